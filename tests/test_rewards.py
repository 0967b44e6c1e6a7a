"""Rewards: edges of the protocol, the formula parser under random input, DNSMOS against speechmos, NISQA
against its published scores."""

import csv
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dlpo_nb.audio import read_audio, resample
from dlpo_nb.core import UserError
from dlpo_nb.rewards import CombinedReward, Reward, get_reward
from dlpo_nb.rewards.base import as_reward, check_gradient, with_slope
from dlpo_nb.rewards.formula import Moments, check_as_reward, parse_formula
from dlpo_nb.rewards.queue import ScoringQueue
from dlpo_nb.rewards.dnsmos import DNSMOS, SAMPLE_RATE, mel_filters, windows
from dlpo_nb.rewards.nisqa import NISQA, OPTIONS, find_nisqa_weights

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
        dict(audio=torch.zeros(2, 2, 1000)),
        dict(audio=torch.zeros(2, 1000, dtype=torch.int32)),
        dict(lengths=[1000, 900]),
        dict(lengths=torch.tensor([1000])),
        dict(lengths=torch.tensor([1000, -1])),
        dict(sample_rate=22050.0),
        dict(sample_rate=-1),
        dict(sample_rate=True),
        dict(texts="ab"),
        dict(texts=["a"]),
        dict(texts=["a", None]),
    ],
)
def test_mistakes_of_the_caller_are_user_errors(change):
    call = dict(
        audio=torch.zeros(2, 1000), lengths=torch.tensor([1000, 900]), sample_rate=RATE, texts=["a", "b"]
    )
    with pytest.raises(UserError):
        Loudest()(**{**call, **change})


def test_stereo_is_told_what_to_do():
    with pytest.raises(UserError, match=r"\(2, 2, 1000\).*audio.mean\(1\)"):
        Loudest()(torch.zeros(2, 2, 1000), torch.tensor([1000, 900]), RATE, ["a", "b"])


def test_failures_are_listed_with_their_reasons_and_the_others_are_scored():
    class Picky(Loudest):
        name, max_seconds = "picky", 1.0

        def score_clips(self, clips, sample_rate, texts):
            return [
                math.nan if text == "odd" else clip.abs().max().item() for clip, text in zip(clips, texts)
            ]

    clips = [
        voice(0.5),
        voice(0.5) * math.nan,
        torch.zeros(0),
        voice(40),
        voice(0.4),
        voice(0.01),
        voice(0.3),
    ]
    lengths = torch.tensor([len(clip) for clip in clips])
    texts = ["fine", "nan", "empty", "long", "odd", "short", "fine too"]
    reward = Picky()
    scores = reward(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths, RATE, texts)
    assert [(f.index, f.text) for f in reward.last_failures] == [(i, texts[i]) for i in (1, 2, 3, 4, 5)]
    for failure, reason in zip(
        reward.last_failures,
        [
            "not finite",
            "shorter than the 0.02 s",
            "40 s is longer than the 1 s that picky takes",
            "its score",
            "0.00998 s is shorter",
        ],
    ):
        assert reason in failure.reason
    assert scores[[0, 6]].tolist() == [clips[0].abs().max().item(), clips[6].abs().max().item()] and set(
        scores[1:6].tolist()
    ) == {-1.0}
    score(reward, voice(0.5))
    assert reward.failures == 5 and len(reward.last_failures) == 0


def test_a_reward_with_one_score_has_that_in_its_details_and_no_parts_or_state():
    reward = Loudest()
    audio, lengths = voice(0.5)[None], torch.tensor([round(0.5 * RATE)])
    assert reward.details(audio, lengths, RATE, [""]) == {"reward": reward(audio, lengths, RATE, [""])}
    reward.load_state_dict(reward.state_dict())
    assert reward.pop_components() == {} and reward.state_dict() == {}


def check_invariance(reward, clips):
    """No score moves by more than 1e-4 when silence is put behind an utterance, neighbours change places, or
    come and go."""
    scores = score(reward, *clips)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))
    longer = [torch.cat([clips[0], torch.zeros(20000)]), *clips[1:]]
    others = {
        "one by one": torch.cat([score(reward, clip) for clip in clips]),
        "permuted": score(reward, *(clips[i] for i in order))[order.argsort()],
        "padded": score(reward, *clips, torch.zeros(len(clips[0]) + 30000))[:-1],
    }
    for name, found in others.items():
        np.testing.assert_allclose(found, scores, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        score(reward, *longer)[1:], scores[1:], atol=1e-4, err_msg="a neighbour with silence appended"
    )
    assert scores.std() > 0 and reward.failures == 0


# formulas


def test_random_formulas_give_weights_or_a_user_error():
    draw = random.Random(0)
    pieces = [
        "dnsmos",
        "wer",
        "_",
        "1",
        "0.5",
        ".5",
        "1e3",
        "1e999",
        "+",
        "-",
        "*",
        " ",
        "(",
        ")",
        "\n",
        "é",
        "nan",
        "__class__",
        ".",
        "e",
    ]
    for _ in range(5000):
        formula = "".join(draw.choices(pieces, k=draw.randrange(8)))
        try:
            weights = parse_formula(formula)
        except UserError:
            continue
        assert weights and all(math.isfinite(weight) for weight in weights.values()), formula


@pytest.mark.parametrize("formula", ["mosnet", "clarity", "0.8*dnsmos - 0.2*clarity", "", " ", None, 3])
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


class Length(Loudest):
    """Seconds; more is worse."""

    name, worst = "length", 20.0

    def score_clips(self, clips, sample_rate, texts):
        return [len(clip) / sample_rate for clip in clips]


def two_parts(**options):
    return CombinedReward({"a": 0.8, "b": -2.0}, {"a": Loudest(), "b": Length()}, **options)


def clips_of(count, seed=0):
    """Clips of random length and level."""
    draw = random.Random(seed)
    return [draw.random() * voice(0.1 + 0.4 * draw.random(), seed=i % 3) for i in range(count)]


def test_moments_are_those_of_all_numbers_at_once():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = Moments()
    for few in values.split([1, 2, 97, 400]):
        moments.update(few)
    np.testing.assert_allclose(
        moments.z(values), (values - values.mean()) / values.std(correction=0), atol=1e-8
    )  # numbers near 1e6 are 1e-10 apart
    assert Moments().z(torch.tensor([3.0])).tolist() == [3.0]  # nothing is known yet
    one = Moments()
    one.update(torch.tensor([0.25, 0.25]))
    assert one.z(torch.tensor([0.25, 0.5])).tolist() == [0.0, 0.25]  # what never varied is shifted only


def test_z_is_taken_from_the_first_utterances_and_then_stays():
    reward, clips = two_parts(normalise="z", warmup=24), clips_of(40)
    first = [score(reward, *clips[i : i + 8]) for i in (0, 8, 16)][-1]
    state = reward.state_dict()
    later = score(reward, *clips[24:])
    assert reward.state_dict() == state and state["a"]["count"] == 24
    raw = two_parts()
    score(raw, *clips[:24])
    means = {name: (x.mean(), x.std(correction=0)) for name, x in raw.components.items()}
    for chunk, found in ((clips[16:24], first), (clips[24:], later)):
        score(raw, *chunk)
        expected = sum(
            w * (raw.components[name] - means[name][0]) / means[name][1] for name, w in raw.weights.items()
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert reward.name == "0.8*z(a) - 2*z(b)"


def test_failed_utterances_stay_out_of_the_statistics_and_get_the_bad_end():
    reward = two_parts(normalise="z")
    clips = [*clips_of(8), torch.full((5000,), math.nan)]
    scores = score(reward, *clips)
    assert reward.state_dict()["a"]["count"] == 8 and scores.argmin() == 8 and scores.isfinite().all()
    assert [(f.index, f.reason) for f in reward.last_failures] == [
        (8, "a: the audio is not finite"),
        (8, "b: the audio is not finite"),
    ]
    score(reward, torch.full((5000,), math.nan))  # nothing that could enter


def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole, halves, clips = (
        two_parts(normalise="z", warmup=20),
        two_parts(normalise="z", warmup=20),
        clips_of(32),
    )
    expected = [score(whole, *clips[i : i + 4]) for i in range(0, 32, 4)]
    for i in (0, 4, 8):
        score(halves, *clips[i : i + 4])
    torch.save(halves.state_dict(), tmp_path / "state.pt")
    resumed = two_parts(normalise="z", warmup=20)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(score(resumed, *clips[i : i + 4]), expected[i // 4]) for i in range(12, 32, 4))
    with pytest.raises(UserError, match="resume with the same reward"):
        resumed.load_state_dict({"a": {}})
    with pytest.raises(UserError, match="resume with the same reward"):
        two_parts().load_state_dict(halves.state_dict())


def test_components_are_means_over_all_calls_since_they_were_asked_for():
    reward, clips = two_parts(normalise="z"), clips_of(7)
    parts = [
        (score(reward, *few), reward.components["a"], reward.components["b"])[1:]
        for few in (clips[:2], clips[2:])
    ]
    found = reward.pop_components()
    assert list(found) == ["reward/a", "reward/b"]
    for mean, scores in zip(found.values(), zip(*parts)):
        assert mean == pytest.approx(torch.cat(scores).mean().item(), abs=1e-6)
    assert reward.pop_components() == {}


def test_a_run_is_not_paid_for_errors():
    class Errors(Loudest):
        name, lower_is_better = "errors", True

    both = lambda weight: CombinedReward({"a": 1.0, "errors": weight}, {"a": Loudest(), "errors": Errors()})
    for fine in (Loudest(), both(-0.5), both(0.0), CombinedReward({"errors": -1.0}, {"errors": Errors()})):
        check_as_reward(fine)
        assert not fine.lower_is_better
    for wrong in (Errors(), both(0.5), CombinedReward({"errors": 2.0}, {"errors": Errors()}, "z")):
        with pytest.raises(
            UserError, match="pay for more errors.*--reward=-errors or --reward 'dnsmos - 0.5[*]errors'"
        ):
            check_as_reward(wrong)
    assert get_reward("-wer", wer={"recogniser": "pocketsphinx"}).weights == {"wer": -1.0}
    with pytest.raises(UserError, match="more wer"):
        check_as_reward(get_reward("wer", recogniser="pocketsphinx"))


def test_what_lasts_longer_than_a_minute_is_no_utterance():
    reward, book = DNSMOS(), torch.zeros(40 * 60 * 8000)
    clip = voice(0.5, 8000)
    assert torch.equal(
        score(reward, clip, book, rate=8000), torch.tensor([score(DNSMOS(), clip, rate=8000).item(), 1.0])
    )
    assert [(f.index, f.reason) for f in reward.last_failures] == [
        (1, "2400 s is longer than the 60 s that dnsmos takes")
    ]


def test_normalise_is_known_to_get_reward():
    assert get_reward("dnsmos", normalise="z").name == "1*z(dnsmos)"
    assert get_reward("2*dnsmos", normalise="z", dnsmos={"score": "bak"}).moments
    for formula in ("dnsmos", "2*dnsmos"):
        with pytest.raises(UserError, match="'max'"):
            get_reward(formula, normalise="max")


# scoring in the background


class Slow(Reward):
    """First sample of the clip, the utterance's tag, after as many milliseconds as its text says."""

    def score_clips(self, clips, sample_rate, texts):
        time.sleep(float(texts[0]) / 1000)
        finished.append(clips[0][0].item())
        return [clip[0].item() for clip in clips]


finished = []


@pytest.mark.parametrize("workers", [1, 4])
def test_reward_worker_order_does_not_change_rewards_to_sample_pairing(workers):
    draw, tags, sizes = random.Random(workers), torch.arange(60.0) / 100, [1, 5, 3, 7, 2, 8, 4, 6, 9, 15]
    finished.clear()
    with ScoringQueue(Slow(), workers=workers) as queue:
        for i, batch in enumerate(tags.split(sizes)):
            audio, lengths = batch[:, None].repeat(1, 1000), torch.full((len(batch),), 1000)
            queue.submit(audio, lengths, RATE, [str(draw.choice([0, 5, 40]) if i else 300)] * len(batch))
            audio.zero_(), lengths.zero_()  # the sampler may write over its buffers
        assert torch.equal(queue.collect(), tags)
        assert queue.collect().tolist() == []
    starts = [batch[0].item() for batch in tags.split(sizes)]
    assert sorted(finished) == pytest.approx(starts) and (finished == starts) == (workers == 1)


def test_a_thread_is_used_again_unless_it_hangs():
    """Of queues one after the other; what cuDNN remembers is a thread's own."""
    threads = []

    class Where(Loudest):
        def score_clips(self, clips, sample_rate, texts):
            threads.append(threading.get_ident())
            if texts[0] == "never":
                threading.Event().wait()
            return super().score_clips(clips, sample_rate, texts)

    for text in ("well", "well", "never", "well", "well"):
        with ScoringQueue(Where(), patience=60 if text == "well" else 0.1) as queue:
            queue.submit(voice(0.5)[None], torch.tensor([round(0.5 * RATE)]), RATE, [text])
            assert queue.collect().isfinite().all() == (text == "well")
    assert threads[0] == threads[1] == threads[2] != threads[3] == threads[4]


def test_submitting_does_not_wait():
    with ScoringQueue(Slow()) as queue:
        start = time.perf_counter()
        queue.submit(torch.zeros(1, 1000), torch.tensor([1000]), RATE, ["1000"])
        assert time.perf_counter() - start < 0.9
        queue.collect()
        assert time.perf_counter() - start >= 1


def test_a_mistake_in_the_background_is_raised_as_it_is_and_the_queue_goes_on():
    class Choosy(Loudest):
        def score_clips(self, clips, sample_rate, texts):
            if texts[0] == "bad":
                raise OSError("the disk is full")
            return super().score_clips(clips, sample_rate, texts)

    audio, lengths = voice(0.5)[None], torch.tensor([round(0.5 * RATE)])
    with ScoringQueue(Choosy()) as queue:
        for text in ("good", "bad", "good"):
            queue.submit(audio, lengths, RATE, [text])
        with pytest.raises(OSError, match="the disk is full"):
            queue.collect()
        queue.submit(audio[None], lengths, RATE, ["stereo"])
        with pytest.raises(UserError, match="average its channels"):
            queue.collect()
        queue.submit(audio, lengths, RATE, ["good"])
        assert torch.equal(queue.collect(), score(Loudest(), audio[0]))


def test_failures_in_the_background_are_listed_by_place_in_the_answer():
    reward = two_parts(normalise="z")
    broken = torch.stack([voice(0.5), voice(0.5) * math.nan])
    with ScoringQueue(reward) as queue:
        for batch in (broken, broken.flip(0)):
            queue.submit(batch, torch.full((2,), batch.shape[1]), RATE, ["first", "second"])
        scores = queue.collect()
        assert [(f.index, f.text) for f in queue.last_failures] == [
            (1, "second"),
            (1, "second"),
            (2, "first"),
            (2, "first"),
        ]
    assert scores.argmin().item() in (1, 2) and len(reward.pop_components()) == 2


class Order(Loudest):
    """Says when it has scored what, and raises where it is told to."""

    def __init__(self, name, seen, wrong=None):
        self.name, self.seen, self.wrong = name, seen, wrong

    def score_clips(self, clips, sample_rate, texts):
        self.seen.append((self.name, texts[0]))
        if texts[0] == self.wrong:
            raise OSError("the disk is full")
        return super().score_clips(clips, sample_rate, texts)


def watched(seen, wrong=None):
    rewards = {"watch": Order("watch", seen, wrong), "pay": Order("pay", seen)}
    return CombinedReward({"watch": 0.0, "pay": 2.0}, rewards)


@pytest.mark.parametrize("wrong", [None, "b"])
def test_a_judge_that_pays_nothing_is_heard_last_and_spoils_nothing(wrong):
    """Rewards come when those are in that pay; the log is that of all."""
    seen = []
    reward = watched(seen, wrong)
    audio, lengths = voice(0.5)[None], torch.tensor([round(0.5 * RATE)])
    with ScoringQueue(reward, patience=60, watch_late=True) as queue:
        for text in "abc":
            queue.submit(audio, lengths, RATE, [text])
        scores = queue.collect()
        assert torch.allclose(scores, 2 * score(Loudest(), audio[0]).expand(3)) and not queue.last_failures
        queue.combine(*queue.collect_late(), late=True)
        assert seen == [(name, text) for name in ("pay", "watch") for text in "abc"]
        assert [f.index for f in queue.last_failures] == ([1] if wrong else [])
    means = reward.pop_components()
    assert means["reward/pay"] == pytest.approx(float(scores[0]) / 2)
    assert math.isnan(means["reward/watch"]) == bool(wrong) and not reward.pop_components()


def test_all_is_one_sum_where_nobody_asks_for_the_late_ones():
    seen = []
    audio, lengths = voice(0.5)[None], torch.tensor([round(0.5 * RATE)])
    with ScoringQueue(watched(seen)) as queue:
        queue.submit(audio, lengths, RATE, ["a"])
        assert torch.allclose(queue.collect(), 2 * score(Loudest(), audio[0])) and len(seen) == 2
    nothing = CombinedReward(
        {"a": 0.0}, {"a": Order("a", seen)}
    )  # pays nothing at all: not a judge beside one
    with ScoringQueue(nothing, watch_late=True) as queue:
        queue.submit(audio, lengths, RATE, ["a"])
        assert queue.collect().tolist() == [0.0] and not queue.watches


def test_options_reach_their_part():
    assert get_reward("dnsmos", score="bak").score == "bak"
    assert get_reward("2*dnsmos", dnsmos={"score": "sig"}).rewards["dnsmos"].score == "sig"
    for formula, options in [
        ("dnsmos", {"scores": "bak"}),
        ("2*dnsmos", {"score": "sig"}),
        ("dnsmos", {"threads": 0}),
    ]:
        with pytest.raises(UserError):
            get_reward(formula, **options)


def test_importing_the_rewards_loads_no_scorer():
    late = ("librosa", "onnxruntime", "torchmetrics", "speechmos", "transformers")
    code = f"import sys, dlpo_nb.rewards; print([m for m in {late} if m in sys.modules])"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_sum_of_slopes_is_the_slope_of_the_sum():
    """Of parts that count, with the statistics they have by now; one utterance at a time, or both."""
    loud = as_reward(lambda audio, lengths, *rest: audio.square().mean(1))
    edge = as_reward(lambda audio, lengths, *rest: audio.diff(dim=1).abs().mean(1))
    parts = {"loud": loud, "edge": edge, "deaf": Loudest()}
    reward = CombinedReward({"loud": 2.0, "edge": -0.5, "deaf": 0.0}, parts, "z")
    audio = torch.stack([voice(0.2, seed=1), voice(0.2, seed=2)])
    lengths = torch.tensor([audio.shape[1]] * 2)
    scores = reward(audio, lengths, RATE, ["", ""])
    variable = audio.clone().requires_grad_()
    found = with_slope(reward, variable, lengths, RATE, ["", ""])
    torch.testing.assert_close(found.detach(), scores, atol=1e-4, rtol=0)
    stds = [(m.squares / m.count) ** 0.5 for m in (reward.moments["loud"], reward.moments["edge"])]
    plain = 2 * loud(variable, lengths) / stds[0] - 0.5 * edge(variable, lengths) / stds[1]
    for one, other in zip(*(torch.autograd.grad(x.sum(), variable) for x in (found, plain))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    check_gradient(reward)
    with pytest.raises(UserError, match="without a gradient"):
        check_gradient(CombinedReward({"loud": 1.0, "deaf": 1e-3}, parts))


# DNSMOS


def test_p808_in_torch_is_the_onnx_network():
    """In 1e-4 on the features, and for clips of one and of several windows at any rate."""
    clips = [voice(0.7, seed=1), voice(3.3, seed=2), voice(11.2, seed=3)]
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.5).requires_grad_()
    found = DNSMOS().with_gradient(audio, lengths, RATE, [""] * 3)
    torch.testing.assert_close(found.detach(), DNSMOS()(audio, lengths, RATE, [""] * 3), atol=1e-4, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), audio)
    assert slope.isfinite().all() and slope[0].any() and not slope[0, lengths[0] :].any()
    assert DNSMOS().differentiable and not DNSMOS("ovrl").differentiable


def test_mel_filters_are_librosas():
    librosa_filters = pytest.importorskip("librosa.filters")
    np.testing.assert_allclose(mel_filters(), librosa_filters.mel(sr=16000, n_fft=321, n_mels=120), atol=1e-7)


def test_dnsmos_is_speechmos_on_the_tile_and_on_long_clips():
    from speechmos import dnsmos

    clips = [
        voice(0.7, SAMPLE_RATE, 1),
        voice(3.3, SAMPLE_RATE, 2),
        torch.zeros(9000),
        voice(11.2, SAMPLE_RATE, 3),
    ]
    theirs = [dnsmos.run((windows(c)[0] if len(c) < 144160 else c).numpy(), SAMPLE_RATE) for c in clips]
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=math.nan)
    for name, ours in (
        DNSMOS().details(audio, lengths, SAMPLE_RATE, [""] * len(clips)).items()
    ):  # the next test asks for each by its name
        np.testing.assert_allclose(
            ours, [scores[f"{name}_mos"] for scores in theirs], atol=1e-4, err_msg=name
        )


def test_details_are_the_four_scores_and_names_reach_them():
    clips = [voice(0.7, seed=1), voice(9.6, seed=2)]
    lengths, audio = (
        torch.tensor([len(clip) for clip in clips]),
        torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
    )
    found = DNSMOS(threads=2).details(audio, lengths, RATE, ["", ""])
    assert list(found) == ["p808", "sig", "bak", "ovrl"]
    for name, scores in found.items():
        reward = get_reward("dnsmos" if name == "p808" else f"dnsmos_{name}")
        assert reward.score == name and torch.equal(reward(audio, lengths, RATE, ["", ""]), scores)
        assert reward.name == ("dnsmos" if name == "p808" else f"dnsmos_{name}")
    broken = DNSMOS().details(audio * math.nan, lengths, RATE, ["", ""])
    assert all(scores.tolist() == [1.0, 1.0] for scores in broken.values())


@pytest.mark.parametrize("threads", [1, 3])
def test_dnsmos_does_not_hear_neighbours_padding_or_order(threads):
    check_invariance(
        DNSMOS(threads=threads), [voice(0.3 + 0.17 * i, seed=i) for i in range(15)] + [voice(11.3)]
    )


def test_dnsmos_takes_any_rate_and_length():
    reward = DNSMOS()
    assert 1 < score(reward, voice(1, 8000), rate=8000).item() < 5
    long = voice(600, 8000)
    assert 1 < score(reward, long[: 8000 * 33], rate=8000).item() < 5
    views = windows(long)  # 300 s at 16 kHz, without a copy for each window
    assert len(views) == 270 and all(
        view.untyped_storage().data_ptr() == long.untyped_storage().data_ptr() for view in views
    )


def test_windows_are_those_the_reference_scores():
    for seconds, count in [(9.02, 1), (10.99, 1), (11.0, 2), (16.0, 7), (20.0, 7), (40.0, 14)]:
        clip = torch.arange(round(seconds * SAMPLE_RATE), dtype=torch.float32)
        starts = torch.stack(windows(clip))[:, 0] / SAMPLE_RATE
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
    torch.save(
        {"args": OPTIONS, "model_state_dict": _NISQADIM(OPTIONS).state_dict()}, tmp_path / "random.tar"
    )
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
    assert not (home / ".torchmetrics").exists()


def test_nisqa_leaves_out_what_is_too_long_for_it_and_scores_the_others(home, random_weights):
    reward, clip = NISQA(weights=random_weights), voice(0.6)
    scores = score(reward, clip, torch.zeros(60 * RATE), clip)
    assert (
        scores[[0, 2]].tolist() == score(NISQA(weights=random_weights), clip).tolist() * 2
        and scores[1] == reward.worst
    )
    assert [(f.index, f.reason) for f in reward.last_failures] == [
        (1, "60 s is longer than the 52 s that nisqa takes")
    ]
    assert score(reward, torch.zeros(52 * RATE)).item() != reward.worst


def test_nisqa_details_are_five_and_the_first_is_the_score(home, random_weights):
    reward, clips = NISQA(weights=random_weights), [voice(0.6), voice(0.4, seed=1)]
    audio, lengths = (
        torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
        torch.tensor([len(clip) for clip in clips]),
    )
    for i, head in enumerate(reward.network.pool_layers):  # they begin as copies of one
        head.model.linear3.bias += i
    found = reward.details(audio, lengths, RATE, ["", ""])
    assert list(found) == ["mos", "noisiness", "discontinuity", "coloration", "loudness"]
    assert torch.equal(found["mos"], score(reward, *clips)) and found["loudness"].tolist() == pytest.approx(
        [4 + x for x in found["mos"].tolist()]
    )


def test_nisqa_does_not_hear_neighbours_padding_or_order(home, random_weights):
    check_invariance(NISQA(weights=random_weights), [voice(0.2 + 0.05 * i, seed=i) for i in range(16)])


def test_nisqa_is_as_exact_where_the_caller_is_under_autocast(home, random_weights):
    reward, clip = NISQA(weights=random_weights), voice(0.6, 16000)
    scores = score(reward, clip, rate=16000)
    with torch.autocast("cpu", torch.bfloat16):  # which reaches the resampling, too
        assert torch.equal(score(reward, clip, rate=16000), scores)


def test_nisqa_raw_and_normalised_stand_side_by_side(home, random_weights):
    options = {"weights": random_weights}
    both = get_reward("nisqa + 0*nisqa_normalised", nisqa=options, nisqa_normalised=options)
    score(both, 0.1 * voice(0.6))
    assert both.components["nisqa"] != both.components["nisqa_normalised"]
    assert torch.equal(
        both.components["nisqa_normalised"],
        score(NISQA(random_weights, level_normalise=True), 0.1 * voice(0.6)),
    )
    assert both.rewards["nisqa_normalised"].name == "nisqa_normalised"


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


NISQA_COLUMNS = dict(
    mos="nisqa_mos",
    noisiness="nisqa_noi",
    discontinuity="nisqa_dis",
    coloration="nisqa_col",
    loudness="nisqa_loud",
)


@pytest.mark.parametrize(
    "table, folder, count",
    [("dlpo_demo/scores.csv", "dlpo_demo", 42), ("ljspeech/scores_32.csv", "ljspeech/wavs", 32)],
)
def test_nisqa_gives_the_published_scores(shared, home, table, folder, count):
    weights = shared / "data/nisqa/nisqa.tar"
    if not weights.is_file() or not (shared / "data" / table).is_file():
        pytest.skip(f"NISQA's weights or {table} are not in the shared folder")
    with open(shared / "data" / table, newline="") as file:
        rows = [
            (row, shared / "data" / folder / f"{Path(row['file']).stem}.flac") for row in csv.DictReader(file)
        ]
    rows = [(row, path) for row, path in rows if path.is_file()]
    clips = [read_audio(path) for _, path in rows]
    lengths, audio = (
        torch.tensor([len(clip) for clip in clips]),
        torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
    )
    found = NISQA(weights=weights).details(audio, lengths, RATE, [""] * len(clips))
    assert len(rows) == count and rows[0][0]["sample_rate"] == str(RATE)
    for name, column in NISQA_COLUMNS.items():
        np.testing.assert_allclose(
            found[name], [float(row[column]) for row, _ in rows], atol=1e-3, err_msg=name
        )
    assert not (home / ".torchmetrics").exists()


def test_the_single_headed_nisqa_is_refused(shared):
    with pytest.raises(UserError, match="nisqa_tts.tar"):
        NISQA(weights=shared / "data/nisqa/nisqa_tts.tar")


@pytest.mark.parametrize("scale", [100, 32768])
def test_integers_kept_as_floats_are_not_scored(scale):
    reward = Loudest()
    assert score(reward, voice(0.5), scale * voice(0.5)).tolist()[1] == reward.worst
    assert [(f.index, "its samples reach" in f.reason) for f in reward.last_failures] == [(1, True)]


def test_odd_sound_is_scored_put_down_and_said_once_of_each_kind():
    reward, silence = Loudest(), torch.zeros(9000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score(reward, voice(0.5), silence, voice(0.5) + 0.2, silence)
        assert [(f.index, f.reason.split(" of ")[0]) for f in reward.last_faults] == [
            (1, "it is digital silence"),
            (2, "it has a DC offset"),
            (3, "it is digital silence"),
        ]
        score(reward, silence)
        assert len(reward.last_faults) == 1
        score(reward, voice(0.5))
    assert not reward.last_faults and [
        "silence" in str(w.message) or "DC offset of 0.2" in str(w.message) for w in caught
    ] == [True, True]
