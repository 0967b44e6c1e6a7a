"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def data():
    """Folder of the small reference numbers kept in the repository."""
    return HERE / "data"


@pytest.fixture(scope="session")
def shared():
    """Folder of the large reference material (LJSpeech, NISQA's weights, the demo recordings),
    where DLPO_SHARED_FOLDER names it."""
    if not (folder := os.environ.get("DLPO_SHARED_FOLDER")):
        pytest.skip("DLPO_SHARED_FOLDER names no folder with the large reference material")
    if not Path(folder).is_dir():
        pytest.fail(f"DLPO_SHARED_FOLDER is {folder}, which is not a folder")
    return Path(folder)


@pytest.fixture
def no_whisper(monkeypatch):
    """No Whisper is found: it takes a second to load and one per utterance."""
    monkeypatch.setattr("dlpo_nb.rewards.wer.packaged_whisper", lambda: None)
    monkeypatch.delenv("DLPO_WHISPER_MODEL", raising=False)
