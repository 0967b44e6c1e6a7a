"""What a policy promises, kept by those that are tested on everything:
WaveGrad 2, a toy whose state is a spectrogram, and the small Grad-TTS."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from small_policy import TEXTS, make_corpus, make_model, make_rollout, make_tuner, spoken
from small_gradtts import make_gradtts
from toy_mel import ToyMel, make_toy_mel

from dlpo_nb.core import UserError
from dlpo_nb.heldout import synthesise_all
from dlpo_nb.diagnostics import drift
from dlpo_nb.finetune import load_state, save_state
from dlpo_nb.lora import adapters, merged, without_adapters
from dlpo_nb.mdp import replay, select_text
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.policy import POLICIES, Policy, load_policy, state_mask
from dlpo_nb.text import pad_ids

VOICES = {"wavegrad2": lambda: spoken(make_model()), "toy_mel": make_toy_mel, "gradtts": make_gradtts}


@pytest.fixture(params=VOICES)
def voice(request):
    return VOICES[request.param]()


def samples_per_frame(voice):
    return round(voice.sample_rate / voice.frame_rate)


def tuner_of(voice, method="ddpo", **options):
    return make_tuner(voice, method=method, corpus=make_corpus(samples_per_frame(voice)), **options)


def test_the_toy_is_that_of_the_notebook():
    cells = [
        "".join(cell["source"])
        for cell in json.loads((Path(__file__).parents[1] / "nbs" / "04b_policy.ipynb").read_text())["cells"]
    ]
    (shown,) = [cell for cell in cells if "class ToyMel(Policy)" in cell]
    assert shown.strip() in (Path(__file__).parent / "toy_mel.py").read_text()


def test_what_is_promised(voice):
    """Shapes, lengths, and the file."""
    said = voice.condition(*pad_ids(voice.encode(TEXTS)))
    x = torch.randn(len(TEXTS), int(said.frames.max()) * voice.width)
    with torch.no_grad():
        eps = voice.predict_noise(x, said.hidden, torch.full((len(TEXTS), 1), 0.7), said.frames)
        audio, lengths = voice.render(0.1 * x, said)
        again = voice.analyse(audio, said)
    assert eps.shape == again.shape == x.shape and audio.ndim == 2 and audio.abs().max() <= 1
    assert lengths.tolist() == (said.frames * samples_per_frame(voice)).tolist()
    mask = state_mask(said.frames, voice.width)
    assert (eps * (1 - mask) == 0).all()
    if voice.kind != "gradtts":  # its vocoder guesses the phases
        assert ((again - 0.1 * x) * mask).abs().max() < 1e-2
    assert voice.denoising_error(eps, x, 0.7).shape == voice.denoising_error(eps, eps, 0.7).shape == x.shape
    assert (voice.denoising_error(eps, eps, 0.7) == 0).all() and voice.duration_loss(
        said, said.durations
    ).shape == (len(TEXTS),)
    with pytest.raises(UserError):
        voice.encode(["..."])


def test_a_batch_is_its_items_alone(voice):
    """State, sound and log-probability, from one key each;
    `select_text` is what the text alone would have been."""
    _, together = make_rollout(voice, group_size=2, fork=3)
    for i, text in enumerate(TEXTS):
        schedule, alone = make_rollout(voice, [text], indices=[i], group_size=2, fork=3)
        chosen = select_text(together, i)
        assert (
            chosen.x_0_lengths.tolist() == alone.x_0_lengths.tolist()
            and chosen.audio_lengths.tolist() == alone.audio_lengths.tolist()
        )
        for name in ("x_0", "audio", "log_prob"):
            torch.testing.assert_close(getattr(chosen, name), getattr(alone, name), atol=2e-5, rtol=0)
        torch.testing.assert_close(
            replay(voice, schedule, chosen, 0)[0], chosen.log_prob[0], atol=1e-5, rtol=0
        )
    assert (together.x_0 * (1 - state_mask(together.x_0_lengths, 1)) == 0).all()


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_every_method_tunes_every_voice(voice, method):
    """The first ratio is 1, the reference does not move, and what is tuned does;
    its sound and its state are two things."""
    tuner = tuner_of(voice, method)
    before = {key: value.clone() for key, value in voice.state_dict().items()}
    first, second = tuner.episode(), tuner.episode()
    assert (
        first["kl"] < 1e-10 < second["kl"]
        and first.get("ratio/mean", 1.0) == second.get("ratio/mean", 1.0) == 1.0
    )
    moved = {
        key.split(".")[0] for key, value in voice.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"decoder"} and all(
        torch.equal(value, before[key]) for key, value in tuner.reference.state_dict().items()
    )
    assert first["x0/clipped"] == 0 or voice.training_schedule().bounds
    assert first["diffusion_loss"] > 0 and drift(tuner, TEXTS[:1])["diffusion_loss/base"] > 0


@pytest.mark.parametrize("kind", ["toy_mel", "gradtts"])  # WaveGrad 2, a minute of compiling: test_packing
def test_compiled(kind, monkeypatch):
    """A rollout runs the graph that the update differentiates: the same ratio, and nearly the same gradient.
    (aot_eager has the graphs, and needs no C++ compiler.)"""
    voice = VOICES[kind]()
    plain = tuner_of(copy.deepcopy(voice), "dpok").episode()  # whose two parts go back through one graph
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    tuner = tuner_of(voice, "dpok", compile=True)
    assert [module for module, _ in compiled] == [*tuner.model.networks(), *tuner.reference.networks()]
    monkeypatch.undo()
    tuner.model.compile(backend="aot_eager")
    metrics = tuner.episode()
    assert metrics["ratio/mean"] == 1.0 and metrics["kl"] < 1e-10
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    graded = []
    again = copy.deepcopy(tuner.model)
    again.networks()[0].register_forward_pre_hook(lambda *_: graded.append(torch.is_grad_enabled()))
    make_rollout(again)
    assert again.compiled and graded and all(graded)
    again = copy.deepcopy(tuner.model)  # a copy's numbers are its own
    for weight in again.decoder.parameters():
        weight.data.zero_()
    _, spoken = make_rollout(again)
    assert not torch.equal(spoken.x_0, make_rollout(tuner.model)[1].x_0)


def test_own_speech_and_all_weights(voice):
    """The denoising loss on the policy's own states, and an encoder that is trained too."""
    tuner = make_tuner(voice, method="dlpo", denoising_source="sample", trainable="all", denoising_frames=0)
    metrics = tuner.episode()
    assert (
        metrics["ratio/mean"] == pytest.approx(1, abs=1e-8)
        and metrics["diffusion_loss/sample"] > 0
        and metrics["grad_norm/penalty"] > 0
    )


def test_low_rank_changes(voice):
    """Begin at the base, leave it untouched, and are put into the weights of a plain copy."""
    before = {key: value.clone() for key, value in voice.state_dict().items()}
    tuner = tuner_of(voice, lora_rank=2, learning_rate=1e-2)
    assert tuner.episode()["kl"] < 1e-10 < tuner.episode()["kl"] and adapters(voice)
    with without_adapters(voice):
        plain = merged(voice)
    assert not adapters(plain) and all(
        torch.equal(value, before[key]) for key, value in plain.state_dict().items()
    )
    assert {
        key.split(".")[0]
        for key, value in merged(voice).state_dict().items()
        if not torch.equal(value, before[key])
    } == {"decoder"}
    assert len(adapters(voice)) > 0, "and the voice itself keeps them"


def test_resumed_is_uninterrupted(voice, tmp_path):
    kind = VOICES[voice.kind]
    whole, first, second = (tuner_of(kind(), "klinr", inner_epochs=2) for _ in range(3))
    whole.episode(), whole.episode(), first.episode()
    save_state(first, tmp_path / "state.pt")
    load_state(second, tmp_path / "state.pt")
    second.episode()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters))


def test_files(voice, tmp_path):
    """What is saved is read again, by its kind;
    another kind is refused where it is not wanted, an unknown one named."""
    path = tmp_path / "voice.safetensors"
    if isinstance(voice, ToyMel):
        voice.save(path, {"steps": 3})
        again = load_policy(path)
        assert type(again) is ToyMel and again.config == voice.config and again.metadata == {"steps": "3"}
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in voice.state_dict().items())
        with pytest.raises(UserError, match="wavegrad2 is needed"):
            load_policy(path, kind="wavegrad2")
        stored = POLICIES.entries.pop("toy_mel")
        try:
            with pytest.raises(UserError, match="unknown policy 'toy_mel'"):
                load_policy(path)
        finally:
            POLICIES.entries["toy_mel"] = stored


def test_evaluation_speaks_with_any_voice(voice):
    schedule = voice.training_schedule().respaced(4)
    audio = synthesise_all(voice, TEXTS, schedule, seed=0, batch_size=2)
    alone = synthesise_all(voice, TEXTS[:1], schedule, seed=0)
    assert (
        len(audio) == 3
        and len({len(clip) for clip in audio}) > 1
        and all(clip.isfinite().all() for clip in audio)
    )
    torch.testing.assert_close(audio[0], alone[0], atol=1e-5, rtol=0)


def test_a_promise_that_is_not_kept():
    """A policy without one of the six methods cannot be made."""

    class Mute(ToyMel):
        render = Policy.render

    with pytest.raises(TypeError, match="render"):
        Mute(ToyMel.Config())
