"""How much of the base a recogniser understands: `python tools/hear_base.py CORPUS` (needs `pip install pocketsphinx`).

CORPUS is the speaker's own reading of the held-out prompts, see tools/make_speaker_reference.py. Word error rate of
pocketsphinx, an old recogniser that can only show a collapse, on held-out prompts 65 to 88 (the longer ones), 25 steps, seed 0.
"""
import re
import sys

import jiwer
import numpy as np
import torch
from pocketsphinx import Decoder

from dlpo_nb.audio import SAMPLE_RATE, resample
from dlpo_nb.core import asset
from dlpo_nb.data import load_corpus
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.evaluate import synthesise_all
from dlpo_nb.text import prompts
from dlpo_nb.wavegrad2.model import load_wavegrad2


def hear(decoder, audio):
    """The words of an utterance (N,), with a quarter of a second of silence around it."""
    padded = torch.nn.functional.pad(resample(audio, SAMPLE_RATE, 16000), (4000, 4000))
    decoder.start_utt()
    decoder.process_raw((padded.clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def main():
    texts = prompts("heldout")[64:88]
    words = [" ".join(re.findall(r"[a-z']+", text.lower())) for text in texts]
    items = {item.text: item.audio for item in load_corpus(sys.argv[1]).items}
    model = load_wavegrad2(asset("tiny_base.safetensors"))
    spoken = {"speaker": [torch.from_numpy(items[text] / np.float32(32767)) for text in texts],
              "base": synthesise_all(model, texts, NoiseSchedule.linear().respaced(25, "geometric"), 0)}
    for name, audio in spoken.items():
        decoder = Decoder()
        print(f"{name}: word error rate {jiwer.wer(words, [hear(decoder, a) for a in audio]):.3f}")


if __name__ == "__main__":
    main()
