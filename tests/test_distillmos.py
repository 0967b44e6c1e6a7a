"""Distill-MOS: equal to the package at every length, alone as in a batch, differentiable, quiet."""

import contextlib
import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

from dlpo_nb.audio import read_audio
from dlpo_nb.core import UserError
from dlpo_nb.evaluate import main as evaluate
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.distillmos import (
    FEATURES,
    SAMPLE_RATE,
    WINDOW,
    DistillMOS,
    features_of_sound,
    hops,
    load_package,
    spectrum,
    to_16k,
)

ROOT = Path(__file__).resolve().parents[1]
# a score of 1 to 5 after fifteen layers in float32: sums in another order have moved it by up to 1e-6
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def judge():
    return DistillMOS(device="cpu")


@pytest.fixture(scope="module")
def package():
    "The package's own model, loaded in the package's own way."
    load_package()  # torchaudio is there from now on, whether it fits torch or not
    from distillmos import ConvTransformerSQAModel

    with contextlib.redirect_stdout(io.StringIO()):
        return ConvTransformerSQAModel().eval()


@pytest.fixture(scope="module")
def speech(data):
    "The six clips of the little corpus, spoken by festival, (N_i,) at 22,050 Hz."
    return [read_audio(path) for path in sorted((data / "corpus_tiny" / "audio").glob("*.flac"))]


@pytest.fixture(scope="module")
def spoken(speech):
    "15 s of them at 16 kHz, (N,)."
    return torch.cat([to_16k(clip, 22050) for clip in speech * 2])


def score(reward, *clips, rate=22050, padding=0.0):
    "Scores of clips given as one padded batch."
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.full((len(clips), int(lengths.max()) + 100), padding)
    for row, clip in zip(audio, clips):
        row[: len(clip)] = clip
    return reward(audio, lengths, rate, [""] * len(clips))


# the package


@pytest.mark.parametrize("seconds", [0.02, 0.3, 1.0, 2.0, 5.03, 7.55, 7.675, 7.68, 7.69, 12.0])
def test_equal_to_the_package(judge, package, spoken, seconds):
    clip = spoken[3000:][: round(seconds * SAMPLE_RATE)]
    with torch.no_grad():
        reference = package(clip[None]).item()
    assert abs(score(judge, clip, rate=SAMPLE_RATE).item() - reference) < ROUNDING


def test_features_beyond_the_sound_are_those_of_silence(package, spoken):
    """`features_of_sound` against the package's own convolutions: not one too few, at most one too many."""
    with torch.no_grad():
        quiet = package.cnn(torch.zeros(1, WINDOW))
        for samples in (1, 80, 81, 240, 241, 16000, 122640):
            audio = torch.zeros(1, WINDOW)
            audio[:, :samples] = spoken[:samples]
            audio[:, samples - 1] = 0.5
            heard = (package.cnn(audio) - quiet).abs().amax((0, 1)) > 1e-6
            last = heard.nonzero().max().item() + 1
            assert last <= features_of_sound(samples) <= min(FEATURES, last + 1)


def test_the_spectrum_is_the_packages(package, spoken):
    from distillmos.sqa import _complex_compressed

    clip = torch.nn.functional.pad(spoken[None, :30000], (0, WINDOW - 30000))
    theirs = _complex_compressed(clip, 160, 320).permute(0, 3, 1, 2)
    torch.testing.assert_close(spectrum(spoken[None, :30000]), theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(spectrum(spoken[None, :30000], 300), spectrum(spoken[None, :30000])[..., :300])


def test_windows_of_a_long_clip_lie_at_most_a_second_apart():
    for length in (WINDOW, WINDOW + 1, WINDOW + 16000, WINDOW + 16001, 5 * WINDOW):
        starts = [int(window[0]) for window in hops(torch.arange(length))]
        assert starts[0] == 0 and starts[-1] == length - WINDOW
        assert max(np.diff(starts), default=0) <= 16000
        assert all(len(window) == WINDOW for window in hops(torch.arange(length)))


# the promises


def test_batches_padding_order_and_level_change_nothing(judge, speech):
    alone = torch.cat([score(judge, clip) for clip in speech[:3]])
    assert torch.equal(score(judge, *speech[:3]), alone)
    assert torch.equal(score(judge, *speech[2::-1], padding=float("nan")), alone.flip(0))
    # of half the level, so that what the filter adds to a peak is not cut off
    half, quiet = ([clip * gain for clip in speech[:2]] for gain in (0.5, 0.005))
    torch.testing.assert_close(score(judge, *quiet), score(judge, *half), atol=1e-3, rtol=0)


def test_windows_together_are_the_windows_alone(judge, spoken):
    """As on a GPU: the clips of a batch have other lengths, and one has several windows."""
    clips = [spoken[:4000], spoken[: WINDOW + 20000], spoken[5000:25000], spoken[:70000]]
    together = DistillMOS(device="cpu", batch_size=4)
    alone = judge.score_clips(clips, SAMPLE_RATE, [""] * 4)
    torch.testing.assert_close(
        together.score_clips(clips, SAMPLE_RATE, [""] * 4), alone, atol=ROUNDING, rtol=0
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_on_a_gpu(judge, spoken, precision, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    clips = [spoken[:4000], spoken[: WINDOW + 20000], spoken[5000:25000]]
    there = DistillMOS(precision, device="cuda").score_clips(clips, SAMPLE_RATE, [""] * 3)
    torch.testing.assert_close(there, judge.score_clips(clips, SAMPLE_RATE, [""] * 3), atol=tolerance, rtol=0)


def test_bfloat16_is_near(judge, speech):
    coarse = get_reward("distillmos_bf16", device="cpu")
    assert coarse.name == "distillmos_bf16" and coarse.network.cnn.cnn[0].weight.dtype == torch.bfloat16
    assert coarse.network.transformer_pool_attn.pool.linear1.weight.dtype == torch.float32
    np.testing.assert_allclose(score(coarse, *speech), score(judge, *speech), atol=0.05)


def test_noise_costs_and_broken_audio_is_the_worst(judge, speech):
    noise = torch.randn(len(speech[0]), generator=torch.Generator().manual_seed(0))
    clean, noisy = score(judge, speech[0], (speech[0] + 0.02 * noise).clamp(-1, 1)).tolist()
    assert 1 < noisy < clean < 5
    broken = score(judge, speech[0] * float("nan"), speech[0], torch.zeros(100))
    assert broken[[0, 2]].tolist() == [1.0, 1.0] and judge.failures >= 2
    assert not judge.lower_is_better and judge.worst == 1.0


# resampling and the gradient


def test_the_filter_is_flat_to_7_3_kilohertz_and_ends_at_8():
    time = torch.arange(22050, dtype=torch.float64) / 22050
    tone = lambda hertz: to_16k(0.5 * torch.sin(2 * torch.pi * hertz * time).float(), 22050)[2000:-2000]
    level = lambda hertz: 20 * torch.log10(tone(hertz).square().mean().sqrt() / 0.125**0.5).item()
    assert all(abs(level(hertz)) < 0.01 for hertz in (100, 4000, 7250))
    assert all(level(hertz) < -90 for hertz in (8050, 9000, 10500))  # float32 keeps -120 dB or so


def test_with_gradient_gives_the_score(judge, speech):
    clip, lengths = speech[3][None], torch.tensor([len(speech[3])])
    with torch.no_grad():
        scores = judge.with_gradient(clip, lengths, 22050, [""])
    torch.testing.assert_close(scores, judge(clip, lengths, 22050, [""]), atol=ROUNDING, rtol=0)


def test_gradients_are_difference_quotients(spoken):
    """In float64, with a tiny step, in a little noise: the power 0.3 of the magnitudes is steep near 0."""
    generator = torch.Generator().manual_seed(0)
    noise, direction = torch.randn(2, 1, 8000, generator=generator).double()
    fine = DistillMOS(device="cpu")
    fine.network.double()
    fine.silence = fine.silence.double()
    sound, lengths = 0.5 * spoken[None, 4000:12000].double() + 1e-3 * noise, torch.tensor([8000])
    step = 1e-10 * direction
    variable = sound.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fine.with_gradient(variable, lengths, SAMPLE_RATE, [""]).sum(), variable)
    with torch.no_grad():
        up, down = (
            fine.with_gradient(sound + sign * step, lengths, SAMPLE_RATE, [""]).item() for sign in (1, -1)
        )
    np.testing.assert_allclose((up - down) / 2, (slope * step).sum(), rtol=1e-3)
    assert abs((slope * sound).sum()) < 1e-6 < slope.norm()  # the level is not heard


def test_gradients_through_silence_are_finite_and_stop_at_the_end_of_a_clip(judge, speech):
    audio = torch.zeros(2, 30000)
    audio[0, 8000:20000] = 0.5 * speech[0][:12000]
    audio.requires_grad_()
    (slope,) = torch.autograd.grad(
        judge.with_gradient(audio, torch.tensor([24000, 9000]), 22050, [""] * 2).sum(), audio
    )
    assert slope.isfinite().all() and slope[0, 8000:20000].any()
    assert not slope[0, 24000:].any() and not slope[1, 9000:].any()


# loading


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_nothing_is_printed_and_no_random_number_drawn():
    code = """
import torch
before = torch.get_rng_state()
from dlpo_nb.rewards import get_reward
judge = get_reward("distillmos", device="cpu")
assert torch.equal(torch.get_rng_state(), before)
assert not any(weight.requires_grad for weight in judge.network.parameters())
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_rewards_imports_no_package():
    done = run("import sys, dlpo_nb.rewards; print('distillmos' in sys.modules, 'torchaudio' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_without_the_package_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "distillmos" else find(name)
    )
    with pytest.raises(UserError, match="pip install distillmos"):
        get_reward("distillmos")


def test_damaged_weights_are_said(monkeypatch, tmp_path):
    load_package()
    from distillmos import sqa

    (tmp_path / "half.pt").write_bytes(Path(sqa.DEFAULT_WEIGHTS_CHKPT).read_bytes()[:1000])
    monkeypatch.setattr(sqa, "DEFAULT_WEIGHTS_CHKPT", str(tmp_path / "half.pt"))
    with pytest.raises(UserError, match="half.pt cannot be read.*force-reinstall"):
        load_package()


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"batch_size": 0}, {"batch_size": 1.5}])
def test_wrong_options_are_one_sentence(options):
    with pytest.raises(UserError, match="distillmos: .* but got"):
        DistillMOS(device="cpu", **options)


# the commands


def test_evaluate_judges_with_it(speech, judge, data, tmp_path, monkeypatch, capsys):
    paths = sorted((data / "corpus_tiny" / "audio").glob("*.flac"))[:2]
    (tmp_path / "one").mkdir()
    for path in paths:
        (tmp_path / "one" / path.name).symlink_to(path)
    (tmp_path / "one" / "texts.txt").write_text("".join(f"{path.stem}|some words\n" for path in paths))
    monkeypatch.chdir(tmp_path)
    evaluate(["one", "--metrics", "distillmos", "--no-level-normalised", "--out", "out", "--device", "cpu"])
    with open("out/evaluation.csv") as file:
        heard = [float(row["distillmos"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(heard, score(judge, *speech[:2]), atol=1e-3)
    assert "distillmos" in capsys.readouterr().out


def test_a_run_is_paid_by_it(tmp_path):
    flags = "--reward distillmos --episodes 1 --batch-size 2 --group-size 2 --heldout 2 --threads 1"
    done = commands.run("launch", *flags.split(), "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 1 < summary["evaluation"]["metrics"]["distillmos"]["base"] < 5
