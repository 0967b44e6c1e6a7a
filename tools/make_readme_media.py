"""The README's sounds and curve: `python tools/make_readme_media.py [INDEX]`, after
tools/run_seeds.py.

Writes docs/audio/base.mp3, tuned.mp3 and control.mp3 (held-out text INDEX, seed 0, the same noise),
a picture of their spectrograms and the reward curves of all runs of results/tiny_dlpo/.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dlpo_nb.audio import mp3_bytes, read_audio
from dlpo_nb.figures import reward_curve

ROOT = Path(__file__).resolve().parents[1]


def main():
    index = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    runs = ROOT / "runs" / "tiny_dlpo"
    wavs = {
        "base": runs / "dlpo-seed0" / "samples" / f"base_{index:03d}.wav",
        "tuned": runs / "dlpo-seed0" / "samples" / f"tuned_{index:03d}.wav",
        "control": runs / "control-seed0" / "samples" / f"tuned_{index:03d}.wav",
    }
    (ROOT / "docs" / "audio").mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.4), sharey=True, layout="constrained")
    for ax, (name, path) in zip(axes, wavs.items()):
        audio = read_audio(path)
        (ROOT / "docs" / "audio" / f"{name}.mp3").write_bytes(mp3_bytes(audio))
        ax.specgram(audio.numpy() + 1e-6, NFFT=512, noverlap=384, Fs=22050, cmap="magma", vmin=-130, vmax=-40)
        ax.set_title({"base": "base", "tuned": "DLPO", "control": "control (shuffled)"}[name])
        ax.set_xlabel("s")
    fig.savefig(ROOT / "docs" / "before_after.png", dpi=80)
    reward_curve(sorted((ROOT / "results" / "tiny_dlpo").glob("*-seed*"))).savefig(
        ROOT / "docs" / "reward_curve.png", dpi=80, bbox_inches="tight"
    )
    print((runs / "dlpo-seed0" / "samples" / "texts.txt").read_text().splitlines()[index])


if __name__ == "__main__":
    main()
