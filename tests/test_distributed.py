"""Two processes are one: the same gradients, updates and log, for every method;
and a run that loses a process resumes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch

from dlpo_nb import distributed
from dlpo_nb.core import UserError
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.settings import parse

HERE = Path(__file__).resolve().parent
FLAGS = [
    "--batch-size", "4", "--group-size", "2", "--heldout", "0", "--train-steps", "last:1", "--nproc-per-node",
    "2", "--device", "cpu", "--reward", "level",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What shared_work finds in one process and in two."""
    folder, found = tmp_path_factory.mktemp("ranks"), []
    work = HERE / "shared_work.py"
    for name, start in (("one", commands.python), ("two", commands.torchrun)):
        done = start(work, folder / name)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(folder / name, weights_only=True))
    return found


def close(one, two, tolerance):
    assert one.shape == two.shape and float((one - two).norm()) <= tolerance * float(one.norm())


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_gradients_and_updates(method, exact, both):
    one, two = (found[method, exact] for found in both)
    for part in ("gradient/policy", "gradient/penalty"):
        close(one[part], two[part], 1e-10 if exact else 1e-5)
    assert one["gradient/policy" if method not in ("onlydl", "released") else "gradient/penalty"].any()
    close(one["weights"], two["weights"], 1e-10 if exact else 1e-5)


@pytest.mark.parametrize("method", ["dlpo", "klinr", "rwr", "awm"])
def test_a_voice_whose_state_is_a_spectrogram(method, both):
    one, two = (found[method, "toy"] for found in both)
    for part in ("gradient/policy", "gradient/penalty", "weights"):
        close(one[part], two[part], 1e-9)
    assert one["gradient/policy"].any()
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


def test_grad_tts(both):
    """In float32, as its spectrograms are measured."""
    one, two = (found["dlpo", "gradtts"] for found in both)
    for part in ("gradient/policy", "gradient/penalty"):
        close(one[part], two[part], 1e-4)
        assert one[part].any()
    for a, b in zip(one["log"], two["log"], strict=True):
        assert list(a) == list(b) and a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert one["heldout"] == pytest.approx(two["heldout"], rel=1e-4)


def test_what_is_evaluated_is_spoken_in_parts(both):
    one, two = (found["spoken"] for found in both)
    assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


def test_drift_is_measured_in_parts(both):
    one, two = (found["drift"] for found in both)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-9) and a["kl"] > 0


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_the_log_is_that_of_the_whole_batch(method, both):
    one, two = (found[method, True] for found in both)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert list(a) == list(b) and a == pytest.approx(b, rel=1e-6, abs=1e-9)
    assert one["heldout of one"] == pytest.approx(two["heldout of one"], rel=1e-6)
    assert one["heldout"] == pytest.approx(two["heldout"], rel=1e-6) and set(one["heldout"]) == {
        "reward/heldout",
        "reward/heldout/loud",
        "reward/heldout/long",
        "reward/heldout/watching",
    }


def launch(*flags, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "dlpo_nb.launch", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def workers(parent):
    """Process numbers of the ranks that a launch has started."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    return [int(pid) for pid, above in (line.split() for line in listed.splitlines()) if int(above) == parent]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes with ps")
def test_a_lost_process_is_started_again(tmp_path):
    out = tmp_path / "run"
    job = launch("--episodes", 3, "--out", out, "--max-restarts", 1, *FLAGS)
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "state-000001.pt").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.05)
    os.kill(workers(job.pid)[-1], signal.SIGKILL)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [0, 1, 2] and (
        out / "checkpoints" / "tuned.safetensors"
    ).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes with ps")
def test_two_machines_go_on_after_one_has_lost_its_process(tmp_path):
    """Two agents on one machine; each counts its own restarts."""
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [
        "--episodes",
        3,
        "--out",
        out,
        "--max-restarts",
        1,
        *FLAGS,
        "--nproc-per-node",
        1,
        "--nnodes",
        2,
        "--rdzv-endpoint",
        f"localhost:{port}",
    ]
    jobs = [launch(*flags, start_new_session=True) for _ in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not (out / "checkpoints" / "state-000001.pt").exists():
            assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(workers(jobs[1].pid)[-1], signal.SIGKILL)
        said = [job.communicate(timeout=300)[1] for job in jobs]
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert [job.returncode for job in jobs] == [0, 0], said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [0, 1, 2] and (
        out / "checkpoints" / "tuned.safetensors"
    ).exists()


def test_what_cannot_go_on_is_not_tried_again(tmp_path):
    done = commands.run(
        "launch", "--episodes", 2, "--learning-rate", 1e30, "--max-skipped", 1, "--out", tmp_path / "run",
        "--max-restarts", 3, *FLAGS,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="more processes than GPUs"):
        distributed.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for threads in /proc")
@pytest.mark.parametrize(
    "flags",
    [
        ["dlpo_nb.launch", "--episodes", "1", *FLAGS],
        [
            "dlpo_nb.pretrain",
            "--corpus",
            HERE / "data" / "corpus_tiny",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--window-frames",
            "16",
            "--sample-every",
            "0",
            "--device",
            "cpu",
        ],
    ],
    ids=["launch", "pretrain"],
)
def test_no_thread_of_gloo_is_left_behind(flags, tmp_path):
    """One that is still letting go of a tensor when the interpreter ends aborts the process
    (pytorch/pytorch#190489)."""
    done = subprocess.run(
        distributed.torchrun_command(HERE / "leaving.py", *flags, "--out", tmp_path / "run"),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_fails_alone_does_not_wait_for_the_others():
    done = subprocess.run(
        distributed.torchrun_command(HERE / "failing_alone.py"), capture_output=True, text=True, timeout=100
    )
    assert done.returncode and "OutOfMemoryError: out of memory" in done.stderr, done.stderr


def test_gpus_wait_for_minutes_and_processors_for_hours(monkeypatch):
    """NCCL has a group of its own, for what lies on GPUs."""
    asked = []

    def group(name):
        return lambda *place, **named: asked.append((name, place, named)) or name

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(distributed, "BOARD", [])
    monkeypatch.setattr(distributed, "GPUS", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 1)])
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", group("all"))
    monkeypatch.setattr(torch.distributed, "new_group", group("gpus"))
    assert distributed.join() == torch.device("cuda", 0) and distributed.GPUS == ["gpus"]
    (_, (backend,), waiting), (_, _, adding) = asked
    assert backend == "gloo" and waiting["timeout"].total_seconds() == 12 * 3600
    assert adding["backend"] == "nccl" and adding["timeout"].total_seconds() == 15 * 60


def test_threads_are_shared_by_the_cores_of_the_job(monkeypatch):
    from torch.distributed import run

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DLPO_STARTED", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(run, "main", lambda argv: None)
    config = SimpleNamespace(threads=0, nproc_per_node=2, nnodes=1, max_restarts=0)
    distributed.start_processes("dlpo_nb.launch", config, [])
    assert os.environ["OMP_NUM_THREADS"] == "3"


def slurm(tmp_path, *flags, **variables):
    """What tools/gpu/slurm.sh has srun start, and with which options, on two nodes of 8 GPUs."""
    for name, line in {"srun": 'echo "$@"', "scontrol": "echo node7; echo node8"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = dict(
        SLURM_JOB_ID="41234", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="8"
    )
    done = subprocess.run(
        [HERE.parent / "tools" / "gpu" / "slurm.sh", *flags],
        capture_output=True,
        text=True,
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"} | variables,
    )
    return done.returncode, done.stdout.split(), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_slurm_starts_one_launcher_on_each_node(tmp_path):
    code, said, _ = slurm(tmp_path, "paper", "--out", "runs/p")
    assert code == 0 and said[:5] == ["--ntasks-per-node=1", "python", "-m", "dlpo_nb.launch", "paper"]
    preset, config = parse(said[4:])
    assert (preset, config.nnodes, config.nproc_per_node) == ("paper", 2, 8)
    assert config.rdzv_endpoint == "node7:21234" and not config.resume
    assert "--resume" in slurm(tmp_path, "paper", "--out", "runs/p", SLURM_RESTART_COUNT="1")[1]
    code, _, said = slurm(tmp_path, "paper", SLURM_JOB_ID="")
    assert code == 2 and "sbatch --nodes 2" in said


def test_one_sentence_from_many_processes(tmp_path):
    missing = ["--base-checkpoint", tmp_path / "none.safetensors"]
    done = commands.run("launch", "--episodes", 1, *missing, "--out", tmp_path / "run", *FLAGS)
    said = done.stderr
    assert done.returncode == 2 and said.count("none.safetensors") == 1 and "Traceback" not in said, said


@pytest.mark.smoke
@pytest.mark.parametrize(
    "flags, words",
    [
        (["wavegrad-tiny", "--nproc-per-node", "8"], ["4 texts for 8 processes"]),
        (["--nnodes", "2"], ["--rdzv-endpoint", "--out"]),
        (["--nproc-per-node", "0"], ["at least 1"]),
    ],
)
def test_processes_that_make_no_sense(flags, words):
    done = commands.run("launch", *flags)
    said = done.stderr
    assert done.returncode == 2 and all(word in said for word in words) and "Traceback" not in said


def test_an_existing_run_is_refused_once_and_left_alone(tmp_path):
    out = tmp_path / "run"
    done = commands.run("launch", "--episodes", 1, "--out", out, *FLAGS)
    assert done.returncode == 0, done.stderr
    before = (out / "metrics.jsonl").read_text()
    flags = ["--episodes", 2, "--seed", 7, "--out", out, "--max-restarts", 1, *FLAGS]
    done = commands.run("launch", *flags)
    assert (
        done.returncode == 2
        and done.stderr.count("already holds a run") == 1
        and "Traceback" not in done.stderr
        and (out / "metrics.jsonl").read_text() == before
    )
