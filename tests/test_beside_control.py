"""`--with-control`: a run and its control in two processes, resumed together, side by side in the end."""

import json
import subprocess
import sys
from functools import partial

import commands
import pytest

from dlpo_nb import launch as module
from dlpo_nb.core import RunDir, UserError
from dlpo_nb.evaluate import choose_vocoder
from dlpo_nb.evaluate import EvaluateConfig
from dlpo_nb.settings import LaunchConfig, parse

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

    done = launch("--out", out, "--resume", "--episodes", 2)
    assert done.returncode == 0, done.stderr
    assert len(RunDir(control).metrics()) == len(RunDir(out).metrics()) == 2


def test_a_control_that_fails_is_said_after_the_run(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def start(preset, config):
        log = RunDir(f"{out}-control").path / "log.txt"
        log.write_text("error: no room\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(module, "start_control", start)
    monkeypatch.setattr(module, "run_job", lambda preset, config: RunDir(config.out))
    config = LaunchConfig(with_control=True, out=str(out))
    with pytest.raises(UserError, match=r"did not finish \(error: no room\); resume it with"):
        module.launch("wavegrad-tiny", config)


def test_a_control_has_no_control():
    with pytest.raises(UserError, match="not a control itself"):
        parse(["--with-control", "--control", "shuffle-advantages"])


def test_models_are_heard_as_the_first_run_was():
    runs = {"a": {}, "b": {"vocoder": "griffinlim"}, "c": {"vocoder": "vocos"}}
    chosen, notes = choose_vocoder(EvaluateConfig(), runs)
    assert chosen == "griffinlim" and "c was tuned through vocos and is heard through griffinlim" in notes
    assert choose_vocoder(EvaluateConfig(vocoder="vocos"), runs)[0] == "vocos"
    assert choose_vocoder(EvaluateConfig(), {"a": {}}) == ("", [])
