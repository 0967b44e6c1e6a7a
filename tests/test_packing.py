"""Utterances of unequal length on one axis: each as if it were alone, with its gradients."""

from unittest import mock

import pytest
import torch
from small_policy import TINY, make_model, make_rollout, make_tuner, spoken
from torch.nn import functional as F

from dlpo_nb.core import UserError
from dlpo_nb.mdp import keyed_noise, replay
from dlpo_nb.waiting import on_host, read_all
from dlpo_nb.wavegrad2 import decoder as decoders
from dlpo_nb.wavegrad2.decoder import Decoder, predict_noise
from dlpo_nb.wavegrad2.layers import Stretch
from dlpo_nb.wavegrad2.packing import axis_parts, make_packing

NARROW = dict(hidden_channels=6, first_up=8, up=(8, 8, 6, 4, 4), first_down=4, down=(4, 4, 6, 8))
SHORT = dict(hidden_channels=6, first_up=8, up=(8, 4), first_down=4, down=(8,), factors=(3, 2))
KINDS = {
    "narrow": NARROW | dict(preconditioned=True, data_std=0.2),
    "large": NARROW | dict(large=True, up_dilations=((1, 2, 4, 8),) * 5),
    "two blocks": SHORT | dict(up_dilations=((1, 2, 4, 9), (1, 2, 1, 2))),
}
COUNTS = [5, 1, 9, 2]
# of the largest number; 3e-7 to 7e-7 and 2e-16 where it was measured, and others add in another order
SCALES = {torch.float32: 5e-6, torch.float64: 1e-12}


def case(kind, dtype):
    torch.manual_seed(0)
    decoder = Decoder(**KINDS[kind]).to(dtype)
    x = torch.randn(4, decoder.hop * 9, dtype=dtype, requires_grad=True)
    hidden = torch.randn(4, 6, 9, dtype=dtype, requires_grad=True)
    level = torch.tensor([[0.2], [0.7], [0.9], [0.5]], dtype=dtype)
    return decoder, x, hidden, level, torch.tensor(COUNTS)


def near(found, expected, scale):
    return (found - expected).abs().max() <= scale * expected.abs().max()


def noise_and_gradients(decoder, x, hidden, *rest, **options):
    "The noise, and the gradients of a sum of it to all that has one; the padding of x holds garbage."
    eps = predict_noise(decoder, x, hidden, *rest, **options)
    weights = torch.linspace(-1, 1, eps.numel(), dtype=eps.dtype).view_as(eps)
    return eps.detach(), torch.autograd.grad((eps * weights).sum(), [x, hidden, *decoder.parameters()])


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone(kind, dtype):
    given = case(kind, dtype)
    alone, expected = noise_and_gradients(*given, batching="alone")
    packed, found = noise_and_gradients(*given, batching="packed")
    assert near(packed, alone, SCALES[dtype])
    for i, n in enumerate(COUNTS):
        assert not packed[i, n * given[0].hop :].any()
    for ours, theirs in zip(found, expected, strict=True):  # sums over all samples
        assert near(ours, theirs, 10 * SCALES[dtype])


@pytest.mark.parametrize("batching", ["alone", "packed"])
def test_compiled(batching):
    """What torch compiles has the same gradients by itself, for other lengths too. (aot_eager has the
    compiler's graphs and gradients, and needs no C++ compiler.)"""
    given = case("two blocks", torch.float64)
    expected = noise_and_gradients(*given, batching=batching)
    frames = torch.tensor([4, 9, 3, 2])
    others = noise_and_gradients(*given[:-1], frames, batching=batching)
    given[0].compile(dynamic=True, backend="aot_eager")
    for (eps, gradients), at in ((expected, given[-1]), (others, frames)):
        found, ours = noise_and_gradients(*given[:-1], at, batching=batching)
        assert near(found, eps, 1e-12) and all(
            near(a, b, 1e-11) for a, b in zip(ours, gradients, strict=True)
        )


def test_neighbours_and_padding_are_not_heard():
    decoder, x, hidden, level, frames = case("narrow", torch.float32)
    with torch.no_grad():
        packed = predict_noise(decoder, x, hidden, level, frames, batching="packed")
        x[1], hidden[1] = 100.0, 100.0
        x[0, 5 * decoder.hop :], hidden[0, :, 5:] = float("nan"), float("nan")
        other = predict_noise(decoder, x, hidden, level, frames, batching="packed")
    assert torch.equal(other[[0, 2, 3]], packed[[0, 2, 3]]) and not torch.equal(other[1], packed[1])


def test_an_axis_of_several_parts():
    decoder, *given = case("two blocks", torch.float64)
    whole = predict_noise(decoder, *given, batching="packed")
    decoder.most = 10
    assert list(axis_parts(COUNTS, decoder.most)) == [(0, 2), (2, 3), (3, 4)]
    assert near(predict_noise(decoder, *given, batching="packed"), whole, 1e-12)


def test_few_shapes():
    lengths = {
        len(make_packing((n, 7), n, 2, 64, torch.device("cpu")).gap) for n in (30, 40, 50, 60, 90, 113)
    }
    assert lengths == {64, 128}


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_stretch(factor):
    x = torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x[:, :, 0], scale_factor=float(factor), mode="linear", align_corners=False)
    torch.testing.assert_close(Stretch.apply(x, factor)[:, :, 0], expected)
    assert torch.autograd.gradcheck(lambda x: Stretch.apply(x, factor), x)


def test_stretch_of_long_audio():
    """Positions are not computed, so nothing is lost with length."""
    x = torch.randn(1, 1, 1, 200_000)
    for factor in (3, 5):
        exact = F.interpolate(x[:, :, 0].double(), scale_factor=float(factor), mode="linear")
        assert (Stretch.apply(x, factor)[:, :, 0] - exact).abs().max() < 1e-5


@pytest.mark.parametrize("group_size", [1, 2])
def test_first_ratio_is_one(group_size):
    model = spoken(make_model(config=TINY))
    model.batching = "packed"
    fork = 3 if group_size > 1 else None
    schedule, trajectory = make_rollout(model, group_size=group_size, fork=fork)
    for s in range(len(trajectory.steps)):
        log_prob, _ = replay(model, schedule, trajectory, s)
        assert torch.equal(log_prob.detach(), trajectory.log_prob[s]) and log_prob.requires_grad


def test_an_episode_packed_is_one_alone():
    found = {}
    for batching in ("alone", "packed"):
        model = spoken(make_model(config=TINY))
        tuner = make_tuner(model, method="dpok", batching=batching, batch_size=6, micro_batch=6)
        with mock.patch.object(decoders, "make_packing", wraps=make_packing) as made:
            found[batching] = tuner.episode()
        assert made.called == (batching == "packed") and found[batching]["ratio/mean"] == 1.0
    for name in ("reward/mean", "kl", "grad_norm/policy"):
        assert found["packed"][name] == pytest.approx(found["alone"][name], rel=1e-3)


def test_auto_is_alone_on_a_cpu_and_names_are_checked():
    with mock.patch.object(decoders, "packed_noise", side_effect=AssertionError):
        predict_noise(*case("two blocks", torch.float32))
    with pytest.raises(UserError, match="--batching"):
        make_tuner(batching="together")


def test_noise_and_numbers_on_the_host():
    noise = keyed_noise([(0, 1), (0, 2)], [5, 3])
    assert noise.shape == (2, 5) and not noise[1, 3:].any()
    frames = torch.tensor([3, 1])
    assert on_host(frames) is on_host(frames)
    assert read_all([1, torch.tensor(0.5), 2.0]) == [1.0, 0.5, 2.0]
