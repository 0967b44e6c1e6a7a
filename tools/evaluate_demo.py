"""Judge the recordings of the paper's demo page:
`python tools/evaluate_demo.py FOLDER [--out results/dlpo_demo]`.

FOLDER holds LJ001-0004_base.flac and so on: six texts by a human (gt) and six systems. NISQA needs its
weights (DLPO_NISQA_WEIGHTS). The table of 51_demo is drawn from what is written: evaluation.json and
evaluation.csv.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import librosa
import torch

from dlpo_nb.audio import read_audio, resample
from dlpo_nb.core import UserError, run_main
from dlpo_nb.evaluate import EvaluateConfig, evaluate
from dlpo_nb.rewards.distillmos import SAMPLE_RATE, DistillMOS, to_16k

SYSTEMS = ("base", "dlpo", "dpok", "klinr", "rwr", "ddpo", "gt")
TEXTS = {  # LJSpeech, public domain
    "LJ001-0004": "produced the block books, which were the immediate predecessors of the true printed book,",
    "LJ001-0079": "Caslon's type is clear and neat, and fairly well designed;",
    "LJ001-0100": "and these somewhat wiry letters are suitable for the machine process, "
    "which would not do justice to letters of more generous design.",
    "LJ001-0105": "America has produced a good many showy books, the typography, paper, "
    "and illustrations of which are, however, all wrong,",
    "LJ001-0108": "it is obvious that legibility is the first thing to be aimed at "
    "in the forms of the letters;",
    "LJ001-0119": "and the elegance and legibility of the ancient more striking than in the Arabic numerals.",
}


def arrange(folder, where):
    "A folder a system, with its recordings and texts.txt, as `dlpo_nb.evaluate` wants them."
    for system in SYSTEMS:
        (where / system).mkdir()
        for text in TEXTS:
            source = Path(folder).resolve() / f"{text}_{system}.flac"
            if not source.is_file():
                raise UserError(
                    f"there is no {source.name} in {folder}; give the folder of the demo page's recordings"
                )
            os.symlink(source, where / system / f"{text}.flac")
        (where / system / "texts.txt").write_text(
            "".join(f"{name}|{said}\n" for name, said in TEXTS.items()), encoding="utf-8"
        )


def by_filter(folder):
    """Mean Distill-MOS {filter: {system: mean}}, by what brings the recordings to 16 kHz."""
    judge, means = DistillMOS(device="cpu"), {}
    filters = {
        "long": lambda audio: to_16k(audio, 22050),
        "librosa, soxr": lambda audio: torch.from_numpy(
            librosa.resample(audio.numpy(), orig_sr=22050, target_sr=SAMPLE_RATE)
        ),
        "torchaudio": lambda audio: resample(audio, 22050, SAMPLE_RATE),
    }
    for name, convert in filters.items():
        means[name] = {}
        for system in SYSTEMS:
            clips = [convert(read_audio(Path(folder) / f"{text}_{system}.flac")) for text in TEXTS]
            scores = judge.score_clips(clips, SAMPLE_RATE, list(TEXTS)).tolist()
            means[name][system] = round(statistics.mean(scores), 4)
    return means


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/dlpo_demo"))
    parser.add_argument("--metrics", default="distillmos,dnsmos,nisqa,wer")
    args = parser.parse_args()
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        arrange(args.folder, Path(folder))
        with contextlib.chdir(folder):  # so that what is written names no folder of this machine
            evaluate(EvaluateConfig(systems=SYSTEMS[:-1], ground_truth="gt", metrics=args.metrics, out="out"))
        out.mkdir(parents=True, exist_ok=True)
        for name in ("evaluation.json", "evaluation.csv"):
            shutil.copy(Path(folder) / "out" / name, out / name)
    found = {"command": "python tools/evaluate_demo.py FOLDER", "means": by_filter(args.folder)}
    (out / "resampling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
