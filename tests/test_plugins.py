"""A file of one's own on the command line, as a user has it:
outside the checkout, in a folder with nothing else."""

import json
from pathlib import Path

import commands
import pytest
import soundfile
from toy_mel import make_toy_mel

from dlpo_nb import plugins
from dlpo_nb.core import REGISTRIES, UserError
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.evaluate import EvaluateConfig, sound_keys
from dlpo_nb.judges import identity
from dlpo_nb.objectives import OBJECTIVES, get_objective
from dlpo_nb.plugins import flag_values, load_plugins, plugin_fingerprints, run_plugins
from dlpo_nb.policies import POLICIES
from dlpo_nb.rewards import REWARDS, get_reward
from dlpo_nb.settings import parse, recorded
from dlpo_nb.systems import System

HERE = Path(__file__).resolve().parent
MINE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlpo_nb.objectives.base import OBJECTIVES, Loss, PolicyGradient, Replay
from dlpo_nb.rewards.base import REWARDS, Reward


@REWARDS.register("{0}bright")
class Bright(Reward):
    "How fast the sound changes, over its level."

    name, worst = "{0}bright", 0.0

    def score_clips(self, clips, sample_rate, texts):
        return [float(clip.diff().abs().mean() / (clip.abs().mean() + 1e-6)) for clip in clips]


@OBJECTIVES.register("{0}patient")
@dataclass
class Patient(PolicyGradient):
    "The policy gradient, some times weaker."

    {0}patience: int = 4  # divides the advantages
    {0}mood: Literal["calm", "cross"] = "calm"  # what the log says of it

    def __call__(self, replay: Replay) -> Loss:
        loss = self.policy_loss(replay)
        return Loss(loss.policy / self.{0}patience, None, loss.stats | {{"patience": self.{0}patience}})
"""
SHORT = [
    "--batch-size", "4", "--group-size", "2", "--train-steps", "last:1", "--threads", "1", "--device", "cpu",
    "--heldout", "0",
]  # fmt: skip


def run(folder, module, *flags):
    """A command as a user gives it, in a folder outside the checkout."""
    return commands.run(module, *flags, cwd=folder)


def record(folder):
    return json.loads((folder / "config.json").read_text())


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a plug-in, and one episode of a run with its reward and its objective."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my.py").write_text(MINE.format(""))
    flags = ["--plugin", "my.py", "--method", "patient", "--patience", 2, "--reward", "2*bright", *SHORT]
    done = run(folder, "launch", *flags, "--episodes", 1, "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_reward_and_an_objective_come_in(begun):
    folder, printed = begun
    kept = record(folder / "run")
    assert "patience 2" in printed and "mood calm" in printed
    assert kept["plugin"] == [str(folder / "my.py")] and list(kept["plugin_content"]) == ["my.py"]
    assert kept["objective"]["patience"] == 2 and kept["reward"] == "2*bright"
    at = kept["flags"].index("--plugin")
    assert kept["flags"][at + 1] == str(folder / "my.py") and "--patience" in kept["flags"]
    (row,) = rows(folder / "run")
    assert row["patience"] == 2 and row["reward/bright"] > 0 and row["ratio/mean"] == 1.0


def test_a_run_knows_its_plug_ins_when_it_is_resumed(begun):
    """Without the flag; a content that has changed is on record."""
    folder, _ = begun
    before = record(folder / "run")["plugin_content"]
    (folder / "my.py").write_text(MINE.format("") + "\n# changed since\n")
    done = run(folder, "launch", "--out", "run", "--resume", "--episodes", 2, "--mood", "calm")
    assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
    (change,) = record(folder / "run")["changes"]
    assert len(rows(folder / "run")) == 2 and change["episode"] == 1
    assert change["plugin_content"].keys() == before.keys() and change["plugin_content"] != before


@pytest.fixture(scope="module")
def voiced(begun):
    """A policy whose state is a spectrogram at 16 kHz, from a file outside the library, in two processes."""
    folder, _ = begun
    (folder / "voice.py").write_text((HERE / "toy_mel.py").read_text())
    make_toy_mel().save(folder / "voice.safetensors")
    flags = ["--plugin", "my.py", "--plugin", "voice.py", "--base-checkpoint", "voice.safetensors", *SHORT]
    more = ["--reward", "bright", "--denoising-source", "sample", "--nproc-per-node", 2, "--episodes", 1]
    done = run(folder, "launch", *flags, *more, "--heldout", 2, "--out", "two")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_voice_comes_in_and_two_processes_know_it(voiced):
    folder = voiced
    (row,) = rows(folder / "two")
    assert row["ratio/mean"] == 1.0 and row["grad_norm"] > 0 and "diffusion_loss/sample" in row
    assert soundfile.info(folder / "two" / "samples" / "tuned_001.wav").samplerate == 16000
    assert (
        json.loads((folder / "two" / "summary.json").read_text())["evaluation"]["metrics"]["bright"]["n"] == 2
    )


def test_runs_are_evaluated_and_reported_with_their_plug_ins(voiced):
    """Their voices, and the judge that they were paid by, are known by name without the flag."""
    folder = voiced
    flags = ["--metrics", "bright,shrill", "--heldout", 2, "--rollout-steps", 2, "--no-level-normalised"]
    done = run(folder, "evaluate", "run", "two", *flags, "--device", "cpu", "--threads", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((folder / "out" / "evaluation.json").read_text())
    systems = evaluation["measures"]["bright"]["systems"]
    assert evaluation["judges"] == ["bright"] and systems["run"]["n"] == systems["two"]["n"] == 2
    assert "shrill is left out: unknown reward" in done.stdout
    done = run(folder, "report", "run", "--plugin", "my.py")
    assert done.returncode == 0, done.stderr
    page = (folder / "run" / "report.html").read_text()
    assert str(folder / "my.py") in page and "patient, seed 0" in page


@pytest.fixture
def registries():
    """What this process has registered is as before afterwards."""
    before, loaded = {registry: dict(registry.entries) for registry in REGISTRIES}, dict(plugins.LOADED)
    yield
    for registry in REGISTRIES:
        registry.entries.clear()
        registry.entries.update(before.get(registry, {}))
    plugins.LOADED.clear()
    plugins.LOADED.update(loaded)


def test_what_is_registered_is_known_at_once(registries, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format("x_"))
    assert load_plugins([path, path]) == [str(path.resolve())] == load_plugins([str(path)])
    assert get_reward("2*x_bright").rewards["x_bright"].name == "x_bright"
    assert get_objective("x_patient", x_patience=7).x_patience == 7
    with pytest.raises(UserError, match="calm or cross"):
        get_objective("x_patient", x_mood="sad")
    copy = tmp_path / "copy.py"
    copy.write_text(MINE.format("x_"))
    load_plugins([copy])
    assert plugin_fingerprints([path]).keys() == {"mine.py"}


def test_a_score_is_kept_with_the_content_of_the_plug_in_that_gave_it(registries, tmp_path):
    path, config, keys = tmp_path / "judge.py", EvaluateConfig(), []
    for factor in (1, 1, 2):
        path.write_text(MINE.format("y_") + f"\nFACTOR = {factor}\n")
        for registry in (REWARDS, OBJECTIVES):
            registry.entries.pop("y_bright", None) or registry.entries.pop("y_patient", None)
        plugins.LOADED.pop(str(path), None)
        load_plugins([path])
        keys.append(identity("0.5*y_bright + dnsmos", config))
    assert keys[0] == keys[1] != keys[2] and keys[0].keys() == {"y_bright"}
    assert sound_keys(System("a", "model", path), ["One."], NoiseSchedule.linear(), 0) != sound_keys(
        System("a", "model", path), ["One."], NoiseSchedule.linear(), 0, beyond=keys[0]["y_bright"]
    )


REWARD = "from dlpo_nb.rewards.base import REWARDS, Reward\n"
OBJECTIVE = "from dataclasses import dataclass, field\nfrom dlpo_nb.objectives.base import *\n"
POLICY = "from dlpo_nb.policy import POLICIES, Policy\n"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["cannot read", "--plugin"]),
        ("", ["registers nothing"]),
        ("import dlpo_nb.rewards.dnsmos", ["registers nothing"]),
        ("def f(:", ["line 1", "SyntaxError"]),
        ("\0", ["null bytes"]),
        ("a = 1\nb = a.c", ["line 2", "AttributeError"]),
        ("import nothing_of_the_kind", ["line 1", "nothing_of_the_kind"]),
        ("raise SystemExit(3)", ["line 1", "SystemExit"]),
        (REWARD + '@REWARDS.register("dnsmos")\nclass DNSMOS(Reward): pass', ["'dnsmos'", "taken"]),
        (REWARD + '@REWARDS.register("dnsmos")\nclass Mine(Reward): pass', ["'dnsmos'", "twice"]),
        (REWARD + '@REWARDS.register("my-own")\nclass Mine(Reward): pass', ["my-own", "letters"]),
        (REWARD + '@REWARDS.register("mine")\nclass Mine: pass', ["not derived from Reward"]),
        (REWARD + '@REWARDS.register("mine")\ndef mine(audio, lengths, rate, texts): pass', ["score_clips"]),
        (OBJECTIVE + '@OBJECTIVES.register("mine")\nclass Mine: pass', ["derived from Objective"]),
        (
            OBJECTIVE + '@OBJECTIVES.register("mine")\nclass Mine(PolicyGradient):\n    a: int = 1',
            ["@dataclass"],
        ),
        (
            OBJECTIVE
            + '@OBJECTIVES.register("mine")\n@dataclass(kw_only=True)\nclass Mine(Objective):\n    a: int',
            ["option a", "default"],
        ),
        (
            POLICY + '@POLICIES.register("mine")\nclass Mine(Policy): kind = "mine"',
            ["lacks", "encode", "Config"],
        ),
        (POLICY + '@POLICIES.register("mine")\nclass Mine: pass', ["derived from Policy"]),
    ],
)
def test_a_broken_plug_in_is_one_sentence_and_leaves_no_trace(content, words, registries, tmp_path):
    before = [registry.names() for registry in (REWARDS, OBJECTIVES, POLICIES)]
    kept = [dict(registry.entries) for registry in (REWARDS, OBJECTIVES, POLICIES)]
    if content is not None:
        (tmp_path / "my.py").write_text(content)
    with pytest.raises(UserError) as caught:
        load_plugins([tmp_path / "my.py"])
    assert "my.py" in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert [registry.names() for registry in (REWARDS, OBJECTIVES, POLICIES)] == before
    assert [dict(registry.entries) for registry in (REWARDS, OBJECTIVES, POLICIES)] == kept
    assert str((tmp_path / "my.py").resolve()) not in plugins.LOADED


def test_options_of_an_objective_are_in_the_help(registries, tmp_path, capsys):
    (tmp_path / "my.py").write_text(MINE.format("h_"))
    with pytest.raises(SystemExit):
        parse([f"--plugin={tmp_path / 'my.py'}", "--help"])
    printed = capsys.readouterr().out
    assert "dnsmos" in printed.split("rewards by name: ")[1] and "h_bright" in printed
    for words in ("h_patient", "--h-patience INT", "divides the advantages", "{calm,cross}", "--plugin STR"):
        assert words in printed


@pytest.mark.parametrize("name", ["seed", "plugin", "method", "guidance_steps"])
def test_an_option_cannot_be_called_like_a_setting(name, registries, tmp_path):
    """Of the loop, of the command, or as one was called before."""
    lines = [
        '@OBJECTIVES.register("mine")',
        "@dataclass",
        "class Mine(PolicyGradient):",
        f"    {name}: int = 1",
    ]
    (tmp_path / "my.py").write_text(OBJECTIVE + "\n".join(lines))
    with pytest.raises(
        UserError, match=f"^objective mine .*'{name}', which is the name of a setting"
    ) as refused:
        parse(["--plugin", str(tmp_path / "my.py")])
    assert str(refused.value).count(".") == 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_resumed_run_reads_its_settings_without_a_warning(registries, tmp_path):
    path, run = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(MINE.format("r_"))
    flags = ["--plugin", str(path), "--method", "r_patient", "--r-patience", "3"]
    run.mkdir()
    (run / "config.json").write_text(json.dumps(recorded(*parse(flags), {})))
    resumed = parse(["--out", str(run), "--resume", "--episodes", "30"])[1]
    assert resumed.plugin == (str(path.resolve()),) and resumed.objective.r_patience == 3
    again = parse(["--out", str(run), "--resume", "--plugin", str(path)])[1]
    assert again.plugin == resumed.plugin and resumed.episodes == 30


def test_which_plug_ins_a_run_has(registries, tmp_path):
    assert flag_values(["--plugin", "a.py", "--plugin=b.py", "--plug", "c.py"], "plugin") == ["a.py", "b.py"]
    assert flag_values(["--base_checkpoint", "x", "--base-checkpoint=y"], "base-checkpoint") == ["x", "y"]
    old, new = tmp_path / "old" / "my.py", tmp_path / "new" / "my.py"
    for path in (old, new):
        path.parent.mkdir()
        path.write_text(MINE.format("y_"))
    (tmp_path / "config.json").write_text(json.dumps({"plugin": [str(old)]}))
    assert run_plugins(tmp_path) == [str(old)] and run_plugins(tmp_path / "nothing", [new]) == [str(new)]
    assert run_plugins(tmp_path, [new]) == [str(new)], "one of the same file name takes its place"
    old.unlink()
    with pytest.raises(UserError, match="not at .*old.my.py any more; say where it is now by --plugin"):
        run_plugins(tmp_path)
    new.with_name("also.py").write_text(MINE.format("z_"))
    old.write_text(MINE.format("w_"))
    with pytest.raises(UserError, match="same file name"):
        plugin_fingerprints([str(old), str(new)])
