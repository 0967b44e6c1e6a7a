"""Cost of a second of sound by vocoder.

    python tools/bench/bench_vocoders.py [--out results/bench/vocoders.json]

Processor milliseconds of this process on one thread, which other jobs disturb less than the clock, for noise
of --seconds. Medians of --repeats rounds in which the ways take turns, after a round that is not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dlpo_nb.core import environment
from dlpo_nb.vocoder import SMALL_MEL, GriffinLim
from dlpo_nb.vocos import Vocos


def cpu_seconds(call):
    """Processor seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames = 80 * args.seconds
    mel = 2 * torch.randn(1, SMALL_MEL.bands, frames) - 6
    ways = {"griffinlim": GriffinLim(SMALL_MEL), "vocos": Vocos()}
    rounds = [
        {name: cpu_seconds(lambda: way(mel, torch.tensor([frames]))) for name, way in ways.items()}
        for _ in range(args.repeats + 1)
    ]
    costs = {
        name: round(1000 * statistics.median(each[name] for each in rounds[1:]) / args.seconds, 2)
        for name in ways
    }
    print("processor milliseconds for a second of sound:", costs)
    if args.out:
        row = dict(
            ms_per_second=costs,
            seconds=args.seconds,
            repeats=args.repeats,
            environment=environment(),
        )
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
