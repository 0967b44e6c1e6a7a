"""`--with-control`: a run and its control in two processes, resumed together, side by side in the end."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import commands
import pytest
from toy_mel import make_toy_mel

from dlpo_nb import launch as module
from dlpo_nb.core import RunDir, UserError, asset, read_jsonl
from dlpo_nb.evaluate import EvaluateConfig
from dlpo_nb.launch import check_control, last_words
from dlpo_nb.settings import AWAY, LaunchConfig, as_flags, flags_beyond, parse, recorded
from dlpo_nb.systems import System, choose_vocoder, heard_through

HERE = Path(__file__).resolve().parent
launch = partial(commands.run, "launch")
SMALL = ["--batch-size", "4", "--group-size", "2", "--heldout", "2", "--threads", "1", "--rollout-steps", "3"]


def settings(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_run_and_its_control(tmp_path):
    out, control = tmp_path / "run", tmp_path / "run-control"
    done = launch("--with-control", "--vocoder", "griffinlim", "--episodes", 1, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr + (control / "log.txt").read_text()
    assert "true - shuf." in done.stdout and (out / "comparison.html").is_file()
    mine, theirs = settings(out), settings(control)
    assert mine["inputs"] == theirs["inputs"] and mine["inputs"]["vocoder"].startswith("griffinlim")
    differ = {name for name in mine if mine[name] != theirs[name]} - {"objective"}
    assert differ == {"out", "control", "with_control"}
    first = [RunDir(folder).metrics()[0]["reward/mean"] for folder in (out, control)]
    assert first[0] == first[1], "the same texts from the same noise"


def test_a_control_that_fails_is_said_after_the_run(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def start(preset, config):
        log = RunDir(f"{out}-control").path / "log.txt"
        log.write_text("error: no room\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(module, "start_control", start)
    monkeypatch.setattr(module, "run_job", lambda preset, config: RunDir(config.out))
    config = LaunchConfig(with_control=True, out=str(out))
    with pytest.raises(UserError, match=r"did not finish \(exit status 1: error: no room\); resume both"):
        module.launch("wavegrad-tiny", config)


def test_a_control_has_no_control():
    with pytest.raises(UserError, match="not a control itself"):
        parse(["--with-control", "--control", "shuffle-advantages"])


def test_models_are_heard_as_the_first_run_was():
    runs = {"a": {"inputs": {"vocoder": ""}}, "b": {"vocoder": "griffinlim"}, "c": {"vocoder": "vocos"}}
    chosen, notes = choose_vocoder(EvaluateConfig(), runs)
    assert chosen == "griffinlim" and notes == ["c was tuned through vocos and is heard through griffinlim"]
    assert choose_vocoder(EvaluateConfig(vocoder="vocos"), runs)[0] == "vocos"
    assert choose_vocoder(EvaluateConfig(), {"a": {}}) == ("", [])
    old = {"old": {"inputs": {"vocoder": "vocos 123"}}}  # before there was --vocoder
    assert choose_vocoder(EvaluateConfig(), old)[0] == "vocos"


def test_only_spectrograms_have_a_vocoder():
    small = System("small", "model", asset("gradtts_small.safetensors"))
    wave = System("wave", "model", asset("tiny_base.safetensors"))
    systems, notes = heard_through([small, wave], "griffinlim", True)
    assert [system.vocoder for system in systems] == ["griffinlim", ""] and len(notes) == 1
    with pytest.raises(UserError, match="nosuch"):
        heard_through([wave], "nosuch", True)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["wavegrad-tiny"],
        ["--method", "klinr", "--beta", "0.3", "--episodes", "30"],
        ["--reward=-wer", "--vocoder", "vocos"],
        ["--base-checkpoint", str(asset("gradtts_small.safetensors")), "--vocoder", "griffinlim"],
    ],
)
def test_flags_say_what_they_were_made_of(flags):
    """Of the control's process, of a control begun with other values, and of the record."""
    preset, config = parse(flags)
    settings = {name: value for name, value in config.flat().items() if name not in AWAY}
    assert parse([preset, *as_flags(settings)])[1] == config
    assert parse([preset, *flags_beyond(preset, config.flat())])[1] == config


def test_a_folder_of_another_run_is_not_taken_as_the_control(tmp_path):
    folder = RunDir(tmp_path / "run-control")
    _, other = parse(["--seed", "7", "--control", "shuffle-advantages"])
    folder.write_json("config.json", recorded("tiny", other, {}))
    for resume, words in (
        (False, "holds a run already"),
        (True, "not hold the control of this run .other: seed"),
    ):
        with pytest.raises(UserError, match=words):
            check_control(replace(parse([])[1], resume=resume, out="run"), folder.path)


def test_the_last_words_of_a_control(tmp_path):
    (tmp_path / "log.txt").write_text("a bar 1/2\r a bar 2/2\n╭─╮\n│ error: no such base │\n╰─╯\n")
    assert last_words(tmp_path) == "error: no such base"


def test_sigterm_ends_both_with_status_0_and_they_are_resumed(tmp_path):
    make_toy_mel().save(tmp_path / "toy.safetensors", {})
    out, control = tmp_path / "run", tmp_path / "run-control"
    toy = [
        "--plugin",
        HERE / "toy_mel.py",
        "--base-checkpoint",
        tmp_path / "toy.safetensors",
        "--with-control",
    ]
    flags = ["--reward", "level", "--denoising-source", "sample", "--denoising-frames", 0, "--fork", 0]
    flags += ["--episodes", 100000, "--out", out, "--train-steps", "all", *SMALL, "--heldout", 0]
    command = [sys.executable, "-m", "dlpo_nb.launch", *map(str, [*toy, *flags])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = [folder / "metrics.jsonl" for folder in (out, control)]
    while process.poll() is None and not all(log.exists() and len(read_jsonl(log)) > 2 for log in logs):
        time.sleep(0.2)
    process.terminate()
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resume it with --out {out} --resume" in said, said + error
    text = (control / "log.txt").read_text()
    assert "stopped after episode" in text and "Traceback" not in text + error
    done = [len(read_jsonl(log)) for log in logs]
    again = launch("--out", out, "--resume", "--episodes", max(done) + 1)
    assert again.returncode == 0, again.stderr
    assert [len(RunDir(folder).metrics()) for folder in (out, control)] == [max(done) + 1] * 2
