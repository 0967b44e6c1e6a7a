"""The command line: a whole run, resuming, and one clear sentence for everything that can be wrong."""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import commands
import pytest
import torch

from dlpo_nb import launch as module
from dlpo_nb.config import preset_of, renamed
from dlpo_nb.core import UserError, asset, run_main
from dlpo_nb.cost import fitting, kept_gb, shorter_chain
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.inputs import banner, load_all_texts, load_base, load_recordings, load_reward
from dlpo_nb.judges import judge_options
from dlpo_nb.launch import rehearse
from dlpo_nb.locks import lock_folder, unlock_folders
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.objectives.base import PolicyGradient
from dlpo_nb.policies import load_policy
from dlpo_nb.policy import recorded as recorded_items
from dlpo_nb.settings import SAME_CONTENT, LaunchConfig, check_inputs, parse, preset_settings, recorded
from dlpo_nb.settings import stored_config
from dlpo_nb.rewards.wer import WER
from dlpo_nb.wavegrad2.model import load_wavegrad2

ROOT = Path(__file__).resolve().parents[1]
launch = partial(commands.run, "launch")
TINY = ["--batch-size", "2", "--group-size", "2", "--heldout", "2", "--threads", "1"]


@pytest.fixture
def launch_here(monkeypatch, capsys):
    """The command in this process, which saves importing torch each time: exit code, stdout, stderr."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["dlpo_nb.launch", *map(str, flags)])
        with pytest.raises(
            SystemExit
        ) as ended:  # any other exception is what a user would see as a traceback
            run_main(module.main)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    done = launch("--episodes", 2, "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_run_directory(finished):
    out, printed = finished
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "tensorboard",
        "summary.json",
        "report.html",
        "evaluation.csv",
    } <= names
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["episode"] for r in rows] == [0, 1]
    wanted = {
        "episode",
        "reward/mean",
        "reward/std",
        "loss",
        "diffusion_loss",
        "kl",
        "ratio/clipfrac",
        "grad_norm",
        "seconds",
        "audio_seconds",
    }
    assert wanted <= set(rows[0])
    assert rows[0]["ratio/mean"] == 1.0 and rows[0]["kl"] < 1e-10, "the first update is exactly on-policy"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_texts"] == 2
    assert ("wer" in summary["evaluation"]["metrics"]) == bool(WER.found_weights())
    assert summary["ceiling"]["vocoder"] == "griffinlim" and "distillmos" in summary["ceiling"]["judges"]
    assert "The vocoder's ceiling (64 held-out texts" in printed
    assert (out / "samples" / "base_001.wav").exists() and (out / "samples" / "tuned_001.wav").exists()
    assert "report.html" in printed


def test_tuned_checkpoint_differs_and_loads(finished):
    tuned = load_policy(finished[0] / "checkpoints" / "tuned.safetensors").state_dict()
    base = load_policy(asset("gradtts_small.safetensors")).state_dict()
    changed = {k.split(".")[0] for k in base if not torch.equal(base[k], tuned[k])}
    assert changed == {"decoder"}


def test_existing_run_is_not_overwritten(finished):
    before = (finished[0] / "metrics.jsonl").read_text()
    again = launch("--episodes", 1, "--out", finished[0], *TINY)
    assert again.returncode == 2 and "already holds a run" in again.stderr
    assert (finished[0] / "metrics.jsonl").read_text() == before


def test_resume_goes_on(finished, tmp_path):
    out = tmp_path / "half"
    assert launch("--episodes", 1, "--out", out, *TINY, "--heldout", 0).returncode == 0
    with open(out / "metrics.jsonl", "a") as file:  # as after a kill between a row and its state
        file.write(json.dumps({"episode": 1, "reward/mean": 0.0}) + "\n")
    assert launch("--episodes", 2, "--out", out, "--resume").returncode == 0, (
        "the other settings are the run's own"
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["episode"] for r in rows] == [0, 1]
    whole = load_policy(finished[0] / "checkpoints" / "tuned.safetensors").state_dict()
    halves = load_policy(out / "checkpoints" / "tuned.safetensors").state_dict()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seed", "5"], ["--seed is 5", "begun with 0"]),
        (["--method", "ddpo"], ["--method is ddpo", "begun with dlpo"]),
    ],
)
def test_a_run_is_not_gone_on_with_as_another(flags, words, finished):
    before = (finished[0] / "config.json").read_text()
    done = launch("--out", finished[0], "--resume", *flags)
    assert (
        done.returncode == 2 and all(word in done.stderr for word in words) and "Traceback" not in done.stderr
    )
    assert (finished[0] / "config.json").read_text() == before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_that_is_under_way_is_left_alone(finished):
    before = files(finished[0])
    lock_folder(finished[0])
    try:
        refused = launch("--out", finished[0], "--resume", "--episodes", 3)
    finally:
        unlock_folders()
    assert (
        refused.returncode == 2 and "another process" in refused.stderr and refused.stderr.count("\n") == 1
    ), refused.stderr
    assert files(finished[0]) == before


def test_a_resumed_run_has_no_fewer_episodes_than_are_done(finished):
    with pytest.raises(UserError, match="--episodes is 1, .* has done 2"):
        parse(["--out", str(finished[0]), "--resume", "--episodes", "1"])
    assert parse(["--out", str(finished[0]), "--resume"])[1].episodes == 2


def test_a_resumed_run_is_heard_through_the_same_vocoder():
    inputs = dict.fromkeys(SAME_CONTENT, "x") | {"vocoder": "vocos 1"}
    check_inputs({"inputs": inputs}, inputs, LaunchConfig())
    check_inputs({"inputs": dict.fromkeys(SAME_CONTENT, "x")}, inputs, LaunchConfig())  # a run of before
    with pytest.raises(UserError, match="another vocoder .vocos 1, now griffinlim 32"):
        check_inputs({"inputs": inputs}, inputs | {"vocoder": "griffinlim 32"}, LaunchConfig())


@pytest.mark.parametrize(
    "flags",
    [
        ["--advantage", "batch"],
        ["--fork", "9"],
        ["--train-steps", "last:2"],
        ["--heldout", "1"],
        ["--max-words", "3"],
        ["--estimator", "score"],
        ["--reduction", "sum"],
        ["--denoising-levels", "grid", "--denoising-steps", "2"],
        ["--control", "shuffle-advantages"],
        ["--denoising-source", "sample"],
    ],
)
def test_what_decides_the_numbers_stays(flags, finished):
    with pytest.raises(UserError, match=f"{flags[0]} is .* begun with"):
        parse(["--out", str(finished[0]), "--resume", *flags])


def test_the_record_of_a_finished_run(finished):
    record = json.loads((finished[0] / "config.json").read_text())
    built = {
        "alpha": 1.0,
        "clip_range": 1e-4,
        "estimator": "ratio",
        "beta": 0.005,
        "denoising_source": "data",
        "penalty_parts": "direct",
    }
    assert record["objective"].items() >= built.items() <= record.items()
    assert record["flags"][record["flags"].index("--episodes") + 1] == "2" and set(record["inputs"]) >= {
        "base_checkpoint",
        "texts",
        "corpus",
    }
    assert stored_config(finished[0])[1].objective.beta == 0.005


def test_an_objective_of_ones_own_is_recorded_as_it_was_built(capsys):
    @dataclass
    class Cautious(PolicyGradient):
        beta: float = 1.25
        patience: int = 3

    OBJECTIVES.register("cautious")(Cautious)
    try:
        config = LaunchConfig.of("cautious").resolved()
        banner("wavegrad-tiny", config, ["one"], [])
        record = recorded("wavegrad-tiny", config, {})
        again = LaunchConfig.of("cautious", beta=record["beta"]).resolved().objective
    finally:
        OBJECTIVES.entries.pop("cautious")
    printed = capsys.readouterr().out
    assert "  cautious: alpha 1, beta 1.25, advantage group, advantage_clip 5, buffer_size 32," in printed
    assert " buffer_min_count 16, estimator ratio, clip_range 0.0001, patience 3\n" in printed
    assert record["flags"] == ["--method", "cautious"], "what it fills in need not be said"
    assert record["beta"] == 1.25 and record["objective"]["patience"] == 3 and again.beta == 1.25


def test_what_fails_at_the_end_fails_before_the_first_episode(monkeypatch, tmp_path, no_whisper):
    """Judging, comparing and reporting are tried on a recording first; nothing is left where that fails."""
    config = LaunchConfig(reward="2*dnsmos", normalise="z", heldout=2).resolved()
    reward = load_reward(config)
    before = reward.state_dict()
    rehearse("tiny", config, reward)
    assert reward.state_dict() == before and reward.pop_components() == {}
    for broken in (
        "dlpo_nb.heldout.aligned_log_mel_distance",
        "dlpo_nb.launch.write_rows",
        "dlpo_nb.report.write_page",
        "dlpo_nb.launch.write_audio",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, refuse)
            with pytest.raises(UserError, match="no space"):
                module.launch(
                    "tiny", replace(config, reward="dnsmos", normalise="none", out=str(tmp_path / "run"))
                )
    assert not (tmp_path / "run").exists()


def refuse(*args, **options):
    raise UserError("there is no space")


def test_rewards_of_a_run():
    """An error rate is capped where it is paid for, whole where it is reported;
    a sum of one is normalised too."""
    assert "most" not in judge_options("dnsmos - 0.5*wer", LaunchConfig())["wer"]
    assert judge_options("wer", LaunchConfig(), report=True)["most"] == float("inf")
    reward = load_reward(LaunchConfig(reward="dnsmos", normalise="z"))
    assert reward.name == "1*z(dnsmos)" and not reward.settled
    with pytest.raises(UserError, match="less is better"):
        load_reward(LaunchConfig(reward="wer"))


def test_texts_of_a_corpus_and_of_the_watch():
    folder, voice = str(asset("speech_train")), load_base(LaunchConfig())
    texts, heldout, watched = load_all_texts(LaunchConfig(texts=folder, watch_every=1, watch_texts=3), voice)
    assert len(texts) > 50 and len(heldout) == 64 and len(watched) == 3 and not set(watched) & set(heldout)
    assert load_all_texts(LaunchConfig(watch_every=1, heldout=96, watch_from=folder), voice)[2]
    with pytest.raises(UserError, match="--watch-from"):
        load_all_texts(LaunchConfig(watch_every=1, heldout=96), voice)


def test_dry_run_of_the_paper():
    """Nothing is given, so all of it is stood in for; what a CPU cannot run is scaled up."""
    done = launch("paper", "--dry-run", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for word in (
        "random weights",
        "64 texts x 1",
        "1000 trailing steps",
        "scaled up",
        "episode 2 of 2",
        "CPU-hours",
        "memory",
        "a card of 12 GB takes --micro-batch",
        "drift",
        "recordings",
    ):
        assert word in done.stdout
    refused = launch("paper")
    assert (
        refused.returncode == 2
        and all(word in refused.stderr for word in ("--base-checkpoint", "--corpus", "--dry-run"))
        and "Traceback" not in refused.stderr
    )


def test_what_a_backward_pass_keeps():
    """Of exp its result, of a product its factors; weights are there anyway."""
    x, weight = torch.ones(1000, requires_grad=True), torch.ones(1000, requires_grad=True)
    assert kept_gb(lambda: x.exp().exp(), []) == pytest.approx(8e-6)
    assert kept_gb(lambda: (x.exp() * weight).sum(), [weight]) == pytest.approx(4e-6)


def test_a_small_card_is_told_what_it_takes():
    assert fitting(12, 2.0, 0.2) == "a card of 12 GB takes --micro-batch 46s"
    assert "12 GB hold 4 s of audio at once" in fitting(12, 2.0, 2.0) and "hold 0 s" in fitting(12, 20.0, 1.0)


def test_a_long_chain_is_cut_short_on_a_gpu():
    """The batch is whole; of trained steps as many as there are in the shorter chain."""
    flat = preset_settings("paper", "dlpo") | dict(base_checkpoint="tiny_base")
    for steps, train, probed, factors in (
        (1000, "random:10", "last:10", (50, 1, 1, 1)),
        (1000, "all", "last:19", (50, 1, 1009 / 29, 1)),
        (40, "all", "all", (1, 1, 1, 1)),
    ):
        whole = LaunchConfig.of(**flat | dict(rollout_steps=steps, train_steps=train)).resolved()
        config, texts, found = shorter_chain(whole, ["Rain."])
        config.check()
        assert (config.batch_size, config.train_steps, texts) == (64, probed, ["Rain."])
        assert tuple(found.values()) == pytest.approx(factors)


def test_dry_run_writes_nothing(tmp_path):
    done = launch("--dry-run", *TINY, "--out", tmp_path / "none")
    assert done.returncode == 0 and "minutes" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.smoke
@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_an_episode_of_every_method(method, launch_here, tmp_path):
    code, printed, complaint = launch_here(
        "--method", method, "--episodes", 1, "--out", tmp_path / "run", *TINY, "--heldout", 0
    )
    assert code == 0 and f"{method} on preset tiny" in printed, complaint
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["grad_norm"] > 0 and row.get("ratio/mean", 1.0) == 1.0, "the first update is exactly on-policy"
    base, tuned = (
        load_policy(path).state_dict()
        for path in (
            asset("gradtts_small.safetensors"),
            tmp_path / "run" / "checkpoints" / "tuned.safetensors",
        )
    )
    assert {k.split(".")[0] for k in base if not torch.equal(base[k], tuned[k])} == {"decoder"}


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_what_every_method_will_cost(method, launch_here):
    code, printed, complaint = launch_here("--method", method, "--dry-run", *TINY)
    assert code == 0 and f"{method} on preset tiny" in printed and "minutes" in printed, complaint


PRESET_RUNS = {
    "tiny": ("gradtts_small", "distillmos", "trailing", 0.005, 64),
    "wavegrad-tiny": ("tiny_base", "dnsmos", "geometric", 0.5, 32),
    "tiny-paper": ("tiny_base", "dnsmos", "geometric", 1.0, 32),
}


@pytest.mark.parametrize("preset", PRESET_RUNS)
def test_a_preset_is_its_numbers(preset):
    name, config = parse([preset])
    settings = config.flat()
    found = [settings[key] for key in ("base_checkpoint", "reward", "spacing", "beta", "batch_size")]
    assert name == preset and tuple(found) == PRESET_RUNS[preset]


def test_the_vocoder_of_a_preset_is_for_its_own_base():
    assert parse([])[1].vocoder == parse(["--base-checkpoint", "gradtts_small"])[1].vocoder == "griffinlim"
    own = str(asset("gradtts_small.safetensors"))
    assert parse(["--base-checkpoint", own])[1].vocoder == ""
    assert parse(["--base-checkpoint", own, "--vocoder", "vocos"])[1].vocoder == "vocos"
    with pytest.raises(UserError, match="makes its waveform itself: leave out --vocoder griffinlim"):
        load_base(parse(["wavegrad-tiny", "--vocoder", "griffinlim"])[1])


def test_what_a_preset_has_for_one_method_is_not_taken_by_another():
    assert parse(["--method", "dpok"])[1].objective.beta == OBJECTIVES.get("dpok")().beta
    config = parse(["--method", "klinr", "--beta", "0.3"])[1]
    assert config.objective.beta == 0.3
    assert recorded("tiny", config, {})["flags"] == ["--method", "klinr", "--beta", "0.3"]
    assert recorded("tiny", parse([])[1], {})["flags"] == []


def test_the_preset_of_wavegrad_2_is_what_was_recorded_as_tiny():
    """Number for number, as far as the record of before has the setting."""
    record = json.loads((ROOT / "results" / "tiny_dlpo" / "dlpo-seed0" / "config.json").read_text())
    assert preset_of(record) == "wavegrad-tiny"
    settings = parse(["wavegrad-tiny"])[1].flat()
    away = {"out", "threads", "device", "resume", "nisqa_weights"}
    before = {key: value for key, value in renamed(record).items() if key in settings and key not in away}
    assert len(before) > 25 and {key: settings[key] for key in before} == before


@pytest.mark.parametrize(
    "record, preset",
    [
        (dict(preset="tiny"), "wavegrad-tiny"),  # the first runs had no spacing
        (dict(preset="tiny", spacing="geometric", flags=[]), "wavegrad-tiny"),
        (dict(preset="tiny", spacing="trailing", flags=["--spacing", "trailing"]), "wavegrad-tiny"),
        (dict(preset="tiny", spacing="trailing", flags=["--seed", "1"]), "tiny"),
        (dict(preset="tiny", spacing="geometric", flags=["--spacing", "geometric"]), "tiny"),
        (dict(preset="paper", spacing="trailing", flags=[]), "paper"),
    ],
)
def test_a_preset_keeps_its_runs_when_it_is_renamed(record, preset):
    assert preset_of(record) == preset


def test_the_preset_fits_the_kind_of_the_base():
    assert parse(["--base-checkpoint", "tiny_base"])[0] == "wavegrad-tiny"
    assert parse(["--method", "ddpo", "--base-checkpoint", "gradtts_small"])[0] == "tiny"
    with pytest.raises(UserError, match="preset tiny has .* of a gradtts, and tiny_base .* wavegrad-tiny or"):
        parse(["tiny", "--base-checkpoint", "tiny_base"])
    with pytest.raises(UserError, match="preset paper .* holds a gradtts; give tiny or gradtts"):
        parse(["paper", "--base-checkpoint=gradtts_small"])


def test_a_released_grad_tts_by_its_preset(tmp_path, launch_here):
    """A tiny one in the released layout; its own symbols, so no recordings, and texts from a file."""
    torch.manual_seed(0)
    sizes = dict(
        encoder_channels=16, encoder_hidden=24, encoder_layers=1, duration_hidden=16, decoder_channels=16
    )
    voice = GradTTS(GradTTSConfig(**sizes))
    with torch.no_grad():
        voice.encoder.proj_w.proj.weight.zero_()
        voice.encoder.proj_w.proj.bias.fill_(1.5)
    torch.save(voice.state_dict(), tmp_path / "grad-tts.pt")
    (tmp_path / "texts.txt").write_text("The bell rings.\nSnow fell.\n")
    given = ["--texts", tmp_path / "texts.txt", "--heldout-texts", tmp_path / "texts.txt", *TINY]
    given += ["--base-checkpoint", tmp_path / "grad-tts.pt", "--reward", "dnsmos", "--watch-every", 0]
    short = ["--rollout-steps", 3, "--train-steps", "all", "--denoising-steps", 1, "--episodes", 1]
    short += ["--heldout", 0]  # what random weights say is no sound
    code, printed, complaint = launch_here("gradtts", *given, *short, "--out", tmp_path / "run")
    assert code == 0 and "dlpo on preset gradtts" in printed, complaint
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["ratio/mean"] == 1.0 and row["grad_norm/penalty"] > 0
    code, _, complaint = launch_here(
        "gradtts", *given, "--denoising-source", "data", "--out", tmp_path / "no"
    )
    assert code == 2 and "--denoising-source sample" in complaint


def test_what_the_presets_at_full_size_want(launch_here):
    for preset, words in {"paper": ["--corpus"], "gradtts": ["--base-checkpoint", "--texts"]}.items():
        code, _, complaint = launch_here(preset)
        assert code == 2 and all(word in complaint for word in words), complaint


def test_the_packaged_recordings_fit_the_packaged_voices():
    for preset, rate in {"tiny": 24000, "wavegrad-tiny": 22050}.items():
        config = parse([preset])[1]
        corpus, policy = load_recordings(config, load_base(config)), load_base(config)
        assert policy.sample_rate == rate and len(corpus) >= 64
        batch = recorded_batch_of(policy, corpus[:3].items)
        assert torch.isfinite(batch).all() and 0.05 < batch.std() < 3


def recorded_batch_of(policy, items):
    """The states x_0 of recordings, as the denoising loss takes them."""
    batch = recorded_items(policy, items)
    conditioning = policy.condition(batch["ids"], batch["lengths"], durations=batch["durations"])
    return policy.analyse(batch["audio"], conditioning)


def test_the_papers_weights_are_a_preset():
    done = launch("tiny-paper", "--dry-run", "--guidance-steps", "1", *TINY)
    assert done.returncode == 0 and "alpha 1, beta 1," in done.stdout


def test_help_is_a_manual():
    done = launch("--help")
    assert done.returncode == 0
    for word in (
        "examples:",
        "--method",
        "--episodes",
        "--batch-size",
        "--control",
        "--base-checkpoint",
        "--out",
        "--resume",
        "--seed",
        "--dry-run",
        "--alpha",
        "--beta",
        "--advantage",
        "--kl-form",
        "--reduction",
        "--estimator",
        "--denoising-source",
        "--penalty-parts",
        "--denoising-steps",
        "--rwr-weights",
        "--train-steps",
        "--trainable",
        "tiny-paper",
    ):
        assert word in done.stdout


def broken_files(folder):
    folder.mkdir(exist_ok=True)
    (folder / "empty.txt").write_text("")
    (folder / "symbols.txt").write_text("Hello there.\n?!... --\n")
    (folder / "broken.safetensors").write_bytes(b"not a checkpoint at all")
    (folder / "file").write_text("a file where a folder should be")
    model = load_wavegrad2(asset("tiny_base.safetensors"))
    object.__setattr__(model.config, "sample_rate", 16000)
    model.save(folder / "rate.safetensors")
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no-such-flag"], ["no-such-flag"]),
        (["huge"], ["huge", "tiny"]),
        (["--method", "ppo"], ["ppo", "dlpo", "ddpo"]),
        (["--method", "rwr", "--dl-source", "data"], ["--denoising-source", "onlydl", "rwr"]),
        (["--penalty-parts", "both"], ["--penalty-parts both", "--denoising-source sample"]),
        (["--method", "dpok", "--kl-form", "l3"], ["l3", "exact"]),
        (["--advantage", "zscore"], ["zscore", "leave-one-out"]),
        (["--estimator", "score", "--inner-epochs", "2"], ["--estimator score"]),
        (["--tau", "2"], ["--tau is an option of rwr", "dlpo"]),
        (["--method", "rwr", "--tau", "0"], ["--tau", "above 0"]),
        (["--reward", "mosquito"], ["mosquito", "dnsmos"]),
        (["--control", "placebo"], ["placebo", "shuffle-advantages"]),
        (["--episodes", "0"], ["--episodes", "at least 1"]),
        (["--episodes", "many"], ["many"]),
        (["--batch-size", "10"], ["--batch-size 10", "--group-size 8"]),
        (["--train-steps", "last:99"], ["last:99"]),
        (["--base-checkpoint", "{}/missing.safetensors"], ["missing.safetensors"]),
        (["--base-checkpoint", "{}/broken.safetensors"], ["broken.safetensors"]),
        (["--base-checkpoint", "{}/rate.safetensors"], ["16000", "22050"]),
        (["--texts", "{}/nowhere.txt"], ["nowhere.txt"]),
        (["--texts", "{}/empty.txt"], ["empty.txt"]),
        (["--texts", "{}/symbols.txt"], ["symbols.txt", "line 2"]),
        (["--out", "{}/file/run"], ["file"]),
        (["--out", "{}/nothing", "--resume"], ["nothing"]),
        (["--nisqa-weights", "{}/none.tar"], ["none.tar"]),
        (["--reward", "wer"], ["less is better"]),
        (["--max-grad-norm", "inf"], ["--max-grad-norm"]),
        (["--lora-rank", "2", "--trainable", "all"], ["--lora-rank"]),
        (["--nnodes", "2", "--rdzv-endpoint", "node0", "--out", "{}/run"], ["HOST:PORT"]),
    ],
)
def test_bad_input_is_one_clear_sentence(flags, words, tmp_path, launch_here):
    folder = broken_files(tmp_path / "bad")
    code, printed, complaint = launch_here(
        *[f.format(folder) for f in flags], *([] if "--batch-size" in flags else TINY)
    )
    assert code != 0
    assert "Traceback" not in printed + complaint, complaint
    for word in words:
        assert word in printed + complaint, complaint
