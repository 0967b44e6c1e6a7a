"""A few pre-training steps of several jobs, in float64 where the voice can, in one process or several:
python tests/pretrain_process.py JOBS.json"""

import json
import sys
from pathlib import Path

import toy_mel  # noqa: F401  a policy of its own
from small_gradtts import shrunk

from dlpo_nb.core import run_main
from dlpo_nb.distributed import run_process
from dlpo_nb.optimisers import make_optimisers
from dlpo_nb.pretrain import prepare, train_step
from dlpo_nb.pretrain_settings import PretrainConfig
from dlpo_nb.training_run import save


def in_double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def train(path):
    for settings in json.loads(Path(path).read_text()):
        places = {name: Path(settings[name]) for name in ("corpus", "out")}
        config = PretrainConfig(**{**settings, **places})
        with shrunk():
            run = prepare(config)
        if exact := config.arch != "gradtts-small":  # which measures spectrograms in float32
            run.model.double(), run.ema.double()
        run.optimisers = make_optimisers(run.model, config.optimiser, config.lr, config.matrix_lr)
        steps = run.recipe.steps(run.model, run.items)
        for step in range(config.steps):
            train_step(run, in_double(steps[step]) if exact else steps[step])
        save(run)


if __name__ == "__main__":
    run_main(lambda: run_process(lambda: train(sys.argv[1])))
