"""The speaker's own reading of the standard held-out texts: `python tools/make_speaker_reference.py CORPUS`.

CORPUS is made from them by `python -m dlpo_nb.data --texts dlpo_nb/assets/prompts_heldout.txt --out CORPUS`
(needs festival). Writes their log-mel spectrograms, 8 bits per value, to dlpo_nb/assets/heldout_speaker.npz,
so that an evaluation can measure the distance to the speaker anywhere; prints the speaker's own DNSMOS (and
NISQA, where its weights are found).
"""

import sys
from pathlib import Path

import numpy as np
import torch

from dlpo_nb.audio import log_mel
from dlpo_nb.corpus import load_corpus
from dlpo_nb.heldout import measure
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.text import prompts

COUNT, LOW, STEP = 64, -6.0, 0.04  # texts; log10-mel of the 8-bit value 0, and of one unit


def main():
    items = {item.text: item for item in load_corpus(sys.argv[1]).items}
    texts = prompts("heldout")[:COUNT]
    audio = [torch.from_numpy(items[text].audio / np.float32(32767)) for text in texts]
    mels = [log_mel(x)[0].numpy() for x in audio]
    packed = [np.clip(np.round((mel - LOW) / STEP), 0, 255).astype(np.uint8) for mel in mels]
    path = Path(__file__).resolve().parents[1] / "dlpo_nb" / "assets" / "heldout_speaker.npz"
    np.savez_compressed(
        path,
        texts=np.array(texts),
        frames=np.array([mel.shape[1] for mel in mels]),
        mels=np.concatenate(packed, 1),
        low=LOW,
        step=STEP,
    )
    judges = {"dnsmos": get_reward("dnsmos")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    rows = measure(audio, texts, judges)
    print({name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0] if name != "text"})
    print(
        f"{path.name}: {path.stat().st_size / 1000:.0f} kB, lowest log10 mel "
        f"{min(m.min() for m in mels):.2f}, highest {max(m.max() for m in mels):.2f}"
    )


if __name__ == "__main__":
    main()
