"""What 00_core does not show: other processes, unwritable places, numbers that JSON cannot hold."""

import contextlib
import getpass
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dlpo_nb.core import (
    CACHES,
    Registry,
    RunDir,
    UserError,
    append_jsonl,
    asset,
    checkout,
    counted,
    environment,
    fingerprint,
    in_force,
    keyed_generator,
    pick_device,
    plain,
    provide_home,
    read_jsonl,
    record_changes,
    run_main,
    split_lines,
)
from dlpo_nb.locks import lock_folder, unlock_folders

ROOT = Path(__file__).resolve().parents[1]


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_what_is_counted_agrees_in_number():
    assert [counted(n, "text") for n in (0, 1, 2)] == ["0 texts", "1 text", "2 texts"]
    assert counted(1, "entry", "entries") == "1 entry" and counted(3, "entry", "entries") == "3 entries"


def test_keyed_generator_is_the_same_in_another_process():
    code = "from dlpo_nb.core import keyed_generator as k; print(k(0, 'rollout', 17, 3).initial_seed())"
    seeds = {python(code, PYTHONHASHSEED=s).stdout.strip() for s in ("0", "1")}
    assert seeds == {str(keyed_generator(0, "rollout", 17, 3).initial_seed())} == {"8326616327006217745"}


def test_keyed_generator_takes_integers_of_any_kind_and_nothing_else():
    assert keyed_generator(torch.tensor(3)).initial_seed() == keyed_generator(3).initial_seed()
    with pytest.raises(TypeError):
        keyed_generator(0.5)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "raised, code, stderr",
    [
        (UserError("no texts"), 2, "error: no texts\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_run_main_exit_codes(raised, code, stderr, capsys):
    def main():
        if raised:
            raise raised
        return 7

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, stderr)


@pytest.mark.smoke
def test_run_main_keeps_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


@pytest.mark.parametrize(
    "shell, runs", [(None, True), ("a terminal", True), (SimpleNamespace(kernel=1), False)]
)
def test_a_command_is_not_run_in_a_notebook(shell, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with pytest.raises(SystemExit) if runs else contextlib.nullcontext():
        run_main(lambda: None if runs else pytest.fail("it was run"))


def test_core_needs_no_notebook_tools():
    code = "import sys; sys.modules.update(nbdev=None, fastcore=None, matplotlib=None); import dlpo_nb.core"
    assert python(code).returncode == 0


def test_registry_names_the_choices():
    things = Registry("reward")
    things.register("wer")(len)
    with pytest.raises(UserError, match="unknown reward 'were'; did you mean 'wer'\\? choose one of: wer"):
        things.get("were")


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunDir(tmp_path / "file" / "run")
    if os.geteuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError):
            RunDir(tmp_path / "closed" / "run")


def test_opening_for_reading_creates_nothing(tmp_path):
    RunDir(tmp_path, create=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no run in"):
        RunDir(tmp_path / "none", create=False)


def test_run_folder_keeps_what_is_there(tmp_path):
    RunDir(tmp_path).append_metrics({"episode": 0})
    RunDir(tmp_path).append_metrics({"episode": 1})
    assert [r["episode"] for r in RunDir(tmp_path).metrics()] == [0, 1]


@pytest.mark.parametrize("torn", ["", "x", '{"episode": 1', "x" * 70000])
def test_half_a_line_is_skipped_and_replaced(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"episode": 0}\n' + torn)
    assert read_jsonl(path) == [{"episode": 0}]
    append_jsonl(path, {"episode": 1})
    assert read_jsonl(path) == [{"episode": 0}, {"episode": 1}]


def test_a_damaged_line_in_the_middle_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"episode": 0}\nnonsense\n{"episode": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl"):
        read_jsonl(path)


def test_json_is_standard_even_for_nan(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics({"loss": float("nan"), "kl": torch.tensor(float("inf")), "x": [torch.ones(2)]})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda c: pytest.fail(c)) == {
        "loss": None,
        "kl": None,
        "x": [[1.0, 1.0]],
    }


def test_plain_refuses_nothing_json_holds():
    value = {"a": [1, 2.5, "s", None, True], "b": {"c": []}}
    assert plain(value) == value


def test_devices_and_assets():
    assert pick_device("cpu").type == "cpu"
    for wrong in ("gpu", "cuda:99", ""):
        with pytest.raises(UserError):
            pick_device(wrong)
    with pytest.raises(UserError, match="assets/none"):
        asset("none")


def test_environment_is_plain_and_names_no_machine():
    told = environment()
    assert plain(told) == told and told["torch"] == torch.__version__
    assert str(os.path.expanduser("~")) not in json.dumps(told)


def test_lines_end_in_line_ends_and_nothing_else():
    assert split_lines("a\u2028b\x0bc\x0cd\x1ce\x85f\r\ng\rh\n\ni") == [
        "a\u2028b\x0bc\x0cd\x1ce\x85f",
        "g",
        "h",
        "",
        "i",
    ]
    assert split_lines("") == [] and split_lines("\n") == [""]
    readers = [
        line
        for path in (ROOT / "dlpo_nb").rglob("*.py")
        for line in path.read_text(encoding="utf-8").split("\n")
        if "read_text" in line and "splitlines" in line
    ]
    assert not readers, "str.splitlines cuts at U+2028 and others, which stand inside sentences"


HOLD = (
    "import sys, time; from dlpo_nb.locks import lock_folder; lock_folder(sys.argv[1]); "
    "print('locked', flush=True); time.sleep(600)"
)


def test_a_folder_is_one_processs_until_it_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"another process \({other.pid}\) is working on"):
            lock_folder(tmp_path)
    finally:
        other.kill()
        other.wait()
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # its own already
    (tmp_path / ".lock").read_text()  # as a copy of the folder does
    refused = subprocess.run([sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True)
    assert refused.returncode == 1 and f"another process ({os.getpid()})" in refused.stderr
    unlock_folders()
    with pytest.raises(UserError, match="cannot write"):
        lock_folder(tmp_path / "none")


def test_forked_children_have_no_part_in_a_lock(tmp_path):
    """They may outlive a process that was killed, as readers of a corpus do for some seconds."""
    code = (
        "import os, sys, time; from dlpo_nb.locks import lock_folder; lock_folder(sys.argv[1])\n"
        "child = os.fork()\nif child: print(child, flush=True); os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        lock_folder(tmp_path, patience=30)  # until the child has run: it gives up the lock first of all
    finally:
        unlock_folders()
        os.kill(child, 9)


def test_changes_are_written_beside_what_was():
    begun = {"seed": 0, "rate": 1.0, "beta": None}
    once = record_changes(begun, {"rate": 0.5, "beta": None}, ["rate", "beta"], episode=3)
    twice = record_changes(once, {"rate": 0.5, "beta": 2.0}, ["rate", "beta"], episode=5)
    assert twice == begun | {"changes": [{"episode": 3, "rate": 0.5}, {"episode": 5, "beta": 2.0}]}
    assert in_force(twice) == {"seed": 0, "rate": 0.5, "beta": 2.0}
    # a state of before was gone back to: what was changed later was never trained with
    assert record_changes(twice, {"rate": 1.0, "beta": None}, ["rate", "beta"], episode=3) == begun
    assert len({fingerprint(x) for x in (b"a", b"b", ["a"], ["b"], [["a"], []], [[], ["a"]])}) == 6


def test_checkout_is_found_from_inside_it(monkeypatch, tmp_path):
    inside = checkout("nbs").resolve()
    monkeypatch.chdir(inside / "experiments")
    assert checkout("nbs").resolve() == inside
    monkeypatch.chdir(tmp_path)
    assert checkout("nbs").resolve() == inside


def nobody():
    raise KeyError("getpwuid(): uid not found: 54321")


def test_a_user_without_name_and_home_gets_both(monkeypatch, tmp_path):
    """As in a container; what compiles its code into the home folder otherwise fails when it is first
    needed: after the last episode."""
    for name in (*CACHES, "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what is set below
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "no" / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pwd.getpwuid", lambda uid: nobody())
    provide_home()
    assert getpass.getuser() == f"user{os.getuid()}"
    for name in CACHES:
        assert (
            Path(os.environ[name]).is_dir()
            and Path(os.environ[name]).parent == tmp_path / f"dlpo_nb-{os.getuid()}"
        )
    monkeypatch.setenv("NUMBA_CACHE_DIR", "mine")
    provide_home()
    assert os.environ["NUMBA_CACHE_DIR"] == "mine"
    monkeypatch.delenv("HOME")  # and no entry of a home either
    provide_home()
    assert Path.home() == tmp_path / f"dlpo_nb-{os.getuid()}"


def test_a_folder_of_somebody_else_is_not_trusted(monkeypatch, tmp_path):
    """Compiled code is read from it."""
    (tmp_path / f"dlpo_nb-{os.getuid()}").mkdir()
    (tmp_path / f"dlpo_nb-{os.getuid()}").chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/no/such/home")
    for name in CACHES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    provide_home()
    assert Path(os.environ["NUMBA_CACHE_DIR"]).parent.name.startswith("dlpo_nb-") and not list(
        (tmp_path / f"dlpo_nb-{os.getuid()}").iterdir()
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
def test_another_user_without_home(tmp_path):
    """May write neither to the installation nor to a home, and has no entry among the users."""
    tmp_path.chmod(0o777)
    package = Path(checkout(".")).resolve()
    bare = {
        "PATH": os.environ["PATH"],
        "HOME": "/",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)]),
    }
    run = lambda code: subprocess.run(
        [sys.executable, "-c", code],
        user=54321,
        group=54321,
        extra_groups=[],
        cwd="/",
        env=bare,
        capture_output=True,
        text=True,
    )
    try:
        if run("import torch").returncode:
            pytest.skip("the environment that runs the tests is closed to other users")
    except PermissionError:
        pytest.skip("the interpreter that runs the tests is closed to other users")
    code = """
import getpass, pathlib, torch
from dlpo_nb.heldout import aligned_log_mel_distance
distance = aligned_log_mel_distance(torch.zeros(80, 5), torch.zeros(80, 4))
print(getpass.getuser(), pathlib.Path.home(), distance)
"""
    done = run(code)
    assert done.returncode == 0 and done.stdout == "user54321 / 0.0\n", done.stderr
