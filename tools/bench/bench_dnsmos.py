"""Cost of DNSMOS by length, against the stock `speechmos` call:
`python tools/bench/bench_dnsmos.py [--out results/bench/dnsmos.json]`.

Processor seconds of this process (all its threads), which other jobs on the machine disturb less than seconds
on the clock. Medians, after a first call that is not counted, so that loading is not measured. `speechmos`
leaves the number of threads to onnxruntime. The second part scores a batch on one thread, with a pool of two,
and with two threads inside onnxruntime instead.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import onnxruntime
import torch
from speechmos import dnsmos as stock

from dlpo_nb.core import environment
from dlpo_nb.rewards import dnsmos
from dlpo_nb.rewards.dnsmos import DNSMOS, SAMPLE_RATE

BATCH = 8


def cpu_seconds(call, repeats):
    """Median of the processor seconds of a call."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def noise(seconds, seed=0):
    """A clip (N,) of noise that comes and goes."""
    clip = torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed))
    return (0.1 * clip * torch.linspace(0, 6.28, len(clip)).sin().abs()).clamp(-1, 1)


@functools.lru_cache
def two_threads(file):
    """A session as DNSMOS has it, but with two threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
    return onnxruntime.InferenceSession(
        str(dnsmos.network_path(file)), options, providers=["CPUExecutionProvider"]
    )


def by_length(lengths, repeats):
    """{name: [processor seconds a clip, by length]}."""
    p808, ovrl = DNSMOS("p808", threads=1), DNSMOS("ovrl", threads=1)
    calls = {
        "speechmos": lambda clip: stock.run(clip.numpy(), SAMPLE_RATE),
        "all four": lambda clip: p808.detail_clips([clip], SAMPLE_RATE, [""]),
        "ovrl": lambda clip: ovrl.score_clips([clip], SAMPLE_RATE, [""]),
        "p808": lambda clip: p808.score_clips([clip], SAMPLE_RATE, [""]),
    }
    found = {}
    for name, call in calls.items():
        call(noise(9.5))
        found[name] = [cpu_seconds(lambda: call(noise(seconds)), repeats) for seconds in lengths]
    return found


def by_threads(repeats):
    """{score: {way: processor seconds a clip}} of a batch of clips of 3 s."""
    clips, own, found = [noise(3, seed) for seed in range(BATCH)], dnsmos.session, {}
    for score in ("p808", "ovrl"):
        ways = {
            "one thread": (1, own),
            "pool of two": (2, own),
            "two threads in onnxruntime": (1, two_threads),
        }
        for way, (threads, session) in ways.items():
            dnsmos.session = session
            reward = DNSMOS(score, threads=threads)
            call = lambda: reward.score_clips(clips, SAMPLE_RATE, [""] * BATCH)
            call()
            found.setdefault(score, {})[way] = cpu_seconds(call, repeats) / BATCH
        dnsmos.session = own
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        default=[1, 2, 4.5, 9, 10.5, 12, 16, 20, 30],
        help="lengths of the clips",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths, threads = by_length(args.seconds, args.repeats), by_threads(args.repeats)
    for name, costs in lengths.items():
        print(f"{name:10}", *(f"{seconds:g} s: {cost:.3f}" for seconds, cost in zip(args.seconds, costs)))
    for score, ways in threads.items():
        print(f"{score:10}", *(f"{way}: {cost:.3f}" for way, cost in ways.items()))
    if args.out:
        rounded = lambda numbers: [round(number, 4) for number in numbers]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(
                {
                    "seconds": args.seconds,
                    "cpu_seconds_per_clip": {name: rounded(costs) for name, costs in lengths.items()},
                    "batch": BATCH,
                    "threads": {
                        score: dict(zip(ways, rounded(ways.values()))) for score, ways in threads.items()
                    },
                    "environment": environment(),
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
