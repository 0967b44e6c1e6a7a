"""Signal and noise of the policy gradient on the packaged base: `python tools/gradient_signal.py`.

16 of the short train prompts x 8 rollouts, DNSMOS p808, training the last 1, 2 or 3 actions; see nbs/40_finetune.
Writes results/tiny_dlpo/gradient_signal.json.
"""
import json
import math
from pathlib import Path

from dlpo_nb.core import asset
from dlpo_nb.finetune import Finetuner, FinetuneConfig, collect, gradient_signal, score_audio
from dlpo_nb.rewards import get_reward
from dlpo_nb.text import prompts
from dlpo_nb.wavegrad2.model import load_wavegrad2

HOW = "python tools/gradient_signal.py (16 texts x 8 rollouts, seed 0; one estimate each, itself noisy; null: no signal measured)"


def measure(last):
    """One row: signal and noise for train steps last:N, and where the reward's spread lies."""
    texts = [text for text in prompts("train") if len(text.split()) <= 4]
    config = FinetuneConfig(batch_size=128, group_size=8, fork=last, train_steps=f"last:{last}", dl_source="sample")
    tuner = Finetuner(config, load_wavegrad2(asset("tiny_base.safetensors")), get_reward("dnsmos"), texts)
    rewards = score_audio(tuner, collect(tuner, 0)).view(-1, 8)
    found = gradient_signal(tuner)
    needed = found["groups_for_signal"]
    return {"train_steps": config.train_steps, "groups": found["groups"], "signal": float(f"{found['signal']:.3g}"), "noise": float(f"{found['noise']:.3g}"),
            "groups_for_signal": round(needed, 1) if math.isfinite(needed) else None,
            "reward_sd_within_text": round(float((rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt()), 4),
            "reward_sd_between_texts": round(float(rewards.mean(1).std()), 4)}


def main():
    rows = [measure(last) for last in (1, 2, 3)]
    path = Path(__file__).resolve().parents[1] / "results" / "tiny_dlpo" / "gradient_signal.json"
    path.write_text(json.dumps({"rows": rows, "how": HOW}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
