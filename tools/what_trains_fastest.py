"""What a few minutes of training are worth under several settings:
`python tools/what_trains_fastest.py CORPUS`.

CORPUS is made by `python -m dlpo_nb.data`. Each setting trains the same network from the same seed for the
same minutes of processor time (one thread, so that other work on the machine does not count) and is judged by
the validation: the denoising loss of the averaged model at five noise levels, on the same windows under the
same noise. Writes results/what_trains_fastest.json after each.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from dlpo_nb import pretrain, recipes
from dlpo_nb.pretrain_settings import PretrainConfig
from dlpo_nb.wavegrad2 import training
from dlpo_nb.core import environment

SETTINGS = {  # flags, and what is changed about the network
    "as shipped": ({}, None),
    "12 windows a step": ({"batch_size": 12}, None),
    "AdamW": ({"optimiser": "adamw", "lr": 1.5e-3}, None),
    "no annealing": ({"final_lr": 1.0}, None),
    "last layer as drawn": ({}, "loud"),
    "plain output": ({}, "plain"),
    "the small network": ({"arch": "small"}, None),
}


def train(corpus, minutes, flags, network):
    """Steps, and the validation's losses, of a run."""
    # the clock of the run is the processor's
    changes = [mock.patch.object(pretrain, "time", SimpleNamespace(monotonic=time.process_time))]
    if network == "loud":
        changes.append(
            mock.patch.object(
                recipes, "new_model", lambda arch, quiet=True: training.new_model(arch, quiet=False)
            )
        )
    if network == "plain":
        changes.append(mock.patch.dict(training.NARROW, preconditioned=False))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        config = PretrainConfig(
            Path(corpus),
            Path(folder) / "run",
            minutes=minutes,
            warmup_steps=50,
            sample_every=0,
            log_every=10**6,
            threads=1,
            **flags,
        )
        run = pretrain.pretrain(config, progress=False)
        return run.step, run.validation


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "results" / "what_trains_fastest.json",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "how": "python tools/what_trains_fastest.py CORPUS",
        "minutes": args.minutes,
        "seed": 0,
        "environment": environment(),
        "runs": {},
    }
    for name, (flags, network) in SETTINGS.items():
        steps, validation = train(args.corpus, args.minutes, flags, network)
        result["runs"][name] = {"steps": steps, "validation": validation}
        print(
            f"{name:24s}{steps:6d} steps  ",
            {level: round(loss, 3) for level, loss in validation.items()},
            flush=True,
        )
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
