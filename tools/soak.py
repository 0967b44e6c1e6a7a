"""Thousands of episodes in one process: does it grow? `python tools/soak.py [--episodes 3000]`.

Runs `dlpo_nb.launch` on a voice of a few sine waves (tests/toy_mel.py), watched once in twenty episodes, and
every second takes its memory, its open files and the size of its folder. Writes results/soak.json: the slope
of each over the second half of the run. In its first thousand episodes the allocators settle, by about 2 MB;
Python's own objects (tracemalloc) take no more after 900 episodes than after 300.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dlpo_nb.core import environment, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--method", "dlpo", "--denoising-source", "sample", "--denoising-frames", "0", "--reward", "level",
    "--batch-size", "4", "--group-size", "2", "--micro-batch", "4", "--rollout-steps", "4", "--fork", "0",
    "--train-steps", "all", "--watch-every", "20", "--watch-texts", "2", "--heldout", "0", "--threads", "1",
]  # fmt: skip


def base_in(folder):
    """The path of a base of the voice, with random weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    from toy_mel import make_toy_mel

    make_toy_mel().save(folder / "toy.safetensors", {})
    return folder / "toy.safetensors"


def looked_at(pid, out) -> dict:
    """Resident memory in MB, open files, MB in the run's folder without its growing log, episodes done."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = [path for path in out.rglob("*") if path.is_file()]
    log = out / "metrics.jsonl"
    kept = sum(path.stat().st_size for path in files if path != log and "tensorboard" not in path.parts)
    done = len(read_jsonl(log)) if log.exists() else 0
    opened = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return dict(memory=pages * 4096 / 1e6, open_files=opened, folder=kept / 1e6, episodes=done)


def slopes(rows) -> dict:
    """Change per thousand episodes in the second half: slope and standard error of a straight line."""
    half = [row for row in rows if row["episodes"] >= rows[-1]["episodes"] / 2]
    x, found = np.array([row["episodes"] for row in half]) / 1000, {}
    for name in ("memory", "open_files", "folder"):
        y = np.array([row[name] for row in half])
        slope, level = np.polyfit(x, y, 1)
        spread = np.sqrt(
            np.square(y - level - slope * x).sum() / (len(x) - 2) / np.square(x - x.mean()).sum()
        )
        found[name] = dict(
            per_thousand=round(float(slope), 3), error=round(float(spread), 3), last=round(float(y[-1]), 3)
        )
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["wavegrad-tiny", "--plugin", "tests/toy_mel.py", "--base-checkpoint", base_in(Path(folder))]
        flags += ["--episodes", args.episodes, "--out", out, *FLAGS]
        command = [sys.executable, "-m", "dlpo_nb.launch", *map(str, flags)]
        rows, started = [], time.monotonic()
        with open(Path(folder) / "log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(1)
                try:
                    rows.append(looked_at(process.pid, out))
                except (FileNotFoundError, ProcessLookupError, IndexError):
                    continue  # it has ended, or a file has just been moved
        if process.returncode:
            sys.exit((Path(folder) / "log").read_text())
    rows = [row for row in rows if 0 < row["episodes"] < args.episodes]  # not its beginning, not its report
    result = dict(episodes=args.episodes, seconds=round(time.monotonic() - started), looks=len(rows))
    result |= slopes(rows) | dict(curve=rows[:: max(1, len(rows) // 40)], environment=environment())
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
