"""tools/train_vocoder.py at its smallest: the teacher speaks, a few steps, a file that is heard, resuming."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dlpo_nb.core import UserError, asset, read_jsonl
from dlpo_nb.vocoder import SMALL_MEL
from dlpo_nb.vocos import Vocos

TOOL = Path(__file__).resolve().parents[1] / "tools" / "train_vocoder.py"


@pytest.fixture
def train(tmp_path, monkeypatch):
    "The command in this process, on the first six packaged recordings of its teacher."
    pytest.importorskip("hibari")
    main = runpy.run_path(str(TOOL))["main"]
    corpus, threads = tmp_path / "corpus", torch.get_num_threads()
    (corpus / "audio").mkdir(parents=True)
    lines = (asset("speech_hibari") / "manifest.jsonl").read_text().splitlines()[:6]
    for line in lines:
        for path in (asset("speech_hibari") / "audio").glob(json.loads(line)["id"] + ".*"):
            shutil.copy(path, corpus / "audio")
    (corpus / "manifest.jsonl").write_text("\n".join(lines) + "\n")

    def run(*flags):
        small = "--held-out 2 --batch-size 2 --frames 32 --log-every 1 --save-every 1 --sounds-from 0".split()
        places = ["--corpus", str(corpus), "--out", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *places, *small, *flags])
        main()
        return read_jsonl(tmp_path / "run" / "metrics.jsonl")

    yield run
    torch.set_num_threads(threads)


def test_it_trains_resumes_and_its_file_is_a_vocoder(train, tmp_path):
    rows = train("--minutes", "0.005")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {"gain", "free", "f0", "voiced", "mel", "spectrum_800", "held_out"} <= rows[-1].keys()
    assert rows[-1]["held_out"]["utterances"] == 2
    spoken = (tmp_path / "run" / "frames" / "hidden.f16").stat().st_mtime_ns
    with pytest.raises(UserError, match="add --resume"):
        train("--minutes", "0.01")
    more = train("--minutes", "0.01", "--resume")
    assert more[: len(rows)] == rows and len(more) > len(rows)
    assert (tmp_path / "run" / "frames" / "hidden.f16").stat().st_mtime_ns == spoken, "it was all there"
    vocoder = Vocos(weights=tmp_path / "run" / "vocos_small.safetensors")
    copy = vocoder.copy([0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))])[0]
    assert len(copy) == 4000 // SMALL_MEL.hop * SMALL_MEL.hop and copy.isfinite().all()
