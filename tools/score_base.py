"""Scores of a base by number of sampling steps: `python tools/score_base.py [CHECKPOINT] [--out FILE]`.

The 64 standard held-out texts, one noise seed: DNSMOS p808, Distill-MOS, NISQA (where its weights are found),
the pooled word error rate of Whisper tiny.en (where it is installed), level, noise floor, and for the voice
of the packaged WaveGrad 2 the distance to its speaker.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from dlpo_nb.core import base_path, environment
from dlpo_nb.heldout import measure, speaker_log_mels, synthesise_all
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.rewards.wer import packaged_whisper
from dlpo_nb.rewards.words import pooled_wer
from dlpo_nb.text import prompts
from dlpo_nb.policies import load_policy

SCHEDULES = {
    "wavegrad2": ("geometric 25", "geometric 10", "geometric 50", "trailing 25", "trailing 10"),
    "gradtts": ("trailing 10", "trailing 25"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="tiny_base", help="a file or a packaged base")
    parser.add_argument("--out", type=Path, default=Path("results/tiny_base/scores.json"))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", nargs="+", metavar="'SPACING STEPS'")
    args = parser.parse_args()
    model = load_policy(base_path(args.checkpoint))
    texts = prompts("heldout")[: args.texts]
    judges = {"p808": get_reward("dnsmos"), "distillmos": get_reward("distillmos")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    rows, speaker = [], speaker_log_mels(texts) if model.kind == "wavegrad2" else None
    listener = get_reward("wer") if packaged_whisper() else None
    for name in args.schedules or SCHEDULES[model.kind]:
        spacing, steps = name.split()
        start = time.perf_counter()
        schedule = model.training_schedule().respaced(int(steps), spacing)
        audio = synthesise_all(model, texts, schedule, args.seed)
        seconds = time.perf_counter() - start
        scores = measure(audio, texts, judges, speaker, model.sample_rate)
        means = {k: round(float(np.mean([r[k] for r in scores])), 4) for k in scores[0] if k != "text"}
        rows.append({"schedule": name, "texts": len(texts), "seed": args.seed, **means})
        if listener:
            rows[-1]["wer"] = round(pooled_wer(texts, listener.hear(audio, model.sample_rate)), 4)
        print(rows[-1], f"{seconds:.0f} s", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_name("environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
