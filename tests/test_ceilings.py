"""The ceiling beside the scores of the packaged voice: who gets it, by which judges, and where."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_run import make_run

from dlpo_nb.ceilings import JUDGES, ceiling_lines, ceilings, heard_as, measured
from dlpo_nb.core import RunDir, asset, checkout, fingerprint
from dlpo_nb.evaluate import EvaluateConfig, evaluate
from dlpo_nb.gradtts.model import GradTTS
from dlpo_nb.heldout import format_table
from dlpo_nb.policies import load_policy
from dlpo_nb.report import write_report
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.wer import WER, packaged_whisper
from dlpo_nb.text import prompts
from dlpo_nb.vocoder import SMALL_MEL, get_vocoder
from small_gradtts import SMALL
from toy_mel import make_toy_mel

NOTHING = SimpleNamespace(nisqa_weights="", whisper="")


@pytest.fixture(autouse=True)
def usual_vocoders(monkeypatch):
    for name in ("DLPO_VOCODER", "DLPO_VOCOS_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


def test_the_file_is_of_the_texts_and_vocoders_that_the_package_has():
    found = measured()
    assert found["texts"] == dict(count=64, fingerprint=fingerprint(prompts("heldout")[:64]))
    for name, scores in found["vocoders"].items():
        assert scores["identity"] == get_vocoder(name, SMALL_MEL).identity
        assert scores["distillmos"] < found["recordings"]["distillmos"]
    with open(checkout("results/ceilings/evaluation.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, scores in dict(found["vocoders"], recordings=found["recordings"]).items():
        for judge in JUDGES:
            mean = np.mean([float(row[judge]) for row in rows if row["system"] == name])
            assert scores[judge] == pytest.approx(mean, abs=1e-4)  # it has four digits


def test_the_page_says_the_same():
    found, said = measured(), checkout("docs/state.md").read_text(encoding="utf-8")
    for name, scores in (
        ("copied through it", found["vocoders"]["vocos"]),
        ("themselves", found["recordings"]),
    ):
        numbers = ", ".join(f"{scores[judge]:.2f}" for judge in ("distillmos", "dnsmos", "nisqa"))
        assert f"{name}: {numbers}" in said
    rates = [100 * scores["pooled_wer"] for scores in (found["vocoders"]["vocos"], found["recordings"])]
    assert f"of the copies {rates[0]:.1f} %, of the recordings {rates[1]:.1f} %" in said
    ways = [found["recordings"], found["vocoders"]["vocos"], found["vocoders"]["griffinlim"]]
    numbers = [f"{scores['distillmos']:.2f}" for scores in ways]
    assert "teacher says them {}, through it {}, through Griffin-Lim {}".format(*numbers) in said


def test_a_copy_gets_what_is_recorded():
    pytest.importorskip("hibari")
    from dlpo_nb.hibari import speak

    with open(checkout("results/ceilings/evaluation.csv"), newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["system"] == "vocos")
    said = torch.from_numpy(speak(row["text"]).audio.astype(np.float32) / 32767)
    copy = get_vocoder("vocos", SMALL_MEL).copy([said])[0]
    assert len(copy) == len(said) // SMALL_MEL.hop * SMALL_MEL.hop
    score = get_reward("distillmos")(copy[None], torch.tensor([len(copy)]), 24000, [""]).item()
    # onnxruntime's last bits are the processor's; texts differ by 0.2 from each other
    assert score == pytest.approx(float(row["distillmos"]), abs=0.1)


def test_only_the_voice_of_the_file_has_a_ceiling(monkeypatch, tmp_path):
    packaged = load_policy(asset("gradtts_small.safetensors"))
    assert heard_as(packaged) == "vocos"
    packaged.save(tmp_path / "tuned.safetensors")
    assert heard_as(load_policy(tmp_path / "tuned.safetensors")) == "vocos"
    # a base of another speaker, one of nobody knows whom, and one that says what it is to be heard through
    others = replace(SMALL, voice="festival"), SMALL, replace(SMALL, vocoder="vocos")
    assert [heard_as(GradTTS(config)) for config in others] == [""] * 3
    packaged.hear_through("griffinlim")
    assert heard_as(packaged) == "griffinlim"
    assert heard_as(make_toy_mel()) == heard_as(load_policy(asset("tiny_base.safetensors"))) == ""
    monkeypatch.setenv("DLPO_VOCODER", "griffinlim")
    assert heard_as(GradTTS(replace(SMALL, vocoder="vocos", voice="hibari"))) == "griffinlim"
    assert heard_as(GradTTS(replace(SMALL, vocoder="vocos"))) == ""
    packaged.__dict__["vocoder"] = SimpleNamespace(identity="vocos of other weights")
    assert heard_as(packaged) == ""


def test_a_judge_of_other_weights_or_another_listener_is_left_out(tmp_path):
    judges = {"dnsmos": object(), "nisqa": object(), "wer": WER("pocketsphinx"), "loud": object()}
    (tmp_path / "other.tar").write_bytes(b"of somebody else")
    config = SimpleNamespace(nisqa_weights=str(tmp_path / "other.tar"), whisper="")
    of_vocos = ceilings("vocos", judges, config)
    assert list(of_vocos["judges"]) == ["dnsmos"]
    assert of_vocos["judges"]["dnsmos"]["copies"] == measured()["vocoders"]["vocos"]["dnsmos"]
    assert ceilings("", judges, config) == ceilings("vocos", {"loud": object()}, config) == {}
    if packaged_whisper():
        assert list(ceilings("griffinlim", {"wer": WER()}, NOTHING)["judges"]) == ["wer"]


def test_the_weights_of_nisqa_are_known(shared):
    config = SimpleNamespace(nisqa_weights=str(shared / "data" / "nisqa" / "nisqa.tar"), whisper="")
    assert list(ceilings("vocos", {"nisqa": object()}, config)["judges"]) == ["nisqa"]


def example():
    scores = dict(copies=0.0407, recordings=0.065)
    return dict(voice="hibari", vocoder="vocos", texts=64, judges=dict.fromkeys(JUDGES, scores))


def test_the_sentence():
    lines = ceiling_lines(example(), "The vocoder's ceiling for base, tuned", percent=True)
    assert max(map(len, lines)) <= 100
    sentence = " ".join(lines)
    assert "for base, tuned (64 held-out texts" in sentence and "copied through vocos): dist" in sentence
    assert "dnsmos 0.041" in sentence and "wer 4.1 %. The recordings" in sentence and "wer 6.5 %." in sentence
    assert ceiling_lines({}) == ceiling_lines(None) == []


def test_table_and_report_of_a_run_show_it(tmp_path):
    run = RunDir(make_run(tmp_path / "run"))
    summary = run.read_json("summary.json")
    assert "ceiling" not in format_table(summary) + write_report(run.path).read_text(encoding="utf-8")
    run.write_json("summary.json", summary | dict(ceiling=example()))
    table = format_table(run.read_json("summary.json"))
    assert max(map(len, table.splitlines())) <= 100 and "wer 0.041. The" in " ".join(table.split())
    assert "The vocoder&#x27;s ceiling (64 held-out" in write_report(run.path).read_text(encoding="utf-8")


def test_evaluate_shows_it_below_the_packaged_voice_only(tmp_path, capsys):
    config = EvaluateConfig(
        systems=("gradtts_small", "tiny_base"),
        metrics="dnsmos",
        heldout=2,
        rollout_steps=2,
        level_normalised=False,
        device="cpu",
        out=str(tmp_path),
    )
    found = evaluate(config)
    assert list(found["ceilings"]) == ["gradtts_small"] and list(
        found["ceilings"]["gradtts_small"]["judges"]
    ) == ["dnsmos"]
    table = " ".join((tmp_path / "table.txt").read_text().split())
    assert "The vocoder's ceiling for gradtts_small (64 held-out texts spoken by" in table
    assert "hibari, and copied through vocos): dnsmos 3.6" in " ".join(capsys.readouterr().out.split())
