"""Our decoder against a plain transcription of the reference's arithmetic, on the CPU:
`python tools/bench/bench_decoder.py`.

WaveGrad 2 Base with the tests' deterministic weights. Sampling steps and training steps take turns in one
process, and so do the machine's ceilings (matrix product, copy); ratios are of medians. Peak memory is that
of processes of their own, which do two training steps each. Writes results/bench/decoder.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from deterministic_weights import weight_values  # noqa: E402

from dlpo_nb.core import environment  # noqa: E402
from dlpo_nb.diffusion import NoiseSchedule  # noqa: E402
from dlpo_nb.wavegrad2.decoder import Decoder, predict_noise  # noqa: E402
from dlpo_nb.wavegrad2.plain import plain_noise  # noqa: E402

BETAS = torch.linspace(1e-6, 1e-2, 1000)


def base_decoder():
    with torch.device("meta"):
        decoder = Decoder()
    decoder.to_empty(device="cpu")
    for name, value in decoder.state_dict().items():
        value.copy_(torch.from_numpy(weight_values(f"decoder.{name}", tuple(value.shape))))
    return decoder


def signals(batch, frames):
    """Noisy audio, hidden frames and noise."""
    generator = torch.Generator().manual_seed(0)
    return [
        scale * torch.randn(batch, *shape, generator=generator)
        for scale, shape in ((1, (300 * frames,)), (0.25, (576, frames)), (1, (300 * frames,)))
    ]


class PlainTables:
    """The reference's float32 tables for betas (S,), and its reverse step."""

    def __init__(self, betas):
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1), kept[:-1]])
        self.level = kept.sqrt()
        self.of_x = (1 / kept).sqrt()
        self.of_eps = (1 - kept).sqrt() * (1 / kept).sqrt()
        self.of_x0 = betas * before.sqrt() / (1 - kept)
        self.of_y = (1 - before) * (1 - betas).sqrt() / (1 - kept)
        self.log_variance = (betas * (1 - before) / (1 - kept)).clamp(min=1e-20).log()

    def step(self, decoder, y, hidden, t, z):
        """The estimated noise, and y at step t - 1, (B, N) each, from y at step t and noise z."""
        eps = decoder(y, hidden, self.level[t].expand(len(y), 1))
        x0 = (self.of_x[t] * y - self.of_eps[t] * eps).clamp(-1, 1)
        return eps, self.of_x0[t] * x0 + self.of_y[t] * y + (0.5 * self.log_variance[t]).exp() * z


def sampling_steps(args):
    """{name: a call that gives the estimated noise and the next state, (B, N) each}:
    reverse step t = 500 of 1000."""
    ours = base_decoder()
    plain = partial(plain_noise, ours.state_dict())
    tables = PlainTables(BETAS)
    schedule = NoiseSchedule.from_betas(BETAS, torch.float32)
    y, hidden, z = signals(args.batch, args.frames)

    def step():
        eps = predict_noise(ours, y, hidden, schedule.level(500))
        return eps, schedule.step(eps, y, 500, z)

    def in_half(call):
        def half():
            with torch.autocast("cpu", torch.bfloat16):
                return call()

        return half

    plainly = lambda: tables.step(plain, y, hidden, 500, z)
    return {
        "plain": plainly,
        "ours": step,
        "plain bfloat16": in_half(plainly),
        "ours bfloat16": in_half(step),
    }


def training_steps(args, names=("plain", "ours", "ours bfloat16")):
    """{name: a call that gives the loss and leaves gradients in the weights}:
    L1 to given noise, gradients to weights and frames."""
    ours = base_decoder()
    weights = {name: value.clone().requires_grad_() for name, value in ours.state_dict().items()}
    weights = weights if "plain" in names else {}
    y, hidden, z = signals(args.batch, args.window)
    hidden.requires_grad_()
    level = torch.full((args.batch, 1), 0.6)
    decoders = {
        "plain": lambda: plain_noise(weights, y, hidden, level),
        "ours": lambda: predict_noise(ours, y, hidden, level),
    }

    def step(name):
        for p in (*ours.parameters(), *weights.values()):
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in name):
            loss = (decoders[name.split()[0]]() - z).abs().mean()
        loss.backward()
        moved = weights.values() if name == "plain" else ours.parameters()
        return loss.item(), torch.stack([p.grad.norm() for p in moved]).norm().item()

    return {name: lambda name=name: step(name) for name in names}


def ceilings():
    """{name: a call, and how much it does (floating-point operations, or bytes)}."""
    a, b = torch.randn(2, 1536, 1536)
    half = (a.bfloat16(), b.bfloat16())
    signal = torch.randn(4, 512, 1, 3000).contiguous(memory_format=torch.channels_last)
    kernel, big = torch.randn(512, 512, 1, 3), torch.randn(2, 32 * 2**20)
    small = signal.bfloat16(), kernel.bfloat16()
    of_conv = 2 * 4 * 3000 * 512 * 512 * 3
    return {
        "matmul float32": (lambda: a @ b, 2 * 1536**3),
        "matmul bfloat16": (lambda: half[0] @ half[1], 2 * 1536**3),
        "conv float32": (lambda: torch.nn.functional.conv2d(signal, kernel, padding=(0, 1)), of_conv),
        "conv bfloat16": (lambda: torch.nn.functional.conv2d(*small, padding=(0, 1)), of_conv),
        "copy": (lambda: big[0].copy_(big[1]), 2 * big[0].nbytes),
    }


def take_turns(calls, rounds):
    """{name: seconds of each round}, after one call of each that is not counted."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(calls, rounds, baseline="plain"):
    """Seconds of each call by rounds, ratios to the baseline, floating-point operations,
    and the share of the machine's ceiling.

    The ceilings (GFLOP/s, GB/s) take their turns between the calls,
    so that other jobs on the machine slow them as well."""
    work = ceilings()
    seconds, found = take_turns(calls | {name: call for name, (call, _) in work.items()}, rounds), {}
    best = {name: amount / statistics.median(seconds[name]) / 1e9 for name, (_, amount) in work.items()}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        median, kind = statistics.median(seconds[name]), "bfloat16" if "bfloat16" in name else "float32"
        gflop = counter.get_total_flops() / 1e9
        found[name] = {
            "seconds": seconds[name],
            "median": median,
            "times faster": statistics.median(seconds[baseline]) / median,
            "times faster by minima": min(seconds[baseline]) / min(seconds[name]),
            "gflop": gflop,
            "share of the ceiling": gflop / median / max(best[f"matmul {kind}"], best[f"conv {kind}"]),
        }
    return found, best


def profiled(call, rows=10):
    """{operation: share of the time spent in it}."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = [e for e in found.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in events)
    events.sort(key=lambda e: -e.self_cpu_time_total)
    return {e.key: e.self_cpu_time_total / total for e in events[:rows]}


def peak(args, name):
    """Peak memory (MiB) of a process that does two training steps, and what it held before them."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        *(f"--{key}={getattr(args, key)}" for key in ("threads", "batch", "window")),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(args):
    # Linux; `ru_maxrss` would count what the parent held when it started this process
    held = lambda: (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            ).split()[1]
        )
        / 1024
    )
    call = training_steps(args, [args.memory_of])[args.memory_of]
    before = held()
    call(), call()
    print(json.dumps({"before": before, "peak": held()}))


def show(found, best):
    """Print a table."""
    for name, row in found.items():
        print(
            f"{name:15s} {row['median']:7.2f} s   {row['times faster']:.2f} times faster   "
            f"{row['gflop']:.0f} GFLOP, {row['share of the ceiling']:.0%} of the ceiling",
            *(
                f"  {k} {row[k]:.2g}"
                for k in ("noise max off", "noise rms off", "share of plain's memory")
                if k in row
            ),
        )
    print("ceilings, GFLOP/s and GB/s:", {name: round(value, 1) for name, value in best.items()})


@torch.no_grad()
def sampling(args):
    """The sampling step's table."""
    calls = sampling_steps(args)
    results = {name: call() for name, call in calls.items()}
    found, best = compare(calls, args.rounds)
    for name, row in found.items():
        for kind, result, plain in zip(("noise", "state"), results[name], results["plain"]):
            off = result - plain
            row |= {
                f"{kind} max off": off.abs().max().item(),
                f"{kind} rms off": off.square().mean().sqrt().item(),
            }
        row["profile"] = profiled(calls[name])
    show(found, best)
    return found | {
        "ceilings": best,
        "rms of the noise and the state": [v.square().mean().sqrt().item() for v in results["plain"]],
    }


def training(args):
    """The training step's table."""
    calls = training_steps(args)
    found, best = compare(calls, args.training_rounds)
    for name, row in found.items():
        row["loss"], row["gradient norm"] = calls[name]()
        row |= {"memory": peak(args, name), "profile": profiled(calls[name])}
        row["share of plain's memory"] = row["memory"]["peak"] / found["plain"]["memory"]["peak"]
    show(found, best)
    return found | {"ceilings": best}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=221, help="of the sampling step; 221 are 3 s")
    parser.add_argument("--window", type=int, default=256, help="frames of the training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training-rounds", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "decoder.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return report_memory(args)
    tables = {"sampling": sampling(args), "training": training(args)}
    cpu = next(
        (
            line.split(":")[1].split()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        ),
        [],
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "memory_of")}
    args.out.write_text(
        json.dumps(
            {
                "how": "python tools/bench/bench_decoder.py",
                "settings": settings,
                **tables,
                "bfloat16 instructions": [f for f in cpu if "bf16" in f],
                "environment": environment(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
