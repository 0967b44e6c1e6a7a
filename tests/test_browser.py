"""Pages and notebooks in a real browser: what they show, play and write.
Skipped where no Chromium or Chrome is installed (Debian: apt install chromium)."""

import contextlib
import json
import os
import shutil
import socket
import sys
import urllib.request
from pathlib import Path

import browser
import pytest
from make_run import make_run

from dlpo_nb.core import read_jsonl
from dlpo_nb.listen import Pairs, make_pairs
from dlpo_nb.report import write_report

pytest.importorskip(
    "websocket", reason="websocket-client, which comes with JupyterLab, is not installed here"
)
pytestmark = pytest.mark.skipif(
    browser.find_browser() is None, reason=f"no browser is installed here ({', '.join(browser.NAMES)})"
)
NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
SIZES = [(1280, 900), (400, 800)]


@pytest.fixture(scope="module")
def open_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(browser.chromium(folder))
        except (
            AssertionError
        ):  # one that may not read this folder, as those from snap, or that lacks a library
            log = (folder / "browser.log").read_text(errors="replace").strip()
            pytest.skip(f"{browser.find_browser()} does not start without a window: {log[-300:]}")
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A made-up run with its report."
    made = make_run(tmp_path_factory.mktemp("runs") / "dlpo")
    write_report(made)
    return made


def listening_test(run, folder):
    "A test of two pairs, each of sounds of that run."
    with contextlib.redirect_stdout(None):
        return make_pairs(Pairs((run,), folder, pairs=2))


def test_what_is_wrong_is_noticed(open_page, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<!doctype html><div style='width: 500px'>wide</div><img src='gone.png'>"
        "<script>console.error('said'); throw new Error('thrown')</script>"
    )
    page = open_page((tmp_path / "bad.html").as_uri(), 400)
    (wide,) = page.overflows()
    complaints = "\n".join(page.complaints)
    assert "500px" in wide and all(word in complaints for word in ("said", "thrown", "gone.png"))


@pytest.mark.parametrize("width, height", SIZES)
def test_a_report_is_whole(open_page, run, width, height):
    page = open_page((run / "report.html").as_uri(), width, height)
    assert not page.overflows()
    players = page.plays()
    assert len(players) >= 2 and all(fine for *_, fine in players), players
    assert not page.complaints


@pytest.mark.parametrize("width, height", SIZES)
def test_the_listening_page_is_voted_on(open_page, run, tmp_path, width, height):
    page = open_page(listening_test(run, tmp_path / "listening").as_uri(), width, height)
    assert not page.overflows()
    page.type("#name", f"Ada {width}")  # a name of before would resume
    page.click("#form button")
    for number, vote in enumerate(("#voteA", "#votetie"), 1):
        assert page.text("#count") == f"Pair {number} of 2" and not page.overflows()
        page.click(vote)
        assert page.text("#hint") == "Listen to both first."
        for side in ("#playA", "#playB"):
            page.click(side)
            page.wait("document.querySelector('#sound').currentTime > 0.1")
            page.wait(f"document.querySelector({side!r}).classList.contains('heard')")
        page.click(vote)
    assert page.run("!document.querySelector('#done').hidden") and not page.overflows()
    rows = [json.loads(line) for line in page.run("document.querySelector('#rows').value").splitlines()]
    assert [row["choice"] for row in rows] == ["A", "tie"] and not page.complaints


# in JupyterLab -------------------------------------------------------------------------------------------

SETTINGS = "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, run):
    "JupyterLab on copies of three notebooks, for this machine alone: (address, its folder)."
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    for name in ("35_dlpo", "55_listen", "57_playground"):
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", root)
    listening_test(run, root / "listening")
    settings = home / "config" / SETTINGS
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # else what cannot be seen is not in the page
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--allow-root", "--expose-app-in-browser", f"--ServerApp.root_dir={root}"]
    command += ["--IdentityProvider.token=", "--ServerApp.port_retries=0"]
    places = dict(HOME=home, JUPYTER_CONFIG_DIR=home / "config", JUPYTER_DATA_DIR=home / "data")
    env = os.environ | {name: str(place) for name, place in places.items()}
    with browser.running(command, home / "lab.log", env=env, cwd=root):
        address = f"http://127.0.0.1:{port}"

        def answers():
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{address}/api/status", timeout=2).status == 200

        browser.wait_for(answers, "JupyterLab")
        yield address, root


READY = """(() => {
  const dialog = document.querySelector(".jp-Dialog button.jp-mod-accept");
  if (dialog) dialog.click();
  const shown = window.jupyterapp && jupyterapp.shell.currentWidget;
  const kernel = shown && shown.sessionContext && shown.sessionContext.session
    && shown.sessionContext.session.kernel;
  return !!kernel && kernel.status === "idle" && !!document.querySelector(".jp-Notebook .jp-CodeCell");
})()"""
RUN_ALL = """(() => { window.ran = false;
  jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.ran = true; }); })()"""
ERRORS = """jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === "code")
  .flatMap(cell => cell.model.outputs.toJSON()).filter(one => one.output_type === "error")
  .map(one => one.ename + ": " + one.evalue)"""


def run_all(open_page, lab, name):
    "A notebook in JupyterLab after Run All Cells: the page, and the errors of its cells."
    page = open_page(f"{lab[0]}/lab/tree/{name}.ipynb?reset", 1400, 1200)
    page.wait(READY)
    page.run(RUN_ALL)
    page.wait("window.ran", 2 * browser.PATIENCE)
    return page, page.run(ERRORS)


def test_a_methods_notebook_runs(open_page, lab):
    page, errors = run_all(open_page, lab, "35_dlpo")
    widths = page.run(
        "[...document.querySelectorAll('.jp-OutputArea-output img')].map(one => one.naturalWidth)"
    )
    assert not errors and widths and all(widths)


def test_the_playground_speaks(open_page, lab):
    page, errors = run_all(open_page, lab, "57_playground")
    assert not errors
    stored = page.plays(".jp-OutputArea-output audio")
    assert len(stored) >= 6 and all(fine for *_, fine in stored), stored
    page.click(".play-ground input[type=checkbox]")  # no judges
    page.type(".play-ground input[type=text]", "nowhere")
    page.click(".play-speak")
    page.says(".play-status", "no run, checkpoint")
    page.type(".play-ground input[type=text]", "tiny_base")
    page.run(
        "(list => { list.selectedIndex = 1; list.dispatchEvent(new Event('change', {bubbles: true})); })"
        "(document.querySelector('.play-ground select'))"
    )
    page.click(".play-speak")
    page.says(".play-status", "Done.")
    tops = "[...document.querySelectorAll('.play-sounds figure')].map(one => one.getBoundingClientRect().top)"
    first, second = page.run(tops)
    assert first == second, "base and tuned model are side by side"
    assert "after 5 of 10 steps" in page.text(".play-states")
    page.run("document.querySelector('.play-place .noUi-handle').focus()")
    page.press("ArrowRight")
    page.says(".play-states", "after 6 of 10 steps")
    for part in (".play-sounds", ".play-states"):
        players = page.plays(f"{part} audio")
        assert len(players) == 2 and all(fine for *_, fine in players), players


def test_a_vote_goes_to_the_disk_and_comes_back(open_page, lab):
    page, errors = run_all(open_page, lab, "55_listen")
    assert not errors, errors  # its last cell, the command, among them
    page.type(".ab-listen input", "Eva")
    page.click(".ab-start")
    page.says(".ab-status", "Pair 1 of 2")
    for side in (".ab-play-a", ".ab-play-b"):
        page.click(side)
        page.says(side, "(1 ×)")
        page.wait("(document.querySelector('.ab-listen audio') || {}).currentTime > 0.1")
    page.click(".vote-B")
    page.says(".ab-status", "Pair 2 of 2")
    (row,) = read_jsonl(lab[1] / "listening" / "votes.jsonl")
    assert row["listener"] == "Eva" and row["choice"] == "B" and row["plays"] == {"A": 1, "B": 1}
    page.run("document.querySelector('.ab-play-a').focus()")
    for side in "ab":
        page.press(side)
        page.says(f".ab-play-{side}", "(1 ×)")
    page.press("ArrowDown")
    page.says(".ab-status", "Thank you! 2 votes")
    assert [row["choice"] for row in read_jsonl(lab[1] / "listening" / "votes.jsonl")] == ["B", "tie"]
