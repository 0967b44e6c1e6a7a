"""What a report must survive: unfinished and damaged runs, hostile texts, long recordings."""

import re
from html.parser import HTMLParser
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from make_run import TEXTS, make_run

from dlpo_nb.audio import write_audio
from dlpo_nb.core import RunDir, UserError
from dlpo_nb.figures import across_seeds, control_difference, read_run, reward_curve
from dlpo_nb.heldout import Row, compare, read_rows, write_rows
from dlpo_nb.report import control_command, main, write_comparison, write_report

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "br", "source", "line", "circle"}


class Page(HTMLParser):
    "Checks that tags are balanced and collects what the page refers to and says."

    def __init__(self, path):
        super().__init__()
        self.open, self.links, self.tags, self.said = [], [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value for key, value in attributes if key in ("src", "srcset", "href", "poster", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said += data


def checked(path):
    page = Page(path)
    assert all(link.startswith(("data:image/png;base64,", "data:audio/mpeg;base64,")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert (
        "url(" not in (text := Path(path).read_text(encoding="utf-8"))
        and "@import" not in text
        and Path(path).stat().st_size < 3e6
    )
    return page


def test_a_finished_run(tmp_path):
    page = checked(write_report(make_run(tmp_path / "run")))
    assert page.tags.count("audio") == 8 and page.tags.count("picture") == 8
    for words in (
        "Held-out dnsmos rose",
        "64 held-out texts",
        "On its own this proves nothing",
        "--control shuffle-advantages",
        "not the reward",
    ):
        assert words in page.said
    assert all(text in page.said for text in TEXTS)


def test_a_control(tmp_path):
    said = checked(write_report(make_run(tmp_path / "run", control="shuffle-advantages", effect=0.0))).said
    assert "This is a negative control" in said and "proves nothing" not in said


def test_a_stopped_run(tmp_path):
    page = checked(write_report(make_run(tmp_path / "run", finished=False)))
    assert "no result" in page.said and "12 of 24 episodes recorded" in page.said and "audio" not in page.tags
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "0 of 24 episodes" in checked(write_report(tmp_path / "run")).said


def test_a_run_without_evaluation(tmp_path):
    run = RunDir(make_run(tmp_path / "run"))
    summary = run.read_json("summary.json")
    del summary["evaluation"]
    run.write_json("summary.json", summary)
    (run.path / "evaluation.csv").unlink()
    assert "ended without an evaluation" in checked(write_report(run.path)).said


def test_what_is_no_run(tmp_path):
    for folder, word in ((tmp_path / "nowhere", "no run"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=word):
            write_report(folder)
    (tmp_path / "config.json").write_text('{"method": "dlpo"')
    with pytest.raises(UserError, match="config.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 7}')
    with pytest.raises(UserError, match="method, reward"):
        write_report(tmp_path)


def test_hostile_words(tmp_path):
    run = RunDir(make_run(tmp_path / 'run "&<b>'))
    run.write_json(
        "config.json",
        run.read_json("config.json")
        | {"texts": "<script>alert(1)</script>", "note": '"><img src=http://evil>'},
    )
    page = checked(write_report(run.path))
    assert "<script>alert(1)</script>" in page.said and "Rain, <at last>." in page.said


def test_size_with_long_recordings(tmp_path):
    path = make_run(tmp_path / "run", samples=0)
    noise = torch.tensor(0.1 * np.random.default_rng(0).normal(size=15 * 22050), dtype=torch.float32)
    texts = [f"A long text, number {i}." for i in range(12)]
    (path / "samples" / "texts.txt").write_text("\n".join(texts))
    for i in range(12):
        for system in ("base", "tuned"):
            write_audio(path / "samples" / f"{system}_{i:03d}.wav", noise)
    page = checked(write_report(path))
    assert (
        2 <= page.tags.count("audio") <= 16
        and f"The first {page.tags.count('audio') // 2} held-out" in page.said
    )


def test_metrics_with_gaps(tmp_path):
    path = make_run(tmp_path / "run", episodes=4)
    run = RunDir(path)
    run.append_metrics(
        {"episode": 3, "reward/mean": 5.0, "kl": float("nan")}
    )  # episode 3 was done again after a resume
    run.append_metrics({"episode": 4, "reward/mean": None})
    read = read_run(path)
    assert [row["episode"] for row in read.metrics] == [0, 1, 2, 3, 4] and read.metrics[3]["reward/mean"] == 5
    checked(write_report(path))
    one = make_run(tmp_path / "one", episodes=1)
    assert reward_curve([one]).axes and checked(write_report(one))


def test_what_went_wrong_in_the_episodes_is_said(tmp_path):
    path = make_run(tmp_path / "run", episodes=4)
    assert "no update" not in checked(write_report(path)).said
    run = RunDir(path)
    run.append_metrics({"episode": 4, "skipped": 1.0})
    for episode in range(5, 9):
        run.append_metrics({"episode": episode, "kl": 0.5})
    assert "1 episode brought no update" in (said := checked(write_report(path)).said)
    assert "the KL to the base is 0.5" in said and "Listen before" in said
    other = make_run(tmp_path / "other")
    said = checked(write_comparison([path, other], tmp_path / "two.html")).said
    assert said.count("brought no update") == 1


def test_comparison(tmp_path):
    runs = [make_run(tmp_path / f"run{s}", seed=s) for s in range(2)]
    controls = [
        make_run(tmp_path / f"control{s}", seed=s, control="shuffle-advantages", effect=0.0) for s in range(2)
    ]
    beyond = control_difference(runs + controls)
    assert (beyond["n"], beyond["runs"], beyond["controls"]) == (64, 2, 2)
    assert 0 < beyond["metrics"]["dnsmos"]["low"] < 0.05 < beyond["metrics"]["dnsmos"]["high"]
    page = checked(write_comparison(runs + controls))
    assert "Over 2 training seeds" in page.said
    assert (
        "more than its control" in page.said
        and "Beyond the control" in page.said
        and page.tags.count("audio") == 4 * 5
    )
    assert "No control, no conclusion" in checked(write_comparison(runs, tmp_path / "two.html")).said
    mixed = [runs[0], make_run(tmp_path / "half", finished=False, control="shuffle-advantages")]
    assert "no result" in checked(write_comparison(mixed, tmp_path / "mixed.html")).said


def test_what_cannot_be_compared(tmp_path):
    run, other = (
        make_run(tmp_path / "run", heldout=4),
        make_run(tmp_path / "other", control="shuffle-advantages", heldout=4),
    )
    config = RunDir(other).read_json("config.json")
    RunDir(other).write_json("config.json", config | {"reward": "nisqa"})
    with pytest.raises(UserError, match="different rewards"):
        write_comparison([run, other])
    RunDir(other).write_json("config.json", config)
    rows = (other / "evaluation.csv").read_text()
    for text in ("kettle", "geese", "Rain", "door"):
        rows = rows.replace(text, "other")
    (other / "evaluation.csv").write_text(rows)
    with pytest.raises(UserError, match="different texts"):
        control_difference([run, other])


def test_the_control_command_repeats_the_settings(tmp_path):
    path = make_run(tmp_path / "a run", seed=7)
    RunDir(path).write_json(
        "config.json",
        RunDir(path).read_json("config.json") | {"beta": 0.625, "texts": "my texts.txt", "out": "x"},
    )
    command = control_command(read_run(path)).splitlines()
    assert command[0].startswith("python -m dlpo_nb.launch wavegrad-tiny ")
    for part in ("--seed 7", "--beta 0.625", "--texts 'my texts.txt'", "--control shuffle-advantages"):
        assert part in command[0]
    assert len(re.findall("--out", command[0])) == 1 and command[1].startswith("python -m dlpo_nb.report ")


@pytest.mark.smoke
def test_the_command(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    main([str(path), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html") and checked(tmp_path / "page.html")
    bad = commands.run("report", tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    with pytest.raises(UserError, match="no run given"):
        main([])


def test_a_method_that_this_process_does_not_know(tmp_path):
    """A page about a folder needs the folder only."""
    path = make_run(tmp_path / "run", method="positive")
    RunDir(path).write_json(
        "config.json",
        RunDir(path).read_json("config.json")
        | {
            "objective": {"alpha": 1.0, "beta": 2.0},
            "flags": ["--method", "positive", "--beta", "2.0"],
            "vocoder": "",
            "changes": [{"episode": 3, "beta": 1.0}],
        },
    )
    page = checked(write_report(path))
    assert (
        "launch wavegrad-tiny --method positive --beta 2.0 --control" in page.said
        and "Settings were changed on the way" in page.said
    )


def test_the_control_beside_a_run_is_named(tmp_path):
    path = make_run(tmp_path / "run")
    RunDir(path).write_json("config.json", RunDir(path).read_json("config.json") | {"with_control": True})
    page = checked(write_report(path))
    assert "The control of this run is in run-control" in page.said and "Run the control" not in page.said


def test_seeds_without_a_control_each_are_no_pairs(tmp_path):
    """Two runs that share a seed: which is whose control is not known."""
    runs = [make_run(tmp_path / f"{i}", seed=i % 2) for i in range(4)]
    controls = [
        make_run(tmp_path / f"c{i}", seed=i, control="shuffle-advantages", effect=0.0) for i in range(2)
    ]
    assert across_seeds(runs + controls) is None and across_seeds(runs[:2] + controls[:1]) is None
    over = across_seeds(runs[:2] + controls)
    assert over["seeds"] == [0, 1] and over["n"] == 64
    beyond = control_difference(runs[:2] + controls)["metrics"]
    for name, row in over["metrics"].items():  # the same means, other intervals
        assert row["difference"][0] == pytest.approx(beyond[name]["difference"])


def test_a_text_that_one_run_lacks_is_left_out_of_all(tmp_path):
    """A judge refuses a recording that lasts too long; its row has no score."""
    run, control = (
        make_run(tmp_path / "run"),
        make_run(tmp_path / "control", control="shuffle-advantages", effect=0.0),
    )
    rows = read_rows(run / "evaluation.csv")
    del rows["tuned"][0]["dnsmos"]
    write_rows(run / "evaluation.csv", rows)
    beyond = control_difference([run, control])
    assert (beyond["metrics"]["dnsmos"]["n"], beyond["metrics"]["nisqa"]["n"], beyond["n"]) == (63, 64, 64)
    assert "63 texts" in checked(write_comparison([run, control])).said
    left = [b["dnsmos"] for b in rows["base"][1:]], [t["dnsmos"] for t in rows["tuned"][1:]]
    assert beyond["metrics"]["dnsmos"]["run"] == pytest.approx(np.mean(left[1]) - np.mean(left[0]))


def test_what_a_judge_refused_is_listed(tmp_path):
    run = RunDir(make_run(tmp_path / "run"))
    base, tuned = (read_rows(run.path / "evaluation.csv")[name] for name in ("base", "tuned"))
    base, tuned = [Row(row) for row in base], [Row(row) for row in tuned]
    tuned[2]["nisqa"], tuned[2].refused = None, {"nisqa": "longer than <60> s"}
    run.write_json("summary.json", run.read_json("summary.json") | {"evaluation": compare(base, tuned)})
    said = checked(write_report(run.path)).said
    assert (
        "Left out on both sides (column n): nisqa could not judge text 3, “Rain, <at last>.”, "
        "of the tuned model: longer than <60> s." in said
    )
