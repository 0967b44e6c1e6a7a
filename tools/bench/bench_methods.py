"""What an episode of each method costs, beside DDPO's: `python tools/bench/bench_methods.py`.

One thread, the packaged base, two texts x 8 rollouts with a free reward;
the methods take turns, and the fastest of three rounds counts. Writes results/all_methods/seconds.json.
"""

import json
from pathlib import Path

import torch
from bench_episode import level

from dlpo_nb.core import environment
from dlpo_nb.config import FinetuneConfig
from dlpo_nb.finetune import Finetuner
from dlpo_nb.inputs import load_base, load_recordings
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.settings import LaunchConfig
from dlpo_nb.text import prompts

PHASES = ("seconds/rollout", "seconds/update", "seconds")


def main():
    torch.set_num_threads(1)
    texts, corpus = prompts("train")[:2], load_recordings(LaunchConfig(), load_base(LaunchConfig()))
    tuners = {
        m: Finetuner(FinetuneConfig.of(m, batch_size=16), load_base(LaunchConfig()), level, texts, corpus)
        for m in OBJECTIVES.names()
    }
    rounds = {m: [] for m in tuners}
    for _ in range(3):
        for method, tuner in tuners.items():
            tuner.next_episode = 0  # the same texts and draws
            rounds[method].append(tuner.episode())
    best = {m: {phase: min(row[phase] for row in rows) for phase in PHASES} for m, rows in rounds.items()}
    table = {
        m: {phase: round(v / best["ddpo"][phase], 3) for phase, v in row.items()} for m, row in best.items()
    }
    for method, row in table.items():
        print(
            f"{method:9s}"
            + "".join(f"  {phase.removeprefix('seconds/')} {row[phase]:.2f}" for phase in PHASES)
            + f"   ({best[method]['seconds']:.1f} s)"
        )
    path = Path(__file__).resolve().parents[2] / "results" / "all_methods" / "seconds.json"
    path.write_text(
        json.dumps(
            {
                "how": "python tools/bench/bench_methods.py",
                "to ddpo": table,
                "ddpo": best["ddpo"],
                "environment": environment(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
