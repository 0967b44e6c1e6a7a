"""What the evaluation must keep to beyond its notebook: invariance, odd inputs, and the formats on disk."""

import contextlib
import csv
import io
import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import soundfile
import torch
from toy_mel import make_toy_mel

from dlpo_nb.audio import log_mel
from dlpo_nb.rewards.base import Failure
from dlpo_nb.core import UserError, asset
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.evaluate import EvaluateConfig, main, speak
from dlpo_nb.evaluate import evaluate as compare_all
from dlpo_nb.heldout import (
    compare,
    evaluation_judges,
    format_table,
    measure,
    ordered,
    read_rows,
    role,
    speaker_log_mels,
    synthesise_all,
    verdict,
    write_rows,
)
from dlpo_nb.judges import find_judges, identity, judge_options
from dlpo_nb.judging import ScoreCache, pooled_rates, scores_or_errors
from dlpo_nb.rewards import REWARDS, Reward, get_reward
from dlpo_nb.rewards.base import WeightsFrom
from dlpo_nb.statistics import bootstrap_interval
from dlpo_nb.systems import Clip, System, read_clip
from dlpo_nb.text import prompts
from dlpo_nb.text import text_to_ids
from dlpo_nb.wavegrad2.model import AUDIO_MAX, load_wavegrad2

ROOT = Path(__file__).resolve().parents[1]

TEXTS = ["Good morning.", "The kettle is on.", "Six grey geese crossed the wide road.", "Rain."]


class Toy(torch.nn.Module):
    "A policy that is exact per sample, so that batching must not change a bit; `slow` frames per symbol."

    width = 300

    def __init__(self, slow=2, gain=0.5):
        super().__init__()
        self.slow, self.gain = slow, torch.nn.Parameter(torch.tensor(gain))

    def encode(self, texts):
        return [text_to_ids(text) for text in texts]

    def render(self, x_0, conditioning):
        return x_0.clamp(-1, AUDIO_MAX), conditioning.frames * self.width

    def condition(self, ids, lengths):
        frames = lengths * self.slow
        return SimpleNamespace(hidden=torch.zeros(len(ids), 1, int(frames.max())), frames=frames)

    def predict_noise(self, x, hidden, level, frames=None):
        assert not self.training and frames is not None
        return self.gain * x * level


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear().respaced(4)


def test_batching_changes_nothing(schedule):
    whole = synthesise_all(Toy(), TEXTS, schedule, seed=3)
    for batch_size in (1, 2, 3):
        assert all(
            map(torch.equal, whole, synthesise_all(Toy(), TEXTS, schedule, seed=3, batch_size=batch_size))
        )
    assert all(
        x.min() >= -1 and x.max() <= 1 - 2**-10 and x.dtype == torch.float32 and not x.requires_grad
        for x in whole
    )


def test_models_share_their_noise(schedule):
    base, tuned = (synthesise_all(Toy(gain=g), TEXTS, schedule, seed=0) for g in (0.5, 0.5001))
    assert all(0 < (a - b).abs().max() < 0.01 for a, b in zip(base, tuned))
    # a slower model needs more noise a step, so only its start is shared
    slower = synthesise_all(Toy(slow=3), TEXTS, schedule, seed=0)
    assert all(len(b) > len(a) for a, b in zip(base, slower))


def test_mode_is_kept_and_nothing_to_say_is_an_error(schedule):
    for training in (True, False):
        model = Toy().train(training)
        synthesise_all(model, TEXTS[:1], schedule, seed=0)
        assert model.training == training
    assert synthesise_all(Toy(), [], schedule, seed=0) == []
    with pytest.raises(UserError):
        synthesise_all(Toy(), ["Good morning.", "???"], schedule, seed=0)


def judge(audio, lengths, sample_rate, texts):
    "Sum of the samples an utterance really has: padding would show."
    assert sample_rate == 22050 and len(texts) == len(audio) <= 16
    return torch.stack([row[:n].sum() for row, n in zip(audio, lengths)])


def test_measure():
    audio = [torch.full((1000 + 7 * i,), 0.25) for i in range(40)]
    audio[3] = torch.ones(1000)
    rows = measure(audio, [f"text {i}" for i in range(40)], {"judge": judge})
    assert [row["judge"] for row in rows] == [float(x.sum()) for x in audio]
    assert rows[3]["clipped_share"] == 1 and rows[4]["clipped_share"] == 0
    assert rows[0]["seconds"] == 1000 / 22050 and abs(rows[0]["rms_db"] + 12.04) < 0.01
    with pytest.raises(ValueError):
        measure(audio, ["one text"], {})


def test_reference_of_another_length():
    audio = [torch.sin(torch.arange(22050) * 0.1)]
    reference = [log_mel(torch.sin(torch.arange(30000) * 0.1))[0]]
    row = measure(audio, ["a"], {}, reference)[0]
    assert 0 <= row["log_mel_to_reference"] < 0.2  # only the frames at the cut differ


def rows(scores, **more):
    return [
        dict(
            text=f"text {i}",
            seconds=1.0,
            rms_db=-20.0,
            noise_floor_db=-60.0,
            clipped_share=0.0,
            dnsmos=s,
            **more,
        )
        for i, s in enumerate(scores)
    ]


def summary(base, tuned, reward="dnsmos", control="none"):
    return dict(
        evaluation=compare(base, tuned),
        method="dlpo",
        reward=reward,
        control=control,
        seed=0,
        episodes=24,
        minutes=1.0,
    )


def test_intervals():
    assert bootstrap_interval([2.0]) == (2.0, 2.0, 2.0)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy()
    mean, low, high = bootstrap_interval(x)
    assert bootstrap_interval(x) == (mean, low, high) and low < mean < high
    # the normal theory's interval, to 15 %
    assert abs((high - low) / (2 * 1.96 * x.std() / 8) - 1) < 0.15
    assert bootstrap_interval(x, level=0.5)[1] > low
    for wrong in ([], [[1.0, 2.0]]):
        with pytest.raises(UserError):
            bootstrap_interval(wrong)


def test_compare():
    base, tuned = rows([3.0, 3.2, 2.8]), rows([3.1, 3.3, 2.9])
    tuned[0]["seconds"] = 1.3
    result = compare(base, tuned)
    metric = result["metrics"]["dnsmos"]
    assert result["n"] == 3 and abs(metric["difference"] - 0.1) < 1e-9 and abs(metric["low"] - 0.1) < 1e-9
    assert abs(result["duration_ratio"] - 1.1) < 1e-9 and "log_mel_distance" not in result
    # recordings of different lengths are compared on the frames both have
    audio = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) * 0.1 for i in range(3)]
    assert compare(base, tuned, audio, [x[:4000] for x in audio])["log_mel_distance"]["mean"] < 0.1
    for wrong in ([], rows([1.0]), rows([1.0, 2.0, 3.0])[::-1]):
        with pytest.raises(UserError):
            compare(base, wrong)
    with pytest.raises(UserError):
        compare([], [])


def test_verdict():
    base, draw = rows([3.0 + 0.01 * i for i in range(20)]), torch.Generator().manual_seed(0)
    move = lambda by: rows([r["dnsmos"] + by + 0.1 * float(torch.randn(1, generator=draw)) for r in base])
    for by, word in ((0.3, " rose: "), (-0.3, " fell: "), (0.0, " did not clearly change: ")):
        assert word in verdict(summary(base, move(by)))
    assert "not measured" in verdict(summary(base, base, reward="utmos"))


def test_table():
    mixed = "0.8*dnsmos - 0.2*a_judge_with_a_very_long_name_indeed"
    base = rows([3.0, 3.1], **{mixed: 1.0, "nisqa": 2.0, "a_judge_with_a_very_long_name_indeed": 100.0})
    table = format_table(summary(base, base, reward=mixed))
    assert max(map(len, table.splitlines())) <= 100 and "2 held-out texts" in table
    assert "nisqa (not the reward)" in table and "shuffle-advantages" in table
    assert "drift" not in format_table(summary(base, base, reward=mixed, control="shuffle-advantages"))
    assert [role(name, mixed) for name in (mixed, "dnsmos", "nisqa", "mos")] == [
        "the reward",
        "part of the reward",
        "not the reward",
        "not the reward",
    ]
    assert ordered({"seconds": 0, "nisqa": 0, "dnsmos": 0, mixed: 0}, mixed) == [
        mixed,
        "dnsmos",
        "nisqa",
        "seconds",
    ]


def test_rows_on_disk(tmp_path):
    base = rows([3.0, 3.1])
    base[0]["text"] = 'He said: "1, 2;\n3", and left.'
    tuned = [dict(row, only_here=1.5) for row in base]
    write_rows(tmp_path / "e.csv", {"base": base, "tuned": tuned})
    assert read_rows(tmp_path / "e.csv") == {"base": base, "tuned": tuned}
    for damage in ("", "system,index,text,dnsmos\nbase,0,Hello,loud\n", "a,b\n1,2\n"):
        (tmp_path / "d.csv").write_text(damage)
        if damage:
            with pytest.raises(UserError, match="d.csv"):
                read_rows(tmp_path / "d.csv")
    with pytest.raises(UserError, match="nothing.csv"):
        read_rows(tmp_path / "nothing.csv")


def test_the_speakers_own_reading():
    texts = prompts("heldout")[:64]
    mels = speaker_log_mels(texts[::-1])
    assert len(mels) == 64 and all(
        mel.shape[0] == 80 and mel.dtype == torch.float32 and -6 <= mel.min() < mel.max() < 3 for mel in mels
    )
    assert (
        torch.equal(mels[0], speaker_log_mels(texts)[-1])
        and speaker_log_mels(texts + ["Something else."]) is None
    )


# `python -m dlpo_nb.evaluate`


evaluate = partial(commands.run, "evaluate")


def said(done):
    "What a command printed, on one line as if the terminal were endless."
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "What a run leaves of itself: its settings, and a tuned model whose weights were moved a little."
    folder = tmp_path_factory.mktemp("runs") / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    model = load_wavegrad2(asset("tiny_base.safetensors"))
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight *= 1.01
    model.save(folder / "checkpoints" / "tuned.safetensors")
    (folder / "config.json").write_text(
        json.dumps(dict(base_checkpoint="tiny_base", rollout_steps=4, spacing="geometric"))
    )
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "Recordings of the eight short texts; seven have something wrong or unusual."
    folder = tmp_path_factory.mktemp("audio") / "theirs"
    folder.mkdir()
    voice = (0.1 * torch.sin(torch.arange(30000) * 0.05)).numpy()
    soundfile.write(folder / "0.wav", voice, 22050)
    (folder / "1.wav").write_bytes(b"RIFF but not really")
    soundfile.write(folder / "2.wav", np.stack([voice, voice], 1), 44100)
    soundfile.write(folder / "3.wav", voice, 8000)
    soundfile.write(folder / "4.wav", np.zeros(40 * 60 * 16000, np.int16), 16000)
    soundfile.write(folder / "5.wav", voice[:0], 22050)
    soundfile.write(folder / "6.wav", voice * np.nan, 22050, subtype="FLOAT")
    return folder  # and 7.wav is missing


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "eight.txt"
    path.write_text("\n".join(f"{word}." for word in "One Two Three Four Five Six Seven Eight".split()))
    return path


@pytest.fixture(scope="module")
def evaluated(run, theirs, texts_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    command = (
        run,
        theirs,
        "--texts",
        texts_file,
        "--metrics",
        "dnsmos,mosquito,nisqa",
        "--nisqa-weights",
        "nowhere.tar",
        "--threads",
        1,
        "--out",
        out,
    )
    done = evaluate(*command)
    assert done.returncode == 0, done.stderr
    return command, out, done


def test_command_writes_what_it_says(evaluated):
    _, out, done = evaluated
    assert {p.name for p in out.iterdir()} == {
        "audio",
        "scores.jsonl",
        "evaluation.csv",
        "evaluation.json",
        "table.txt",
        "bars.png",
    }
    result = json.loads((out / "evaluation.json").read_text())
    assert (
        list(result["systems"]) == ["base", "moved", "theirs"]
        and result["reference"] == "base"
        and result["texts"] == 8
    )
    against = result["measures"]["dnsmos"]["systems"]["moved"]["against"]
    assert (
        against["n"] == 8
        and 0 <= against["t"] <= against["holm"] <= 1
        and against["low"] <= against["difference"] <= against["high"]
    )
    assert {"dnsmos", "dnsmos_normalised", "seconds", "rms_db"} <= set(result["measures"])
    assert (
        result["measures"]["rms_db"]["better"] == ""
        and result["settings"]["seed"] == 0
        and "torch" in result["environment"]
    )
    rows = read_rows(out / "evaluation.csv")
    assert [len(own) for own in rows.values()] == [8, 8, 8] and {"text", "dnsmos", "seconds"} <= set(
        rows["base"][7]
    )
    assert set(rows["theirs"][1]) == {"text"}, "what cannot be judged has no numbers"
    assert "4 geometric steps" in done.stdout and "Holm" in done.stdout and "Traceback" not in done.stderr


def test_every_wrong_recording_is_named_once_and_the_others_are_judged(evaluated):
    _, out, done = evaluated
    failures = json.loads((out / "evaluation.json").read_text())["failures"]
    for index, word in {
        1: "damaged",
        3: "8000 samples per second",
        4: "40.0 minutes",
        5: "no audio",
        6: "nan or inf",
        7: "no recording of this text",
    }.items():
        found = [f for f in failures if f["index"] == index]
        assert (
            len(found) == 1
            and found[0]["system"] == "theirs"
            and word in found[0]["reason"]
            and word in done.stdout
        )
    assert len(failures) == 6 and "2.wav: its 2 channels were averaged" in done.stdout
    judged = read_rows(out / "evaluation.csv")["theirs"]
    assert [i for i, row in enumerate(judged) if "dnsmos" in row] == [0, 2] and abs(
        judged[2]["seconds"] - 30000 / 44100
    ) < 1e-3


def test_missing_judges_are_one_sentence_each(evaluated):
    words = said(evaluated[2])
    assert (
        "mosquito is left out: unknown reward 'mosquito'" in words
        and "nisqa is left out: there are no NISQA weights at nowhere.tar" in words
    )


def test_nothing_is_made_twice(evaluated):
    command, out, _ = evaluated
    csv, scores = (out / "evaluation.csv").read_bytes(), (out / "scores.jsonl").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in (out / "audio").rglob("*.wav")}
    book = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text(
        "".join(book[:-3]) + book[-3][:20]
    )  # as after a kill, in the middle of a line
    (out / "audio" / "moved" / "003.wav").unlink()
    (out / "evaluation.csv").unlink()
    done = evaluate(*command)
    assert done.returncode == 0, done.stderr
    assert (out / "evaluation.csv").read_bytes() == csv, "to the bit"
    assert sorted((out / "scores.jsonl").read_bytes().splitlines()) == sorted(scores.splitlines())
    assert len(made) == 16 and all(
        path.stat().st_mtime_ns == t for path, t in made.items() if path.parent.name == "base"
    )


def test_other_settings_are_made_anew(evaluated, tmp_path):
    first = speak_one(tmp_path, seed=0)
    assert (
        speak_one(tmp_path, seed=0) == first
        and speak_one(tmp_path, seed=1) != first
        and speak_one(tmp_path, seed=0, text="Two.") != first
    )


def speak_one(folder, seed, text="One."):
    system, schedule = (
        System("base", "model", asset("tiny_base.safetensors")),
        NoiseSchedule.linear().respaced(2, "geometric"),
    )
    assert speak(system, [text], schedule, seed, folder, "cpu") == {}
    assert (folder / "texts.txt").read_text() == f"000|{text}\n"
    return (folder / "000.wav").read_bytes()


def test_a_diverged_model_is_a_failure_not_a_crash(tmp_path):
    model = load_wavegrad2(asset("tiny_base.safetensors"))
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.fill_(1e30)
    model.save(tmp_path / "gone.safetensors")
    failed = speak(
        System("gone", "model", tmp_path / "gone.safetensors"),
        ["One."],
        NoiseSchedule.linear().respaced(2),
        0,
        tmp_path / "audio",
        "cpu",
    )
    assert (
        list(failed) == [0] and "diverged" in str(failed[0]) and not list((tmp_path / "audio").glob("*.wav"))
    )


def ones(n, rate=22050):
    return Clip(torch.ones(n), rate)


def test_a_judge_that_refuses_one_still_hears_the_others(tmp_path):
    class Judge(Reward):
        min_seconds, name = 0.0, "judge"

        def score_clips(self, clips, sample_rate, texts):
            if any(len(clip) > 1000 for clip in clips):
                raise UserError("too long")
            return [math.nan if text == "odd" else len(clip) for clip, text in zip(clips, texts)]

    judge = Judge()
    _, odd, last = scores_or_errors(judge, "judge", [ones(5)] * 3, ["a", "odd", "b"])
    assert str(odd) == "judge cannot hear it: its score is not finite" and last == 5
    book = ScoreCache(tmp_path / "scores.jsonl")
    found = book.ask(judge, "judge", {}, [ones(n) for n in (10, 2000, 30)], ["a", "b", "c"])
    assert found[0] == 10 and str(found[1]) == "too long" and found[2] == 30 and len(book.known) == 2
    assert book.ask(judge, "judge", {"weights": "other"}, [ones(5)], ["a"]) == [5] and len(book.known) == 3


class Listener(Reward):
    "A stub of wer: the same rates whatever is said, and no Whisper to load."

    name, lower_is_better = "wer", True
    weights_from, report_options = WeightsFrom("whisper", "model", "STUB"), {"most": math.inf}

    def __init__(self, model="", most=1.0):
        self.model, self.most = model, most

    def score_clips(self, clips, sample_rate, texts):
        return [min(1.5, self.most)] * len(clips)


def test_a_run_is_judged_for_its_words_where_a_whisper_is(monkeypatch):
    """A report cuts nothing; the fallback, pocketsphinx, is not asked."""
    monkeypatch.setitem(REWARDS.entries, "wer", Listener)
    monkeypatch.setattr("dlpo_nb.rewards.nisqa.find_nisqa_weights", lambda: None)
    monkeypatch.delenv("STUB", raising=False)
    config, reward = SimpleNamespace(reward="judge", device="cpu"), Seconds()
    assert list(evaluation_judges(config, reward)) == ["judge", "dnsmos"]
    monkeypatch.setenv("STUB", "a model")
    judges = evaluation_judges(config, reward)
    assert list(judges) == ["judge", "dnsmos", "wer"] and judges["judge"] is reward
    audio = [torch.sin(torch.arange(16000) * 0.05) / 9] * 2
    rows = measure(audio, TEXTS[:2], judges, sample_rate=16000)
    assert [row["wer"] for row in rows] == [1.5, 1.5] and [row["judge"] for row in rows] == [1, 1]
    table = dict(
        evaluation=compare(rows, rows), method="dlpo", reward="judge", control="none", seed=0, episodes=1
    )
    assert "wer (not the reward)                1.500" in format_table(table)
    both = get_reward("dnsmos + 0.2*level")  # each part is judged by itself, dnsmos as in every report
    judges = evaluation_judges(SimpleNamespace(reward="dnsmos + 0.2*level", device="cpu"), both)
    assert list(judges) == ["dnsmos + 0.2*level", "level", "dnsmos", "wer"]
    assert judges["level"] is both.rewards["level"] and judges["dnsmos"] is not both.rewards["dnsmos"]
    config.nisqa_weights = "nowhere.tar"
    with pytest.raises(UserError, match="nowhere.tar"):
        evaluation_judges(config, reward)


class Seconds(Reward):
    "What a judge is told of the time an utterance takes, times the number that its weights are."

    name, weights_from = "seconds_heard", WeightsFrom("", "weights", "SECONDS_WEIGHTS")

    def __init__(self, weights=None):
        self.factor = float(weights or self.found_weights() or 1)
        self.rates = set()

    def score_clips(self, clips, sample_rate, texts):
        self.rates.add(sample_rate)
        return [self.factor * len(clip) / sample_rate for clip in clips]


def test_each_recording_is_judged_at_its_own_rate(tmp_path, monkeypatch):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, rate in enumerate((16000, 24000, 44100, 24000)):
        soundfile.write(folder / f"{i}.wav", (0.1 * torch.sin(torch.arange(rate) * 0.05)).numpy(), rate)
    made = []
    monkeypatch.setitem(REWARDS.entries, "seconds_heard", lambda: made.append(Seconds()) or made[-1])
    config = EvaluateConfig(
        systems=(str(folder),),
        texts=str(tmp_path / "texts.txt"),
        metrics="seconds_heard",
        out=str(tmp_path / "out"),
    )
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    with contextlib.redirect_stdout(io.StringIO()):
        result = compare_all(config)
    rows = read_rows(tmp_path / "out" / "evaluation.csv")["mixed"]
    assert made[0].rates == {16000, 24000, 44100} and not result["failures"]
    assert [row["seconds"] for row in rows] == [1] * 4 == [row["seconds_heard"] for row in rows]


def test_a_score_is_kept_by_rate_and_by_the_weights_of_any_judge(tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS.entries, "seconds_heard", Seconds)
    cache, config = ScoreCache(tmp_path / "scores.jsonl"), EvaluateConfig()
    for weights, rate, want in (("", 22050, 2), ("", 44100, 1), ("3", 44100, 3)):
        monkeypatch.setenv("SECONDS_WEIGHTS", weights)
        judges, notes = find_judges(["seconds_heard"], config)
        used = identity("seconds_heard", config)
        assert used == {"seconds_heard": weights} and not notes
        clip = [ones(44100, rate)]
        assert cache.ask(judges["seconds_heard"], "seconds_heard", used, clip, ["a"]) == [want]
        assert cache.ask(None, "seconds_heard", used, clip, ["a"]) == [want], "nobody is asked again"
    assert judge_options("seconds_heard", config) == {}


def test_a_voice_of_another_rate_is_spoken_and_judged_at_it(tmp_path, monkeypatch):
    model = make_toy_mel()
    model.save(tmp_path / "toy.safetensors")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    made = []
    monkeypatch.setitem(REWARDS.entries, "seconds_heard", lambda: made.append(Seconds()) or made[-1])
    config = EvaluateConfig(
        systems=(str(tmp_path / "toy.safetensors"),),
        texts=str(tmp_path / "texts.txt"),
        metrics="seconds_heard",
        rollout_steps=2,
        level_normalised=False,
        device="cpu",
        out=str(tmp_path / "out"),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        compare_all(config)
    rate = soundfile.info(tmp_path / "out" / "audio" / "toy" / "000.wav").samplerate
    assert rate == model.sample_rate != 22050 and made[0].rates == {rate}
    rows = read_rows(tmp_path / "out" / "evaluation.csv")["toy"]
    assert all(row["seconds"] == pytest.approx(row["seconds_heard"]) for row in rows)


def test_a_word_error_rate_is_heard_once_and_less_is_better(theirs, texts_file, tmp_path, monkeypatch):
    @dataclass
    class Counting(Reward):
        "A made-up recogniser: for one word of the first recording it hears three others."

        model: str = ""
        device: str = "auto"
        most: float = 1.0
        lower_is_better = True
        weights_from = WeightsFrom("whisper", "model", "DLPO_WHISPER_MODEL")
        report_options = {"most": math.inf}

        def score_clips(self, clips, sample_rate, texts):
            assert self.model == "whisper-folder" and self.device == "cpu" and self.most == math.inf, (
                "a report cuts nothing"
            )
            return [1.5 if text == "One." else 0.0 for text in texts]

    monkeypatch.setitem(REWARDS.entries, "wer", Counting)
    config = EvaluateConfig(
        systems=(str(theirs),),
        texts=str(texts_file),
        metrics="dnsmos,wer",
        whisper="whisper-folder",
        device="cpu",
        out=str(tmp_path),
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = compare_all(config)
    assert (
        result["measures"]["wer"]["better"] == "lower"
        and "wer_normalised" not in result["measures"]
        and "wer, %" in printed.getvalue()
    )
    assert result["measures"]["wer"]["systems"]["theirs"]["mean"] == 0.75 and "75.0" in printed.getvalue()
    assert (
        result["pooled_wer"] == {"theirs": 0.75}
        and "of all words of all texts: theirs 75.0" in printed.getvalue()
    )
    assert (tmp_path / "leaderboard.png").stat().st_size > 5000


def test_human_recordings_are_a_row_and_doubles_are_numbered(theirs, texts_file, tmp_path):
    twin = tmp_path / "theirs"
    twin.mkdir()
    shutil.copy(theirs / "0.wav", twin / "0.wav")
    soundfile.write(twin / "1.wav", soundfile.read(theirs / "0.wav")[0][::-1], 22050)
    done = evaluate(
        twin,
        theirs,
        "--ground-truth",
        twin,
        "--texts",
        texts_file,
        "--metrics",
        "dnsmos",
        "--test",
        "wilcoxon",
        "--no-level-normalised",
        "--heldout",
        2,
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (
        list(result["systems"]) == ["ground truth", "theirs", "theirs-2"]
        and result["reference"] == "theirs"
        and result["texts"] == 2
    )
    assert "dnsmos_normalised" not in result["measures"] and "Wilcoxon" in result["test"]
    same = result["measures"]["dnsmos"]["systems"]["ground truth"]["against"]
    assert same["difference"] == 0 and same["holm"] == 1 and same["cohens_d"] == 0


def test_help_of_the_command_is_a_manual():
    done = evaluate("--help")
    assert done.returncode == 0
    for word in (
        "examples:",
        "texts.txt",
        "Holm",
        "--texts",
        "--heldout",
        "--metrics",
        "--ground-truth",
        "--rollout-steps",
        "--spacing",
        "--seed",
        "--device",
        "--threads",
        "--nisqa-weights",
        "--utmos-weights",
        "--whisper",
        "--out",
        "--test",
    ):
        assert word in done.stdout


@pytest.mark.smoke
@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["no system given"]),
        (["{run}/nowhere"], ["nowhere", "folder of recordings"]),
        (["{run}/config.json"], ["config.json"]),
        (["{run}/checkpoints"], ["checkpoints", "no recordings"]),
        (["tiny_base", "{run}/broken.safetensors"], ["broken.safetensors"]),
        (["tiny_base", "--metrics", "mosquito"], ["mosquito", "dnsmos"]),
        (["tiny_base", "--metrics", ","], ["names no judge"]),
        (["tiny_base", "--texts", "{run}/none.txt"], ["none.txt"]),
        (["tiny_base", "--heldout", "-1"], ["--heldout"]),
        (["tiny_base", "--test", "anova"], ["anova"]),
        (["tiny_base", "--metrics", "dnsmos", "--device", "abacus"], ["abacus"]),
        (["tiny_base", "--metrics", "dnsmos", "--out", "{run}"], ["holds a run"]),
        (["tiny_base", "--metrics", "dnsmos", "--ground-truth", "{run}/none"], ["--ground-truth"]),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(flags, words, run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (run / "broken.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises((SystemExit, UserError)) as caught:
        main([flag.format(run=run) for flag in flags])
    told = str(caught.value) + capsys.readouterr().err
    assert all(word in told for word in words), told


def test_batches_are_spoken_whole_or_not_at_all(schedule):
    heard = {}
    whole = synthesise_all(Toy(), TEXTS, schedule, seed=3, batch_size=2)
    part = synthesise_all(
        Toy(), TEXTS, schedule, seed=3, batch_size=2, skip={0, 3}, on_audio=heard.__setitem__
    )
    assert [x is None for x in part] == [True, False, False, True] and set(heard) == {1, 2}
    assert all(torch.equal(whole[i], heard[i]) for i in heard)


def test_the_demo_recordings_are_judged_as_recorded(shared):
    with open(shared / "data" / "dlpo_demo" / "scores.csv", newline="") as file:
        reference = {(row["system"], row["utt"]): row for row in csv.DictReader(file)}
    names = ["LJ001-0004", "LJ001-0079", "LJ001-0100", "LJ001-0105", "LJ001-0108", "LJ001-0119"]
    ours = read_rows(ROOT / "results" / "dlpo_demo" / "evaluation.csv")
    for system, rows_ in ours.items():
        for row, name in zip(rows_, names, strict=True):
            assert (
                abs(
                    row["nisqa"]
                    - float(reference["gt" if system == "ground truth" else system, name]["nisqa_mos"])
                )
                < 1e-3
            )
    clips = [read_clip(shared / "data" / "dlpo_demo" / f"{name}_dlpo.flac")[0] for name in names[:2]]
    again = scores_or_errors(get_reward("dnsmos"), "dnsmos", clips, [""] * 2)
    assert all(abs(a - row["dnsmos"]) < 1e-4 for a, row in zip(again, ours["dlpo"]))


def test_a_bar_inside_a_text_is_part_of_it(tmp_path):
    from dlpo_nb.systems import read_transcript

    for content, want in (
        (("c1|Press A | B now.", "c2|My uncle."), ["Press A | B now.", "My uncle."]),
        (("c1|Press A | B now.",), ["Press A | B now."]),
        (("c1|Dr. Ray|doctor ray", "c2|No.|no"), ["doctor ray", "no"]),
    ):
        (tmp_path / "texts.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
        assert [text for _, text in read_transcript(tmp_path)] == want


def test_what_a_judge_refuses_is_left_out_on_both_sides():
    class Judge:
        def __call__(self, audio, lengths, rate, texts):
            self.last_failures = [
                Failure(i, "it is too long", texts[i]) for i, n in enumerate(lengths.tolist()) if n > 30000
            ]
            return torch.where(lengths > 30000, 1.0, 3.0 + lengths / 1e6)

    clips = [torch.sin(torch.arange(n) / 9) / 3 for n in (20000, 22000, 24000)]
    longer = [*clips[:2], clips[2].repeat(2)]
    base, tuned = (
        measure(clips, ["one", "two", "three"], {"judge": Judge()}),
        measure(longer, ["one", "two", "three"], {"judge": Judge()}),
    )
    result = compare(base, tuned, clips, longer)
    metric = result["metrics"]["judge"]
    assert (
        (metric["n"], metric["difference"]) == (2, 0)
        and metric["base"] == pytest.approx(3.021)
        and result["metrics"]["seconds"]["n"] == 3
    )
    assert result["left_out"] == [
        dict(system="tuned", index=2, text="three", judge="judge", reason="it is too long")
    ]
    table = format_table(
        dict(evaluation=result, method="dlpo", reward="judge", control="none", seed=0, episodes=1)
    )
    assert (
        "left out of judge on both sides (n = 2): text 3, 'three'" in (words := " ".join(table.split()))
        and "too long" in words
    )
    nobody = compare(tuned[2:], tuned[2:])
    assert "judge" not in nobody["metrics"] and len(nobody["left_out"]) == 2


def test_a_text_that_is_refused_of_one_system_is_left_out_for_all():
    from dlpo_nb.statistics import compare_systems, table_against

    rows = {
        "base": [
            dict(text=t, m=v, wer=w) for t, v, w in (("a b", 1.0, 0.5), ("c", 2.0, 0.0), ("d", 9.0, 1.0))
        ],
        "other": [
            dict(text="a b", m=1.5, wer=0.0),
            dict(text="c", m=2.0, wer=1.0),
            dict(text="d", seconds=70.0),
        ],
        "mute": [dict(text=t) for t in ("a b", "c", "d")],
    }
    m = compare_systems(rows, {"m": "m"}, "base")["measures"]["m"]
    assert [(v["n"], v.get("mean")) for v in m["systems"].values()] == [(2, 1.5), (2, 1.75), (0, None)] and m[
        "left_out"
    ] == [2]
    assert "2 of 3 texts; refused and left out for all systems: 3" in table_against(
        compare_systems(rows, {"m": "m"}, "base"), "m"
    )
    assert pooled_rates(rows) == {"base": pytest.approx(1 / 3), "other": pytest.approx(1 / 3)}
