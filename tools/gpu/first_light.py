"""Does all of it work on this GPU, and where does the time go? `tools/gpu/first_light.sh OUT`, five minutes.

Each step runs in a process of its own, so that one that fails, crashes or hangs leaves the rest; it gets a
line, and its numbers are in OUT/summary.json. What the steps print is in OUT/log.txt, what an episode spends
its time on in OUT/profile.txt. Status 1 if a step has failed."""

import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench_episode
import torch
import tyro
from roofline import ceilings, cost
from torch.profiler import ProfilerActivity, profile

from dlpo_nb import doctor
from dlpo_nb.core import environment, pick_device, plain
from dlpo_nb.cost import memory
from dlpo_nb.finetune import Finetuner
from dlpo_nb.inputs import load_base, load_recordings
from dlpo_nb.precision import compute_in
from dlpo_nb.settings import LaunchConfig, preset_settings
from dlpo_nb.text import prompts

POLICIES = {"wavegrad2": "wavegrad-tiny", "gradtts": "tiny"}  # each with the preset of its packaged base
PRECISIONS = ("float32", "tf32", "bfloat16")
EXAMINED = ("packages", "working directory", "default job", "GPU")  # by the doctor


@dataclass
class Config:
    out: str  # folder for summary.json, log.txt, profile.txt
    device: str = "auto"
    minutes: float = 5.0  # steps that have not begun by then are left out
    patience: float = 90.0  # seconds of a step
    tiny: bool = False  # the smallest sizes, and the packaged base in place of WaveGrad 2 Base: for a CPU
    steps: tuple[str, ...] = ()  # which; none: all of them


class Wrong(Exception):
    """What a step has found to be wrong, in a sentence."""


def demand(condition, words):
    """Raises Wrong, with the words, unless the condition holds."""
    if not condition:
        raise Wrong(words)


SMALL = dict(batch_size=8, group_size=4, micro_batch=8, rollout_steps=5, fork=3, train_steps="last:2")
SMALLEST = dict(batch_size=2, group_size=2, rollout_steps=2, fork=0, train_steps="last:1", denoising_frames=8)


def small_tuner(policy, config, device, **settings):
    """DLPO on a packaged base with the settings of its preset, but for a small batch, short texts and a
    reward that costs nothing."""
    sizes = SMALLEST if config.tiny else SMALL
    run = LaunchConfig.of(**preset_settings(POLICIES[policy], "dlpo") | sizes | settings).resolved()
    compute_in(run.precision, run.deterministic)
    texts, model = sorted(prompts("train"), key=len), load_base(run)
    kept = texts[: 8 if config.tiny else 64]
    return Finetuner(run, model, bench_episode.level, kept, load_recordings(run, model), device)


def examined(config, device):
    """The machine, and what the doctor says of the parts that a job needs."""
    parts = [part for part in doctor.PARTS if part.name in EXAMINED and not (config.tiny and part.needed)]
    findings = [doctor.examine(part) for part in parts]
    print(*doctor.machine(), *map(doctor.line_of, findings), sep="\n")
    needed = {part.name for part in parts if part.needed} | ({"GPU"} if device.type == "cuda" else set())
    for found in findings:
        demand(found.works or found.part.name not in needed, f"{found.part.name}: {found.said}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"{name}, torch {torch.__version__}", dict(environment=environment())


def episode(policy, precision, config, device):
    """An episode: its loss is finite, it moves the weights, and the first ratio is 1."""
    tuner = small_tuner(policy, config, device, precision=precision)
    before = [p.detach().clone() for p in tuner.parameters]
    row = tuner.episode()
    demand(abs(row["ratio/mean"] - 1) < 1e-9, f"the first ratio is {row['ratio/mean']!r}, not 1")
    demand(not row.get("skipped") and row["grad_norm"] > 0, f"no update: gradient norm {row['grad_norm']}")
    moved = sum(not torch.equal(a, b) for a, b in zip(before, tuner.parameters))
    demand(moved, "the update has changed no weight")
    said = f"ratio 1, loss {row['loss']:.3g}, gradient {row['grad_norm']:.3g}, {row['seconds']:.1f} s"
    return said, dict(metrics=row, kl_before_update=row["kl"])


@torch.no_grad()
def together(policy, config, device):
    """Texts of different lengths in one call of the network, and each alone: the same noise."""
    tuner, draw = small_tuner(policy, config, device), torch.Generator().manual_seed(0)
    model, texts = tuner.model, sorted(prompts("train"), key=len)
    places = (0, 20, 40) if config.tiny else (0, len(texts) // 2, -1)
    alone = [one_text(model, texts[place], device) for place in places]
    sizes = [c.hidden.shape[2] for c in alone]
    states = [torch.randn(n * model.width, generator=draw).to(device) for n in sizes]
    hidden = [c.hidden[0].T for c in alone]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    level = torch.full((len(alone), 1), 0.5, device=device)
    frames = torch.cat([c.frames for c in alone])
    eps = model.predict_noise(pad(states), pad(hidden).transpose(1, 2).contiguous(), level, frames=frames)
    apart = [
        model.predict_noise(x[None], c.hidden, level[:1], frames=c.frames)[0] for x, c in zip(states, alone)
    ]
    worst = max(float((e[: len(a)] - a).abs().max() / a.abs().max()) for e, a in zip(eps, apart))
    demand(worst < 1e-4, f"noise differs by {worst:.2g} of its largest value")
    return f"{sizes} frames, noise differs by {worst:.2g} of its largest value", dict(difference=worst)


def one_text(model, text, device):
    """What a policy makes of a text."""
    ids = torch.tensor(model.encode([text]), device=device)
    return model.condition(ids, torch.tensor([ids.shape[1]], device=device))


def rerun(policy, config, device):
    """With --deterministic, an episode done twice gives the same weights to the last bit."""
    ends = []
    for _ in range(2):
        tuner = small_tuner(policy, config, device, deterministic=True)
        tuner.episode()
        ends.append([p.detach().clone() for p in tuner.parameters])
    differ = sum(not torch.equal(a, b) for a, b in zip(*ends))
    demand(not differ, f"{differ} of {len(ends[0])} tensors of weights differ")
    return f"{len(ends[0])} tensors of weights, all bits equal", {}


def limits(config, device):
    """What a large product and a large copy reach here."""
    rows = {}
    for name in PRECISIONS:
        compute_in(name)
        kind = torch.bfloat16 if name == "bfloat16" else torch.float32
        rows[name] = ceilings(device, kind, 64 if config.tiny else None)
    said = ", ".join(f"{name} {row['flops_per_s'] / 1e12:.3g}" for name, row in rows.items())
    return f"{said} TFLOP/s; {rows['float32']['bytes_per_s'] / 1e12:.3g} TB/s", dict(ceilings=rows)


def base_tuner(config, device, precision, batch_size):
    """Of WaveGrad 2 Base with random weights on texts of LJSpeech's length, 50 steps, preset paper."""
    options = dict(batch_size=batch_size)
    if config.tiny:
        options = dict(
            tiny=True, batch_size=2, rollout_steps=3, denoising_steps=1, train_steps="random:1", symbols=4
        )
    compute_in(precision)
    sizes = bench_episode.Config(**options)
    return bench_episode.tuner_of(sizes, dict(precision=precision), device), sizes


def work_of_a_second(tuner):
    """Operations of the network for a second of audio at one step."""
    c = one_text(tuner.model, tuner.texts[0], tuner.device)
    x = torch.randn(1, c.hidden.shape[2] * tuner.model.width, device=tuner.device)
    level = torch.full((1, 1), 0.5, device=tuner.device)
    with torch.no_grad():
        asked = cost(lambda: tuner.model.predict_noise(x, c.hidden, level, frames=c.frames))
    return asked["flops"] / (c.hidden.shape[2] / tuner.model.frame_rate)


def full_episode(precision, config, device):
    """Seconds by phase, memory, and the share of the ceiling that rollouts reach."""
    tuner, sizes = base_tuner(config, device, precision, batch_size=64)
    row = tuner.episode()
    flops = work_of_a_second(tuner) * row["audio_seconds"] * sizes.rollout_steps
    limit = ceilings(
        device, torch.bfloat16 if precision == "bfloat16" else torch.float32, 64 if config.tiny else None
    )
    numbers = dict(
        metrics=row, memory_gb=memory(device), rollout_flops=flops,
        utilisation=flops / row["seconds/rollout"] / limit["flops_per_s"],
    )  # fmt: skip
    if device.type == "cuda":
        numbers["card_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    phases = ", ".join(f"{phase} {row[f'seconds/{phase}']:.1f} s" for phase in bench_episode.PHASES)
    said = f"{row['audio_seconds']:.0f} s of audio: {phases}, {numbers['memory_gb']:.1f} GB, "
    return f"{said}{100 * numbers['utilisation']:.1f} % of the ceiling in rollouts", numbers


def timeline(events) -> dict:
    """Of (name, start, end) in microseconds: from first to last, what was busy, the gaps between, copies, and
    seconds by name, the longest first."""
    events, busy, end, gaps = sorted(events, key=lambda e: e[1]), 0.0, None, []
    names, copies = {}, [e for e in events if e[0].startswith("Memcpy")]
    for name, start, stop in events:
        calls, spent = names.get(name, (0, 0.0))
        names[name] = calls + 1, spent + (stop - start) / 1e6
        if end is not None and start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    wall = (end - events[0][1]) / 1e6 if events else 0.0
    longest = sorted(names.items(), key=lambda pair: -pair[1][1])
    return dict(
        seconds=wall, busy=busy / 1e6, launches=len(events), gaps=len(gaps),
        longest_gap=max(gaps, default=0) / 1e6,
        copies=len(copies), copy_seconds=sum(e[2] - e[1] for e in copies) / 1e6,
        by_name=[dict(name=name, calls=calls, seconds=spent) for name, (calls, spent) in longest],
    )  # fmt: skip


def profiled(config, device):
    """What an episode of 8 rollouts spends its time on: kernels, gaps, copies, waits of the host."""
    tuner, _ = base_tuner(config, device, "bfloat16", batch_size=8)
    if device.type == "cuda":
        tuner.episode()  # plans of cuDNN are made once
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        tuner.episode()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    found = recorded.events()
    own = [
        e
        for e in found
        if e.device_type == kind and not e.cpu_children and not getattr(e, "is_user_annotation", False)
    ]
    demand(own, "the profiler has seen nothing")
    line = timeline([(e.name, e.time_range.start, e.time_range.end) for e in own])
    line["waits"] = sum("Synchronize" in e.name for e in found)
    table = "\n".join(
        f"{row['seconds']:9.4f} s {row['calls']:8d} calls  {row['name'][:100]}" for row in line["by_name"]
    )
    (Path(config.out) / "profile.txt").write_text(table + "\n", encoding="utf-8")
    line["by_name"] = line["by_name"][:20]
    share = 100 * line["busy"] / line["seconds"]
    said = f"busy {share:.0f} % of {line['seconds']:.1f} s, {line['launches']} launches, "
    return f"{said}{line['copies']} copies, {line['waits']} waits", dict(timeline=line)


STEPS = {
    "doctor": examined,
    **{f"{name} {kind}": partial(episode, name, kind) for kind in PRECISIONS for name in POLICIES},
    "ceilings": limits,
    **{f"{name} together": partial(together, name) for name in POLICIES},
    "base bfloat16": partial(full_episode, "bfloat16"),
    "profile": profiled,
    **{f"{name} rerun": partial(rerun, name) for name in POLICIES},
    "base float32": partial(full_episode, "float32"),
}  # what is worth most comes first


def work(name, config, pipe):
    """A step, in a process of its own: sends (verdict, what it says, numbers)."""
    log = os.open(Path(config.out) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)  # of libraries that are not Python, too
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    print(f"== {name}", flush=True)
    try:
        answer = ("ok", *STEPS[name](config, pick_device(config.device)))
    except Wrong as wrong:
        answer = "WRONG", str(wrong), {}
    except BaseException as error:  # whatever a GPU's libraries may raise
        traceback.print_exc()
        answer = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", {}
    pipe.send(answer)
    pipe.close()


def guarded(name, config, seconds):
    """The answer of a step, or of the lack of one within the seconds."""
    mine, its = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")  # what was imported need not be imported again
    process = fork.Process(target=work, args=(name, config, its), daemon=True)
    process.start()
    its.close()
    try:
        if not mine.poll(seconds):
            process.kill()
            return "FAILED", f"did not end within {seconds:.0f} s", {}
        answer = mine.recv()
    except EOFError:  # it crashed, or was killed
        process.join()
        return "FAILED", f"its process ended with status {process.exitcode}; see log.txt", {}
    process.join(10)
    process.kill()  # what only hangs in its end has answered
    return answer


def main(config):
    """All steps, a line each; the number of those that have failed."""
    start, summary, out = time.monotonic(), dict(how=plain(config), steps={}), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    for name in config.steps or STEPS:
        begun = time.monotonic()
        left = 60 * config.minutes - (begun - start)
        if left > 0:
            verdict, said, numbers = guarded(name, config, min(config.patience, max(left, 10)))
        else:
            verdict, said, numbers = "-", "left out: the time is over", {}
        spent = time.monotonic() - begun
        summary["steps"][name] = dict(verdict=verdict, said=said, seconds=spent, **numbers)
        print(f"{verdict:7s} {name:20s} {said} ({spent:.0f} s)", flush=True)
        (out / "summary.json").write_text(json.dumps(plain(summary), indent=1) + "\n", encoding="utf-8")
    bad = [name for name, step in summary["steps"].items() if step["verdict"] not in ("ok", "-")]
    print(f"not right: {', '.join(bad)}; see {out / 'log.txt'}" if bad else "all is well")
    return len(bad)


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # as an optimiser does: once, for all steps
    sys.exit(min(1, main(tyro.cli(Config, description=__doc__))))
