"""A long run survives one bad batch, stops after several, and says when its model collapses."""

import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import commands
from dlpo_nb.checkpoints import heldout_reward, load_last, save_last
from dlpo_nb.collapse import LIMITS, WINDOW, CollapseWatch, collapse_signs
from dlpo_nb.core import RunDir, UserError
from dlpo_nb.launch import train
from dlpo_nb.objectives.base import TextBuffer, advantages
from dlpo_nb.rewards.base import Reward, as_reward
from dlpo_nb.rewards.formula import CombinedReward
from dlpo_nb.rewards.queue import ScoringQueue
from small_policy import TEXTS, TINY, make_model, make_tuner, quiet, spoken


def tuner_of(reward=quiet, **options):
    settings = dict(method="ddpo", rollout_steps=3, train_steps="last:1", fork=0, episodes=9) | options
    return make_tuner(spoken(make_model(config=TINY)), reward, **settings)


def weights(tuner):
    return [p.detach().clone() for p in tuner.parameters]


def unchanged(tuner, before):
    return all(torch.equal(a, b) for a, b in zip(before, tuner.parameters))


class At:
    "The reward `quiet`, but in some calls what `fault` makes of it."

    def __init__(self, fault, *calls):
        self.fault, self.calls, self.count = fault, calls, 0

    def __call__(self, *batch):
        self.count += 1
        return self.fault(quiet(*batch)) if self.count - 1 in self.calls else quiet(*batch)


def raises(scores):
    raise ZeroDivisionError("in the\nplug-in")


def nan(scores):
    return scores * math.nan


def infinite(scores):
    return scores + torch.tensor([math.inf] + [0.0] * (len(scores) - 1))


@pytest.mark.parametrize("fault", [nan, infinite, raises], ids=lambda fault: fault.__name__)
def test_one_bad_batch_is_skipped_and_the_run_goes_on(fault, capsys):
    tuner = tuner_of(At(fault, 1))  # the second of the two micro-batches of the first episode
    before = weights(tuner)
    metrics = tuner.episode()
    assert metrics["skipped"] == 1 and unchanged(tuner, before) and not tuner.optimiser.state
    said = capsys.readouterr().err
    assert "episode 0 brings no update: the reward of '" in said and "Traceback" not in said
    assert "ZeroDivisionError: in the plug-in" in said or fault is not raises
    assert "skipped" not in tuner.episode() and not unchanged(tuner, before) and tuner.skipped == 0


def test_after_a_skipped_episode_the_run_is_as_if_its_update_had_not_been(tmp_path):
    bad, good = tuner_of(At(nan, 0)), tuner_of()
    bad.episode()
    good.next_episode = 1
    bad.episode(), good.episode()
    assert all(torch.equal(a, b) for a, b in zip(bad.parameters, good.parameters))


@pytest.mark.parametrize("most", [1, 3])
def test_too_many_in_a_row_stop_the_run_with_a_good_state(tmp_path, most):
    tuner = tuner_of(At(nan, *range(2, 100)), max_skipped=most)
    tuner.episode()
    save_last(tuner, tmp_path)
    before = weights(tuner)
    for _ in range(most - 1):
        assert tuner.episode()["skipped"]
        save_last(tuner, tmp_path)
    with pytest.raises(UserError, match="--resume") as caught:
        tuner.episode()
    assert any(text in str(caught.value) for text in TEXTS) and f"{most} episode" in str(caught.value)
    again = tuner_of()
    load_last(again, tmp_path)
    assert unchanged(again, before) and "skipped" not in again.episode()


def test_they_are_counted_on_when_the_run_is_resumed(tmp_path):
    tuner, again = tuner_of(At(nan, 0)), tuner_of(At(nan, 0), max_skipped=2)
    tuner.episode()
    save_last(tuner, tmp_path)
    load_last(again, tmp_path)
    with pytest.raises(UserError, match="2 episodes in a row"):
        again.episode()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(monkeypatch, capsys, value):
    tuner = tuner_of(max_skipped=2, inner_epochs=2)
    kind, before = type(tuner.objective), weights(tuner)
    healthy = kind.__call__
    broken = lambda self, replay: healthy(self, replay)._replace(policy=value * replay.log_prob.sum())
    monkeypatch.setattr(kind, "__call__", broken)
    metrics = tuner.episode()
    assert metrics["skipped"] and "kl" in metrics and unchanged(tuner, before)
    assert "loss or gradient is not finite (loss " in capsys.readouterr().err
    with pytest.raises(UserError, match="2 episodes in a row.*--learning-rate"):
        tuner.episode()
    assert unchanged(tuner, before)
    monkeypatch.setattr(kind, "__call__", healthy)
    assert "skipped" not in tuner.episode() and not unchanged(tuner, before)


def test_a_reward_that_never_answers(capsys):
    stuck = threading.Event()
    tuner = tuner_of(At(lambda scores: stuck.wait() and scores, 0), reward_patience=0.5)
    assert tuner.episode()["skipped"] and "did not answer within 0.5 s" in capsys.readouterr().err
    stuck.set()
    assert "skipped" not in tuner.episode()


def test_a_reward_that_never_answers_does_not_keep_the_process():
    code = (
        "import threading, torch\n"
        "from dlpo_nb.rewards.queue import ScoringQueue\n"
        "with ScoringQueue(lambda *batch: threading.Event().wait(), patience=0.1) as queue:\n"
        "    queue.submit(torch.zeros(1, 9), torch.tensor([9]), 9, ['a'])\n"
        "    print(queue.collect())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "nan" in done.stdout, done.stderr


def test_what_is_watched_fails_alone():
    tuner = tuner_of(At(raises, 0))
    assert math.isnan(heldout_reward(tuner, TEXTS)["reward/heldout"])
    assert math.isfinite(heldout_reward(tuner, TEXTS)["reward/heldout"])


@pytest.mark.parametrize("fault, weight", [(raises, 0.0), (nan, 0.0), (raises, 1.0)])
def test_a_judge_that_only_watches_costs_no_update(fault, weight):
    judges = {"pay": as_reward(quiet), "watch": as_reward(At(fault, 0))}
    tuner = tuner_of(CombinedReward({"pay": 1.0, "watch": weight}, judges))
    before, metrics = weights(tuner), tuner.episode()
    assert ("skipped" in metrics) == unchanged(tuner, before) == bool(weight)
    assert weight or math.isfinite(metrics["reward/pay"])
    judges["watch"] = as_reward(At(fault, 0))
    watched = heldout_reward(tuner_of(CombinedReward({"pay": 1.0, "watch": weight}, judges)), TEXTS)
    assert math.isfinite(watched["reward/heldout"]) == (not weight)


class Tag(Reward):
    "First sample of each clip."

    name = "tag"

    def score_clips(self, clips, sample_rate, texts):
        if texts[0] == "bad":
            raise RuntimeError("no")
        return [clip[0].item() for clip in clips]


def test_failures_of_a_sum_touch_no_statistics():
    reward = CombinedReward({"a": 1.0, "b": -1.0}, {"a": Tag(), "b": Tag()}, "z", warmup=8)
    with ScoringQueue(reward, patience=60) as queue:
        for text, value in (("x", 0.1), ("bad", 0.2), ("y", 0.3)):
            queue.submit(torch.full((2, 9000), value), torch.tensor([9000, 9000]), 22050, [text] * 2)
        parts, failed = queue.collect_parts()
    assert parts.shape == failed.shape == (6, 2) and failed[2:4].all() and failed.sum() == 4
    assert [failure.index for failure in queue.last_failures] == [2, 3]
    assert reward.combine(parts, failed)[[0, 1, 4, 5]].isfinite().all()
    assert reward.moments["a"].count == 4 and math.isfinite(reward.moments["a"].mean)


def test_without_patience_a_mistake_is_raised():
    with ScoringQueue(Tag()) as queue:
        queue.submit(torch.ones(1, 9000), torch.tensor([9000]), 22050, ["bad"])
        with pytest.raises(RuntimeError, match="no"):
            queue.collect()


# advantages


@pytest.mark.parametrize("kind", ["group", "batch", "buffer"])
@pytest.mark.parametrize("level", [3.1, -18.0, 1e-3, 0.0])
def test_rounding_is_no_advantage(kind, level):
    rewards = torch.full((8,), level) * (1 + torch.tensor([0.0, 1, -1, 2] * 2) * 2**-23)
    buffer = TextBuffer(16, 4)
    for _ in range(3):
        assert not advantages(rewards, kind, 4, texts=["a"] * 8, buffer=buffer).any()
    if kind == "group":  # other texts have other levels
        apart = rewards + torch.tensor([0.0] * 4 + [1.0] * 4)
        assert not advantages(apart, kind, 4).any()
    real = rewards + torch.linspace(0, 1e-3, 8)
    assert advantages(real, kind, 4, texts=["b"] * 8, buffer=buffer).abs().max() > 0.5


# collapse

HEALTHY = {
    "audio/rms_db": -26.0, "audio/noise_floor_db": -72.0, "audio_seconds": 70.0, "diffusion_loss": 0.25,
    "kl": 0.02,
}  # fmt: skip


def history(count=9, **last):
    rows = [{"episode": e, **HEALTHY} for e in range(count)]
    return [row | (last if e >= count - WINDOW else {}) for e, row in enumerate(rows)]


@pytest.mark.parametrize(
    "name, value, found",
    [
        ("audio/rms_db", -31.9, False), ("audio/rms_db", -32.1, True), ("audio/rms_db", -19.9, True),
        ("audio/noise_floor_db", -67.1, False), ("audio/noise_floor_db", -66.9, True),
        ("audio/noise_floor_db", -90.0, False), ("audio_seconds", 49.0, True), ("audio_seconds", 51.0, False),
        ("audio_seconds", 99.0, True), ("diffusion_loss", 0.34, False), ("diffusion_loss", 0.36, True),
        ("kl", 0.09, False), ("kl", 0.11, True), ("kl", None, False), ("kl", math.nan, False),
    ],
)  # fmt: skip
def test_signs_of_a_collapse(name, value, found):
    assert set(collapse_signs(history(**{name: value}))) == ({name} if found else set())


def test_a_young_run_and_one_that_logs_less_have_no_signs():
    assert not collapse_signs(history(2 * WINDOW - 1, kl=9.0)) and not collapse_signs([])
    assert not collapse_signs([{"episode": e} for e in range(20)])
    assert set(LIMITS) == set(HEALTHY)


def test_a_long_run_is_watched_by_its_first_and_last_episodes():
    watch, rows = CollapseWatch(), history(500)
    for row in rows:
        watch(row | {"audio/rms_db": -26 + row["episode"] / 100})
    assert all(len(kept) == 2 * WINDOW for kept in watch.values.values())
    assert watch.values["audio/rms_db"] == [-26 + e / 100 for e in (0, 1, 2, 497, 498, 499)]


def test_a_sign_is_said_once_and_a_resumed_run_is_silent(capsys):
    watch, rows = CollapseWatch(), history(12, kl=5.0)
    for row in rows:
        watch(row)
    assert capsys.readouterr().err.count("warning: after episode") == 1
    CollapseWatch(rows)(rows[-1])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_a_run_that_collapses(tmp_path, monkeypatch, capsys, on_collapse):
    monkeypatch.setitem(LIMITS, "kl", LIMITS["kl"]._replace(high=-1.0))  # whatever it does
    tuner, run = tuner_of(episodes=7), RunDir(tmp_path)
    settings = dict(on_collapse=on_collapse, watch_every=0, out=str(tmp_path), episodes=7)
    config = SimpleNamespace(method="ddpo", reward="quiet", control="none", seed=0, **settings)
    if on_collapse == "stop":
        with pytest.raises(UserError, match="--on-collapse warn"):
            train(tuner, run, config)
        assert tuner.next_episode == len(run.metrics()) == 2 * WINDOW
        assert load_last(tuner_of(), tmp_path / "checkpoints").name == "state-000006.pt"
    else:
        train(tuner, run, config)
        assert "warning: after episode 5" in capsys.readouterr().err and len(run.metrics()) == 7


def test_the_levels_are_logged():
    metrics = tuner_of().episode()
    assert -120 <= metrics["audio/noise_floor_db"] <= metrics["audio/rms_db"] <= 0


TWO = """
import sys
sys.path.insert(0, "tests")
import torch
from dlpo_nb.distributed import join, leave, rank
from test_safety import At, nan, raises, tuner_of, weights, unchanged

join("cpu")
tuner = tuner_of(At(nan if sys.argv[1] == "nan" else raises, *([0] if rank() == 1 else [])))
before, rows = weights(tuner), []
rows.append(tuner.episode())
assert rows[0]["skipped"] == 1 and unchanged(tuner, before)
assert "skipped" not in tuner.episode() and not unchanged(tuner, before)
said = f"weights {float(sum(p.double().sum() for p in tuner.parameters))}\\n"
print(said, end="", flush=True)  # in one piece: two processes write
leave()
"""


@pytest.mark.parametrize("fault", ["nan", "raises"])
def test_processes_skip_together(tmp_path, fault):
    (tmp_path / "two.py").write_text(TWO)
    done = commands.torchrun(tmp_path / "two.py", fault)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(said) == 2 and len(set(said)) == 1, "one model in both"
    assert done.stderr.count("brings no update") == 1, "said once"
