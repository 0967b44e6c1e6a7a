"""How far from the reward's own gradient is the policy gradient? `python tools/reward_gradient.py [PRESET]`.

The preset's base and reward on short train prompts. On the same rollouts: the gradient through all steps of
the chain (the truth, up to its noise), through the last one (DRaFT-1), and the policy gradient's estimate of
all actions; how they lie to each other, see nbs/43_diagnostics. Heard through the voice's own vocoder, whose
slope holds the pitch, unless --vocoder says otherwise; of WaveGrad 2 the truth is exact. Writes
results/gradtts_small/reward_gradient.json, or --out.

    python tools/reward_gradient.py tiny --texts 32 --group-size 4 --reward dnsmos
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

import torch

from dlpo_nb.config import applicable
from dlpo_nb.core import environment
from dlpo_nb.diagnostics import alignment, reward_gradients, signal_and_noise
from dlpo_nb.finetune import Finetuner
from dlpo_nb.inputs import load_base, load_reward, load_texts
from dlpo_nb.settings import PRESETS, LaunchConfig, preset_settings

OUT = Path(__file__).resolve().parents[1] / "results" / "gradtts_small" / "reward_gradient.json"


def rounded(row):
    """Three digits; null where nothing was measured."""
    return {k: float(f"{v:.3g}") if math.isfinite(v) else None for k, v in row.items()}


def make_tuner(args):
    """The loop of the preset with DRaFT through all steps, no fork, and all actions stored."""
    flat = applicable(LaunchConfig, preset_settings(args.preset, "draft") | {"method": "draft"})
    flat |= dict(batch_size=args.texts * args.group_size, group_size=args.group_size, fork=0, beta=0.0)
    flat |= dict(train_steps="all", seed=args.seed, vocoder=args.vocoder, micro_batch=args.group_size)
    flat |= dict(draft_steps=flat["rollout_steps"]) | ({"reward": args.reward} if args.reward else {})
    config = LaunchConfig.of(**flat).resolved()
    policy = load_base(config)
    texts = load_texts(policy, config.texts, "train", config.max_words)
    return Finetuner(config, policy, load_reward(config), texts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="tiny", choices=PRESETS)
    parser.add_argument("--texts", type=int, default=12, help="groups, at least 3")
    parser.add_argument("--group-size", type=int, default=4, help="rollouts of each text, at least 2")
    parser.add_argument("--reward", default="", help="one with a gradient; default: the preset's")
    parser.add_argument("--vocoder", default="", help="default: the base's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tuner = make_tuner(args)
    every = tuner.config.rollout_steps
    found = reward_gradients(tuner, [1, every], progress=True)
    truth, labels = found[every], {"policy": "ddpo", 1: "draft-1", every: f"draft-{every}"}
    methods = {
        label: rounded(
            signal_and_noise(found[name]) | ({} if name == every else alignment(truth, found[name]))
        )
        for name, label in labels.items()
    }
    report = {
        "how": shlex.join(["python", "tools/reward_gradient.py", *sys.argv[1:]]),
        "reward": tuner.config.reward,
        "vocoder": getattr(getattr(tuner.model, "vocoder", None), "identity", ""),
        "rollouts": [args.texts, args.group_size],
        "truth": f"draft-{every}",
        "methods": methods,
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
