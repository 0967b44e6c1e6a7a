"""What 09_pretrain does not show: interruption, damaged states, the command line, the slices of tools/gpu."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlpo_nb.core import UserError, asset
from dlpo_nb.pretrain import PretrainConfig, Pretraining, Steps, first_model, fit, make_optimisers, new_model, prepare, pretrain, train_step, window_batch
from dlpo_nb.wavegrad2.model import load_wavegrad2

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
        CORPUS, tmp_path / "run", steps=4, batch_size=2, window_frames=12, warmup_steps=2, log_every=2, sample_every=0, device="cpu")


def weights(path):
    return {k: v for k, v in load_wavegrad2(path).state_dict().items()}


@pytest.mark.parametrize("optimiser, first", [("muon", 2), ("adamw", 1)])
def test_resume_is_exact(config, tmp_path, optimiser, first):
    whole = replace(config, optimiser=optimiser, bf16=False)
    parts = replace(whole, out=tmp_path / "parts", save_every=1)
    pretrain(whole)
    fit(prepare(parts), last_step=first)
    torch.manual_seed(99)  # the state of the resuming process must not matter
    pretrain(replace(parts, resume=True, workers=1))
    one, two = weights(whole.out / "base.safetensors"), weights(parts.out / "base.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    losses = [[row["loss"] for row in map(json.loads, (out / "metrics.jsonl").open())] for out in (whole.out, parts.out)]
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
    total = [int(sum(item.frames)) for item in items]
    frames = min(total) - 1
    starts = {int(window_batch(items, frames, 300, torch.Generator().manual_seed(s))["starts"][total.index(min(total))]) for s in range(40)}
    assert starts == {0, 1}
    batch = window_batch(items, max(total) + 3, 300)
    assert batch["mask"].sum(1).tolist() == [300 * n for n in total]
    assert (batch["audio"][batch["mask"] == 0] == 0).all()


def test_a_step_hears_the_same_whatever_came_before(config):
    items = Pretraining(config).items
    one, two = Steps(config, items, 300), Steps(config, items, 300)
    one[0], one[1]
    assert all(torch.equal(a, b) for a, b in zip(one[7].values(), two[7].values()))
    assert not torch.equal(one[7]["noise"], one[8]["noise"])


def test_muon_leaves_edges_to_adamw():
    model = new_model("tiny")
    muon, adamw = make_optimisers(model, "muon", 1e-3, 0.02)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = [names[id(p)] for p in muon.param_groups[0]["params"]]
    assert "decoder.ublock_preconv.conv1d.weight" in matrices and "encoder.lstm.weight_ih_l0" in matrices
    assert not any("embedding" in n or "fc" in n or "postconv" in n or "dblock_preconv" in n or n.endswith("bias") for n in matrices)
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


@pytest.mark.parametrize("change, sentence", [
    (dict(steps=0), "--steps or as --minutes"),
    (dict(minutes=1.0), "--steps or as --minutes"),
    (dict(batch_size=0), "--batch-size is 0"),
    (dict(corpus=Path("nowhere")), "nowhere"),
    (dict(device="cuda:99"), "cuda:99"),
    (dict(out=CORPUS / "manifest.jsonl"), "--out"),
])
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


def test_resume_without_a_state_starts(config):
    assert pretrain(replace(config, steps=1, resume=True)).step == 1


def command(config, *more):
    flags = ["--corpus", config.corpus, "--out", config.out, "--batch-size", 2, "--window-frames", 12, "--sample-every", 0, "--device", "cpu"]
    return [sys.executable, "-m", "dlpo_nb.pretrain", *map(str, flags), *map(str, more)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_ctrl_c_saves_and_the_command_goes_on(config):
    process = subprocess.Popen(command(config, "--steps", 100000, "--log-every", 1), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics, limit = config.out / "metrics.jsonl", time.time() + 300
    while not metrics.exists() and time.time() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, process.stderr.read()
    reached = torch.load(config.out / "state.pt", weights_only=True)["step"]
    assert reached >= 1
    pretrain(replace(config, steps=reached + 1, warmup_steps=300, log_every=1, resume=True))
    assert [json.loads(line)["step"] for line in metrics.open()][-2:] == [reached, reached + 1]


def test_command_line_error_is_one_sentence(config):
    done = subprocess.run(command(config), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_gpu_job_goes_on_from_small_files(config, tmp_path):
    job = ["bash", str(ROOT / "tools" / "gpu" / "train_base.sh"), str(CORPUS)]
    flags = ["--batch-size", "2", "--window-frames", "12", "--sample-every", "0", "--steps", "100000", "--log-every", "1"]
    env = {**ENVIRONMENT, "PYTHON": sys.executable, "SLICE_MINUTES": "0.01"}
    steps = []
    for before, after in (("none", "one"), ("one", "two")):
        done = subprocess.run([*job, tmp_path / before, tmp_path / after, *flags], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(p.stat().st_size <= 16e6 for p in (tmp_path / after).iterdir())
        steps.append(json.loads((tmp_path / after / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    assert 0 < steps[0] < steps[1]
    (tmp_path / "base.safetensors").write_bytes(b"".join(p.read_bytes() for p in sorted((tmp_path / "two").glob("base.part.*"))))
    load_wavegrad2(tmp_path / "base.safetensors")


def test_start_from_a_base(tmp_path):
    config = PretrainConfig(corpus=tmp_path, out=tmp_path, steps=1, start_from="tiny_base")
    base = load_wavegrad2(asset("tiny_base.safetensors")).state_dict()
    assert all(torch.equal(v, base[k]) for k, v in first_model(config).state_dict().items())
    with pytest.raises(UserError, match="--arch small"):
        first_model(PretrainConfig(corpus=tmp_path, out=tmp_path, steps=1, arch="small", start_from="tiny_base"))
