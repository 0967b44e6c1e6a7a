"""Cost of Distill-MOS by length, against the package's own call.

    python tools/bench/bench_distillmos.py [--out results/bench/distillmos.json]

Processor seconds of this process on one thread, which other jobs disturb less than seconds on the clock.
Medians of --repeats rounds in which the three ways take turns, after a round that is not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dlpo_nb.core import environment
from dlpo_nb.rewards.distillmos import SAMPLE_RATE, DistillMOS, load_package


def noise(seconds, seed=0):
    """A clip (N,) of noise that comes and goes."""
    clip = torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed))
    return 0.1 * clip * torch.linspace(0, 6.28, len(clip)).sin().abs()


def cpu_seconds(call):
    """Processor seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def by_length(lengths, repeats):
    """{way: [processor seconds per clip, by length]}."""
    package, exact, coarse = load_package(), DistillMOS(device="cpu"), DistillMOS("bfloat16", device="cpu")
    ways = {
        "package": lambda clip: package(clip[None]),
        "float32": lambda clip: exact.score_clips([clip], SAMPLE_RATE, [""]),
        "bfloat16": lambda clip: coarse.score_clips([clip], SAMPLE_RATE, [""]),
    }
    costs = {way: [] for way in ways}
    for seconds in lengths:
        clip = noise(seconds)
        rounds = [
            {way: cpu_seconds(lambda: call(clip)) for way, call in ways.items()} for _ in range(repeats + 1)
        ]
        for way in ways:
            costs[way].append(statistics.median(each[way] for each in rounds[1:]))
    return costs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.3, 1, 2, 3, 4, 5, 6, 7.68, 12])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        costs = by_length(args.seconds, args.repeats)
    for way, seconds in costs.items():
        print(f"{way:9}", *(f"{length:g} s: {cost:.3f}" for length, cost in zip(args.seconds, seconds)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rounded = {way: [round(cost, 4) for cost in seconds] for way, seconds in costs.items()}
        found = {"seconds": args.seconds, "cpu_seconds_per_clip": rounded, "environment": environment()}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
