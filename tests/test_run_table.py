"""The tables of tools/run_table.py, on made-up runs: borrowed rows, seeds in common, what does not fit."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from make_run import make_run

from dlpo_nb.core import RunDir
from dlpo_nb.figures import read_run

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("run_table")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    return tool


def a_run(root, place, seed, effect, **more):
    "A made-up run whose summary says how far it went."
    path = make_run(root / "results" / f"{place}-seed{seed}", seed=seed, effect=effect, samples=0, **more)
    run = RunDir(path, create=False)
    drift = {"kl": 0.01, "diffusion_loss/base": 0.3, "diffusion_loss/tuned": 0.31}
    run.write_json("summary.json", run.read_json("summary.json") | dict(drift=drift))
    return read_run(path)


def test_rows_of_another_table_and_the_seeds_in_common(tool, tmp_path):
    dlpo = [a_run(tmp_path, "methods/dlpo", seed, 0.1) for seed in (0, 1)]
    a_run(tmp_path, "methods/dlpo-control", 0, 0.0, control="shuffle-advantages")
    a_run(tmp_path, "beta/beta-1", 1, 0.02)
    tool.summarise("beta")
    table = json.loads((tmp_path / "results" / "beta" / "table.json").read_text())
    assert list(table["rows"]) == ["beta-0.005", "beta-1"] and table["texts"] == 64
    row = table["rows"]["beta-0.005"]
    assert row["seeds"] == [1] and row["controls"] == []  # what is borrowed has the seeds of what is not
    changed = [run.evaluation["metrics"]["dnsmos"]["difference"] for run in dlpo]
    assert row["metrics"]["dnsmos"]["run"] == [pytest.approx(changed[1]), None, None]
    assert table["rows"]["beta-1"]["metrics"]["diffusion_loss"]["run"][0] == pytest.approx(0.01)
    assert "| beta-1 | 1 |" in (tmp_path / "results" / "beta" / "table.txt").read_text()
    assert table["tests"]["seeds"] == [1]
    against = table["tests"]["base"]["measures"]["dnsmos"]["systems"]["beta-0.005"]["against"]
    assert against["difference"] == pytest.approx(changed[1])  # over the base of that seed

    a_run(tmp_path, "beta/beta-1", 0, 0.02)
    tool.summarise("beta")
    table = json.loads((tmp_path / "results" / "beta" / "table.json").read_text())
    row = table["rows"]["beta-0.005"]
    assert row["seeds"] == [0, 1] and row["controls"] == [0]
    assert row["metrics"]["dnsmos"]["run"][0] == pytest.approx(sum(changed) / 2)
    assert row["metrics"]["dnsmos"]["control"][1] is None and table["tests"]["seeds"] == [0]


def test_other_texts_do_not_stand_beside(tool, tmp_path):
    a_run(tmp_path, "methods/dlpo", 0, 0.1)
    a_run(tmp_path, "options/kappa", 0, 0.1, heldout=32)
    with pytest.raises(SystemExit, match="heard on 32 and 64 texts"):
        tool.summarise("options")
    assert not (tmp_path / "results" / "options" / "table.json").exists()


def test_a_borrowed_row_is_not_run(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_table.py", "options", "--rows", "default"])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 2 and "default is methods/dlpo" in capsys.readouterr().err


def test_every_run_has_its_name_once(tool):
    for table, rows in tool.TABLES.items():
        names = [name for name, _ in tool.jobs_of(table, rows, [0, 1], ["--heldout", "96"])]
        assert len(set(names)) == len(names) >= 2 * len(rows)
        assert not set(rows) & set(tool.LENT.get(table, {}))
