"""Sounds and pictures of an experiment of tools/run_seeds.py: `python tools/make_readme_media.py NAME`.

Of runs/NAME, seed 0: docs/audio/NAME/{base,tuned,control}_INDEX.mp3 (the same held-out text from the same
noise) and docs/NAME_spectrograms.png of the first of them; of results/NAME: docs/NAME_curve.png, the reward
curves of all seeds. And docs/idea.png, the first picture of nbs/index.ipynb.
"""

import argparse
import base64
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import soundfile

from dlpo_nb.audio import mp3_bytes, read_audio
from dlpo_nb.figures import reward_curve

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"base": "base", "tuned": "DLPO", "control": "control (shuffled)"}


def recordings(runs, index):
    """Paths of what base, tuned model and control say."""
    sample = lambda run, system: runs / f"{run}-seed0" / "samples" / f"{system}_{index:03d}.wav"
    return dict(
        base=sample("dlpo", "base"), tuned=sample("dlpo", "tuned"), control=sample("control", "tuned")
    )


def draw(wavs):
    """Their spectrograms side by side."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.4), sharey=True, layout="constrained")
    for ax, (name, path) in zip(axes, wavs.items()):
        audio, rate = read_audio(path, None).numpy(), soundfile.info(path).samplerate
        ax.specgram(audio + 1e-6, NFFT=512, noverlap=384, Fs=rate, cmap="magma", vmin=-130, vmax=-40)
        ax.set_title(TITLES[name])
        ax.set_xlabel("s")
    return fig


def picture_of_the_idea() -> bytes:
    """The first picture that the index shows."""
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return base64.b64decode(next(data["image/png"] for data in shown if "image/png" in data))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the folders in runs/ and results/")
    parser.add_argument("--texts", type=int, nargs="+", default=[0, 1, 2], help="held-out texts, by number")
    args = parser.parse_args()
    runs, docs = ROOT / "runs" / args.name, ROOT / "docs"
    (docs / "audio" / args.name).mkdir(parents=True, exist_ok=True)
    for index in args.texts:
        for name, path in recordings(runs, index).items():
            sound = mp3_bytes(read_audio(path, None), soundfile.info(path).samplerate)
            (docs / "audio" / args.name / f"{name}_{index}.mp3").write_bytes(sound)
    draw(recordings(runs, args.texts[0])).savefig(docs / f"{args.name}_spectrograms.png", dpi=80)
    (docs / "idea.png").write_bytes(picture_of_the_idea())
    curve = reward_curve(sorted((ROOT / "results" / args.name).glob("*-seed*")))
    curve.savefig(docs / f"{args.name}_curve.png", dpi=80, bbox_inches="tight")
    texts = (runs / "dlpo-seed0" / "samples" / "texts.txt").read_text().splitlines()
    print([texts[index] for index in args.texts])


if __name__ == "__main__":
    main()
