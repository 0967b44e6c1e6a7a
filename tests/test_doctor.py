"""What the doctor says where parts are missing; the default job decides the exit status."""

import importlib.metadata
import os
import socket
import subprocess
import sys

import pytest

import dlpo_nb.doctor as module
from commands import ROOT
from dlpo_nb.doctor import PARTS, Part, advice, diagnose, examine

CHECKS = {part.name: part for part in PARTS}


@pytest.mark.smoke
def test_a_machine_without_torch_is_told_so():
    """In a process of its own: with torch hidden, nothing of the library can be imported."""
    hidden = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = []; "
    hidden += "runpy.run_module('dlpo_nb.doctor', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "FAILS  default job" in done.stdout and "pip install" in done.stdout
    assert "the default job cannot run: default job" in done.stdout
    assert sum(part.name in done.stdout for part in PARTS) == len(PARTS), "one failure hides no other"


def test_everything_is_tried_offline(monkeypatch, capsys, tmp_path):
    def refuse(self, address):
        raise AssertionError(f"the doctor wants to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    assert diagnose() == 0
    said = capsys.readouterr().out
    assert "the default job can run" in said and "file a bug" not in said
    assert not any(tmp_path.iterdir()), "it leaves nothing"


@pytest.mark.parametrize(
    "name, hidden, what_to_do",
    [
        ("Distill-MOS", "distillmos", "pip install distillmos"),
        ("pocketsphinx", "pocketsphinx", "pip install"),
        ("Whisper", "faster_whisper", "dlpo_nb[whisper]"),
        ("hibari", "hibari", "dlpo_nb[voice]"),
    ],
)
def test_a_hidden_package(monkeypatch, name, hidden, what_to_do):
    monkeypatch.delenv("DLPO_WHISPER_MODEL", raising=False)
    monkeypatch.setitem(sys.modules, hidden, None)
    found = examine(CHECKS[name])
    assert not found.works and what_to_do in found.said and "file a bug" not in found.said


@pytest.mark.parametrize(
    "name, variable, what_to_do",
    [
        ("UTMOS", "DLPO_UTMOS_WEIGHTS", "utmos22_strong"),
        ("NISQA", "DLPO_NISQA_WEIGHTS", "nisqa.tar"),
        ("HiFi-GAN", "DLPO_HIFIGAN_WEIGHTS", "hifigan.pt"),
    ],
)
def test_weights_that_are_not_there_or_something_else(monkeypatch, tmp_path, name, variable, what_to_do):
    for path in (tmp_path / "none.pt", tmp_path / "page.html"):
        (tmp_path / "page.html").write_text("<html>not found</html>")
        monkeypatch.setenv(variable, str(path))
        found = examine(CHECKS[name])
        assert not found.works and str(path) in found.said, found
        assert what_to_do in found.said or "download" in found.said or ".ckpt" in found.said, found


def test_programs_that_are_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "apt-get install festival" in examine(CHECKS["festival"]).said
    assert "open the file" in examine(CHECKS["player"]).said


def test_versions(monkeypatch):
    versions = {"torch": "2.12.1", "numpy": "2.0"}
    named = ["torch>=2.11,<2.14", "numpy", 'nbdev; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: named)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    assert examine(CHECKS["packages"]) == (CHECKS["packages"], True, "all 2 at versions that fit")
    versions["torch"] = "2.14.0"
    assert "torch is 2.14.0, not <2.14,>=2.11; install" in examine(CHECKS["packages"]).said

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "torch is not installed, numpy is not installed" in examine(CHECKS["packages"]).said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    assert "--out" in examine(CHECKS["working directory"]).said


def test_what_is_unknown_is_a_bug_and_is_said_in_one_line():
    assert advice(ValueError("two\nlines")) == (
        "ValueError: two lines; file a bug, with all that the doctor says"
    )


def test_only_what_is_needed_decides(capsys):
    def broken():
        raise module.need("dlpo_nb.core").UserError("no such thing; get one")

    assert diagnose([Part("this", broken)]) == 0
    assert diagnose([Part("this", broken, needed=True), Part("that", lambda: "1.0")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "FAILS  this               no such thing; get one" in said
    assert "ok     that               1.0" in said and said[-1] == "the default job cannot run: this"
