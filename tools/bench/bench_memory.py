"""The most memory that a DLPO update of WaveGrad 2 Base needs, by what is computed at once:
`python tools/bench/bench_memory.py`.

Texts of LJSpeech's mean length (6.5 s), random weights, float32 on a CPU, each setting in a process of its
own (peak of the resident memory); on a GPU the same tensors are held. A slice is freed before the next, so
one trained step and one noise level show the peak; the stored pairs of all rollouts come on top and are added
up here: 2 x trained steps x samples x 4 bytes per rollout. Writes results/bench/memory.json. With --setting
NAME: that one alone, printed as json.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from bench_episode import Config, level, texts_for

from dlpo_nb.core import environment
from dlpo_nb.finetune import Finetuner
from dlpo_nb.cost import memory, stand_in_base
from dlpo_nb.inputs import load_recordings
from dlpo_nb.settings import PRESETS, LaunchConfig

SETTINGS = {
    "weights, reference, optimiser": dict(micro_batch=0),
    "1 at once": dict(micro_batch=1),
    "1 at once, bfloat16": dict(micro_batch=1, precision="bfloat16"),
    "1 at once, rank 8": dict(micro_batch=1, lora_rank=8),
    "2 at once": dict(micro_batch=2),
    "4 at once": dict(micro_batch=4),
}
SYMBOLS, HOP, RATE = 80, 300, 22050


def peak(options):
    """Gigabytes of a process that has made one update of as many rollouts as are computed at once."""
    count = options["micro_batch"]
    paper = LaunchConfig.of(
        **PRESETS["paper"]
        | dict(
            corpus="packaged",
            batch_size=max(count, 2),
            rollout_steps=3,
            train_steps="last:1",
            denoising_steps=1,
            denoising_frames=0,
            **dict(precision="float32") | options | {"micro_batch": max(count, 1)},
        )
    ).resolved()
    model = stand_in_base()
    texts = texts_for(model, Config(batch_size=paper.batch_size, symbols=SYMBOLS))
    tuner = Finetuner(paper, model, level, texts, load_recordings(paper, model))
    if count == 0:  # as after a step: the moments are there, and no activations
        for p in tuner.parameters:
            p.grad = torch.zeros_like(p)
        tuner.optimiser.step()
    else:
        tuner.episode()
    return memory(torch.device("cpu"))


def main():
    rows = {}
    for name in SETTINGS:
        done = subprocess.run(
            [sys.executable, __file__, "--setting", name], check=True, capture_output=True, text=True
        )
        rows[name] = json.loads(done.stdout)
        print(f"{name:32s}{rows[name]:6.2f} GB", flush=True)
    samples = SYMBOLS * 6 * HOP
    pairs = {f"{steps} trained steps": 64 * 2 * steps * samples * 4 / 1e9 for steps in (1, 10, 50, 999)}
    print("stored pairs of 64 rollouts:", {name: f"{size:.2f} GB" for name, size in pairs.items()})
    path = Path(__file__).resolve().parents[2] / "results" / "bench" / "memory.json"
    path.write_text(
        json.dumps(
            {
                "how": "python tools/bench/bench_memory.py",
                "peak_gb": rows,
                "pairs_gb": pairs,
                "environment": environment(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    print(peak(SETTINGS[sys.argv[2]])) if sys.argv[1:2] == ["--setting"] else main()
