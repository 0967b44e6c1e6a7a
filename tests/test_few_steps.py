"""The search and the resuming of tools/few_steps.py."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from dlpo_nb.diffusion import NoiseSchedule

TOOL = Path(__file__).resolve().parents[1] / "tools" / "few_steps.py"


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def test_a_schedule_from_its_own_ratios_is_itself(tool):
    for n in (1, 6, 50):
        known = NoiseSchedule.linear().respaced(n, "geometric")
        again = tool["from_ratios"](1 / known.alphas_cumprod - 1)
        for name, table in vars(known).items():
            assert not isinstance(table, torch.Tensor) or torch.allclose(
                getattr(again, name), table, rtol=1e-9
            ), name


def test_search_finds_a_known_optimum_and_stays_in_order(tool):
    best = [0.003, 0.3, 3.0, 100.0]
    asked = []

    def score(entries):
        asked.append(entries)
        return sum(math.log(a / b) ** 2 for a, b in zip(entries, best))

    found, lowest, tried = tool["search"](score, [0.001, 0.1, 9.0, 100.0])
    assert found == pytest.approx(best) and lowest == pytest.approx(0, abs=1e-12)
    assert [entries for entries, _ in tried] == asked and lowest == min(value for _, value in tried)
    assert all(b >= 1.05 * a for entries in asked for a, b in zip(entries, entries[1:]))
    assert all(entries[-1] == 100.0 for entries in asked)


def test_a_search_that_finds_nothing_keeps_its_start(tool):
    start = [1.0, 1.1, 1.2]  # no move by 1.7 keeps the order upwards
    found, lowest, tried = tool["search"](lambda entries: float(entries != start), start)
    assert found == start and lowest == 0 and len(tried) == 3  # the start, and the first entry down twice


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch, capsys):
    stored = json.dumps({"seed": 0, "calls": [], "schedules": {"geometric 6": "kept as it is"}})
    (tmp_path / "study.json").write_text(stored)
    for seed, code in (("0", 0), ("1", 2)):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "few_steps.py",
                "--schedules",
                "geometric 6",
                "--seed",
                seed,
                "--out",
                str(tmp_path),
                "--audio",
                str(tmp_path),
            ],
        )
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert end.value.code == code
    assert "was made with seed 0, not 1" in capsys.readouterr().err
    assert (tmp_path / "study.json").read_text() == stored and len(list(tmp_path.iterdir())) == 1
