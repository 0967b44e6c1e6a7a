"""UTMOS: the reference's scores, batches that change nothing, both kinds of weight files,
and files that are something else."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import utmos_weights
from dlpo_nb.audio import resample
from dlpo_nb.core import UserError
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.utmos import UTMOS, WEIGHTS_NAME, equal_lengths, find_utmos_weights, load_utmos, misfit

CASES = {"a_0p5s_16k": ["a"], "b_1p7s_22k": ["b"], "c_3s_16k": ["c"], "d_batch2_1s_22k": ["d0", "d1"]}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# a mean opinion score of 1 to 5 after a hundred layers:
# float32 has 7 digits, and sums are added in any order; bfloat16 has 3
ROUNDING = 1e-4
# right names and shapes, hardly any bytes
SMALL = {name: torch.zeros(1).expand(shape) for name, shape in utmos_weights.shapes().items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like the released one, with numbers by formula, 411 MB; removed at the end."""
    folder = tmp_path_factory.mktemp("utmos")
    torch.save(utmos_weights.weights(), folder / WEIGHTS_NAME)
    yield folder / WEIGHTS_NAME
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def judge(weights):
    return UTMOS(weights, device="cpu")


@pytest.fixture(scope="module")
def reference(data):
    return np.load(data / "utmos_reference.npz")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder and no weights named."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DLPO_UTMOS_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def case(reference, name):
    """Waveforms (B, N) float64 of a case of the reference, and their rate."""
    count, rate = int(reference[f"{name}/n"]), int(reference[f"{name}/sr"])
    return torch.stack([utmos_weights.waveform(wave, count, rate) for wave in CASES[name]]), rate


def score(reward, *clips, rate=16000, padding=0.0, extra=100):
    """Scores of clips given as one padded batch."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.full((len(clips), int(lengths.max()) + extra), padding)
    for row, clip in zip(audio, clips):
        row[: len(clip)] = clip
    return reward(audio, lengths, rate, [""] * len(clips))


def wave(name, count=6400):
    return utmos_weights.waveform(name, count, 16000).float()


# the reference


def test_float64_is_the_reference_in_every_stage(weights, reference):
    network = load_utmos(weights, dtype=torch.float64)
    for name in CASES:
        audio, rate = case(reference, name)
        heard = resample(audio, rate, 16000)
        assert heard.shape[1] == reference[f"{name}/resampled_len"]
        np.testing.assert_allclose(heard[:, ::97], reference[f"{name}/resampled_thin"], atol=1e-7)
        stages = network.stages(heard)
        for stage in ("conv", "proj", "ssl", "blstm"):
            assert stages[stage].shape == tuple(reference[f"{name}/{stage}_shape"])
            np.testing.assert_allclose(
                stages[stage][:, ::7, ::37], reference[f"{name}/{stage}_thin"], atol=1e-6
            )
            np.testing.assert_allclose(stages[stage].sum((1, 2)), reference[f"{name}/{stage}_sum"], atol=1e-7)
        np.testing.assert_allclose(stages["frame"], reference[f"{name}/frame"], atol=1e-9)
        np.testing.assert_allclose(network(heard), reference[f"{name}/score"], atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_the_reference(judge, reference, name):
    audio, rate = case(reference, name)
    np.testing.assert_allclose(
        score(judge, *audio.float(), rate=rate), reference[f"{name}/score"], atol=ROUNDING
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_and_the_convolutions_stay_fine(weights, reference, device):
    coarse = UTMOS(weights, device=device, dtype="bfloat16")
    fine = {name for name, tensor in coarse.network.state_dict().items() if tensor.dtype == torch.float32}
    assert fine == {name for name in coarse.network.state_dict() if "feature_extractor" in name}
    assert coarse.batch_size == (1 if device == "cpu" else 16)
    for name in CASES:
        audio, rate = case(reference, name)
        np.testing.assert_allclose(
            score(coarse, *audio.float(), rate=rate), reference[f"{name}/score"], atol=0.1
        )


def test_safetensors_give_the_same_network(judge, tmp_path):
    save_file(utmos_weights.weights(), tmp_path / "utmos.safetensors")
    again = load_utmos(tmp_path / "utmos.safetensors").state_dict()
    os.remove(tmp_path / "utmos.safetensors")
    ours = judge.network.state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


# batches


def test_neighbours_order_and_padding_change_nothing(judge):
    clips = [wave(str(i), 400 if i == 3 else 4800 + 1600 * (i % 3)) for i in range(7)]
    alone = torch.cat([score(judge, clip) for clip in clips])
    assert alone.isfinite().all() and len(set(alone.tolist())) == 7 and judge.failures == 0
    assert torch.equal(score(judge, *clips, padding=float("nan"), extra=9000), alone)
    assert torch.equal(score(judge, *clips, padding=0.0, extra=16000), alone)
    assert torch.equal(score(judge, *clips[::-1]).flip(0), alone)
    judge.batch_size = 16
    try:
        together, turned = score(judge, *clips), score(judge, *clips[::-1]).flip(0)
    finally:
        judge.batch_size = 1
    np.testing.assert_allclose(together, alone, atol=ROUNDING)
    np.testing.assert_allclose(turned, alone, atol=ROUNDING)


def test_batches_hold_equal_lengths_only():
    lengths = torch.randint(1, 6, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = equal_lengths(lengths, 4)
    assert sorted(sum(batches, [])) == list(range(50))
    assert all(len({lengths[i] for i in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert equal_lengths([], 4) == []


def test_what_cannot_be_scored_is_worst_and_counted(judge):
    before = judge.failures
    scores = score(
        judge, wave("x"), wave("x") * float("nan"), wave("x", 399), wave("x", 0), padding=float("nan")
    )
    assert (
        scores[0] == score(judge, wave("x"))[0]
        and scores[1:].tolist() == [1.0] * 3
        and judge.failures == before + 3
    )
    assert score(judge, torch.zeros(8000)).isfinite().all()


def test_a_formula_takes_its_options(weights):
    reward = get_reward("0.5*utmos + 0*dnsmos", utmos={"weights": str(weights), "device": "cpu"})
    total = score(reward, wave("x"), rate=16000)
    assert torch.equal(total, 0.5 * reward.components["utmos"])


# files


def test_without_weights_it_says_what_to_get_and_fetches_nothing(home, monkeypatch):
    assert find_utmos_weights() is None
    with pytest.raises(
        UserError, match=f"{WEIGHTS_NAME}.*tarepan/SpeechMOS.*v1.0.0.*DLPO_UTMOS_WEIGHTS.*~/.cache/dlpo_nb"
    ):
        get_reward("utmos")
    monkeypatch.setenv("DLPO_UTMOS_WEIGHTS", "nowhere/utmos.pt")
    with pytest.raises(UserError, match="nowhere/utmos.pt"):
        get_reward("utmos")
    assert not list(home.iterdir())


def test_weights_are_found_in_order(home, tmp_path, monkeypatch):
    for folder in (".cache/torch/hub/checkpoints", ".cache/dlpo_nb"):
        (home / folder).mkdir(parents=True)
        (home / folder / WEIGHTS_NAME).write_bytes(b"")
        assert find_utmos_weights() == home / folder / WEIGHTS_NAME
    (tmp_path / "mine.pt").write_bytes(b"")
    monkeypatch.setenv("DLPO_UTMOS_WEIGHTS", str(tmp_path / "mine.pt"))
    assert find_utmos_weights() == tmp_path / "mine.pt"
    with pytest.raises(UserError, match="other.pt"):
        UTMOS(weights=tmp_path / "other.pt")


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        UTMOS(weights=path)
    message = str(caught.value)
    assert path.name in message and WEIGHTS_NAME in message and "SpeechMOS" in message and "\n" not in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html>Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(5000),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    refused(path, "cannot be read")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_half_a_file_is_refused(tmp_path, keep):
    torch.save(SMALL, tmp_path / "whole.pt")
    save_file({"domain_emb": torch.ones(1, 128)}, tmp_path / "whole.safetensors")
    for suffix in (".pt", ".safetensors"):
        whole, part = (tmp_path / f"whole{suffix}").read_bytes(), tmp_path / f"part{suffix}"
        part.write_bytes(whole[: int(keep * len(whole))])
        refused(part, "cannot be read")


@pytest.mark.parametrize(
    "content, match",
    [
        (
            {name: tensor for name, tensor in SMALL.items() if name != "judge_emb"},
            "lacks 1 of 225 tensors, such as judge_emb",
        ),
        ({**SMALL, "extra": torch.zeros(1)}, "has 1 tensor too many, such as 'extra'"),
        (
            {**SMALL, "judge_emb": torch.zeros(3000, 128)},
            r"judge_emb has the shape \(3000, 128\), not \(1, 128\)",
        ),
        ({**SMALL, "step": 3}, "not a plain dict"),
        ([1, 2], "no dictionary of weights"),
        ({}, "225 of 225"),
    ],
)
def test_other_networks_are_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", match)


def test_safetensors_of_another_network_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "225 of 225")


def test_just_the_released_tensors_fit():
    assert misfit(SMALL, utmos_weights.shapes()) is None


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "old.pt"):
        refused(tmp_path / name, "cannot be read")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="float16"),
        dict(dtype=torch.float32),
        dict(batch_size=0),
        dict(batch_size=1.5),
        dict(device="gpu"),
    ],
)
def test_options_that_are_not_there(weights, options):
    with pytest.raises(UserError):
        UTMOS(weights=weights, **options)
    with pytest.raises(UserError, match="options are: weights, device, dtype, batch_size"):
        get_reward("utmos", wieghts=weights)
