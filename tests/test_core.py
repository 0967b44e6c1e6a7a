"""What 00_core does not show: other processes, unwritable places, numbers that JSON cannot hold."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlpo_nb.core import Registry, RunDir, UserError, append_jsonl, asset, environment, keyed_generator, pick_device, plain, read_jsonl, split_lines

ROOT = Path(__file__).resolve().parents[1]


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_keyed_generator_is_the_same_in_another_process():
    code = "from dlpo_nb.core import keyed_generator as k; print(k(0, 'rollout', 17, 3).initial_seed())"
    seeds = {python(code, PYTHONHASHSEED=s).stdout.strip() for s in ("0", "1")}
    assert seeds == {str(keyed_generator(0, "rollout", 17, 3).initial_seed())} == {"8326616327006217745"}


def test_keyed_generator_takes_integers_of_any_kind_and_nothing_else():
    assert keyed_generator(torch.tensor(3)).initial_seed() == keyed_generator(3).initial_seed()
    with pytest.raises(TypeError):
        keyed_generator(0.5)


@pytest.mark.smoke
@pytest.mark.parametrize("body, code, stderr", [
    ("raise UserError('no texts')", 2, "error: no texts\n"),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ("return 7", 0, ""),
])
def test_run_main_exit_codes(body, code, stderr):
    done = python(f"from dlpo_nb.core import UserError, run_main\ndef main():\n    {body}\nrun_main(main)")
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.smoke
def test_run_main_keeps_the_traceback_of_a_bug():
    done = python("from dlpo_nb.core import run_main\nrun_main(lambda: 1 / 0)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


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
    assert json.loads(line, parse_constant=lambda c: pytest.fail(c)) == {"loss": None, "kl": None, "x": [[1.0, 1.0]]}


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
    assert split_lines("a\u2028b\x0bc\x0cd\x1ce\x85f\r\ng\rh\n\ni") == ["a\u2028b\x0bc\x0cd\x1ce\x85f", "g", "h", "", "i"]
    assert split_lines("") == [] and split_lines("\n") == [""]
    readers = [line for path in (ROOT / "dlpo_nb").rglob("*.py") for line in path.read_text(encoding="utf-8").split("\n")
               if "read_text" in line and "splitlines" in line]
    assert not readers, "str.splitlines cuts at U+2028 and others, which stand inside sentences"
