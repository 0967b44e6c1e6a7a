"""Rewards: edges of the protocol, the formula parser under random input, DNSMOS against speechmos, NISQA against its published scores."""
import csv
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dlpo_nb.audio import read_audio, resample
from dlpo_nb.core import UserError
from dlpo_nb.rewards import CombinedReward, Reward, get_reward
from dlpo_nb.rewards.base import parse_formula
from dlpo_nb.rewards.dnsmos import DNSMOS, SAMPLE_RATE, mel_filters, windows
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights

RATE = 22050


class Loudest(Reward):
    """Largest sample, -1 for what cannot be scored."""

    worst = -1.0

    def score_clips(self, clips, sample_rate, texts):
        return [clip.abs().max().item() for clip in clips]


def voice(seconds, rate=RATE, seed=0):
    """A buzzing tone with pauses in a little noise (N,), peak below 1."""
    time = torch.arange(round(seconds * rate)) / rate
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    tone = torch.sin(2 * math.pi * (150 + 20 * seed) * time + 3 * torch.sin(2 * math.pi * 75 * time))
    return (0.4 * (torch.sin(2 * math.pi * 2 * time) > 0) * tone + 0.003 * noise).clamp(-1, 1)


def score(reward, *clips, rate=RATE, padding=0.0):
    """Scores of clips given as one padded batch."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.full((len(clips), int(lengths.max()) + 100), padding)
    for row, clip in zip(audio, clips):
        row[: len(clip)] = clip
    return reward(audio, lengths, rate, [""] * len(clips))


# the protocol


def test_an_empty_batch_has_no_scores():
    assert Loudest()(torch.zeros(0, 10), torch.zeros(0, dtype=torch.long), RATE, []).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_and_gradients_are_taken(dtype):
    audio = voice(0.5).to(dtype)[None].requires_grad_()
    scores = Loudest()(audio, torch.tensor([audio.shape[1]]), RATE, [""])
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_a_score_that_is_not_a_number_counts_as_a_failure():
    class Broken(Loudest):
        def score_clips(self, clips, sample_rate, texts):
            return [math.nan, 0.5]

    reward = Broken()
    assert score(reward, voice(0.5), voice(0.5)).tolist() == [-1.0, 0.5] and reward.failures == 1


def test_full_scale_is_clipped_before_and_after_resampling():
    class Narrow(Loudest):
        sample_rate = 16000

    # a square wave overshoots when it is band-limited
    assert score(Narrow(), 3 * torch.sign(voice(0.5))).item() == 1.0


@pytest.mark.parametrize(
    "change",
    [
        dict(audio=[[0.0]]),
        dict(audio=torch.zeros(2, 3, 4)),
        dict(audio=torch.zeros(2, 1000, dtype=torch.int32)),
        dict(lengths=[1000, 900]),
        dict(lengths=torch.tensor([1000])),
        dict(lengths=torch.tensor([1000, -1])),
        dict(sample_rate=22050.0),
        dict(sample_rate=-1),
        dict(sample_rate=True),
        dict(texts="ab"),
        dict(texts=["a"]),
    ],
)
def test_mistakes_of_the_caller_are_user_errors(change):
    call = dict(audio=torch.zeros(2, 1000), lengths=torch.tensor([1000, 900]), sample_rate=RATE, texts=["a", "b"])
    with pytest.raises(UserError):
        Loudest()(**{**call, **change})


# formulas


def test_random_formulas_give_weights_or_a_user_error():
    draw = random.Random(0)
    pieces = ["dnsmos", "wer", "_", "1", "0.5", ".5", "1e3", "1e999", "+", "-", "*", " ", "(", ")", "\n", "é", "nan", "__class__", ".", "e"]
    for _ in range(5000):
        formula = "".join(draw.choices(pieces, k=draw.randrange(8)))
        try:
            weights = parse_formula(formula)
        except UserError:
            continue
        assert weights and all(math.isfinite(weight) for weight in weights.values()), formula


@pytest.mark.parametrize("formula", ["utmos", "wer", "0.8*dnsmos - 0.2*wer", "", " ", None, 3])
def test_what_is_not_there_is_not_pretended(formula):
    with pytest.raises(UserError):
        get_reward(formula)


def test_a_failed_utterance_has_the_bad_end_of_every_part():
    class Rate(Loudest):
        worst = 9.0

    reward = CombinedReward({"a": 1.0, "b": -0.5}, {"a": Loudest(), "b": Rate()})
    good, bad = score(reward, voice(0.5), torch.full((5000,), math.nan)).tolist()
    assert bad == -1.0 - 4.5 < good and reward.failures == 2
    assert reward.components["b"].tolist()[1] == 9.0 and reward.name == "1*a - 0.5*b"


def test_options_reach_their_part():
    assert get_reward("dnsmos", score="bak").score == "bak"
    assert get_reward("2*dnsmos", dnsmos={"score": "sig"}).rewards["dnsmos"].score == "sig"
    for formula, options in [("dnsmos", {"scores": "bak"}), ("2*dnsmos", {"score": "sig"}), ("dnsmos", {"threads": 0})]:
        with pytest.raises(UserError):
            get_reward(formula, **options)


def test_importing_the_rewards_loads_no_scorer():
    code = "import sys, dlpo_nb.rewards; print([m for m in ('librosa', 'onnxruntime', 'torchmetrics', 'speechmos') if m in sys.modules])"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# DNSMOS


def test_mel_filters_are_librosas():
    librosa_filters = pytest.importorskip("librosa.filters")
    np.testing.assert_allclose(mel_filters(), librosa_filters.mel(sr=16000, n_fft=321, n_mels=120), atol=1e-7)


def test_dnsmos_is_speechmos_on_the_tile_and_on_long_clips():
    from speechmos import dnsmos

    clips = [voice(0.7, SAMPLE_RATE, 1), voice(3.3, SAMPLE_RATE, 2), torch.zeros(9000), voice(11.2, SAMPLE_RATE, 3)]
    theirs = [dnsmos.run((windows(c)[0] if len(c) < 144160 else c).numpy(), SAMPLE_RATE) for c in clips]
    for name in ("p808", "ovrl", "sig", "bak"):
        ours = score(DNSMOS(name), *clips, rate=SAMPLE_RATE, padding=math.nan)
        np.testing.assert_allclose(ours, [scores[f"{name}_mos"] for scores in theirs], atol=1e-4, err_msg=name)


def test_windows_are_those_the_reference_scores():
    for seconds, count in [(9.02, 1), (10.99, 1), (11.0, 2), (16.0, 7), (20.0, 7), (40.0, 14)]:
        clip = torch.arange(round(seconds * SAMPLE_RATE), dtype=torch.float32)
        starts = windows(clip)[:, 0] / SAMPLE_RATE
        assert len(starts) == count and starts.tolist() == [i for i in range(31) if not 7 <= i <= 23][:count]


def test_dnsmos_hears_22_khz_as_resampled_and_not_its_neighbours():
    clips, reward = [voice(0.6), voice(1.1, seed=4)], DNSMOS()
    together = score(reward, *clips, padding=math.nan)
    assert torch.equal(together, torch.cat([score(reward, clip) for clip in clips]))
    low = [resample(clip, RATE, SAMPLE_RATE).clamp(-1, 1) for clip in clips]
    assert torch.equal(together, score(reward, *low, rate=SAMPLE_RATE))


def test_dnsmos_goes_to_another_process():
    assert pickle.loads(pickle.dumps(DNSMOS("bak", threads=2))).score == "bak"


# NISQA

OPTIONS = dict(
    ms_fmax=20000, ms_n_fft=4096, ms_hop_length=0.01, ms_win_length=0.02, ms_n_mels=48, ms_seg_length=15, ms_seg_hop_length=4,
    ms_max_segments=1300, cnn_c_out_1=16, cnn_c_out_2=32, cnn_c_out_3=64, cnn_kernel_size=(3, 3), cnn_dropout=0.2, cnn_pool_1=[24, 7],
    cnn_pool_2=[12, 5], cnn_pool_3=[6, 3], td_sa_d_model=64, td_sa_nhead=1, td_sa_num_layers=2, td_sa_h=64, td_sa_dropout=0.1,
    pool_att_h=128, pool_att_dropout=0,
)  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder and no weights named."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DLPO_NISQA_WEIGHTS", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def random_weights(tmp_path):
    """A file like nisqa.tar, with the network at random."""
    from dlpo_nb.audio import import_torchaudio

    import_torchaudio()
    from torchmetrics.functional.audio.nisqa import _NISQADIM

    torch.manual_seed(0)
    torch.save({"args": OPTIONS, "model_state_dict": _NISQADIM(OPTIONS).state_dict()}, tmp_path / "random.tar")
    return tmp_path / "random.tar"


def test_nisqa_without_weights_says_what_to_get_and_fetches_nothing(home):
    assert find_nisqa_weights() is None
    with pytest.raises(UserError, match="nisqa.tar.*DLPO_NISQA_WEIGHTS"):
        get_reward("nisqa")
    assert not list(home.iterdir())


def test_nisqa_weights_are_found_in_order(home, random_weights, monkeypatch):
    usual = home / ".torchmetrics" / "NISQA" / "nisqa.tar"
    usual.parent.mkdir(parents=True)
    usual.write_bytes(b"")
    assert find_nisqa_weights() == usual
    monkeypatch.setenv("DLPO_NISQA_WEIGHTS", str(random_weights))
    assert find_nisqa_weights() == random_weights
    with pytest.raises(UserError, match="elsewhere.tar"):
        NISQA(weights=home / "elsewhere.tar")


def test_nisqa_with_random_weights_keeps_the_promises(home, random_weights):
    reward = NISQA(weights=random_weights)
    clips = [voice(0.6), voice(0.2, seed=1), voice(0.1), voice(0.4) * math.nan]
    scores = score(reward, *clips, padding=math.nan)
    assert scores[:2].isfinite().all() and scores[2:].tolist() == [reward.worst] * 2 and reward.failures == 2
    assert torch.equal(scores[:1], score(reward, clips[0]))
    with pytest.raises(UserError, match="52 s"):
        score(reward, voice(53))
    assert not list(home.iterdir())


def test_nisqa_level_normalised_does_not_hear_gain(home, random_weights):
    loud, soft = voice(0.6), 0.1 * voice(0.6)
    raw, normalised = NISQA(random_weights), NISQA(random_weights, level_normalise=True)
    assert abs(float(score(raw, loud) - score(raw, soft))) > 1e-4
    np.testing.assert_allclose(score(normalised, loud), score(normalised, soft), atol=1e-4)
    assert score(normalised, torch.zeros(9000)).isfinite().all()


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"args": Evil(), "model_state_dict": {}}, tmp_path / "evil.tar")
    with pytest.raises(UserError, match="evil.tar"):
        NISQA(weights=tmp_path / "evil.tar")
    assert not (tmp_path / "evil").exists()


def test_nisqa_gives_the_published_scores(shared, home):
    reward = NISQA(weights=shared / "data/nisqa/nisqa.tar")
    with open(shared / "data/ljspeech/scores_32.csv", newline="") as file:
        rows = list(csv.DictReader(file))[1:5]
    clips = [read_audio(shared / "data/ljspeech/wavs" / f"{row['utt']}.flac") for row in rows]
    np.testing.assert_allclose(score(reward, *clips), [float(row["nisqa_mos"]) for row in rows], atol=1e-3)
    assert not list(home.iterdir())


def test_the_single_headed_nisqa_is_refused(shared):
    with pytest.raises(UserError, match="nisqa_tts.tar"):
        NISQA(weights=shared / "data/nisqa/nisqa_tts.tar")
