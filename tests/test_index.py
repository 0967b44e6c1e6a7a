"""The index: its glossary has every logged number, its minutes are what the notebooks take to read."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from dlpo_nb.corpus import load_corpus
from dlpo_nb.objectives import OBJECTIVES
from small_policy import make_model, make_tuner, spoken

NBS = Path(__file__).resolve().parents[1] / "nbs"
WORDS, LINES = 200, 40  # per minute


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def index():
    return "\n".join("".join(c["source"]) for c in cells(NBS / "index.ipynb") if c["cell_type"] == "markdown")


@cache
def glossary():
    "Keys in the first column of a table whose first column is called key."
    tables = re.findall(r"^\| key \|.*\n\|[-| ]+\|\n((?:\|.*\n?)+)", index(), re.MULTILINE)
    rows = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def listed(key):
    "As the glossary writes it: a part of a reward by NAME."
    if key.startswith("reward/heldout/"):
        return "reward/heldout/NAME"
    return key if key in glossary() or not key.startswith("reward/") else "reward/NAME"


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_what_the_loop_logs_is_explained(method, data):
    recorded = load_corpus(data / "corpus_tiny")
    sources = [{"corpus": recorded}, {}] if method in ("dlpo", "onlydl") else [{"corpus": recorded}]
    for source in sources:  # on own speech where there are no recordings
        metrics = make_tuner(spoken(make_model()), method=method, **source).episode()
        new = {listed(key) for key in metrics} - glossary()
        assert not new, f"enter them in the glossary of nbs/index.ipynb: {new}"


def test_what_recorded_runs_have_logged_is_explained():
    logs = [path for path in (NBS.parent / "results").rglob("metrics.jsonl") if "vocos" not in str(path)]
    keys = {
        listed(key)
        for path in logs
        for line in path.read_text(encoding="utf-8").splitlines()
        for key in json.loads(line)
    }
    assert len(keys) > 25 and not keys - glossary()


def minutes(path):
    "Reading time of a notebook."
    words = lines = 0
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
        else:
            lines += sum(1 for line in source.splitlines() if line.strip() and line.strip()[0] != "#")
    return words / WORDS + lines / LINES


def test_minutes_of_the_reading_paths():
    rows = re.findall(r"^\| (\[.+?) \| (\d+) \|", index(), re.MULTILINE)
    assert len(rows) > 8
    for row, said in rows:
        needed = sum(minutes(NBS / link) for link in re.findall(r"\]\(([^)]+)\)", row))
        assert abs(needed - int(said)) <= max(3, 0.3 * needed), (row, said, needed)
