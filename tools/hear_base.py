"""How much of a base a recogniser understands: `python tools/hear_base.py CORPUS [CHECKPOINT]` (without one:
the packaged base).

CORPUS is the speaker's own reading of the held-out prompts, see tools/make_speaker_reference.py. Pooled word
error rate of pocketsphinx, an old recogniser that can only show a collapse, on held-out prompts 65 to 88 (the
longer ones), 25 steps, seed 0.
"""

import sys

import numpy as np
import torch

from dlpo_nb.audio import SAMPLE_RATE
from dlpo_nb.core import base_path
from dlpo_nb.corpus import load_corpus
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.heldout import synthesise_all
from dlpo_nb.rewards.wer import WER
from dlpo_nb.rewards.words import pooled_wer
from dlpo_nb.text import prompts
from dlpo_nb.wavegrad2.model import load_wavegrad2


def main():
    texts = prompts("heldout")[64:88]
    items = {item.text: item.audio for item in load_corpus(sys.argv[1]).items}
    model = load_wavegrad2(base_path(sys.argv[2] if len(sys.argv) > 2 else "tiny_base"))
    judge = WER("pocketsphinx")
    spoken = {
        "speaker": [torch.from_numpy(items[text] / np.float32(32767)) for text in texts],
        "base": synthesise_all(model, texts, NoiseSchedule.linear().respaced(25, "geometric"), 0),
    }
    for name, audio in spoken.items():
        print(f"{name}: word error rate {pooled_wer(texts, judge.hear(audio, SAMPLE_RATE)):.3f}")


if __name__ == "__main__":
    main()
