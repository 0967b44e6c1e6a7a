"""How long a first sentence takes, against `import torch` alone, with nothing of either in memory.

    python tools/bench/bench_say.py [--repeats 3] [--out results/bench/say.json]

Before each call the files of the environment and of this package are dropped from the system's cache
(posix_fadvise, Linux; pages that a running process has mapped stay, so use a copy of the environment while
others work in it). Seconds on the clock and of the processor, medians of rounds in which the two take turns.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import dlpo_nb
from dlpo_nb.core import environment

SAY = ["-m", "dlpo_nb.say", "The kettle is boiling.", "--out", "say.wav"]
CALLS = {"import torch": ["-c", "import torch"], "say": SAY}


def forget(folder):
    "Drop the files of a folder from the system's cache."
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(arguments) -> dict:
    "Seconds of one cold call."
    for folder in (sysconfig.get_path("purelib"), Path(dlpo_nb.__file__).parent):
        forget(folder)
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder)
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"clock": clock, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    rounds = [{name: cost(call) for name, call in CALLS.items()} for _ in range(args.repeats)]
    found = {
        name: {
            kind: round(statistics.median(each[name][kind] for each in rounds), 2)
            for kind in ("clock", "cpu")
        }
        for name in CALLS
    }
    for name, seconds in found.items():
        print(f"{name:14s} {seconds['clock']:6.2f} s, {seconds['cpu']:6.2f} s of the processor")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"seconds": found, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
