"""What 46_pretrain does not show: interruption, damaged states, the command line, the slices of tools/gpu."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from deterministic_weights import fill, integers, noise, waveform
from test_distributed import workers

from dlpo_nb import pretrain as module
from dlpo_nb.core import UserError, asset
from dlpo_nb.locks import lock_folder, unlock_folders
from dlpo_nb.corpus import Item, load_corpus
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.mel_head import TARGET_MEL, mel_loss, mel_targets
from dlpo_nb.optimisers import make_optimisers
from dlpo_nb.pretrain import fit, prepare, pretrain, train_step, validate
from dlpo_nb.pretrain_settings import REFERENCE, PretrainConfig, parse
from dlpo_nb.recipes import recipe_for
from dlpo_nb.training_run import Pretraining, first_model
from dlpo_nb.vocoder import log_mel
from dlpo_nb.wavegrad2.training import (
    Windows, batch_losses, draw_start, level_weights, mean_weight, new_model, window_batch,
)  # fmt: skip
from dlpo_nb.wavegrad2.model import WaveGrad2, WaveGrad2Config, load_wavegrad2

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "data" / "corpus_tiny"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        CORPUS,
        tmp_path / "run",
        steps=4,
        batch_size=2,
        window_frames=12,
        warmup_steps=2,
        log_every=2,
        sample_every=0,
        device="cpu",
    )


def weights(path):
    return {k: v for k, v in load_wavegrad2(path).state_dict().items()}


@pytest.mark.parametrize(
    "first, changes",
    [
        (2, dict(precision="float32")),
        (1, dict(optimiser="adamw", precision="float32")),
        (3, dict(precision="bfloat16")),
        (2, {**REFERENCE, "arch": "tiny", "batch_size": 2, "window_frames": 12}),
        (2, dict(mel_weight=0.5, level_weights=10.0)),
    ],
)
def test_resume_is_exact(config, tmp_path, first, changes):
    whole = replace(config, **changes)
    parts = replace(whole, out=tmp_path / "parts", save_every=1)
    pretrain(whole)
    fit(prepare(parts), last_step=first)
    torch.manual_seed(99)  # the state of the resuming process must not matter
    pretrain(replace(parts, resume=True, workers=1))
    one, two = weights(whole.out / "base.safetensors"), weights(parts.out / "base.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    losses = [
        [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").open())]
        for out in (whole.out, parts.out)
    ]
    assert losses[0] == losses[1]


def test_state_is_plain_tensors_and_small(config):
    pretrain(config)
    state = torch.load(config.out / "state.pt", weights_only=True)
    assert state["step"] == 4
    assert (config.out / "state.pt").stat().st_size < 16e6
    assert not list(config.out.glob(".*.tmp"))


def test_rows_after_the_state_are_dropped_on_resume(config):
    fit(prepare(config), last_step=2)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 9.9}) + "\n")
    pretrain(replace(config, resume=True))
    assert [json.loads(line)["step"] for line in (config.out / "metrics.jsonl").open()] == [2, 4]


def test_windows_reach_the_last_frame_and_mask_the_padding(config):
    items = Pretraining(config).items[:2]
    total = [sum(item.frames) for item in items]
    for reference, expected in ((False, {0, 1}), (True, {0})):
        assert {draw_start(8, 7, torch.Generator().manual_seed(s), reference) for s in range(40)} == expected
        assert {
            draw_start(8, frames, torch.Generator().manual_seed(s), reference)
            for s in range(9)
            for frames in (8, 9)
        } == {0}
    batch = window_batch(items, [0, 5], max(total) + 3, 300)
    assert batch["mask"].sum(1).tolist() == [300 * total[0], 300 * (total[1] - 5)]
    assert (batch["audio"][batch["mask"] == 0] == 0).all() and batch["share"].tolist() == [1, 1]
    torch.testing.assert_close(
        batch["audio"][1, : 300 * (total[1] - 5)] * 32767, torch.from_numpy(items[1].audio[1500:]).float()
    )
    assert window_batch(items, [0, 5], max(total) + 3, 300, masked=False)["mask"].all()


def test_rows_of_a_batch_do_not_depend_on_who_makes_them(config):
    items = load_corpus(CORPUS)
    whole, part = (
        Windows(replace(config, batch_size=5), items, 300),
        Windows(replace(config, batch_size=5), items, 300),
    )
    part.rows = [1, 4]
    a, b = whole[3], part[3]
    assert all(torch.equal(a[name], b[name]) for name in ("ids", "lengths", "durations"))
    assert all(
        torch.equal(a[name][[1, 4]], b[name])
        for name in ("rows", "starts", "audio", "mask", "level", "noise")
    )
    part.rows = [0, 2, 3]
    torch.testing.assert_close(b["share"] + part[3]["share"], torch.ones(2).double())


def test_a_step_hears_the_same_whatever_came_before(config):
    items = Pretraining(config).items
    one, two = Windows(config, items, 300), Windows(config, items, 300)
    one[0], one[1]
    assert all(torch.equal(a, b) for a, b in zip(one[7].values(), two[7].values()))
    assert not torch.equal(one[7]["noise"], one[8]["noise"])


def test_the_mel_head_is_training_s_alone(config):
    run = pretrain(replace(config, mel_weight=1.0))
    loaded = load_wavegrad2(config.out / "base.safetensors")
    ours = {name: value for name, value in run.ema.state_dict().items() if "mel_head" not in name}
    del ours["encoder.embedding.weight"]  # vowels that the corpus lacks are lent a row
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.items())
    assert len(ours) + 1 == len(loaded.state_dict()) == len(run.ema.state_dict()) - 2
    row = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["mel_loss"] > 0 and row["validation"]["mel"] > 0
    start = dict(start_from=str(config.out / "base.safetensors"))
    for weight in (0.0, 1.0):  # a base goes on with a fresh head, or with none
        settings = replace(config, **start, mel_weight=weight, out=config.out.parent / f"on{weight}")
        begun = prepare(settings).model
        assert hasattr(begun, "mel_head") == (weight > 0)
        assert torch.equal(begun.encoder.lstm.weight_hh_l0, loaded.encoder.lstm.weight_hh_l0)


def test_level_weights_weigh_windows_in_training_alone(config):
    recipe = recipe_for(replace(config, level_weights=5.0, precision="float32"))
    policy = recipe.new_policy().eval()
    batch = Windows(replace(config, batch_size=3), load_corpus(CORPUS), 300)[0]
    batch["mask"][1, 2000:] = 0  # a window counts by what is inside
    batch["level"] = torch.tensor([[0.99], [0.8], [0.2]])

    def alone(row):
        one = batch["mask"] * (torch.arange(3) == row)[:, None]
        part = batch_losses(policy, batch | dict(mask=one), "float32")[0]
        return part * one.sum() / batch["mask"].sum()

    weights = level_weights(batch["level"], 5.0)[:, 0]
    assert weights[0] < weights[1] < weights[2]
    assert weights[2].item() == pytest.approx(5 / mean_weight(5.0), rel=1e-6)
    expected = sum(weight * alone(row) for row, weight in enumerate(weights)).item()
    assert recipe.losses(policy, batch)[0].item() == pytest.approx(expected, rel=1e-5)
    plain = batch_losses(policy, batch, "float32")[0].item()
    assert recipe.losses(policy, batch, held_out=True)[0].item() == pytest.approx(plain, rel=1e-6) != expected


def test_the_mel_loss_counts_each_frame_once(config):
    items = load_corpus(CORPUS)[:3]
    frames = [sum(item.frames) for item in items]
    assert len(set(frames)) > 1
    windows = window_batch(items, [0] * 3, 8, 300)
    policy = recipe_for(replace(config, mel_weight=1.0)).new_policy()
    said = policy.condition(windows["ids"], windows["lengths"], windows["durations"])

    def loss(rows, most=None):
        batch = dict(rows=torch.tensor(rows)) | mel_targets(items, rows, most)
        return mel_loss(policy.mel_head, said, batch).item()

    assert loss([0, 1, 2]) == pytest.approx(loss([1]) + loss([0, 2]), rel=1e-5)
    for most in (None, 20):
        sizes, squares = [min(size, most or size) for size in frames], 0.0
        for row, (item, size) in enumerate(zip(items, sizes)):
            audio = torch.from_numpy(item.audio.astype(np.float32) / 32767)
            target = (log_mel(audio[None], TARGET_MEL)[0, :, :size] + 5) / 2
            squares += (policy.mel_head(said.hidden)[row, :, :size] - target).square().sum().item()
        assert loss([0, 1, 2], most) == pytest.approx(squares / (80 * sum(sizes)), rel=1e-5)


def test_muon_leaves_edges_to_adamw():
    model = new_model("tiny")
    muon, adamw = make_optimisers(model, "muon", 1e-3, 0.02)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = [names[id(p)] for p in muon.param_groups[0]["params"]]
    assert "decoder.ublock_preconv.conv1d.weight" in matrices and "encoder.lstm.weight_ih_l0" in matrices
    assert not any(
        "embedding" in n or "fc" in n or "postconv" in n or "dblock_preconv" in n or n.endswith("bias")
        for n in matrices
    )
    assert len(matrices) + len(adamw.param_groups[0]["params"]) == len(names)


def test_diverged_training_keeps_the_last_good_state(config):
    run = prepare(replace(config, save_every=1))
    fit(run, last_step=1)
    good = (config.out / "state.pt").read_bytes()
    with torch.no_grad():
        run.model.decoder.ublock_postconv.conv1d.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite at step 2"):
        fit(run, last_step=2)
    assert (config.out / "state.pt").read_bytes() == good


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(steps=0), "--steps or as --minutes"),
        (dict(minutes=1.0), "--steps or as --minutes"),
        (dict(batch_size=0), "--batch-size is 0"),
        (dict(nproc_per_node=3), "less than the 3 processes"),
        (dict(nnodes=2), "--rdzv-endpoint"),
        (dict(validation="nowhere"), "nowhere"),
        (dict(corpus=Path("nowhere")), "nowhere"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(out=CORPUS / "manifest.jsonl"), "--out"),
    ],
)
def test_wrong_settings_end_in_a_sentence(config, change, sentence):
    with pytest.raises(UserError, match=sentence):
        pretrain(replace(config, **change))


def test_empty_corpus(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        pretrain(replace(config, corpus=tmp_path / "empty"))


def test_states_that_do_not_fit(config):
    fit(prepare(config), last_step=1)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(config)
    with pytest.raises(UserError, match="batch_size = 2, now it is 3"):
        pretrain(replace(config, resume=True, batch_size=3))
    (config.out / "state.pt").write_bytes((config.out / "state.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot go on from"):
        pretrain(replace(config, resume=True))


def test_a_setting_that_came_later_was_at_its_default(config):
    fit(prepare(config), last_step=2)
    path = config.out / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["mel_weight"]  # as a training of before wrote it
    torch.save(state, path)
    assert prepare(replace(config, resume=True)).step == 2
    with pytest.raises(UserError, match="mel_weight = 0.0, now it is 1.0"):
        prepare(replace(config, resume=True, mel_weight=1.0))


def test_a_resumed_training_keeps_what_was(config, tmp_path):
    fit(prepare(config), last_step=2)
    with pytest.raises(UserError, match="--steps is 1, .* has done 2"):
        prepare(replace(config, resume=True, steps=1))
    other = shutil.copytree(CORPUS, tmp_path / "other")
    rows = [json.loads(line) for line in (other / "manifest.jsonl").open()]
    rows[-1]["text"] = "Something else was said."
    (other / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="made on other utterances"):
        prepare(replace(config, resume=True, corpus=other))
    environment = (config.out / "environment.json").read_bytes()
    prepare(replace(config, resume=True, steps=6, workers=1))
    record = json.loads((config.out / "config.json").read_text())
    assert (record["steps"], record["changes"], record["workers"]) == (4, [{"step": 2, "steps": 6}], 1)
    assert (config.out / "environment.json").read_bytes() == environment


def test_a_training_that_is_under_way_is_left_alone(config):
    fit(prepare(config), last_step=2)
    resume = command(config, "--steps", 4, "--warmup-steps", 2, "--log-every", 2, "--resume")
    lock_folder(config.out)
    try:
        before = {
            path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()
        }  # to read the lock does not let go of it
        done = commands.python(*resume[1:])
    finally:
        unlock_folders()
    assert (
        done.returncode == 2
        and f"another process ({os.getpid()})" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before


def test_a_resumed_training_knows_its_settings(config, monkeypatch):
    """The folder is enough; another length may be in the other unit; what was changed since holds."""
    fit(prepare(replace(config, seed=3, window_frames=20)), last_step=1)
    words = ["--out", str(config.out), "--resume"]
    again = parse(words)
    assert replace(again, resume=False, corpus=config.corpus) == replace(config, seed=3, window_frames=20)
    assert again.corpus == Path(config.corpus) and parse([*words, "--steps", "9"]).steps == 9
    longer = parse([*words, "--minutes", "5", "--log-every", "7"])
    assert (longer.steps, longer.minutes, longer.log_every, longer.seed) == (0, 5.0, 7, 3)
    for stranger in ({"preset": "tiny"}, {"preset": "tiny", "corpus": "packaged", "out": "run", "seed": 0}):
        (config.out / "config.json").write_text(json.dumps(stranger))
        with pytest.raises(UserError, match="not the record of a training"):
            parse(words)
    monkeypatch.chdir(config.out)  # a record that nobody named
    with pytest.raises(SystemExit):
        parse(["--resume", "--steps", "5"])


def test_resume_without_a_state_starts(config):
    assert pretrain(replace(config, steps=1, resume=True)).step == 1


def command(config, *more):
    flags = [
        "--corpus",
        config.corpus,
        "--out",
        config.out,
        "--batch-size",
        2,
        "--window-frames",
        12,
        "--sample-every",
        0,
        "--device",
        "cpu",
    ]
    return [sys.executable, "-m", "dlpo_nb.pretrain", *map(str, flags), *map(str, more)]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def test_ctrl_c_saves_and_the_command_goes_on(config):
    process = subprocess.Popen(
        command(config, "--steps", 100000, "--log-every", 1),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, limit = config.out / "metrics.jsonl", time.time() + 300
    while not metrics.exists() and time.time() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, process.stderr.read()
    reached = torch.load(config.out / "state.pt", weights_only=True)["step"]
    assert reached >= 1
    pretrain(replace(config, steps=reached + 1, warmup_steps=300, log_every=1, resume=True))
    assert [json.loads(line)["step"] for line in metrics.open()][-2:] == [reached, reached + 1]


@pytest.mark.smoke
def test_command_line_error_is_one_sentence(config):
    done = commands.python(*command(config)[1:])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_gpu_job_goes_on_from_small_files(config, tmp_path):
    job = ["bash", str(ROOT / "tools" / "gpu" / "train_base.sh"), str(CORPUS)]
    flags = [
        "--batch-size",
        "2",
        "--window-frames",
        "12",
        "--sample-every",
        "0",
        "--steps",
        "100000",
        "--log-every",
        "1",
    ]
    env = {**ENVIRONMENT, "PYTHON": sys.executable, "SLICE_MINUTES": "0.01"}
    steps = []
    for before, after in (("none", "one"), ("one", "two")):
        done = subprocess.run(
            [*job, tmp_path / before, tmp_path / after, *flags],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert all(p.stat().st_size <= 16e6 for p in (tmp_path / after).iterdir())
        steps.append(json.loads((tmp_path / after / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    assert 0 < steps[0] < steps[1]
    (tmp_path / "base.safetensors").write_bytes(
        b"".join(p.read_bytes() for p in sorted((tmp_path / "two").glob("base.part.*")))
    )
    load_wavegrad2(tmp_path / "base.safetensors")


# --- the released trainer


@pytest.fixture(scope="module")
def ref(data):
    """Numbers recorded from the released trainer, Base, deterministic weights."""
    return {key: torch.from_numpy(value) for key, value in np.load(data / "wavegrad2_reference.npz").items()}


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        model = WaveGrad2(WaveGrad2Config(dropout=0.0))
    return fill(model.to_empty(device="cpu"))


def recorded_batch(ref, size, level=None):
    """The recorded training batch, made by `window_batch`; its clips go on for a part of a frame,
    which those of a corpus do not."""
    items, extra = [], integers(2, "ref/wavextra", 1, 300)
    for row, length in enumerate(ref["text_lengths"].tolist()):
        frames = ref["durations"][row, :length].tolist()
        wave = waveform(300 * sum(frames) + int(extra[row]), f"ref/train/wav{row}").double() * 32767
        items.append(Item(str(row), "", [], frames, Path(), wave.numpy()))
        items[row].__dict__["ids"] = ref["text_ids"][row, :length].tolist()
    starts = ref["train8_starts"].tolist() if size == 8 else [0, 0]
    batch = window_batch(items, starts, size, 300, masked=False)
    if level is None:
        level = NoiseSchedule.linear().levels.float()[ref["train_step"] - 1][:, None]
    return dict(batch, level=level, noise=noise((2, 300 * size), f"ref/train/eps{size}"))


@pytest.mark.parametrize("size", [8, 256])
@torch.no_grad()
def test_losses_are_those_of_the_released_trainer(base, ref, size):
    losses = torch.stack(batch_losses(base.eval(), recorded_batch(ref, size), "float32", reference=True))
    assert [losses.sum().item(), *losses.tolist()] == pytest.approx(
        ref[f"train{size}_losses"].tolist(), rel=1e-4
    )


def test_a_training_step_has_the_losses_and_gradients_of_the_released_trainer(base, ref, config, monkeypatch):
    settings = replace(config, **REFERENCE | dict(clip=1e9, batch_size=2))
    monkeypatch.setattr("dlpo_nb.training_run.first_model", lambda *arguments: base)
    run = Pretraining(settings)
    run.model.eval()  # as recorded: no dropout, fixed norms
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    train_step(run, recorded_batch(ref, 8))
    total, l1, duration = ref["train8_losses"].tolist()
    assert run.sums.tolist() == pytest.approx(
        [l1, duration, 6.724852, 1], rel=1e-4
    )  # tolerances: see test_wavegrad2
    norms = {
        name: torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
        for name, m in base.named_children()
    }
    assert norms == pytest.approx(
        dict(encoder=0.3958072, speaker_embedding=0.006735903, resampling=0.3040983, decoder=6.706299),
        rel=1e-3,
    )
    # Adam's first step goes as far as its learning rate, wherever the gradient is not next to nothing
    moved = torch.cat(
        [(p.detach() - before[name])[p.grad.abs() > 1e-3].abs() for name, p in base.named_parameters()]
    )
    assert len(moved) > 10_000 and (moved - 3e-4).abs().max() < 1e-5
    ema = dict(run.ema.named_parameters())
    assert all((ema[name] - p).abs().max() < 1e-6 for name, p in base.named_parameters()), (
        "their average is the new weights"
    )
    with torch.no_grad():
        fill(base)


@torch.no_grad()
def test_training_mode_is_that_of_the_released_trainer(base, ref):
    base.train()
    losses = torch.stack(
        batch_losses(base, recorded_batch(ref, 8, ref["train_mode_noise_level"]), "float32", reference=True)
    )
    fill(base)
    assert [losses.sum().item(), *losses.tolist()] == pytest.approx(
        ref["train8_trainmode_losses"].tolist(), rel=1e-4
    )


def test_without_padding_ours_is_theirs(config):
    item = load_corpus(CORPUS)[0]
    model = new_model("tiny").eval()
    batch = window_batch([item, item], [0, 3], 20, 300)
    batch |= dict(level=torch.tensor([[0.5], [0.99]]), noise=torch.randn(2, 6000))
    ours, theirs = (
        torch.stack(batch_losses(model, batch, "float32", reference)) for reference in (False, True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_reference_sets_what_no_flag_says():
    config = parse("--corpus c --out o --steps 5 --lr 0.001 --reference".split())
    assert (
        config.reference
        and config.lr == 0.001
        and (config.arch, config.optimiser, config.window_frames) == ("base", "adam", 256)
    )
    assert not parse("--corpus c --out o --steps 5".split()).reference


# --- precision


def test_bfloat16_trains_with_float32_losses_and_weights(config):
    run = Pretraining(config)
    batch = Windows(config, run.items, 300)[0]
    losses = {
        precision: torch.stack(batch_losses(run.ema, batch, precision))
        for precision in ("float32", "bfloat16")
    }
    assert losses["bfloat16"].dtype == torch.float32 and not torch.equal(*losses.values())
    torch.testing.assert_close(*losses.values(), rtol=0.03, atol=0)
    train_step(run, batch)
    assert (
        {p.dtype for p in run.model.parameters()}
        == {p.grad.dtype for p in run.model.parameters()}
        == {torch.float32}
    )
    assert run.sums.isfinite().all()


# --- validation


def test_held_out_loss_is_a_mean_over_utterances_whatever_the_chunks(config):
    settings = replace(config, validation=str(CORPUS), held_out=5, precision="float32", mel_weight=0.5)
    run = Pretraining(settings)
    assert len(run.items) == 6 and len(run.held_out) == 5
    together, apart = validate(run), validate(run, at_once=2)
    assert list(together) == ["16", "80", "250", "550", "850", "duration", "mel"]
    assert together == pytest.approx(apart, rel=1e-5)


def test_samples_are_judged_and_heard_over_training(config, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(
        module,
        "sample",
        lambda run, count: [torch.sin(torch.arange(22050) / 20) * 0.3] * min(count, len(run.held_out)),
    )
    pretrain(replace(config, steps=7, log_every=2, sample_every=3, validation=str(CORPUS)))
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert ["dnsmos" in row for row in rows] == [False, True, True, True], (
        "the first row at or after each third step, and the last"
    )
    means = [
        sum(v for k, v in row["validation"].items() if k != "duration") / 5 + row["validation"]["duration"]
        for row in rows
    ]
    assert means == pytest.approx([row["held_out_loss"] for row in rows])
    board = EventAccumulator(str(config.out / "tensorboard"), size_guidance={"audio": 0}).Reload()
    assert [(e.step, e.sample_rate) for e in board.Audio("sample/1")] == [(s, 22050) for s in (4, 6, 7)]
    assert [e.step for e in board.Scalars("dnsmos")] == [4, 6, 7] and [
        e.step for e in board.Scalars("held_out_loss")
    ] == [2, 4, 6, 7]
    assert (config.out / "samples" / "step_0000006_0.wav").exists()


def test_nisqa_rates_where_its_weights_are(config, shared):
    run = prepare(replace(config, sample_every=4, nisqa_weights=str(shared / "data" / "nisqa" / "nisqa.tar")))
    ratings = module.score(
        run, [torch.from_numpy(item.audio / 32767).float() for item in load_corpus(CORPUS)[:1]]
    )
    assert ratings.keys() == {"dnsmos", "nisqa"} and all(2.5 < value < 5 for value in ratings.values())


def test_a_judge_that_is_missing_is_missed_at_the_start(config, tmp_path):
    with pytest.raises(UserError, match="no-score"):
        prepare(replace(config, sample_every=4, nisqa_weights=str(tmp_path / "nisqa.tar")))
    prepare(replace(config, sample_every=4, nisqa_weights=str(tmp_path / "nisqa.tar"), score=False))


def test_a_full_disk_is_one_sentence_and_keeps_the_last_state(config, monkeypatch):
    run = prepare(replace(config, save_every=1))
    fit(run, last_step=1)
    good = (config.out / "state.pt").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="state.pt: No space left on device; free some space"):
        fit(run, last_step=2)
    assert (config.out / "state.pt").read_bytes() == good and not list(config.out.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_that_breaks_on_the_way_is_one_sentence(config, tmp_path, monkeypatch, workers):
    folder = Path(shutil.copytree(CORPUS, tmp_path / "corpus"))
    monkeypatch.setattr("dlpo_nb.corpus.HELD", 0)
    run = prepare(replace(config, corpus=folder, workers=workers))
    for path in (folder / "audio").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"^cannot read \S*\.flac") as error:
        fit(run)
    assert "\n" not in str(error.value)


# --- several processes


def in_two(command):
    return commands.python(*command[1:], "--nproc-per-node", "2")


def test_one_process_starts_and_two_go_on(config):
    settings = replace(config, batch_size=3, optimiser="adamw", lr=1e-4, precision="float32", log_every=1)
    settings = replace(settings, mel_weight=0.5)
    whole = replace(settings, out=config.out.parent / "whole")
    pretrain(whole)
    fit(prepare(settings), last_step=1)
    before = sorted(p.name for p in config.out.iterdir())
    flags = "--resume --batch-size 3 --optimiser adamw --lr 1e-4 --precision float32 --log-every 1 --steps 4"
    flags = f"{flags} --warmup-steps 2 --mel-weight 0.5".split()
    done = in_two(command(config, *flags))
    assert done.returncode == 0, done.stderr
    environment = json.loads((config.out / "environment.json").read_text())
    assert environment["processes"] == 1 and (
        environment["changes"][0]["step"],
        environment["changes"][0]["processes"],
    ) == (1, 2)
    assert sorted(p.name for p in config.out.iterdir()) == before
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (whole.out, config.out)]
    for a, b in zip(*rows, strict=True):
        for name in ("step", "loss", "duration_loss", "mel_loss", "grad_norm", "held_out_loss", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    one, two = weights(whole.out / "base.safetensors"), weights(config.out / "base.safetensors")
    assert all((one[k].double() - two[k].double()).abs().max() < 1e-5 for k in one)


def test_another_corpus_joins_in(config):
    alone = prepare(config)
    both = prepare(replace(config, also=str(CORPUS), out=config.out.parent / "both"))
    assert [item.id for item in both.held_out] == [item.id for item in alone.held_out]
    assert (
        len(both.items) == len(alone.items) + len(alone.items) + len(alone.held_out)
        and both.items.hours > alone.items.hours
    )


def test_a_run_that_is_there_is_refused_however_often_torchrun_tries(config):
    config.out.mkdir()
    (config.out / "environment.json").write_text(
        json.dumps({"torchrun": "again"})
    )  # a run with the same id was here before
    (config.out / "state.pt").write_bytes(b"somebody's run")
    done = in_two(command(config, "--steps", 1, "--max-restarts", 2))
    assert (
        done.returncode == 2
        and done.stderr.count("already holds a run") == 1
        and "Traceback" not in done.stderr
    ), done.stderr
    where = "--rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id again --max-restarts 2"
    where = f"{where} --nproc-per-node 2".split()
    done = commands.python("-m", "torch.distributed.run", *where, *command(config, "--steps", 1)[1:])
    assert done.returncode != 0 and done.stderr.count("already holds a run") == 1, done.stderr
    assert (config.out / "state.pt").read_bytes() == b"somebody's run"


def test_the_folder_of_another_kind_of_run_is_left_alone(config):
    config.out.mkdir()
    (config.out / "config.json").write_text('{"preset": "tiny"}')
    for resume, words in ((False, "already holds a run"), (True, "not a training of a base")):
        with pytest.raises(UserError, match=words):
            prepare(replace(config, resume=resume))
    assert (config.out / "config.json").read_text() == '{"preset": "tiny"}'


def test_torchrun_with_more_processes_than_windows(config):
    said = commands.torchrun(*command(config, "--steps", 1, "--batch-size", 1)[1:]).stderr
    assert "less than the 2 processes" in said and 'File "' not in said.split("error:")[0], said


def test_two_processes_stop_together(config):
    process = subprocess.Popen(
        command(config, "--steps", 100000, "--log-every", 1, "--nproc-per-node", 2),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, limit = config.out / "metrics.jsonl", time.time() + 300
    while not metrics.exists() and time.time() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    reached = torch.load(config.out / "state.pt", weights_only=True)["step"]
    pretrain(replace(config, steps=reached + 1, warmup_steps=300, log_every=1, resume=True))
    assert [json.loads(line)["step"] for line in metrics.open()] == list(range(1, reached + 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes with ps")
def test_a_lost_process_is_started_again(config):
    flags = ["--steps", 8, "--log-every", 1, "--save-every", 1, "--nproc-per-node", 2, "--max-restarts", 1]
    process = subprocess.Popen(command(config, *flags), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    limit = time.time() + 300
    while not (config.out / "state.pt").exists() and time.time() < limit:
        time.sleep(0.05)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [json.loads(line)["step"] for line in (config.out / "metrics.jsonl").open()] == list(range(1, 9))


def test_what_ends_two_processes_is_said_once(config):
    done = in_two(command(replace(config, corpus=Path("nowhere")), "--steps", 1))
    assert (
        done.returncode == 2
        and done.stderr.count("error: no corpus in nowhere") == 1
        and "Traceback" not in done.stderr
    )


def test_start_from_a_base(tmp_path):
    config = PretrainConfig(corpus=tmp_path, out=tmp_path, steps=1, start_from="tiny_base")
    base = load_wavegrad2(asset("tiny_base.safetensors")).state_dict()
    begun = first_model(config, recipe_for(config), [])
    assert all(torch.equal(v, base[k]) for k, v in begun.state_dict().items())
    other = replace(config, arch="small")
    with pytest.raises(UserError, match="--arch small"):
        first_model(other, recipe_for(other), [])
