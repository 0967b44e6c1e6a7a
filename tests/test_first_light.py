"""tools/gpu/first_light.sh: what it does where there is no GPU; a step that fails leaves the rest."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def light(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    spec = importlib.util.spec_from_file_location("first_light", ROOT / "tools" / "gpu" / "first_light.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "first_light", module)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_leaves_the_rest(light, tmp_path, monkeypatch, capsys):
    steps = {
        "wrong": lambda config, device: light.demand(False, "the ratio is 2"),
        "raises": lambda config, device: [][1],
        "crashes": lambda config, device: os.kill(os.getpid(), signal.SIGSEGV),
        "hangs": lambda config, device: time.sleep(600),
        "works": lambda config, device: (f"on {device}", dict(number=1.5)),
    }
    monkeypatch.setattr(light, "STEPS", steps)
    config = light.Config(str(tmp_path / "out"), device="cpu", patience=20.0, minutes=10.0)
    assert light.main(replace(config, steps=tuple(steps)[:3] + ("works",))) == 3
    assert light.main(replace(config, patience=1.0, steps=("hangs", "works"), out=str(tmp_path))) == 1
    lines = capsys.readouterr().out.splitlines()
    starts = ["WRONG   wrong", "FAILED  raises", "FAILED  crashes", "ok      works", "not right"]
    assert all(line.startswith(start) for line, start in zip(lines, starts))
    assert "the ratio is 2" in lines[0] and "IndexError" in lines[1] and "status -11" in lines[2]
    assert "did not end within 1 s" in lines[5] and lines[6].startswith("ok      works")
    written = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert written["works"]["number"] == 1.5 and written["raises"]["verdict"] == "FAILED"
    assert "IndexError" in (tmp_path / "out" / "log.txt").read_text()


def test_what_has_not_begun_in_time_is_left_out(light, tmp_path, monkeypatch):
    monkeypatch.setattr(light, "STEPS", {"late": None})
    assert light.main(light.Config(str(tmp_path), minutes=0.0)) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"]["late"]["verdict"] == "-"


def test_a_timeline_has_gaps_and_copies(light):
    """Two kernels that overlap, a gap of 5, a copy."""
    line = light.timeline([("b", 2.0, 8.0), ("a", 0.0, 5.0), ("Memcpy HtoD", 13.0, 15.0), ("a", 15.0, 16.0)])
    assert line["seconds"] == pytest.approx(16e-6) and line["busy"] == pytest.approx(11e-6)
    assert (line["launches"], line["gaps"], line["copies"]) == (4, 1, 1)
    assert line["longest_gap"] == pytest.approx(5e-6) and line["copy_seconds"] == pytest.approx(2e-6)
    assert [row["name"] for row in line["by_name"][:2]] == ["a", "b"] and line["by_name"][0]["calls"] == 2


def test_first_light_on_a_cpu(light, tmp_path):
    """At the smallest sizes, one step of each kind to its end."""
    chosen = ["doctor", "wavegrad2 bfloat16", "ceilings", "gradtts together", "base float32", "profile"]
    chosen += ["gradtts rerun", "gradtts bfloat16"]
    done = subprocess.run(
        ["bash", ROOT / "tools" / "gpu" / "first_light.sh", tmp_path, "--tiny", "--minutes", "60"]
        + ["--patience", "900", "--steps", *chosen],
        env=os.environ | dict(DEVICE="cpu", PYTHON=sys.executable),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "all is well", done.stdout + done.stderr
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert list(steps) == chosen and {step["verdict"] for step in steps.values()} == {"ok"}
    assert steps["wavegrad2 bfloat16"]["metrics"]["ratio/mean"] == 1.0
    assert (
        steps["doctor"]["environment"]["torch"] and steps["ceilings"]["ceilings"]["tf32"]["flops_per_s"] > 0
    )
    assert steps["base float32"]["utilisation"] > 0 and steps["base float32"]["memory_gb"] > 0
    line = steps["profile"]["timeline"]
    assert 0 < line["busy"] <= 1.01 * line["seconds"] and line["launches"] > 100
    assert "calls" in (tmp_path / "profile.txt").read_text()
