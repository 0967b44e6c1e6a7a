"""What recordings of the packaged voice's teacher get, as they are and copied through each vocoder.

    python tools/measure_ceilings.py

hibari (the extra [voice]) speaks the 64 standard held-out texts as it spoke the training corpus; the noise
of a sentence follows from its text. Means of every judge that is here go into dlpo_nb/assets/ceilings.json,
which tables show beside the scores of a voice (48a_ceilings), the scores of each utterance into
results/ceilings.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch

from dlpo_nb.ceilings import JUDGES, mark
from dlpo_nb.core import PACKAGE, environment, fingerprint, run_main
from dlpo_nb.evaluate import EvaluateConfig
from dlpo_nb.heldout import measure, write_rows
from dlpo_nb.hibari import RATE, speak
from dlpo_nb.judges import find_judges
from dlpo_nb.judging import pooled_rates
from dlpo_nb.text import prompts
from dlpo_nb.vocoder import SMALL_MEL, get_vocoder


def means(rows):
    "The mean of each measurement, and the word error rate over all words."
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "text"}
    return {name: round(value, 4) for name, value in (scores | pooled(rows)).items()}


def pooled(rows):
    return {"pooled_wer": rate for rate in pooled_rates({"rows": rows}).values()}


def main():
    torch.set_num_threads(1)
    config, texts = EvaluateConfig(device="cpu"), prompts("heldout")[:64]
    judges, notes = find_judges(JUDGES, config)
    print("\n".join(notes))
    recordings = [torch.from_numpy(speak(text).audio.astype(np.float32) / 32767) for text in texts]
    vocoders = {name: get_vocoder(name, SMALL_MEL) for name in ("griffinlim", "vocos")}
    rows = {"recordings": measure(recordings, texts, judges, None, RATE)}
    for name, vocoder in vocoders.items():
        rows[name] = measure(vocoder.copy(recordings), texts, judges, None, RATE)
        print(name, means(rows[name]), flush=True)
    found = dict(
        command="python tools/measure_ceilings.py",
        voice="hibari",
        version=importlib.metadata.version("hibari-tts"),
        texts=dict(count=len(texts), fingerprint=fingerprint(texts)),
        judges={name: mark(name, judge, config) for name, judge in judges.items()},
        recordings=means(rows["recordings"]),
        vocoders={name: dict(identity=v.identity, **means(rows[name])) for name, v in vocoders.items()},
        environment=environment(),
    )
    (PACKAGE / "assets" / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")
    out = Path("results/ceilings")
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "evaluation.csv", rows)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
