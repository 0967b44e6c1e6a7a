"""Scores of a base model by number of sampling steps: `python tools/score_base.py [CHECKPOINT] [--out FILE]`.

The 64 standard held-out texts, one noise seed, DNSMOS p808 and (where its weights are found) NISQA, level,
noise floor and the distance to the speaker; first the schedule of the gate (25 steps), then the others.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from dlpo_nb.core import base_path, environment
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.heldout import measure, speaker_log_mels, synthesise_all
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.text import prompts
from dlpo_nb.policies import load_policy

SCHEDULES = ("geometric 25", "geometric 10", "geometric 50", "trailing 25", "trailing 10")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="tiny_base", help="a file or a packaged base")
    parser.add_argument("--out", type=Path, default=Path("results/tiny_base/scores.json"))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="'SPACING STEPS'")
    args = parser.parse_args()
    model = load_policy(base_path(args.checkpoint))
    texts = prompts("heldout")[: args.texts]
    judges = {"p808": get_reward("dnsmos")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    rows, speaker = [], speaker_log_mels(texts)
    for name in args.schedules:
        spacing, steps = name.split()
        start = time.perf_counter()
        audio = synthesise_all(model, texts, NoiseSchedule.linear().respaced(int(steps), spacing), args.seed)
        seconds = time.perf_counter() - start
        scores = measure(audio, texts, judges, speaker)
        rows.append(
            {
                "schedule": name,
                "texts": len(texts),
                "seed": args.seed,
                **{k: round(float(np.mean([r[k] for r in scores])), 4) for k in scores[0] if k != "text"},
            }
        )
        print(rows[-1], f"{seconds:.0f} s", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_name("environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
