"""Cost of DNSMOS against the stock `speechmos` call, in one run: `python tools/bench/bench_dnsmos.py [--seconds 1.5] [--threads N]`.

The two take turns; times are medians after a first call that is not counted, so that loading is not measured. `speechmos` leaves the
number of threads to onnxruntime, which takes every core it may use; --threads defaults to the same number.
"""
import argparse
import os
import statistics
import time

import torch
from speechmos import dnsmos as stock

from dlpo_nb.rewards.dnsmos import DNSMOS, SAMPLE_RATE, windows


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of the clip")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    args = parser.parse_args()
    noise = torch.randn(round(args.seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    clip = (0.1 * noise * torch.linspace(0, 6.28, len(noise)).sin().abs()).clamp(-1, 1)
    tile, length = windows(clip)[0], torch.tensor([len(clip)])
    rewards = {score: DNSMOS(score, threads=args.threads) for score in ("p808", "ovrl")}
    calls = {
        "speechmos as it is": lambda: stock.run(clip.numpy(), SAMPLE_RATE),
        "speechmos on one tile": lambda: stock.run(tile.numpy(), SAMPLE_RATE),
        "DNSMOS ovrl": lambda: rewards["ovrl"](clip[None], length, SAMPLE_RATE, [""]),
        "DNSMOS p808": lambda: rewards["p808"](clip[None], length, SAMPLE_RATE, [""]),
    }
    times = {name: [] for name in calls}
    for turn in range(args.repeats + 1):
        for name, call in calls.items():
            spent = seconds_of(call)
            if turn:
                times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"one clip of {args.seconds:g} s, {args.threads} threads, median of {args.repeats}")
    for name, median in medians.items():
        print(f"{name:22} {median:7.3f} s   {medians['speechmos as it is'] / median:6.1f} x cheaper than speechmos as it is")


if __name__ == "__main__":
    main()
