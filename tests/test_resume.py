"""Killed at any moment and resumed, a run ends as if nothing had happened:
the same bits in every file, and each episode once in the log."""

import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from left_behind import left_behind, read
from shared_work import MORE, reward
from small_policy import TINY, make_model, spoken
from torch.utils._pytree import tree_leaves

from dlpo_nb.checkpoints import BackgroundSaving, heldout_reward, keep_best, load_last, read_ranking
from dlpo_nb.checkpoints import save_last, states
from dlpo_nb.core import RunDir, UserError, read_jsonl, save_tensors
from dlpo_nb.locks import unlock_folders
from dlpo_nb.finetune import Finetuner
from dlpo_nb.launch import begin, train
from dlpo_nb.settings import LaunchConfig, applicable, check_resumed, stored_config
from dlpo_nb.weights import read_safetensors

EPISODES = 6
SETTINGS = dict(
    method="klinr",
    reward="loud - 0.5*long",
    normalise="z",
    episodes=EPISODES,
    batch_size=6,
    group_size=2,
    micro_batch=4,
    fork=3,
    rollout_steps=6,
    denoising_frames=8,
    advantage="buffer",
    buffer_min_count=3,
    buffer_size=6,
    learning_rate=1e-3,
    watch_every=2,
    watch_texts=3,
)


def settings(out):
    config = LaunchConfig.of(**SETTINGS, out=str(out), resume=(Path(out) / "config.json").exists()).resolved()
    config.check()
    return config


def run(out, replacements=None):
    """A whole run into `out`, or the rest of one; with `replacements` it kills itself when so many files
    are about to be moved into place."""
    torch.set_num_threads(1)
    config, move = settings(out), os.replace

    def counted(*paths):
        counted.left -= 1
        if counted.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        move(*paths)

    if replacements:
        counted.left, os.replace = replacements, counted
    tuner = Finetuner(config, spoken(make_model(config=TINY)), reward(), MORE)
    train(tuner, begin("tiny", config, tuner), config, ["Snow.", "The bell rings.", "No."])


def started(*arguments):
    """A process of its own with everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dlpo_nb.launch"])
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out, start = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    process = started(out)
    process.join(300)
    assert process.exitcode == 0
    return left_behind(out), time.monotonic() - start


def test_killed_at_random(whole, tmp_path):
    """Again and again, in rollouts, scoring, updates and writing, until it has been killed six times or more;
    tools/kill_at_random.py does it longer."""
    (rows, files), duration = whole
    assert [row["episode"] for row in rows] == list(range(EPISODES)) and sum(
        "reward/heldout" in row for row in rows
    ) == EPISODES // 2
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 6:
        out = tmp_path / f"run{(runs := runs + 1)}"
        while True:
            process = started(out)
            process.join(draw.uniform(0, 0.9 * duration) if kills < 30 else 300)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0 and left_behind(out) == (rows, files)


@pytest.mark.parametrize("which", [1, 2, 3, 4, 7, 11])
def test_killed_while_writing(which, whole, tmp_path):
    """Just before the n-th file would have been moved into place."""
    out = tmp_path / "run"
    process = started(out, which)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    if (out / "metrics.jsonl").exists():  # and half a line
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"episode": 1, "rew')
    process = started(out)
    process.join(300)
    assert process.exitcode == 0 and left_behind(out) == whole[0]


def tuner_in(folder):
    return Finetuner(settings(folder), spoken(make_model(config=TINY)), reward(), MORE)


def test_two_states_and_three_models_are_kept(whole):
    names = set(whole[0][1])
    assert {name for name in names if name.startswith("state")} == {
        f"state-{n:06d}.pt" for n in (EPISODES - 1, EPISODES)
    }
    assert {name for name in names if name.startswith("best-")} == {
        row["file"] for row in json.loads(whole[0][1]["best.json"].decode())
    } and "tuned.safetensors" in names


def test_ranking_of_a_resumed_run(tmp_path):
    """An episode that comes again takes its own place only."""
    tuner = tuner_in(tmp_path)
    for tuner.next_episode, score in ((1, 3.0), (2, 1.0), (3, 2.0), (2, 1.0), (3, 2.0), (4, 0.5)):
        keep_best(tuner, tmp_path, score, {})
    assert [row["episode"] for row in read_ranking(tmp_path)] == [1, 3, 2]


def test_watching_leaves_the_reward_alone(tmp_path):
    tuner = tuner_in(tmp_path)
    tuner.episode()
    before = tuner.reward.state_dict()
    assert heldout_reward(tuner, MORE) == heldout_reward(tuner, MORE)
    assert tuner.reward.state_dict() == before and tuner.reward.pop_components() == {}


def test_a_broken_state_gives_way_to_the_one_before(tmp_path):
    tuner = tuner_in(tmp_path)
    assert not load_last(tuner, tmp_path)
    for _ in range(2):
        tuner.episode()
        save_last(tuner, tmp_path)
    states(tmp_path)[0].write_bytes(b"half")
    assert load_last(tuner, tmp_path) and tuner.next_episode == 1
    states(tmp_path)[1].write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        load_last(tuner, tmp_path)


def test_a_state_is_written_in_the_background(tmp_path, monkeypatch):
    """As it was when it was asked for; without what is frozen; what went wrong is said afterwards."""
    tuner, saving, may = tuner_in(tmp_path), BackgroundSaving(tmp_path), threading.Event()
    tuner.episode()
    save_last(tuner, tmp_path)
    written = torch.load(states(tmp_path)[0], weights_only=True)
    monkeypatch.setattr("dlpo_nb.checkpoints.save_tensors", lambda *it: may.wait(60) and save_tensors(*it))
    saving.save(tuner)
    with torch.no_grad():
        for p in tuner.parameters:
            p.add_(1)
    may.set()
    saving.wait()
    kept = torch.load(states(tmp_path)[0], weights_only=True)
    pairs = list(zip(tree_leaves(kept), tree_leaves(written), strict=True))
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs) and len(pairs) > 50
    assert {name.split(".")[0] for name in kept["model"]} == {"decoder"}
    saving.folder = tmp_path / "none"
    saving.save(tuner)
    with pytest.raises(UserError, match="cannot write"):
        saving.wait()


def test_a_state_of_before_has_frozen_weights_too(tmp_path):
    tuner = tuner_in(tmp_path)
    tuner.episode()
    state = tuner.state_dict()
    save_tensors(state | dict(model=tuner.model.state_dict()), tmp_path / "state-000001.pt")
    again = tuner_in(tmp_path)
    assert load_last(again, tmp_path) and again.next_episode == 1
    assert all(torch.equal(a, b) for a, b in zip(tuner.parameters, again.parameters))
    for wrong in ({}, state["model"] | dict(other=torch.zeros(1))):
        save_tensors(state | dict(model=wrong), tmp_path / "state-000001.pt")
        with pytest.raises(UserError, match="cannot be read"):
            load_last(again, tmp_path)


def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    tuner = tuner_in(tmp_path)
    save_last(tuner, tmp_path)
    before, limits = states(tmp_path)[0].read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="free some space"):
            tuner.next_episode = 1
            save_last(tuner, tmp_path)
        with pytest.raises(UserError, match="free some space"):
            keep_best(tuner, tmp_path, 1.0, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in states(tmp_path)] == [before] and not list(tmp_path.glob(".*tmp"))


def test_two_at_once_are_one_and_a_refusal(whole, tmp_path):
    """As a job array does; whoever comes second finds the folder locked, or a run in it."""
    processes = [started(tmp_path / "run") for _ in range(2)]
    for process in processes:
        process.join(300)
    assert sorted(process.exitcode for process in processes) == [0, 1]
    assert left_behind(tmp_path / "run") == whole[0]


def resumed(out, **changes):
    """The run in `out`, resumed in this process for one more episode."""
    preset, stored = stored_config(out)
    config = LaunchConfig.of(**applicable(LaunchConfig, stored.flat()) | changes).resolved()
    check_resumed(stored, config)
    tuner = Finetuner(config, spoken(make_model(config=TINY)), reward(), MORE)
    run = begin(preset, config, tuner)
    unlock_folders()
    if tuner.next_episode < config.episodes:
        run.append_metrics(tuner.episode())
        save_last(tuner, out / "checkpoints")
    return RunDir(out).read_json("config.json")


def test_a_resumed_run_keeps_what_was(tmp_path):
    out = tmp_path / "run"
    config = settings(out)
    tuner = tuner_in(out)
    begin("tiny", config, tuner)
    for _ in range(2):
        tuner.episode()
        save_last(tuner, out / "checkpoints")
    begun = RunDir(out).read_json("config.json")
    changed = resumed(out, learning_rate=5e-4, micro_batch=2)
    assert (
        changed["learning_rate"] == 1e-3
        and changed["changes"] == [{"episode": 2, "learning_rate": 5e-4}]
        and changed["micro_batch"] == 2
    )
    assert {k: v for k, v in changed.items() if begun.get(k) != v}.keys() == {
        "changes",
        "micro_batch",
        "flags",
    }
    again = resumed(out, beta=0.25, episodes=7)
    assert (
        again["changes"] == changed["changes"] + [{"episode": 3, "beta": 0.25}]
        and again["beta"] == begun["beta"]
        and again["episodes"] == 7
    )
    assert resumed(out)["changes"] == again["changes"] and stored_config(out)[1].learning_rate == 5e-4
    with pytest.raises(UserError, match="has done 5"):
        resumed(out, episodes=4)


def test_a_record_of_before_is_resumed(tmp_path):
    """It has other names, and no marks of what it read."""
    out = tmp_path / "run"
    begin("tiny", settings(out), tuner_in(out))
    unlock_folders()
    record = RunDir(out).read_json("config.json")
    old = {
        {"denoising_frames": "guidance_frames"}.get(name, name): value
        for name, value in record.items()
        if name not in ("inputs", "flags", "objective")
    }
    RunDir(out).write_json("config.json", old)
    again = resumed(out)
    assert "changes" not in again and again["denoising_frames"] == 8
    RunDir(out).write_json("config.json", old)
    with pytest.raises(UserError, match="--texts elsewhere.txt is not what"):
        resumed(out, texts="elsewhere.txt")


def test_other_texts_or_another_base_are_refused(tmp_path):
    out = tmp_path / "run"
    base, other = tmp_path / "base.safetensors", tmp_path / "moved.safetensors"
    base.write_bytes(b"weights")
    config = replace(settings(out), base_checkpoint=str(base))
    begin("tiny", config, tuner_in(out))
    unlock_folders()
    other.write_bytes(b"weights")
    assert resumed(out, base_checkpoint=str(other))["base_checkpoint"] == str(other)
    other.write_bytes(b"others")
    with pytest.raises(UserError, match="--base-checkpoint .* is not what the run"):
        resumed(out)
    other.write_bytes(b"weights")
    before = (out / "config.json").read_text()
    preset, stored = stored_config(out)
    with pytest.raises(UserError, match="--texts .* is not what the run"):
        begin(preset, stored, Finetuner(stored, spoken(make_model(config=TINY)), reward(), MORE[:-1]))
    assert (out / "config.json").read_text() == before
