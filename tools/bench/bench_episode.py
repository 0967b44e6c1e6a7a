"""Seconds of an episode by phase, and how near the machine's ceilings its networks come:
`python tools/bench/bench_episode.py --out FILE`.

WaveGrad 2 Base with random weights on texts of LJSpeech's length (or the packaged base with --tiny), DLPO
with the settings of preset paper but for the flags below, and a reward that costs nothing (a UTMOS with
random weights: --utmos). Every setting in --settings gets an episode to warm up and one that counts. Writes
FILE as json: ceilings, the network's operations and bytes, a row per setting.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from roofline import ceilings, cost, seconds

from dlpo_nb.core import environment, pick_device
from dlpo_nb.cost import memory, stand_in_base, stand_in_texts
from dlpo_nb.finetune import Finetuner
from dlpo_nb.inputs import load_base, load_recordings
from dlpo_nb.rewards.utmos import UTMOS
from dlpo_nb.settings import PRESETS, LaunchConfig
from dlpo_nb.text import text_to_ids

PHASES = ("rollout", "reward", "update")
SETTINGS = {
    "float32": dict(precision="float32"),
    "bfloat16": dict(precision="bfloat16"),
    "bfloat16, all at once": dict(precision="bfloat16", micro_batch=64),
    "bfloat16, a text at once": dict(precision="bfloat16", micro_batch=1),
    "bfloat16, rank 8": dict(precision="bfloat16", lora_rank=8),
}


@dataclass
class Config:
    out: str = "results/bench/episode.json"
    tiny: bool = False  # the packaged base instead of WaveGrad 2 Base
    utmos: bool = False  # a UTMOS with random weights as reward
    batch_size: int = 64  # rollouts
    rollout_steps: int = 50
    denoising_steps: int = 10
    train_steps: str = "random:10"
    symbols: int = 80  # of every text; six frames each are LJSpeech's mean length of 6.6 s
    compile: bool = False  # torch.compile the networks as well
    settings: tuple[str, ...] = tuple(SETTINGS)  # which settings
    device: str = "auto"


def level(audio, lengths, rate, texts):
    """A reward that costs nothing."""
    return torch.stack([a[:n].square().mean() for a, n in zip(audio, lengths)])


def texts_for(model, config):
    """As many texts as the batch has, of about the length asked for."""
    return stand_in_texts(model, config.batch_size, config.symbols, config.symbols)


def tuner_of(config, settings, device):
    """A fine-tuning run at the size asked for."""
    paper = LaunchConfig.of(
        **PRESETS["paper"]
        | dict(
            batch_size=config.batch_size,
            rollout_steps=config.rollout_steps,
            denoising_steps=config.denoising_steps,
            train_steps=config.train_steps,
            corpus="packaged",
            base_checkpoint="tiny_base",
            compile=config.compile,
            **settings,
        )
    )
    model = load_base(paper) if config.tiny else stand_in_base()
    tuner = Finetuner(
        paper.resolved(),
        model,
        UTMOS.untrained(config.device) if config.utmos else level,
        texts_for(model, config),
        load_recordings(paper, model),
        device,
    )
    return tuner


def network(config, device):
    """What a denoising step of a micro-batch of four costs,
    and the share of both ceilings that it reaches, in both precisions; never compiled."""
    # torch compiles nothing any more that it has once met while operations were counted
    tuner = tuner_of(replace(config, compile=False), {}, device)
    ids = torch.tensor([text_to_ids(text)[: config.symbols] for text in (tuner.texts * 4)[:4]], device=device)
    cond = tuner.model.condition(ids, torch.full((4,), ids.shape[1], device=device))
    x = torch.randn(4, int(cond.frames.max()) * tuner.model.width, device=device)
    step = torch.full((4, 1), 0.5, device=device)
    rows = {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):

        def work():
            with torch.no_grad(), torch.autocast(device.type, kind, enabled=kind != torch.float32):
                tuner.model.predict_noise(x, cond.hidden, step, cond.frames)

        limit, asked, spent = ceilings(device, kind), cost(work), seconds(work, device)
        rows[name] = {
            **asked,
            **limit,
            "seconds": spent,
            "audio_seconds": x.numel() / tuner.model.sample_rate,
            "share_of_flops": asked["flops"] / spent / limit["flops_per_s"],
            "share_of_bytes": asked["bytes"] / spent / limit["bytes_per_s"],
        }
        print(
            f"{name}: a step of {rows[name]['audio_seconds']:.0f} s of audio takes {1000 * spent:.1f} "
            f"ms, {asked['flops'] / 1e9:.0f} GFLOP "
            f"({100 * rows[name]['share_of_flops']:.0f} % of the ceiling), {asked['bytes'] / 1e9:.1f} "
            f"GB ({100 * rows[name]['share_of_bytes']:.0f} %)",
            flush=True,
        )
    return rows


def main(config):
    device = pick_device(config.device)
    result = {
        "how": asdict(config),
        "environment": environment(),
        "network": network(config, device),
        "episodes": {},
    }
    for name in config.settings:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tuner = tuner_of(config, SETTINGS[name], device)
        tuner.episode()
        row = tuner.episode()
        result["episodes"][name] = {
            "seconds": row["seconds"],
            **{phase: row[f"seconds/{phase}"] for phase in PHASES},
            "scoring": row["seconds/scoring"],
            "audio_seconds": row["audio_seconds"],
            "memory_gb": memory(device),
        }
        print(
            f"{name:24s}" + "".join(f" {key} {value:.2f}" for key, value in result["episodes"][name].items()),
            flush=True,
        )
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        # after each: a job that runs out of time has what it got
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
