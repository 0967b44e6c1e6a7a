"""The corpus: driving festival (and a stand-in for it that misbehaves), resuming, damaged files, batches."""

import json
import os
import shutil
import stat
import sys
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

from dlpo_nb import data as dd
from dlpo_nb.core import UserError, read_jsonl
from dlpo_nb.corpus import bucketed_batches, collate, load_corpus, read_flac
from dlpo_nb.data import CorpusConfig, fragments, make_corpus
from dlpo_nb.text import phones_to_ids

FAKE = """#!{python}
# behaves like `festival -b script`: writes one second of sound and three phones for each text
import math, re, struct, sys, time, wave
script = sys.argv[2]
if script.startswith("("):
    sys.exit({voice})
for name, text in re.findall(r'^\\(speak "(.*?)" "(.*)"\\)$', open(script).read(), re.M):
    if "crash" in text:
        print("SIOD ERROR: crashed", file=sys.stderr)
        sys.exit(255)
    if "hang" in text:
        time.sleep(60)
    with wave.open(name + ".wav", "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(32000)
        peak = 0 if "silent" in text else 9000
        samples = (int(peak * math.sin(i / 20)) for i in range(32000))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    with open(name + ".phones", "w") as file:
        end = "" if "unfinished" in text else "done\\n"
        file.write("pau 0.1 0\\nhh 0.3 1\\nay 0.6 1\\npau 0.9 0\\n" + end)
"""


@pytest.fixture
def fake_festival(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(voice=0):
        program = folder / "festival"
        program.write_text(FAKE.format(python=sys.executable, voice=voice))
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


def write_texts(path, texts):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


needs_festival = pytest.mark.skipif(
    shutil.which("festival") is None,
    reason="festival is not installed (Debian packages festival, festvox-us-slt-hts)",
)


@needs_festival
def test_festival_speaks_as_it_did(data, tmp_path):
    old = load_corpus(data / "corpus_tiny")
    config = CorpusConfig(write_texts(tmp_path / "t.txt", [item.text for item in old]), tmp_path / "c")
    assert make_corpus(config, progress=False) == (6, 0)
    for a, b in zip(old, load_corpus(tmp_path / "c")):
        assert (a.id, a.text, a.phones, a.frames) == (b.id, b.text, b.phones, b.frames)
        assert np.abs(a.audio.astype(int) - b.audio).max() <= 64


@needs_festival
def test_hostile_texts_are_spoken_or_reported(tmp_path):
    texts = [
        'He said "no".',
        "a \\ b (quit) c",
        "(exit)",
        "?!",
        "Привет.",
        "1/2 of 3,000 at 7:45",
        "don't 'quote'",
        "#; ' `",
        "qwrtz",
    ]
    config = CorpusConfig(write_texts(tmp_path / "t.txt", texts), tmp_path / "c", workers=1)
    count, failed = make_corpus(config, progress=False)
    spoken = [row["text"] for row in read_jsonl(tmp_path / "c" / "manifest.jsonl")]
    reported = [
        line.split("\t")[1]
        for line in (tmp_path / "c" / "failures.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(spoken + reported) == sorted(texts) and (count, failed) == (len(spoken), len(reported))
    assert {"?!", "Привет."} <= set(reported) and 'He said "no".' in spoken and "(exit)" in spoken


def test_crashes_hangs_and_silence_are_reported(fake_festival, tmp_path, monkeypatch):
    fake_festival()
    monkeypatch.setattr(dd, "SECONDS_A_TEXT", 0.5)
    texts = ["one.", "a crash.", "two", "silent.", "unfinished.", "hang.", "three.", "crash"]
    config = CorpusConfig(write_texts(tmp_path / "t.txt", texts), tmp_path / "c")
    assert make_corpus(config, progress=False) == (3, 5)
    failures = dict(
        line.split("\t")[1:] for line in (tmp_path / "c" / "failures.txt").read_text().splitlines()
    )
    assert failures == {
        "a crash.": "SIOD ERROR: crashed",
        "silent.": "festival said nothing",
        "crash": "SIOD ERROR: crashed",
        "unfinished.": "festival stopped in the middle of this text",
        "hang.": "festival did not answer",
    }
    corpus = load_corpus(tmp_path / "c")
    assert [item.text for item in corpus] == ["one.", "two", "three."]
    assert corpus[0].phones == ["HH", "AY1", "sp"] and corpus[0].frames == [15, 22, 4]  # after a full stop
    assert (
        corpus[1].phones == ["HH", "AY1"]
        and corpus[1].samples == 300 * 37
        and np.abs(corpus[1].audio).max() > 32000
    )


def test_goes_on_where_it_stopped(fake_festival, tmp_path):
    fake_festival()
    texts = [f"text {word}." for word in "one two three four five six seven eight nine ten".split()]
    config = CorpusConfig(write_texts(tmp_path / "t.txt", texts), tmp_path / "c", limit=4)
    assert make_corpus(config, progress=False) == (4, 0)
    manifest = tmp_path / "c" / "manifest.jsonl"
    first = (tmp_path / "c" / "audio" / "000000.flac").stat().st_mtime_ns
    manifest.write_bytes(manifest.read_bytes() + b'{"id": "0000')  # killed while writing
    config.limit = None
    assert make_corpus(config, progress=False) == (10, 0)
    assert [row["text"] for row in read_jsonl(manifest)] == texts
    assert (tmp_path / "c" / "audio" / "000000.flac").stat().st_mtime_ns == first
    write_texts(config.texts, ["something else."] + texts)
    with pytest.raises(UserError, match="other texts"):
        make_corpus(config, progress=False)


def test_manifest_does_not_depend_on_workers(fake_festival, tmp_path):
    fake_festival()
    texts = [f"number {i}" for i in range(40)]
    manifests = []
    for workers in (1, 3):
        out = tmp_path / f"c{workers}"
        make_corpus(
            CorpusConfig(write_texts(tmp_path / "t.txt", texts), out, workers=workers), progress=False
        )
        manifests.append((out / "manifest.jsonl").read_text())
    assert manifests[0] == manifests[1]


def test_nothing_spoken_is_an_error(fake_festival, tmp_path):
    fake_festival()
    with pytest.raises(UserError, match="spoke none"):
        make_corpus(
            CorpusConfig(write_texts(tmp_path / "t.txt", ["crash", "crash too"]), tmp_path / "c"),
            progress=False,
        )


def test_missing_festival_says_what_to_install(tmp_path, monkeypatch, fake_festival):
    texts = write_texts(tmp_path / "t.txt", ["Hello."])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="festvox-us-slt-hts"):
        make_corpus(CorpusConfig(texts, tmp_path / "c"))
    fake_festival(voice=255)
    with pytest.raises(UserError, match="no voice.*festvox-us-slt-hts"):
        make_corpus(CorpusConfig(texts, tmp_path / "c"))


@pytest.mark.smoke
def test_command_line(tmp_path):
    run = partial(commands.run, "data")
    texts = write_texts(tmp_path / "t.txt", ["Hello."])
    missing = run("--texts", str(texts), "--out", str(tmp_path / "c"), PATH=str(tmp_path))
    assert (
        missing.returncode == 2 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    )
    assert run("--help").returncode == 0


@pytest.mark.parametrize("bad", [dict(workers=0), dict(limit=0), dict(texts="none.txt"), dict(out="file")])
def test_bad_settings(bad, fake_festival, tmp_path, monkeypatch):
    fake_festival()
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "t.txt", ["Hello."])
    (tmp_path / "file").write_text("")
    config = {"texts": tmp_path / "t.txt", "out": tmp_path / "c", **bad}
    with pytest.raises(UserError):
        make_corpus(
            CorpusConfig(**{**config, "texts": Path(config["texts"]), "out": Path(config["out"])}),
            progress=False,
        )


def test_fragments():
    text = (
        "It was late, and (so they say) the 3 old men who lived by the river had gone home to sleep; "
        "nobody knew why"
    )
    pieces = fragments([text] * 2)
    assert pieces == fragments([text]) and pieces != fragments([text], seed=1)
    assert len(set(pieces)) == len(pieces)
    assert all(2 <= len(piece.split()) <= 8 and len(piece) <= 61 for piece in pieces)
    assert not any("men" in piece for piece in pieces), "parts with digits are left out"
    assert fragments(["a"]) == [] == fragments([])
    assert all(len(p.split()) == 3 for p in fragments([text], 3, 3))


def corrupt_copy(data, tmp_path):
    return Path(shutil.copytree(data / "corpus_tiny", tmp_path / "c"))


def test_load_corpus(data):
    corpus = load_corpus(data / "corpus_tiny")
    assert len(corpus) == 6 and [item.text for item in corpus][3] == "Have you seen Joyce?"
    assert corpus[-1].ids == phones_to_ids(corpus[-1].phones)
    assert corpus.frames == [item.samples // 300 for item in corpus]
    assert corpus[2:4][0].audio.base is corpus[0].audio.base and corpus[2:4].hours < corpus.hours
    assert all(np.abs(item.audio.astype(int)).max() > 16000 for item in corpus)
    with pytest.raises(UserError, match="the model hears 16000; corpora are made at 22050 Hz"):
        load_corpus(data / "corpus_tiny", 16000)  # no --sample-rate of a command makes that


def test_a_large_corpus_stays_on_disk(data, tmp_path, monkeypatch):
    held = load_corpus(data / "corpus_tiny")
    monkeypatch.setattr("dlpo_nb.corpus.HELD", sum(item.samples for item in held) - 1)
    folder = corrupt_copy(data, tmp_path)
    corpus = load_corpus(folder)
    assert all(item.held is None for item in corpus) and all(item.held is not None for item in held)
    assert corpus.hours == held.hours and corpus.frames == held.frames and corpus[1:3][0] is corpus[1]
    assert all(torch.equal(a, b) for a, b in zip(collate(corpus[:]).values(), collate(held[:]).values()))
    path = folder / "audio" / "000002.flac"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    load_corpus(folder)  # its header is whole
    with pytest.raises(UserError, match="000002"):
        corpus[2].audio
    path.write_bytes((folder / "audio" / "000001.flac").read_bytes())
    with pytest.raises(UserError, match="000002"):
        load_corpus(folder)
    path.unlink()
    with pytest.raises(UserError, match="000002"):
        load_corpus(folder)


def test_recordings_are_read_ahead(data, tmp_path, monkeypatch):
    """In the background, each once; what cannot be read is said when it is asked for."""
    held = load_corpus(data / "corpus_tiny")
    held.read_ahead([0, 1])
    assert not held.coming, "nothing is to be read"
    monkeypatch.setattr("dlpo_nb.corpus.HELD", 0)
    folder, read = corrupt_copy(data, tmp_path), []
    corpus = load_corpus(folder)
    monkeypatch.setattr(
        "dlpo_nb.corpus.read_flac", lambda path, *_, **__: read.append(path.stem) or read_flac(path, *_, **__)
    )
    corpus.read_ahead([1, 3, 1])
    assert all(np.array_equal(corpus[i].held, held[i].audio) for i in (1, 3)) and corpus[0].held is None
    assert len(read) == 2
    (folder / "audio" / "000002.flac").write_bytes(b"")
    corpus.read_ahead([2])
    assert set(corpus.coming) == {2} and corpus[1].held is None, "those of before are let go"
    with pytest.raises(UserError, match="000002"):
        corpus[2]


def test_damaged_corpora_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="no corpus"):
        load_corpus(tmp_path)
    folder = corrupt_copy(data, tmp_path)
    manifest = folder / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    row = json.loads(lines[0])
    broken = [
        dict(row, samples=row["samples"] - 300),
        dict(row, frames=row["frames"][1:]),
        dict(row, phones=["XX"] * len(row["phones"])),
        dict(row, frames=[-1] + row["frames"][1:]),
        {"id": "000000"},
        [1],
        dict(row, frames="x"),
    ]
    for bad in broken:
        manifest.write_text("\n".join([json.dumps(bad), *lines[1:]]) + "\n")
        with pytest.raises(UserError):
            load_corpus(folder)
    for content in ("", "not json\n"):
        manifest.write_text(content)
        with pytest.raises(UserError):
            load_corpus(folder)
    manifest.write_text("\n".join(lines) + "\n")
    audio = folder / "audio" / "000001.flac"
    audio.write_bytes(audio.read_bytes()[:100])
    with pytest.raises(UserError, match="000001"):
        load_corpus(folder)
    audio.unlink()
    with pytest.raises(UserError, match="000001"):
        load_corpus(folder)


def test_collate(data):
    corpus = load_corpus(data / "corpus_tiny")
    batch = collate(corpus[1:4])
    for row, item in enumerate(corpus[1:4]):
        n = len(item.ids)
        assert (
            batch["ids"][row, :n].tolist() == item.ids and batch["durations"][row, :n].tolist() == item.frames
        )
        assert (
            not batch["ids"][row, n:].any()
            and not batch["durations"][row, n:].any()
            and not batch["audio"][row, item.samples :].any()
        )
        assert batch["lengths"][row] == n and batch["frames"][row] * 300 == item.samples
        torch.testing.assert_close(
            batch["audio"][row, : item.samples] * 32767, torch.from_numpy(item.audio).float()
        )
    assert batch["ids"].dtype == batch["durations"].dtype == torch.long and batch["audio"].abs().max() <= 1


def test_bucketed_batches():
    frames = torch.randint(30, 400, (1003,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = bucketed_batches(frames, 8, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert sorted(map(len, batches))[:2] == [3, 8]
    assert batches == bucketed_batches(frames, 8, torch.Generator().manual_seed(0))
    assert batches != bucketed_batches(frames, 8, torch.Generator().manual_seed(1))
    spread = [max(frames[i] for i in batch) - min(frames[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 40
    assert bucketed_batches([], 8, torch.Generator()) == []
