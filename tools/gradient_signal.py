"""Signal and noise of the policy gradient of a preset's base, step by step:
`python tools/gradient_signal.py [PRESET]`.

Short train prompts x 8 rollouts, the preset's reward. All actions of the chain; of `wavegrad-tiny` the
rollouts of a text are forked at the noisiest one (they share only x_T); see nbs/32_ddpo and
nbs/43_diagnostics. Writes results/tiny_base/gradient_signal.json, or the file that --out names.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from dlpo_nb.config import applicable
from dlpo_nb.core import environment
from dlpo_nb.diagnostics import gradient_signal
from dlpo_nb.finetune import Finetuner
from dlpo_nb.inputs import load_base, load_recordings, load_reward, load_texts
from dlpo_nb.settings import PRESETS, LaunchConfig, preset_settings


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
    parser.add_argument("preset", nargs="?", default="wavegrad-tiny", choices=PRESETS)
    parser.add_argument("--groups", type=int, default=64, help="texts")
    parser.add_argument("--train-steps", default="all")
    parser.add_argument("--fork", type=int, help="default: 9 for wavegrad-tiny, else none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "results" / "tiny_base" / "gradient_signal.json",
    )
    args = parser.parse_args()
    fork = (9 if args.preset == "wavegrad-tiny" else 0) if args.fork is None else args.fork
    flat = applicable(LaunchConfig, preset_settings(args.preset, "ddpo") | {"method": "ddpo"})
    flat |= dict(batch_size=8 * args.groups, group_size=8, fork=fork, train_steps=args.train_steps)
    config = LaunchConfig.of(**flat | {"seed": args.seed}).resolved()
    policy = load_base(config)
    texts = load_texts(policy, config.texts, "train", config.max_words)
    tuner = Finetuner(config, policy, load_reward(config), texts, load_recordings(config, policy))
    found = gradient_signal(tuner, progress=True)
    steps = [rounded(row) for row in found.pop("steps")]
    how = shlex.join(["python", "tools/gradient_signal.py", *sys.argv[1:]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"how": how, **rounded(found), "steps": steps, "environment": environment()}, indent=1)
        + "\n"
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
