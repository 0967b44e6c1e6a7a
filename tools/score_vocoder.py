"""What is lost on the way from mel to sound.

    python tools/score_vocoder.py --corpus FOLDER [--weights FILE] [--other FOLDER]

The first 64 recordings of a corpus at 24 kHz, which `tools/train_vocoder.py` holds out, as they are and
through both vocoders; the packaged Grad-TTS on the 64 standard held-out texts, through both; and, of another
voice, the first five seconds of 16 files of --other. DNSMOS p808, Distill-MOS, NISQA (where its weights are
found) and, where the text is known, the pooled word error rate of Whisper tiny.en.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dlpo_nb.audio import read_audio
from dlpo_nb.core import base_path, environment
from dlpo_nb.corpus import load_corpus
from dlpo_nb.heldout import measure, synthesise_all
from dlpo_nb.policies import load_policy
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.rewards.words import pooled_wer
from dlpo_nb.text import prompts
from dlpo_nb.vocoder import SMALL_MEL, get_vocoder
from dlpo_nb.vocos import Vocos

RATE = SMALL_MEL.sample_rate


def spoken(vocoder, texts, base):
    """The texts by a base, ten trailing steps, through a vocoder."""
    policy = load_policy(base_path(base))
    policy.__dict__["vocoder"] = vocoder
    return synthesise_all(policy, texts, policy.training_schedule().respaced(10, "trailing"), 0)


def other_voice(folder):
    """The first five seconds of the first 16 recordings of a folder."""
    files = sorted(folder.iterdir())[:16]
    return [read_audio(path, RATE, resample=True)[: 5 * RATE] for path in files]


def things_to_hear(args, vocoders):
    """{name: (function that makes the sounds, their texts or None)}."""
    items = load_corpus(args.corpus, RATE)[: args.texts].items
    recordings = [torch.from_numpy(item.audio.astype(np.float32) / 32767) for item in items]
    said, asked = [item.text for item in items], prompts("heldout")[: args.texts]
    what = {"recordings": (lambda: recordings, said)}
    for name, vocoder in vocoders.items():
        what[f"recordings through {name}"] = partial(vocoder.copy, recordings), said
    for name, vocoder in vocoders.items():
        what[f"{args.base} through {name}"] = partial(spoken, vocoder, asked, args.base), asked
    if args.other:
        strangers = other_voice(args.other)
        what["another voice"] = (lambda: strangers), None
        for name, vocoder in vocoders.items():
            what[f"another voice through {name}"] = partial(vocoder.copy, strangers), None
    return what


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of vocos; without it the packaged ones")
    parser.add_argument("--base", default="gradtts_small", help="a file or a packaged base")
    parser.add_argument("--other", type=Path, help="a folder of recordings of another voice")
    parser.add_argument("--out", type=Path, default=Path("results/vocos_small/scores.json"))
    parser.add_argument("--texts", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vocoders = {
        "Griffin-Lim": get_vocoder("griffinlim", SMALL_MEL),
        "vocos": Vocos(weights=args.weights),
    }
    judges = {"p808": get_reward("dnsmos"), "distillmos": get_reward("distillmos")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    rows, listener = [], get_reward("wer")
    for name, (make, texts) in things_to_hear(args, vocoders).items():
        audio = make()
        scores = measure(audio, texts or [""] * len(audio), judges, None, RATE)
        means = {k: round(float(np.mean([r[k] for r in scores])), 4) for k in scores[0] if k != "text"}
        rows.append(dict(what=name, texts=len(audio)) | means)
        if texts:
            rows[-1]["wer"] = round(pooled_wer(texts, listener.hear(audio, RATE)), 4)
        print(rows[-1], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_name("environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
