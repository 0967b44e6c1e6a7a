"""Make the packaged recordings of the natural voice: `python tools/speak_prompts.py`.

hibari (Apache-2.0, the extra [voice]) speaks the first 64 train prompts of at most four words, at 24 kHz,
into dlpo_nb/assets/speech_hibari: what holds the packaged Grad-TTS where the penalty is taken on recordings.
"""

import shutil
import tempfile
from pathlib import Path

from dlpo_nb.core import PACKAGE, run_main
from dlpo_nb.data import CorpusConfig, make_corpus
from dlpo_nb.text import prompts


def main():
    out = PACKAGE / "assets" / "speech_hibari"
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.txt"
        short = [text for text in prompts("train") if len(text.split()) <= 4]
        texts.write_text("\n".join(short) + "\n", encoding="utf-8")
        make_corpus(CorpusConfig(texts=texts, out=out, voice="hibari", sample_rate=24000, limit=64))
    (out / "failures.txt").unlink()


if __name__ == "__main__":
    run_main(main)
