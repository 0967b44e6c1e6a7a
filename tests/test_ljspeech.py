"""LJSpeech: the split, TextGrids, alignment, frames, and a command that meets broken folders, interruptions
and odd settings."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import soundfile
import torch

from dlpo_nb import alignment as al
from dlpo_nb import recordings
from dlpo_nb import ljspeech as lj
from dlpo_nb.core import UserError, asset, read_jsonl
from dlpo_nb.corpus import load_corpus
from dlpo_nb.alignment import Alignment, compare_alignments, read_textgrid, to_frames
from dlpo_nb.ljspeech import LJSpeechConfig, make_ljspeech, what_is_empty
from dlpo_nb.text import text_to_phones

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reader(shared):
    folder = shared / "data" / "ljspeech"
    if not folder.is_dir():
        pytest.skip("LJSpeech's texts, clips and alignments are not here")
    return folder


@pytest.fixture(scope="module")
def alignments(reader):
    "id -> MFA's alignment, of all 13,100 clips."
    with gzip.open(reader / "alignments.jsonl.gz", "rt") as file:
        rows = map(json.loads, file)
        return {row["id"]: Alignment(row["phones"], np.array([0, *row["ends_cs"]]) / 100) for row in rows}


@pytest.fixture(scope="module")
def spoken():
    "Four short packaged recordings."
    return load_corpus(asset("speech_train"))[:4].items


def raw_folder(path, spoken, names=None):
    "A folder in the shape of LJSpeech."
    (path / "wavs").mkdir(parents=True)
    names = names or [f"LJ001-{i:04d}" for i in range(1, len(spoken) + 1)]
    for name, item in zip(names, spoken):
        soundfile.write(path / "wavs" / f"{name}.wav", item.audio // 2, 22050)
    (path / "metadata.csv").write_text(
        "".join(f"{name}|{item.text}|{item.text}\n" for name, item in zip(names, spoken)), encoding="utf-8"
    )
    return path


def manifest(out, part="train"):
    path = out / part / "manifest.jsonl"
    return read_jsonl(path) if path.exists() else []


def textgrid(alignment, form="short", tier="phones"):
    rows = list(zip(alignment.bounds, alignment.bounds[1:], alignment.phones))
    end = alignment.bounds[-1]
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n'
    if form == "short":
        body = "\n".join(f'{a}\n{b}\n"{phone}"' for a, b, phone in rows)
        words = f'"IntervalTier"\n"words"\n0\n{end}\n1\n0\n{end}\n"he said ""1 2"""\n'
        phones = f'"IntervalTier"\n"{tier}"\n0\n{end}\n{len(rows)}\n{body}\n'
        return f"{head}0\n{end}\n<exists>\n2\n{words}{phones}"

    def interval(i, a, b, label):
        place = f"        intervals [{i}]:\n            xmin = {a} \n            xmax = {b} \n"
        return f'{place}            text = "{label}" \n'

    def tier_head(i, name, size):
        kind = f'    item [{i}]:\n        class = "IntervalTier" \n        name = "{name}" \n'
        return f"{kind}        xmin = 0 \n        xmax = {end} \n        intervals: size = {size} \n"

    words = tier_head(1, "words", 1) + interval(1, 0, end, 'he said ""1 2""')
    body = "".join(interval(i, *row) for i, row in enumerate(rows, 1))
    start = f"{head}xmin = 0 \nxmax = {end} \ntiers? <exists> \nsize = 2 \nitem []: \n"
    return f"{start}{words}{tier_head(2, tier, len(rows))}{body}"


HELLO = Alignment(
    ["sil", "HH", "AY1", "", "HH", "AH0", "sp"], np.array([0, 0.1, 0.2, 0.33, 0.4, 0.5, 0.61, 0.7])
)


# the split


def test_split_lists():
    val, test = recordings.split_ids("val"), recordings.split_ids("test")
    assert (len(val), len(test), len(val & test)) == (512, 200, 0)
    assert {part: recordings.fingerprint(recordings.split_ids(part)) for part in ("val", "test")} == {
        part: recordings.SPLIT_SHA256[part] for part in ("val", "test")
    }
    assert {recordings.part_of(name) for name in val} == {"val"} and {
        recordings.part_of(name) for name in test
    } == {"test"}
    assert not test & {f"LJ001-{i:04d}" for i in range(1, 33)}


def test_split_of_all_ids(reader):
    ids = [name for name, _ in recordings.read_metadata(reader)[0]]
    val = [line.split("|")[0] for line in (reader / "val.txt").read_text(encoding="utf-8").splitlines()]
    assert recordings.split_ids("val") == set(val) and recordings.split_ids("test") == set(
        recordings.choose_test(ids, val)
    )
    train = [name for name in ids if recordings.part_of(name) == "train"]
    assert (
        len(ids) == 13_100
        and len(train) == 12_388
        and recordings.fingerprint(train) == recordings.SPLIT_SHA256["train"]
    )


# TextGrids


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("tier", ["phones", "LJ - phones"])
def test_textgrid(tmp_path, form, encoding, tier):
    path = tmp_path / "a.TextGrid"
    path.write_text(textgrid(HELLO, form, tier), encoding=encoding)
    read = read_textgrid(path)
    assert read.phones == HELLO.phones and np.array_equal(read.bounds, HELLO.bounds)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "ends too early"),
        ("hello", "ends too early"),
        (textgrid(HELLO, tier="syllables"), "no tier phones; its tiers are: words, syllables"),
        (textgrid(HELLO)[:-60], "ends too early"),
        (textgrid(HELLO).replace("TextGrid", "Pitch"), "not a TextGrid"),
        (textgrid(HELLO).replace('0.33\n"AY1"', '0.31\n"AY1"'), "leave gaps"),
        (textgrid(HELLO).replace("<exists>\n2", "<exists>\nx"), "cannot read"),
    ],
)
def test_broken_textgrids(tmp_path, text, message):
    path = tmp_path / "a.TextGrid"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_textgrid(path)
    with pytest.raises(UserError, match="No such file"):
        read_textgrid(tmp_path / "none.TextGrid")


# frames


def test_frames():
    audio = np.arange(1, 22051, dtype=np.int16)
    speech, phones, frames = to_frames(audio, HELLO)
    assert phones == ["HH", "AY1", "sp", "HH", "AH0"]
    assert frames == np.diff(np.round(np.array([0.1, 0.2, 0.33, 0.4, 0.5, 0.61]) * 73.5)).astype(int).tolist()
    assert speech[0] == int(22050 * 0.1) + 1 and len(speech) == 300 * sum(frames)
    end = int(22050 * 0.61) - int(22050 * 0.1)
    assert (
        np.array_equal(speech[: min(end, len(speech))], audio[2205:][: min(end, len(speech))])
        and not speech[end:].any()
    )


def test_halves_are_rounded_to_even():
    # 1 s and 3 s are 73.5 and 220.5 frames
    _, _, frames = to_frames(
        np.ones(22050 * 4, np.int16), Alignment(["sp", "HH", "AY1"], np.array([0, 1, 3, 3.5]))
    )
    assert frames == [220 - 74, 257 - 220]


@pytest.mark.parametrize(
    "alignment, message",
    [
        (Alignment(["sil", "", "spn"], np.array([0, 0.1, 0.2, 0.3])), "nothing but silence"),
        (Alignment(["HH", "AY1"], np.array([0, 0.5, 2])), "ends at 2.00 s, the recording at 1.00 s"),
        (Alignment(["HH", "AY1"], np.array([0, 0.001, 0.002])), "less than a frame"),
        (Alignment(["HH", "ʃ"], np.array([0, 0.1, 0.3])), "not a phone of the model"),
    ],
)
def test_alignments_that_cannot_be_used(alignment, message):
    with pytest.raises(UserError, match=message):
        to_frames(np.ones(22050, np.int16), alignment)


def test_cut_gives_the_released_phones(reader, alignments):
    count = 0
    for part in ("train.txt", "val.txt"):
        for line in (reader / part).read_text(encoding="utf-8").splitlines():
            name, _, phones, _ = line.split("|")
            assert al.cut_silence(alignments[name]).phones == phones.strip("{}").split(), name
            count += 1
    assert count == 13_100


def test_textgrids_of_the_reader(reader, alignments, tmp_path):
    name, grids = "LJ001-0013", tmp_path / "grids" / "LJSpeech"
    grids.mkdir(parents=True)
    (grids / f"{name}.TextGrid").write_text(textgrid(alignments[name], "long"))
    report = make_ljspeech(
        LJSpeechConfig(reader, tmp_path / "c", textgrids=tmp_path / "grids", limit=13), progress=False
    )
    assert report["failures"] == {"alignment": 12} and report["aligner"] == "MFA's TextGrids"
    item = load_corpus(tmp_path / "c" / "train")[0]
    wave, _ = soundfile.read(reader / "wavs" / f"{name}.flac")
    phones, bounds = al.cut_silence(alignments[name], final_pause=item.text[-1] in ".?!")
    assert item.phones == phones and item.frames == np.diff(np.round(bounds * 73.5)).astype(int).tolist()
    expected = np.round(wave / np.abs(wave).max() * 32767)[int(22050 * bounds[0]) : int(22050 * bounds[-1])]
    both = min(len(expected), item.samples)
    assert (
        abs(len(expected) - item.samples) <= 300 * 5
        and np.abs(item.audio[:both] - expected[:both]).max() <= 1
    )


# alignment


def test_festival_is_found_where_it_spoke(spoken):
    aligner, off = al.process_aligner(0.0), []
    for item in spoken:
        truth = Alignment(item.phones, np.cumsum([0, *item.frames]) / 73.5)
        differences, share = compare_alignments(aligner(item.audio, item.text), truth)
        assert share > 0.9
        off += differences[1:, 0].tolist()
    assert np.median(np.abs(off)) < 0.015 and np.quantile(np.abs(off), 0.9) < 0.04


def test_alignment_against_mfa(reader, alignments):
    texts, aligner = dict(recordings.read_metadata(reader)[0]), al.process_aligner()
    off, shares = [], []
    for name in [f"LJ001-{i:04d}" for i in (2, 8, 13, 4, 6, 11)]:
        differences, share = compare_alignments(
            aligner(recordings.read_recording(reader, name), texts[name]), alignments[name]
        )
        off += differences[:, 0].tolist()
        shares.append(share)
    assert (
        np.mean(shares) > 0.95
        and np.median(np.abs(off)) <= 0.0101
        and np.quantile(np.abs(off), 0.9) <= 0.0301
    )


def test_an_alignment_does_not_depend_on_those_before(spoken):
    fresh, used = al.Aligner(), al.process_aligner()
    for item in spoken[:3]:
        used(item.audio, item.text)
    a, b = fresh(spoken[3].audio, spoken[3].text), used(spoken[3].audio, spoken[3].text)
    assert a.phones == b.phones and np.array_equal(a.bounds, b.bounds)


def test_words_that_are_not_in_the_sound(spoken):
    aligner, item = al.process_aligner(), spoken[0]
    for audio, text in [
        (item.audio, "Far too many words for so short a recording, " * 4),
        (item.audio[:400], "Hello there."),
        (item.audio[:30], "Hello."),
    ]:
        with pytest.raises(UserError, match="not found in"):
            aligner(audio, text)
    with pytest.raises(UserError, match="nothing to speak"):
        aligner(item.audio, "?!")
    found = aligner(item.audio, item.text)  # and the next one is as it was
    assert (
        al.bare(al.cut_silence(found).phones) and found.bounds[0] == 0 and (np.diff(found.bounds) >= 0).all()
    )


# the command


def test_broken_clips_are_reported_and_skipped(spoken, tmp_path):
    raw = raw_folder(tmp_path / "raw", spoken)
    (raw / "wavs" / "LJ001-0002.wav").write_bytes(b"RIFF")
    (raw / "wavs" / "LJ001-0003.wav").unlink()
    soundfile.write(raw / "wavs" / "LJ001-0005.wav", np.zeros(9000), 22050)
    soundfile.write(raw / "wavs" / "LJ001-0006.wav", np.ones(9000), 8000)
    soundfile.write(raw / "wavs" / "LJ001-0007.wav", spoken[0].audio, 22050)
    extra = [
        "LJ001-0005|a|a",
        "LJ001-0006|a|a",
        "LJ001-0007|x|" + "far too many words " * 9,
        "LJ001-0009",
        "a|b",
        "../x|a|a",
        "LJ001-0001|a|a",
        "",
        "LJ001-0010|a|",
    ]
    with open(raw / "metadata.csv", "a") as file:
        file.write("\n".join(extra) + "\n")
    report = make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    assert (
        report["failures"] == {"metadata": 3, "recording": 6, "alignment": 1}
        and report["train"]["utterances"] == 2
    )
    failures = {
        row[0]: row[1:]
        for row in (line.split("\t") for line in (tmp_path / "c" / "failures.txt").read_text().splitlines())
    }
    assert (
        "missing" in failures["LJ001-0003"][1]
        and "silent" in failures["LJ001-0005"][1]
        and "8000" in failures["LJ001-0006"][1]
    )
    assert failures["LJ001-0007"][0] == "alignment" and "second time" in failures["line 11"][1]
    corpus = load_corpus(tmp_path / "c" / "train")
    assert [item.id for item in corpus] == ["LJ001-0001", "LJ001-0004"] and [
        item.text for item in corpus
    ] == [spoken[0].text, spoken[3].text]
    assert json.loads((tmp_path / "c" / "report.json").read_text()) == report


def test_parts_go_to_their_folders(spoken, tmp_path):
    names = ["LJ001-0001", sorted(recordings.split_ids("val"))[0], sorted(recordings.split_ids("test"))[0]]
    report = make_ljspeech(
        LJSpeechConfig(raw_folder(tmp_path / "raw", spoken[:3], names), tmp_path / "c"), progress=False
    )
    assert [report[part]["utterances"] for part in recordings.PARTS] == [1, 1, 1] and report["failures"] == {}
    for part, name, item in zip(recordings.PARTS, names, spoken):
        made = load_corpus(tmp_path / "c" / part)[0]
        # peak normalisation: the file had half of full scale
        assert (
            made.id == name
            and np.abs(made.audio.astype(int)).max() > 0.9 * np.abs(item.audio.astype(int)).max()
        )


def test_goes_on_after_an_interruption(spoken, tmp_path, monkeypatch):
    raw = raw_folder(tmp_path / "raw", spoken)
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "whole"), progress=False)
    real, seen = lj.make_clip, []

    def interrupted(task):
        seen.append(task.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(task)

    config = LJSpeechConfig(raw, tmp_path / "c")
    monkeypatch.setattr(lj, "make_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_ljspeech(config, progress=False)
    path = tmp_path / "c" / "train" / "manifest.jsonl"
    assert len(manifest(tmp_path / "c")) == 2
    path.write_bytes(path.read_bytes() + b'{"id": "LJ00')  # killed while writing
    first = (tmp_path / "c" / "train" / "audio" / "LJ001-0001.flac").stat().st_mtime_ns
    report = make_ljspeech(config, progress=False)
    assert seen == [f"LJ001-{i:04d}" for i in (1, 2, 3, 3, 4)] and report["train"]["utterances"] == 4
    assert path.read_bytes() == (tmp_path / "whole" / "train" / "manifest.jsonl").read_bytes()
    assert (tmp_path / "c" / "train" / "audio" / "LJ001-0001.flac").stat().st_mtime_ns == first


def test_a_finished_corpus_is_not_mixed_with_another(spoken, tmp_path):
    raw, out = raw_folder(tmp_path / "raw", spoken[:2]), tmp_path / "c"
    make_ljspeech(LJSpeechConfig(raw, out), progress=False)
    with pytest.raises(UserError, match="--lag 0.02, now it would be pocketsphinx with --lag 0;"):
        make_ljspeech(LJSpeechConfig(raw, out, lag=0.0), progress=False)
    (raw / "metadata.csv").write_text("LJ001-0001|a|another text\n")
    with pytest.raises(UserError, match="other texts"):
        make_ljspeech(LJSpeechConfig(raw, out), progress=False)


def test_workers_change_nothing(spoken, tmp_path):
    raw = raw_folder(tmp_path / "raw", spoken)
    for workers in (1, 2):
        make_ljspeech(LJSpeechConfig(raw, tmp_path / f"c{workers}", workers=workers), progress=False)
    assert manifest(tmp_path / "c1") == manifest(tmp_path / "c2") and len(manifest(tmp_path / "c1")) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(raw="none"), "metadata.csv"),
        (dict(out="file"), "choose another"),
        (dict(workers=0), "counts"),
        (dict(limit=0), "counts"),
        (dict(textgrids="raw"), "no .TextGrid files"),
    ],
)
def test_bad_settings(spoken, tmp_path, change, message):
    raw_folder(tmp_path / "raw", spoken[:1])
    (tmp_path / "file").write_text("")
    change = {name: tmp_path / value if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        make_ljspeech(
            LJSpeechConfig(**{**dict(raw=tmp_path / "raw", out=tmp_path / "c"), **change}), progress=False
        )


def test_nothing_usable_is_an_error(spoken, tmp_path):
    raw = raw_folder(tmp_path / "raw", spoken[:1])
    (raw / "wavs" / "LJ001-0001.wav").unlink()
    with pytest.raises(UserError, match="none of the clips.*missing"):
        make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    (raw / "metadata.csv").write_text("no bars\n")
    with pytest.raises(UserError, match="no line of the form"):
        make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    (raw / "metadata.csv").write_bytes(b"\xff\xfe\xfa|")
    with pytest.raises(UserError, match="UTF-8"):
        make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)


def test_killed_and_started_again(spoken, tmp_path):
    raw, out = (
        raw_folder(
            tmp_path / "raw", spoken * 3, [f"LJ001-{i:04d}" for i in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)]
        ),
        tmp_path / "c",
    )
    words = [sys.executable, "-m", "dlpo_nb.ljspeech", str(raw), str(out)]
    job = subprocess.Popen(
        [*words, "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while job.poll() is None and not (out / "train" / "manifest.jsonl").exists():
        time.sleep(0.02)
    job.kill()
    # the pipe ends when the workers, which hold it too, have ended
    job.communicate(timeout=60)
    kept = manifest(out)
    make_ljspeech(LJSpeechConfig(raw, out), progress=False)
    assert (
        kept
        and manifest(out)[: len(kept)] == kept
        and [row["id"] for row in manifest(out)] == sorted(path.stem for path in (raw / "wavs").iterdir())
    )


def test_from_raw_folder_to_an_epoch(reader, tmp_path):
    made = commands.run("ljspeech", reader, tmp_path / "c", "--limit", "4")
    assert made.returncode == 0 and made.stdout.startswith("train: 4 utterances (0.01 h), val: 0"), (
        made.stderr
    )
    flags = "--arch tiny --steps 2 --batch-size 2 --window-frames 16 --held-out 1"
    flags = f"{flags} --log-every 2 --sample-every 0".split()
    corpus = ["--corpus", tmp_path / "c" / "train"]
    trained = commands.run("pretrain", *corpus, "--out", tmp_path / "run", *flags)
    assert trained.returncode == 0, trained.stderr
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (
        row["step"] == 2
        and torch.isfinite(torch.tensor(row["loss"]))
        and (tmp_path / "run" / "base.safetensors").exists()
    )


@pytest.mark.smoke
def test_command_line_says_what_is_wrong(tmp_path):
    done = commands.run("ljspeech", tmp_path, tmp_path / "c")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: cannot read")
        and "Traceback" not in done.stderr
    )


# other people's recordings


def own_folder(path, spoken, lines, names, rate=22050, folder=""):
    (path / "wavs" / folder).mkdir(parents=True)
    for name, item in zip(names, spoken):
        soundfile.write(path / "wavs" / folder / f"{name}.wav", item.audio, rate)
    (path / "metadata.csv").write_bytes(lines.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "line", ["{}|{}", "{}.wav|{}|{}", "wavs/{}.wav|{}|", "\ufeff{}|{}\r", "{}|{}\u2028 "]
)
def test_metadata_of_others(spoken, tmp_path, line):
    names = ["a1", "my clip 2", "v1.3"]
    lines = "\n".join(line.format(name, item.text, item.text) for name, item in zip(names, spoken)) + "\n"
    report = make_ljspeech(
        LJSpeechConfig(own_folder(tmp_path / "raw", spoken, lines, names), tmp_path / "c"), progress=False
    )
    assert report["failures"] == {} and [report[part]["utterances"] for part in recordings.PARTS] == [1, 1, 1]


def test_sub_folders_and_other_rates(spoken, tmp_path):
    lines = "".join(f"ann/{i}|{item.text}\n" for i, item in enumerate(spoken))
    raw = own_folder(tmp_path / "raw", spoken, lines, range(4), rate=24000, folder="ann")
    assert recordings.read_recording(raw, "ann/0").shape == (-(-len(spoken[0].audio) * 22050 // 24000),)
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    ids = [row["id"] for part in recordings.PARTS for row in manifest(tmp_path / "c", part)]
    assert sorted(ids) == [f"ann_{i}" for i in range(4)]


def read_lines(folder, *lines):
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts, failures = recordings.read_metadata(folder)
    return dict(texts), [reason for _, _, reason in failures]


def test_bars_and_columns(tmp_path):
    assert read_lines(tmp_path, "c1|Press A | B now.", "c2|My uncle drives taxis.") == (
        {"c1": "Press A | B now.", "c2": "My uncle drives taxis."},
        [],
    )
    assert read_lines(tmp_path, "c1|Mr. A|mister a", "c2|B|", "c3|C", "c4|D|d") == (
        {"c1": "mister a", "c2": "B", "c3": "C", "c4": "d"},
        [],
    )
    assert read_lines(tmp_path, "c1 | Mr. A | mister a") == ({"c1": "mister a"}, [])
    texts, failures = read_lines(tmp_path, "a/1|A", "a_1|B", "a/1|C", "d|", "e")
    assert texts == {"a/1": "A"}
    assert [*failures[:3]] == [
        "a_1 would be called a_1, as a/1 is",
        "a/1 stands there a second time",
        "d has no text",
    ] and "is not id|text" in failures[3]


def test_stereo_and_letters_with_two_spellings(spoken, tmp_path):
    name = "caf\u00e9"
    raw = own_folder(tmp_path, spoken, f"{name}|{spoken[0].text}\n", [])
    both = np.stack([spoken[0].audio, spoken[0].audio], 1)
    soundfile.write(raw / "wavs" / "cafe\u0301.wav", both, 44100)
    assert recordings.read_recording(raw, name).shape == (-(-len(both) // 2),)


@pytest.mark.parametrize(
    "name, why",
    [
        ("../x", "outside the folder"),
        ("/etc/x", "outside the folder"),
        ("C:\\x", "outside the folder"),
        ("", "is empty"),
        ("a?b", "'?'"),
    ],
)
def test_what_is_wrong_with_an_id_is_said(tmp_path, name, why):
    (tmp_path / "metadata.csv").write_text(f"{name}|Hello.\nok|Hello.\n")
    _, [(where, kind, reason)] = recordings.read_metadata(tmp_path)
    assert (where, kind) == ("line 1", "metadata") and why in reason


def test_split_of_others():
    for count in (1, 2, 3, 12, 100, 20_000):
        split = recordings.split_of([f"x{i}" for i in range(count)])
        sizes = {part: list(split.values()).count(part) for part in recordings.PARTS}
        assert (
            sum(sizes.values()) == count
            and sizes["train"] > 0
            and sizes["val"] <= 512
            and sizes["test"] <= 200
        )
        assert (sizes["val"] > 0) == (count > 1) and (sizes["test"] > 0) == (count > 2)
    assert (
        split
        == recordings.split_of([f"x{i}" for i in range(20_000)])
        != recordings.split_of([f"x{i}" for i in range(20_000)], seed=1)
    )
    assert recordings.split_of(["LJ001-0001", "a", "b", "c"])["LJ001-0001"] == "train"


def sizes(split):
    return [list(split.values()).count(part) for part in recordings.PARTS]


def test_parts_grow_and_nothing_changes_sides():
    names = [f"x{i}" for i in range(1000)]
    few = recordings.split_of(names[:12])
    more = recordings.split_of(names, before=few)
    assert sizes(few) == [10, 1, 1] and sizes(more) == [940, 40, 20] and more | few == more
    assert sizes(recordings.split_of(names[:3], before=recordings.split_of(names[:2]))) == [1, 1, 1]
    # LJSpeech's own split is the same whatever was taken of it before
    lj_names = [f"LJ001-{i:04d}" for i in range(1, 187)]
    assert recordings.split_of(lj_names, before=recordings.split_of(lj_names[:4])) == {
        name: recordings.part_of(name) for name in lj_names
    }


def test_a_limit_first_does_not_spoil_the_split(spoken, tmp_path):
    names = [
        "LJ001-0001",
        sorted(recordings.split_ids("val"))[0],
        sorted(recordings.split_ids("test"))[0],
        "LJ001-0002",
    ]
    raw, out = raw_folder(tmp_path / "raw", spoken, names), tmp_path / "c"
    make_ljspeech(LJSpeechConfig(raw, out, limit=1), progress=False)
    report = make_ljspeech(LJSpeechConfig(raw, out), progress=False)
    assert [report[part]["utterances"] for part in recordings.PARTS] == [2, 1, 1]


@pytest.mark.parametrize("gone", ["val", "test", "both"])
def test_a_part_without_any_recording_gets_one(spoken, tmp_path, gone):
    names = [f"r{i}" for i in range(4)]
    raw = own_folder(
        tmp_path / "raw", spoken, "".join(f"{n}|{i.text}\n" for n, i in zip(names, spoken)), names
    )
    split, out = recordings.split_of(names), tmp_path / "c"
    for name, part in split.items():
        if part != "train" and gone in (part, "both"):
            (raw / "wavs" / f"{name}.wav").unlink()
    report = make_ljspeech(LJSpeechConfig(raw, out), progress=False)
    made = [report[part]["utterances"] for part in recordings.PARTS]
    # two for training are too few to give one away for test
    assert made == {"val": [1, 1, 1], "test": [2, 1, 0], "both": [1, 1, 0]}[gone] and report["failures"] == {
        "recording": 4 - sum(made)
    }
    for part in recordings.PARTS:
        assert sorted(row["id"] for row in manifest(out, part)) == sorted(
            path.stem for path in (out / part / "audio").iterdir()
        )
        assert not made[recordings.PARTS.index(part)] or load_corpus(out / part)
    assert make_ljspeech(LJSpeechConfig(raw, out), progress=False) == report


def test_the_only_recording_is_for_training(spoken, tmp_path):
    for name in ("a", "b"):
        raw = own_folder(tmp_path / name, spoken[:1], f"a|{spoken[0].text}\nb|{spoken[0].text}\n", [name])
        report = make_ljspeech(LJSpeechConfig(raw, tmp_path / f"c{name}"), progress=False)
        assert [report[part]["utterances"] for part in recordings.PARTS] == [1, 0, 0] and load_corpus(
            tmp_path / f"c{name}" / "train"
        )[0].id == name


def test_another_seed_needs_another_folder(spoken, tmp_path):
    raw = own_folder(
        tmp_path / "raw", spoken[:2], "".join(f"{i}|{item.text}\n" for i, item in enumerate(spoken[:2])), "01"
    )
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    with pytest.raises(UserError, match="split with --seed 0"):
        make_ljspeech(LJSpeechConfig(raw, tmp_path / "c", seed=1), progress=False)


def test_what_comes_later_is_for_training(spoken, tmp_path):
    names = [f"r{i}" for i in range(4)]
    raw = own_folder(
        tmp_path / "raw", spoken, "".join(f"{n}|{i.text}\n" for n, i in zip(names[:3], spoken)), names
    )
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    before = {part: [row["id"] for row in manifest(tmp_path / "c", part)] for part in recordings.PARTS}
    (raw / "metadata.csv").write_text("".join(f"{n}|{i.text}\n" for n, i in zip(names, spoken)))
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    after = {part: [row["id"] for row in manifest(tmp_path / "c", part)] for part in recordings.PARTS}
    assert after == before | {"train": before["train"] + ["r3"]}


def test_a_full_stop_is_a_pause_in_training_too(spoken, tmp_path):
    names = [f"r{i}" for i in range(4)]
    texts = [spoken[0].text, spoken[1].text.rstrip("."), *(item.text for item in spoken[2:])]
    raw = own_folder(
        tmp_path / "raw", spoken, "".join(f"{n}|{text}\n" for n, text in zip(names, texts)), names
    )
    make_ljspeech(LJSpeechConfig(raw, tmp_path / "c"), progress=False)
    rows = [row for part in recordings.PARTS for row in manifest(tmp_path / "c", part)]
    assert len(rows) == 4 and sum(row["phones"][-1] == "sp" for row in rows) == 3
    packaged = [asset("speech_train"), ROOT / "tests" / "data" / "corpus_tiny"]
    for row in rows + [row for folder in packaged for row in read_jsonl(folder / "manifest.jsonl")]:
        assert (row["phones"][-1] == "sp") == (text_to_phones(row["text"])[-1] == "sp"), row["text"]


def one_clip(spoken, path, phones, bounds, text=None, suffix=".TextGrid"):
    raw = own_folder(path / "raw", spoken, f"x1|{text or spoken[0].text}\n", ["x1"])
    (path / "grids").mkdir()
    (path / "grids" / f"x1{suffix}").write_text(textgrid(Alignment(phones, np.array(bounds)), "long"))
    return LJSpeechConfig(raw, path / "c", textgrids=path / "grids")


def test_textgrids_are_checked_against_the_text(spoken, tmp_path):
    item = spoken[0]
    bounds = np.cumsum([0, *item.frames]) / 73.5
    report = make_ljspeech(
        one_clip(spoken, tmp_path / "a", item.phones, bounds, suffix=".textgrid"), progress=False
    )
    assert report["train"]["utterances"] == 1
    for name, phones, text, kind in [
        ("b", item.phones, "The kettle is whistling loudly now", "alignment"),
        ("d", ["HH", "AY1"], None, "alignment"),
        ("e", [*item.phones[:-2], "spn", "sp"], None, "unknown word"),
    ]:
        with pytest.raises(
            UserError, match="not those of the text" if kind == "alignment" else "--keep-unknown"
        ):
            make_ljspeech(
                one_clip(spoken, tmp_path / name, phones, bounds[: len(phones) + 1], text), progress=False
            )
    for name, phones, text, reason in [
        (
            "g",
            item.phones,
            "The lamp is broken, and nobody in the house.",
            "phones in a row are in the text alone",
        ),
        ("h", ["ʃ", *item.phones[1:]], None, "english_us_arpa"),
    ]:
        with pytest.raises(UserError, match=reason):
            make_ljspeech(
                one_clip(spoken, tmp_path / name, phones, bounds[: len(phones) + 1], text), progress=False
            )
    lower = make_ljspeech(
        one_clip(
            spoken, tmp_path / "i", ["<SIL>", *(phone.lower() for phone in item.phones[1:-1]), "pau"], bounds
        ),
        progress=False,
    )
    assert lower["train"]["utterances"] == 1 and manifest(tmp_path / "i" / "c")[0]["phones"][-2:] == [
        item.phones[-2],
        "sp",
    ]
    config = one_clip(spoken, tmp_path / "f", [*item.phones[:3], "spn", *item.phones[4:]], bounds)
    config.keep_unknown = True
    assert make_ljspeech(config, progress=False)["train"]["utterances"] == 1


def test_vowels_without_stress_get_it(spoken, tmp_path):
    item = spoken[0]
    make_ljspeech(
        one_clip(spoken, tmp_path, al.bare(item.phones), np.cumsum([0, *item.frames]) / 73.5), progress=False
    )
    phones = manifest(tmp_path / "c")[0]["phones"]
    assert al.bare(phones) == al.bare(item.phones) and all(
        phone[-1].isdigit() for phone in phones if phone[0] in "AEIOU"
    )


def test_a_limited_run_does_not_move_ljspeech_into_training(tmp_path):
    (tmp_path / "c").mkdir()
    config = LJSpeechConfig(tmp_path, tmp_path / "c")
    val, test = sorted(recordings.split_ids("val"))[0], sorted(recordings.split_ids("test"))[0]
    assert lj.stored_split(config, ["LJ001-0001"]) == {"LJ001-0001": "train"}
    assert lj.stored_split(config, ["LJ001-0001", val, test]) == {
        "LJ001-0001": "train",
        val: "val",
        test: "test",
    }


@pytest.mark.parametrize(
    "content, count, reason",
    [
        ("id|text\na1|One.\na2|Two.\n", 2, None),
        ("file_name|transcription\na1|One.\n", 1, None),
        ("a1|One.|\na2|Two.|\n", 2, None),  # an empty third column
        ("a/b|One.\na_b|Two.\n", 1, "a_b would be called a_b, as a/b is"),
        ("a1|One.\nwavs/a1.wav|Two.\n", 1, "a1 stands there a second time"),
    ],
)
def test_lines_of_metadata(tmp_path, content, count, reason):
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    texts, failures = recordings.read_metadata(tmp_path)
    assert len(texts) == count and all("|" not in text for _, text in texts)
    assert [why for _, _, why in failures] == [reason] * bool(reason)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_said(tmp_path, encoding):
    (tmp_path / "metadata.csv").write_text("a1|Caf\u00e9.\n", encoding=encoding)
    with pytest.raises(UserError, match="is not UTF-8 text.*save it as UTF-8"):
        recordings.read_metadata(tmp_path)


def test_what_is_wrong_with_a_recording_is_said(tmp_path):
    sine = np.sin(np.arange(22050) / 20).astype(np.float32) / 4
    click = sine * 1e-4
    click[5000] = 0.9
    clips = dict(constant=sine * 0 + 0.3, zeros=sine * 0, click=click, nan=sine * np.nan)
    (tmp_path / "wavs").mkdir()
    for name, clip in clips.items():
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", clip, 22050, subtype="FLOAT")
    for name in clips:
        with pytest.raises(UserError, match="nan" if name == "nan" else "is silent"):
            recordings.read_recording(tmp_path, name)
    soundfile.write(tmp_path / "wavs" / "song.mp3", sine, 22050)
    with pytest.raises(UserError, match="song.mp3 is there: convert it"):
        recordings.read_recording(tmp_path, "song")
    with pytest.raises(UserError, match="nor is there a .flac"):
        recordings.read_recording(tmp_path, "nothing")


def test_odd_recordings_are_taken_with_a_remark(tmp_path, capsys):
    sine = np.sin(np.arange(22050) / 20).astype(np.float32) / 4
    (tmp_path / "wavs").mkdir()
    soundfile.write(tmp_path / "wavs" / "offset.wav", sine + 0.3, 22050)
    soundfile.write(tmp_path / "wavs" / "quiet.wav", sine * 1e-3, 22050, subtype="FLOAT")
    for name in ("offset", "quiet"):
        assert np.abs(recordings.read_recording(tmp_path, name)).max() == 32767
    remarks = capsys.readouterr().err.splitlines()
    assert remarks and all(line.startswith("warning: ") for line in remarks) and "DC offset" in remarks[0]


def test_no_folder_of_recordings(tmp_path):
    (tmp_path / "metadata.csv").write_text("a1|One.\n")
    with pytest.raises(UserError, match="has no folder wavs"):
        make_ljspeech(LJSpeechConfig(tmp_path, tmp_path / "c"), progress=False)


@pytest.mark.parametrize("tier", ["Phones", "phone", "ann - phones"])
def test_names_of_the_tier(tmp_path, tier):
    (tmp_path / "a.TextGrid").write_text(textgrid(HELLO, "long", tier))
    assert read_textgrid(tmp_path / "a.TextGrid").phones == HELLO.phones


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda grid: grid.replace(".", ","), "numbers cannot be read"),
        (lambda grid: grid.replace("xmin = 0.0 ", "xmin = -0.1 "), "begin at -0.1 s"),
    ],
)
def test_textgrids_with_odd_numbers(tmp_path, change, message):
    (tmp_path / "a.TextGrid").write_text(change(textgrid(HELLO, "long")))
    with pytest.raises(UserError, match=message):
        read_textgrid(tmp_path / "a.TextGrid")


def test_half_a_text_is_another_text():
    phones = text_to_phones("in being comparatively modern")
    half = Alignment(phones[: len(phones) // 2], np.arange(len(phones) // 2 + 1) / 10)
    with pytest.raises(UserError, match="another version of the text"):
        al.check_text(half, "in being comparatively modern")
    with pytest.raises(UserError, match="nothing but silence"):
        al.check_text(Alignment(["sil", "sp"], np.arange(3) / 10), "hello there")


@pytest.mark.parametrize(
    "counts, sentences", [((1, 0, 0), 1), ((1, 1, 0), 1), ((9, 0, 1), 1), ((9, 0, 0), 2), ((9, 1, 1), 0)]
)
def test_empty_parts_are_said(counts, sentences):
    report = {part: dict(utterances=count) for part, count in zip(recordings.PARTS, counts)}
    said = what_is_empty(report)
    assert len(said) == sentences and (counts != (1, 0, 0) or "too few to train" in said[0])
