"""The natural voice: its tensor, its phones in our symbols, exact durations; where it is not installed, what
needs it is skipped."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import commands
import numpy as np
import pytest

from dlpo_nb import hibari
from dlpo_nb.core import UserError, append_jsonl, read_jsonl
from dlpo_nb.corpus import collate, load_corpus
from dlpo_nb.data import CorpusConfig, make_corpus
from dlpo_nb.hibari import (
    RATE,
    UNIT,
    Utterance,
    cut_silence,
    in_front_end_spelling,
    speak,
    to_arpabet,
    to_frames,
)
from dlpo_nb.text import PHONES, prompts, text_to_phones

ROOT = Path(__file__).resolve().parents[1]
needs_voice = pytest.mark.skipif(
    importlib.util.find_spec("hibari") is None, reason="hibari is not installed: pip install 'dlpo_nb[voice]'"
)
SYMBOLS = sorted(
    [*hibari.CONSONANT, *hibari.VOWEL, *hibari.PAIR, *hibari.PAUSE, *hibari.STRESS, *hibari.LENGTHENS, " "]
)  # in one order in every process of pytest-xdist


def test_there_are_as_many_symbols_as_in_the_voice():
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 114


@needs_voice
def test_every_symbol_of_the_voice_has_a_place():
    assert set(hibari.process_voice().hibari.vocab) == set(SYMBOLS)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_symbol_alone_and_in_a_word(symbol):
    for phonemes in (symbol, f"b{symbol}d", f"bˈ{symbol}d", f"{symbol} {symbol}"):
        steps = list(range(3, 5 + len(phonemes)))
        names, counts = to_arpabet(phonemes, steps)
        assert sum(counts) == sum(steps) and len(names) == len(counts) and names[0] == names[-1] == "sil"
        assert set(names) <= set(PHONES)


@pytest.mark.parametrize(
    "phonemes, phones",
    [
        ("kˈæmɹə", "K AE1 M R AH0"),
        ("lˈɪTᵊl", "L IH1 T AH0 L"),
        ("bˈʌʔn", "B AH1 T N"),
        ("pˈɑɾi", "P AA1 T IY0"),
        ("ˌʌndəɹstˈænd", "AH2 N D ER0 S T AE1 N D"),
        ("nˈɜːs", "N ER1 S"),
        ("nˈɜɹs", "N ER1 S"),
        ("bˈAk mˈI hˈWs", "B EY1 K M AY1 HH AW1 S"),
        ("nˈQ bˈYz", "N OW1 B OY1 Z"),
        ("ɪnʤˈɔɪ", "IH0 N JH AO1 IH0"),
        ("ˈæ ˈə", "AE1 AH1"),
        ("ə ɹˈɛd", "AH0 R EH1 D"),
        ("ˈəɹɹ", "ER1 R"),
        ("pʰˈæt", "P AE1 T"),
        ("ˈʦ i", "T S IY0"),
        ("a—“b.”", "AE0 sp B sp"),
        ("w, b", "W sp B"),
    ],
)
def test_words(phonemes, phones):
    assert to_arpabet(phonemes, [2] * (len(phonemes) + 2))[0][1:-1] == phones.split()


def test_where_the_steps_go():
    assert to_arpabet("b ˈæd", [9, 1, 3, 2, 4, 5, 7]) == (
        ["sil", "B", "AE1", "D", "sil"],
        [9, 2, 8, 5, 7],
    )  # 3 of a space: 1 and 2
    assert to_arpabet("b, d", [9, 1, 2, 3, 4, 7]) == (
        ["sil", "B", "sp", "D", "sil"],
        [9, 1, 5, 4, 7],
    )  # all to the pause
    assert to_arpabet("ʦː", [9, 5, 2, 7]) == (["sil", "T", "S", "sil"], [9, 2, 5, 7])
    assert to_arpabet("bˈ", [9, 1, 2, 7])[1] == [9, 1, 9]
    assert to_arpabet("", [9, 7]) == (["sil", "sil"], [9, 7])


def test_an_unknown_letter_is_named():
    with pytest.raises(UserError, match="'ж'.*misaki"):
        to_arpabet("bж", [1, 1, 1, 1])


def spoken_row(*levels, lead=0):
    "Audio of one step for each level."
    return np.concatenate([np.zeros(lead), np.repeat(np.array(levels, float), UNIT)]).astype(np.float32)


def test_silence_is_cut_and_steps_stay_exact():
    audio = np.concatenate(
        [
            spoken_row(0, 0, 1, 1, 1e-4, 1e-4, 1e-4, 1, 1, 1, 0, 0, 0, 0, 0, 0)[hibari.EARLY :],
            np.zeros(hibari.EARLY),
        ]
    )
    row = ["sil", "AA1", "sp", "IY1", "sil"], [2, 4, 1, 2, 7]
    for full_stop, phones, steps in [
        (True, ["AA1", "sp", "IY1", "sp"], [2, 3, 3, 4]),
        (False, ["AA1", "sp", "IY1"], [2, 3, 3]),
    ]:
        cut, *found = cut_silence(audio, *row, full_stop)
        assert found == [phones, steps] and len(cut) == UNIT * sum(steps)
        assert (cut[: 2 * UNIT] == 1).all() and (cut[5 * UNIT : 8 * UNIT] == 1).all()


def test_a_quiet_phone_keeps_a_step_and_silence_alone_is_refused():
    audio = spoken_row(0, 0, 1, 1, 0, 0, 0, 0, 0, 0)
    assert cut_silence(audio, ["sil", "AA1", "T", "sil"], [3, 2, 2, 3], False)[2][1] == 1
    for phones, level in ((["sil", "sp", "sil"], 1), (["sil", "T", "sil"], 0)):
        with pytest.raises(ValueError, match="nothing to say"):
            cut_silence(spoken_row(level, level, level), phones, [1, 1, 1], True)


def test_spelling():
    same = in_front_end_spelling("W AH0 Z IH0 T AY1 DH ER0 sp".split(), "W AA1 Z IH1 T IY1 DH ER0 sp".split())
    assert same == "W AA1 Z IH1 T AY1 DH ER0 sp".split()
    assert in_front_end_spelling(["B"], []) == ["B"] and in_front_end_spelling([], ["B"]) == []
    assert len(in_front_end_spelling("D IH1 D".split(), "D IH1 D N T".split())) == 3


@pytest.mark.parametrize("rate", [22050, 24000])
def test_frames_never_drift(rate):
    steps = np.random.default_rng(0).integers(1, 9, 50).tolist()
    audio, frames = to_frames(Utterance(np.ones(UNIT * sum(steps), np.int16), ["AA1"] * 50, steps), rate)
    assert len(audio) == 300 * sum(frames) and min(frames) >= 1
    assert np.abs(np.cumsum(frames) * 300 / rate - np.cumsum(steps) * UNIT / RATE).max() <= 150 / rate + 1e-9


def test_missing_voice_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "t.txt").write_text("Hello.\n")
    with pytest.raises(UserError, match=r"not installed.*dlpo_nb\[voice\]"):
        make_corpus(CorpusConfig(tmp_path / "t.txt", tmp_path / "c", voice="hibari"))
    assert not (tmp_path / "c").exists()


def test_festival_has_one_rate_and_hibari_two(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("Hello.\n")
    monkeypatch.setattr("dlpo_nb.data.check_festival", lambda: None)
    with pytest.raises(UserError, match="festival speaks at 22050"):
        make_corpus(CorpusConfig(tmp_path / "t.txt", tmp_path / "c", sample_rate=24000))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="24000 Hz.*22050 Hz.*16000"):
        make_corpus(CorpusConfig(tmp_path / "t.txt", tmp_path / "c", voice="hibari", sample_rate=16000))


@needs_voice
def test_durations_cover_the_sound_and_phones_are_ours():
    for text in [
        *prompts("train")[:12],
        "Hello. How are you?",
        "It cost $3.50 in 1999",
        "no",
        "A-ha!",
        "Mr. Quixote's 2nd bottle, isn't it; yes...",
    ]:
        said = speak(text)
        assert (
            len(said.audio) == UNIT * sum(said.steps)
            and min(said.steps) >= 1
            and set(said.phones) <= set(PHONES)
        ), text
        assert said.audio.dtype == np.int16 and 500 < np.abs(said.audio.astype(int)).max() < 32767
        expected = text_to_phones(text)
        assert (said.phones[-1] == "sp") == (expected[-1] == "sp") and said.phones[0] != "sp"
        agree = sum(a == b for a, b in zip(said.phones, expected)) / len(expected)
        assert len(said.phones) != len(expected) or agree > 0.7, text


@needs_voice
def test_a_text_sounds_the_same_each_time():
    first, second = speak("The lamp is broken."), speak("The lamp is broken.")
    assert np.array_equal(first.audio, second.audio) and first.steps == second.steps


@needs_voice
def test_another_version_is_refused(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(hibari, "DURATIONS", "/Nothing_0")
        with pytest.raises(UserError, match="no tensor /Nothing_0.*version"):
            hibari.Voice()
    monkeypatch.setattr(hibari, "UNIT", 300)
    with pytest.raises(UserError, match="another unit than 300"):
        hibari.process_voice()("həlˈO.")


@needs_voice
def test_a_corpus_is_made_resumed_and_read(tmp_path, monkeypatch):
    texts, out, rate = tmp_path / "t.txt", tmp_path / "c", 24000
    texts.write_text("\n".join(["?!", *prompts("train")[:18]]) + "\n", encoding="utf-8")
    config = CorpusConfig(texts, out, voice="hibari", sample_rate=rate, workers=1)
    assert make_corpus(dataclasses.replace(config, limit=5), progress=False) == (4, 1)
    before = (out / "manifest.jsonl").read_text()
    assert make_corpus(config, progress=False) == (18, 1)
    assert (out / "manifest.jsonl").read_text().startswith(before) and "nothing to speak" in (
        out / "failures.txt"
    ).read_text()
    rows = read_jsonl(out / "manifest.jsonl")
    assert [row["id"] for row in rows] == [f"{i:06d}" for i in range(1, 19)] and all(
        row["voice"] == "hibari" for row in rows
    )
    corpus = load_corpus(out, sample_rate=rate)
    assert len(corpus) == 18 and 10 / 3600 < corpus.hours < 40 / 3600
    assert collate(corpus[:3].items)["audio"].abs().max() > 0.02
    with pytest.raises(UserError, match="is at 24000 Hz, the model hears 22050.*--sample-rate 22050"):
        load_corpus(out)
    monkeypatch.setattr("dlpo_nb.data.check_festival", lambda: None)
    for other in (dict(voice="festival", sample_rate=22050), dict(sample_rate=22050)):
        with pytest.raises(UserError, match="was spoken by hibari at 24000 Hz"):
            make_corpus(dataclasses.replace(config, **other), progress=False)


@needs_voice
def test_a_corpus_for_wavegrad(tmp_path):
    (tmp_path / "audio").mkdir()
    for row in hibari.speak_texts(
        [(f"{i:06d}", text) for i, text in enumerate(prompts("train")[:4])], tmp_path
    ):
        append_jsonl(tmp_path / "manifest.jsonl", row)
    corpus = load_corpus(tmp_path)
    assert len(corpus) == 4 and all(
        item.samples == 300 * sum(item.frames) == len(item.audio) for item in corpus
    )


@needs_voice
def test_command_line(tmp_path):
    (tmp_path / "t.txt").write_text("The lamp is broken.\nPass me the salt.\n", encoding="utf-8")
    flags = ["--voice", "hibari", "--sample-rate", 24000, "--texts", tmp_path / "t.txt"]
    done = commands.run("data", *flags, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "2 utterances, 0 texts" in done.stdout and len(load_corpus(tmp_path / "c", sample_rate=24000)) == 2


def test_the_recorded_check_agrees():
    report = json.loads((ROOT / "results" / "hibari" / "alignment.json").read_text())
    made = report["summary"]["as made"]
    assert report["utterances"] == 200 and abs(made["median_ms"]) < 10 and made["within_50_ms"] > 0.9
    assert all(made["within_25_ms"] >= row["within_25_ms"] for row in report["summary"].values())
