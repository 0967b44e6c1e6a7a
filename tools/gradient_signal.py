"""Signal and noise of the policy gradient on the packaged base, step by step:
`python tools/gradient_signal.py`.

Short train prompts x 8 rollouts, DNSMOS p808 as reward. All nine actions of the 10-step chain, the rollouts
of a text forked at the noisiest one (they share only x_T); see nbs/32_ddpo and nbs/40_finetune. Writes
results/tiny_base/gradient_signal.json.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from dlpo_nb.core import asset, environment
from dlpo_nb.config import FinetuneConfig
from dlpo_nb.diagnostics import gradient_signal
from dlpo_nb.finetune import Finetuner
from dlpo_nb.rewards import get_reward
from dlpo_nb.text import prompts
from dlpo_nb.wavegrad2.model import load_wavegrad2


def rounded(row):
    """Three digits; null where no signal was measured."""
    return {
        k: (v if isinstance(v, int) else float(f"{v:.3g}") if math.isfinite(v) else None)
        for k, v in row.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=64, help="texts")
    parser.add_argument("--train-steps", default="all")
    parser.add_argument("--fork", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "results" / "tiny_base" / "gradient_signal.json",
    )
    args = parser.parse_args()
    texts = [text for text in prompts("train") if len(text.split()) <= 4]
    config = FinetuneConfig.of(
        "ddpo", batch_size=8 * args.groups, fork=args.fork, train_steps=args.train_steps, seed=args.seed
    )
    tuner = Finetuner(config, load_wavegrad2(asset("tiny_base.safetensors")), get_reward("dnsmos"), texts)
    found = gradient_signal(tuner, progress=True)
    steps = [rounded(row) for row in found.pop("steps")]
    how = shlex.join(["python", "tools/gradient_signal.py", *sys.argv[1:]])
    args.out.write_text(
        json.dumps({"how": how, **rounded(found), "steps": steps, "environment": environment()}, indent=1)
        + "\n"
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
