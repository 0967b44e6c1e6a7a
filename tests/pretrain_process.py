"""A few pre-training steps in float64, in one process or several:
python tests/pretrain_process.py SETTINGS.json"""

import json
import sys
from pathlib import Path

from dlpo_nb.core import run_main
from dlpo_nb.distributed import run_process
from dlpo_nb.optimisers import make_optimisers
from dlpo_nb.pretrain import prepare, train_step
from dlpo_nb.pretrain_settings import PretrainConfig
from dlpo_nb.training_run import save


def train(settings):
    config = PretrainConfig(**{**settings, "corpus": Path(settings["corpus"]), "out": Path(settings["out"])})
    run = prepare(config)
    run.model.double(), run.average.double()
    run.optimisers = make_optimisers(run.model, config.optimiser, config.lr, config.matrix_lr)
    steps = run.recipe.steps(run.model, run.items)
    for step in range(config.steps):
        train_step(
            run,
            {
                name: value.double() if value.is_floating_point() else value
                for name, value in steps[step].items()
            },
        )
    save(run)


if __name__ == "__main__":
    run_main(lambda: run_process(lambda: train(json.loads(Path(sys.argv[1]).read_text()))))
