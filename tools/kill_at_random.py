"""Kill a run again and again: does it end as if nothing had happened? `python tools/kill_at_random.py`.

For each packaged voice, in one process and in two: a short run that nobody disturbs, then the same one killed
(SIGKILL to all its processes) at random moments, in rollouts, scoring, updates and writing, and resumed each
time, until it has been killed ten times and is let finish. Logs and checkpoints must be equal, bit for bit.
Writes results/kill_at_random.json.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dlpo_nb.core import environment, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from left_behind import left_behind  # noqa: E402

EPISODES = 8
FLAGS = [
    "--reward", "dnsmos", "--episodes", str(EPISODES), "--batch-size", "8", "--group-size", "4",
    "--micro-batch", "4", "--rollout-steps", "4", "--train-steps", "all", "--fork", "0", "--watch-every", "3",
    "--watch-texts", "2", "--heldout", "0", "--threads", "1", "--max-words", "3",
]  # fmt: skip
VOICES = {"gradtts_small": "tiny", "tiny_base": "wavegrad-tiny"}  # and their presets


def command(voice, processes, out):
    """The run, or the rest of it."""
    resume = ["--resume"] if (out / "config.json").exists() else []
    flags = [VOICES[voice], *FLAGS, "--nproc-per-node", str(processes), "--out", str(out), *resume]
    return [sys.executable, "-m", "dlpo_nb.launch", *flags]


def family(pid) -> list:
    """A process and all that it has started, however deep; torchrun gives its own sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def run(voice, processes, out, seconds=None):
    """Start it, kill all its processes after some seconds; returns whether it was killed.
    Raises RuntimeError if it ends by itself with an error."""
    with open(out.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(
            command(voice, processes, out), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            return True
    if process.returncode:
        raise RuntimeError(out.with_suffix(".log").read_text()[-3000:])
    return False


def trial(voice, processes, kills, folder):
    """Times and moments of the kills of one voice; raises AssertionError where the ends differ."""
    whole, disturbed, draw = folder / "whole", folder / "disturbed", random.Random(0)
    started = time.monotonic()
    run(voice, processes, whole)
    seconds, moments, again = time.monotonic() - started, [], 0
    while len(moments) < kills:
        if not run(voice, processes, disturbed, draw.uniform(0.2, 0.9) * seconds):
            again += 1  # it was done before it was killed: from the start, in another folder
            disturbed = folder / f"disturbed{again}"
            continue
        log = disturbed / "metrics.jsonl"
        moments.append(len(read_jsonl(log)) if log.exists() else 0)
    run(voice, processes, disturbed)
    mine, theirs = left_behind(whole), left_behind(disturbed)
    assert mine[0] == theirs[0], "the logs differ"
    assert mine[1].keys() == theirs[1].keys(), "other checkpoints"
    assert all(mine[1][name] == theirs[1][name] for name in mine[1]), "a checkpoint differs"
    print(f"{voice}, {processes} processes: killed after episodes {moments}, equal", flush=True)
    return dict(voice=voice, processes=processes, killed_after_episodes=moments, runs=1 + again, equal=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--voices", nargs="+", choices=VOICES, default=list(VOICES))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kill_at_random.json")
    args = parser.parse_args()
    trials = []
    for voice in args.voices:
        for processes in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                trials.append(trial(voice, processes, args.kills, Path(folder)))
            result = dict(kills=args.kills, trials=trials, environment=environment())
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
