"""What would run on a GPU runs on a device that is none: nothing mixes devices, and little waits."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretend_device import DEVICE, Pretended, There
from small_gradtts import make_gradtts, make_unet
from small_policy import TEXTS, TINY, make_corpus, make_model, make_tuner, quiet, spoken

from dlpo_nb.checkpoints import heldout_reward
from dlpo_nb.config import FinetuneConfig
from dlpo_nb.corpus import load_corpus
from dlpo_nb.diagnostics import drift, gradient_signal
from dlpo_nb.finetune import Finetuner
from dlpo_nb.heldout import synthesise_all
from dlpo_nb.mdp import rollout
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.pretrain import train_step, validate
from dlpo_nb.pretrain_settings import PretrainConfig
from dlpo_nb.rewards.distillmos import DistillMOS
from dlpo_nb.rewards.utmos import UTMOS
from dlpo_nb.training_run import Pretraining
from dlpo_nb.wavegrad2 import decoder
from dlpo_nb.wavegrad2.packing import make_packing

CORPUS = Path(__file__).parent / "data" / "corpus_tiny"


def tiny():
    return spoken(make_model(config=TINY))


@pytest.fixture
def gpu():
    with Pretended() as device:
        yield device


def tuner_there(make=tiny, corpus=None, **options):
    "The tuner of `make_tuner`, on the pretended device."
    settings = dict(
        episodes=1, batch_size=4, group_size=2, micro_batch=4, fork=3, rollout_steps=5, train_steps="last:2"
    )
    settings |= dict(denoising_frames=8) | options
    if settings.get("method", "dlpo") in ("dlpo", "onlydl") and not corpus:
        settings["denoising_source"] = "sample"
    return Finetuner(FinetuneConfig.of(**settings), make(), quiet, TEXTS, corpus, DEVICE)


def test_devices_do_not_mix_and_waits_are_counted(gpu):
    x = torch.randn(2, 3).to(DEVICE)
    assert isinstance(x, There) and x.device == DEVICE and (2 * x).device == DEVICE and gpu.waits["to"] == 1
    for wrong in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.argmax(1)], lambda: x @ torch.ones(3)):
        with pytest.raises(RuntimeError, match="mixes"):
            wrong()
    assert (x + torch.tensor(1.0)).device == DEVICE, "a number may come from the host"
    assert not isinstance(x.cpu(), There) and gpu.waits["cpu"] == 1
    gpu.waits.clear()
    float(x.sum()), x.tolist(), x[x > 0], x[torch.tensor([0])], torch.tensor([1.0], device=DEVICE)
    assert +gpu.waits == {"__float__": 1, "tolist": 1, "index": 2, "tensor": 1}


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_an_episode_of_each_method(method, gpu):
    """On recordings where it can be."""
    options = dict(corpus=make_corpus(6)) if method in ("dlpo", "released") else {}
    tuner = tuner_there(method=method, **options, **(dict(trainable="all") if method == "dlpo" else {}))
    before = [p.detach().clone() for p in tuner.parameters]
    metrics = tuner.episode()
    assert all(p.device == DEVICE for p in tuner.model.parameters()) and metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, tuner.parameters))


def test_an_episode_is_that_of_the_cpu():
    """The same device, in truth: what differs is the order of additions in a convolution's gradient."""
    with Pretended():
        there = tuner_there(method="dpok").episode()
    options = dict(batch_size=4, micro_batch=4, rollout_steps=5, train_steps="last:2", denoising_frames=8)
    here = make_tuner(tiny(), method="dpok", episodes=1, **options).episode()
    for name in ("reward/mean", "ratio/mean", "grad_norm/policy"):
        assert there[name] == pytest.approx(here[name], rel=1e-3)


def test_grad_tts(gpu):
    assert tuner_there(make_gradtts, method="dpok").episode()["ratio/mean"] == 1.0


@pytest.mark.parametrize("options", [dict(lora_rank=2), dict(inner_epochs=2, control="shuffle-advantages")])
def test_other_episodes(options, gpu):
    assert tuner_there(method="dpok", **options).episode()["grad_norm"] > 0


def test_looking_at_a_run(gpu):
    tuner = tuner_there(
        corpus=load_corpus(CORPUS),
        make=lambda: spoken(make_model()),
        batch_size=6,
        rollout_steps=3,
        train_steps="last:1",
        fork=2,
    )
    assert "reward/heldout" in heldout_reward(tuner, TEXTS)
    audio = synthesise_all(tuner.model, TEXTS[:2], tuner.schedule, 0)
    assert all(not isinstance(clip, There) and clip.isfinite().all() for clip in audio)
    assert drift(tuner, TEXTS[:1]).keys() >= {"kl", "diffusion_loss/base"}
    assert gradient_signal(tuner)["groups"] == 3


def test_a_training_step_of_a_base(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("dlpo_nb.training_run.join", lambda device: DEVICE)
    config = PretrainConfig(
        corpus=CORPUS, out=tmp_path / "run", steps=2, batch_size=2, window_frames=8, held_out=1, score=False,
        precision="float32", sample_every=0,
    )  # fmt: skip
    run = Pretraining(config)
    data = run.recipe.steps(run.model, run.items)
    train_step(run, data[0])
    gpu.waits.clear()
    train_step(run, data[1])
    assert sum(gpu.waits.values()) <= 40, +gpu.waits
    assert all(p.device == DEVICE for p in run.ema.parameters())
    assert all(value == value for value in validate(run).values())


@pytest.mark.parametrize("batching", ["alone", "auto"])
@pytest.mark.parametrize("make", [tiny, make_gradtts, make_unet], ids=["wavegrad2", "gradtts", "unet"])
def test_a_step_waits_for_nothing(make, batching, gpu):
    """Of a rollout of three texts of different lengths: lengths are read once, noise is fetched."""
    model, waits = make().to(DEVICE), []
    model.batching = batching
    for steps in (4, 8):
        schedule = FinetuneConfig(rollout_steps=steps).schedule(model)
        gpu.waits.clear()
        rollout(model, schedule, TEXTS, model.encode(TEXTS), [1], (0, "waits"), [0, 1, 2])
        waits.append(sum(gpu.waits.values()))
    assert waits[1] == waits[0], +gpu.waits


def test_a_trained_step_waits_for_nothing(gpu):
    """From rollout to log, of two texts twice: the numbers of all slices are read together at the end."""
    waits = []
    for steps in (1, 3):
        tuner = tuner_there(method="ddpo", train_steps=f"last:{steps}")
        gpu.waits.clear()
        tuner.episode()
        waits.append(+gpu.waits)
    assert waits[1] == waits[0]


@pytest.mark.parametrize("make", [tiny, make_gradtts], ids=["wavegrad2", "gradtts"])
def test_utterances_share_an_axis(make, gpu):
    """Of four texts of three lengths, by the device's own choice; Grad-TTS's small network has masks."""
    options = dict(method="dpok", group_size=1, fork=0, advantage="batch")
    with mock.patch.object(decoder, "make_packing", wraps=make_packing) as made:
        metrics = tuner_there(make, **options).episode()
    assert metrics["ratio/mean"] == 1.0 and metrics["grad_norm"] > 0
    assert made.called == (make is tiny)


@pytest.mark.parametrize("kind", [UTMOS, DistillMOS])
def test_judges(kind, gpu, monkeypatch):
    """Clips of two lengths get there what they get on the CPU."""
    monkeypatch.setattr(sys.modules[kind.__module__], "pick_device", torch.device)
    make = getattr(kind, "untrained", kind)
    clips = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4000, 4000, 6000)]
    scores = []
    for device in ("cpu", DEVICE):
        judge = make(device=device)
        judge.batch_size = 2
        scores.append(judge.score_clips(clips, 16000, [""] * 3))
        assert next(judge.network.parameters()).device == judge.device == torch.device(device)
    assert not isinstance(scores[1], There) and (scores[1] - scores[0]).abs().max() < 1e-3
