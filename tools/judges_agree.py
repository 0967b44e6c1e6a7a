"""Do the judges agree which of several renderings of a sentence is the better one?
`python tools/judges_agree.py`.

The packaged voice speaks 24 short train prompts 8 times each, through each vocoder, in 5 steps. Of each judge
(the reward for the level among them) the mean, the spread between texts, the spread within a text and the
best of 8; and the correlations of the judges within a text. Writes results/gradtts_small/judges_agree.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dlpo_nb.core import base_path, environment
from dlpo_nb.heldout import scores_or_reasons, synthesise_all
from dlpo_nb.policies import load_policy
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.text import prompts

ROOT = Path(__file__).resolve().parents[1]


def agreement(policy, vocoder, judges, texts, rollouts, steps):
    """Spreads and correlations of the judges' scores (texts, rollouts) through one vocoder."""
    policy.hear_through(vocoder)
    each = [text for text in texts for _ in range(rollouts)]
    audio = synthesise_all(policy, each, policy.training_schedule().respaced(steps, "trailing"), 0)
    scored = {
        name: np.array(scores_or_reasons(judge, audio, each, policy.sample_rate)).reshape(
            len(texts), rollouts
        )
        for name, judge in judges.items()
    }
    within = {name: scores - scores.mean(1, keepdims=True) for name, scores in scored.items()}
    spreads = {
        name: dict(
            mean=scores.mean(),
            between_texts=scores.mean(1).std(),
            within_a_text=np.sqrt(np.square(within[name]).mean() * rollouts / (rollouts - 1)),
            best_of_all=scores.max(1).mean(),
        )
        for name, scores in scored.items()
    }
    correlations = np.corrcoef([scores.ravel() for scores in within.values()])
    names = list(judges)
    pairs = {
        f"{names[i]}, {names[j]}": round(correlations[i, j], 3)
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    rounded = {name: {key: round(float(v), 3) for key, v in row.items()} for name, row in spreads.items()}
    return dict(judges=rounded, correlations_within_a_text=pairs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="gradtts_small", help="a file or a packaged base")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gradtts_small" / "judges_agree.json")
    args = parser.parse_args()
    judges = {name: get_reward(name) for name in ("distillmos", "dnsmos", "level")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    texts = [text for text in prompts("train") if len(text.split()) <= 4][: args.texts]
    policy = load_policy(base_path(args.checkpoint))
    found = {
        vocoder: agreement(policy, vocoder, judges, texts, args.rollouts, args.steps)
        for vocoder in ("vocos", "griffinlim")
    }
    settings = dict(checkpoint=args.checkpoint, texts=args.texts, rollouts=args.rollouts, steps=args.steps)
    args.out.write_text(json.dumps(settings | found | {"environment": environment()}, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
