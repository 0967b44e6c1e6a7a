"""The tests of the objectives, 1 to 50:
on a chain, a bandit and small policies of which every answer is known.

Each docstring names the numbers that it covers. Elsewhere, or not there yet:

8 (log-probabilities of ddpo-pytorch: the 68 finite ones of 84 cases), 28 for the tables, 39, 40: also in
test_diffusion. 20, 32, 36, 46: also in test_finetune, at another size. 45: by command line in test_launch,
there as 1 + 1 = 2 episodes. 43 (two ranks): there is no distributed run yet. 48 (order of asynchronous
rewards): rewards are scored synchronously, so only their order in the batch is checked here.

Where an expectation is a polynomial of the noise, a cubature makes it exact;
the Monte Carlo tests beside it have a fixed seed and a tolerance of four standard errors of their own sample.
"""

import hashlib
import json
import math
from dataclasses import replace
from functools import cache
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from small_policy import (
    TEXTS,
    TINY,
    ConvPolicy,
    FlawedPolicy,
    gradients_of,
    make_corpus,
    make_model,
    make_rollout,
    make_tuner,
    quiet,
    spoken,
)
from toy_mel import make_toy_mel
from torch.distributions import Normal, kl_divergence as torch_kl

from dlpo_nb import finetune, mdp
from dlpo_nb.core import UserError
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.config import FinetuneConfig
from dlpo_nb.denoising import denoising_losses, recorded_batch, windowed_errors, windowed_loss
from dlpo_nb.diagnostics import alignment, drift, reward_gradients
from dlpo_nb.finetune import load_state, save_state
from dlpo_nb.gaussian_chain import GaussianChain, chain_gradient, chain_slices, pull_and_hold
from dlpo_nb.mdp import draw_steps, keyed_noise, last_steps, replay, rollout, step_weights
from dlpo_nb.objectives import OBJECTIVES, Replay, TextBuffer, advantages
from dlpo_nb.objectives import get_objective as build
from dlpo_nb.objectives.base import KL_FORMS, clipped_ratio, kl_divergence
from dlpo_nb.policy import denoising_loss, state_mask
from dlpo_nb.reference import log_ratios, step_kl
from dlpo_nb.rewards.base import Reward
from dlpo_nb.rollouts import collect, make_advantages, score_audio, text_indices

FULL = NoiseSchedule.linear()
SCHEDULES = {
    "trailing 10": FULL.respaced(10),
    "geometric 10": FULL.respaced(10, "geometric"),
    "trailing 25": FULL.respaced(25),
}
METHODS = OBJECTIVES.names()  # a method of your own, imported in 39, runs the tests of every method
B = 0.3
# on the chain: the paper's beta, and D both as a loss and inside the reward
PAPER = {
    "dpok": dict(beta=1.0),
    "klinr": dict(beta=1.0),
    "dlpo": dict(beta=1.0, penalty_parts="both"),
    "onlydl": dict(beta=1.0, penalty_parts="both"),
}


def get_objective(name, **options):
    return build(name, **PAPER.get(name, {}) | options)


each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def agrees(sample, exact):
    """Whether the sample's mean lies within four standard errors of the exact value;
    both, to be read where it does not."""
    mean, error = float(sample.mean()), float(sample.std()) / len(sample) ** 0.5
    assert abs(mean - exact) < 4 * error, f"{mean:.6f} +- {error:.6f}, by hand {exact:.6f}"


def identity(x0):
    return x0


def curved(x0):
    return -((x0 - 1) ** 2)


# --- the chain ----------------------------------------------------------------------------------------------


class Cubature(GaussianChain):
    """The chain with 2d noise vectors, +-sqrt(d) along each axis:
    means are exact for polynomials of the noise up to the third degree."""

    def noise(self, extra=0):
        d = self.schedule.num_steps + extra
        return d**0.5 * torch.cat([torch.eye(d), -torch.eye(d)]).double()

    def rollout(self, b, n=None, generator=None, extra=0):
        K, z = self.schedule.num_steps, self.noise(extra)
        x = [z[:, [K - 1]]]
        for t in reversed(range(K)):
            x.append(self.schedule.step(self.eps(x[-1], t, b), x[-1], t, z[:, [t - 1]], clip=False))
        return x[::-1]


def exactly(objective, schedule, b=B, reward=identity, **options):
    """Expected gradient of the parts of the loss."""
    found = chain_gradient(
        objective, Cubature(schedule), b, 2 * schedule.num_steps, seeded(), reward, **options
    )
    return {part: float(g.mean()) for part, g in found.items()}


def parameter(n, b=B):
    return torch.full((n, 1), b, dtype=torch.float64, requires_grad=True)


def step_scores(chain, x, b=B):
    """d log p / d b of each action, (K - 1, n)."""
    theta = parameter(len(x[0]), b)
    return torch.stack(
        [
            torch.autograd.grad(chain.log_prob(x, t, theta).sum(), theta)[0][:, 0]
            for t in range(1, chain.schedule.num_steps)
        ]
    )


def test_numbers_of_the_list():
    """1, 2, 3, 10, 13, 14, 16, 18, 22, 23, 24:
    the closed forms give the numbers that another program found."""
    chain = GaussianChain()
    direct, score = chain.denoising_slopes(B)
    h = 1e-3
    whole = (chain.expected_denoising(B + h) - chain.expected_denoising(B - h)) / (2 * h)
    numbers = {
        -2.609827: chain.slope,
        -2.835470: chain.mean(1.0),
        -0.225643: -float(chain.shift[0]),
        -0.850641: chain.mean(B),
        -9.659704: -2 * (chain.mean(B) - 1) * chain.slope,
        0.634751: chain.variance,
        6.748253: chain.kappa,
        13.496506: 2 * chain.kappa,
        0.607343: chain.path_kl(B),
        4.048952: 2 * B * chain.kappa,
        -0.193371: chain.slope / (2 * chain.kappa),
        0.074488: direct,
        0.029301: score,
        0.002533: whole - direct - score,
        0.106322: whole,
    }
    for number, ours in numbers.items():
        assert ours == pytest.approx(number, abs=5.1e-7)


@pytest.mark.parametrize("estimator", ["ratio", "score"])
@each_schedule
def test_policy_gradient(schedule, estimator):
    """1, 2: DDPO's gradient of -E[r] for r = x0 and -(x0 - 1)^2, at several b."""
    chain, objective = GaussianChain(schedule), get_objective("ddpo", estimator=estimator)
    for b in (0.0, B, -1.0):
        assert exactly(objective, schedule, b)["total"] == pytest.approx(-chain.slope, rel=1e-9)
        assert exactly(objective, schedule, b, curved)["total"] == pytest.approx(
            2 * (chain.mean(b) - 1) * chain.slope, rel=1e-9
        )


def test_policy_gradient_of_a_thousand_steps():
    """1, 2 on the whole schedule."""
    chain = GaussianChain(FULL)
    found = exactly(get_objective("ddpo"), FULL, reward=lambda x0: x0 + curved(x0))["total"]
    assert found == pytest.approx(-chain.slope + 2 * (chain.mean(B) - 1) * chain.slope, rel=1e-9)


@pytest.mark.parametrize(
    "n, schedule",
    [
        (200_000, SCHEDULES["trailing 10"]),
        (50_000, SCHEDULES["geometric 10"]),
        (20_000, SCHEDULES["trailing 25"]),
    ],
    ids=SCHEDULES,
)
def test_policy_gradient_by_sampling(n, schedule):
    """1, 2, Monte Carlo."""
    chain, objective = GaussianChain(schedule), get_objective("ddpo")
    agrees(chain_gradient(objective, chain, B, n, seeded(1), identity)["total"], -chain.slope)
    agrees(
        chain_gradient(objective, chain, B, n, seeded(2), curved)["total"],
        2 * (chain.mean(B) - 1) * chain.slope,
    )


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), FULL], ids=[*SCHEDULES, "all 1000"])
def test_brute_force_is_the_actions_and_the_last_step(schedule):
    """3: what common random numbers find, less the deterministic step, is what the policy gradient sees."""
    chain, h = GaussianChain(schedule), 0.1
    up, down = (chain.rollout(B + d, 20, seeded())[0].mean() for d in (h, -h))
    brute = float(up - down) / (2 * h)
    assert brute == pytest.approx(chain.mean(1.0), abs=1e-9)
    assert brute + float(chain.shift[0]) == pytest.approx(chain.slope, abs=1e-9)


def test_a_baseline_leaves_the_mean_and_lowers_the_variance():
    """4: by hand, 2 kappa (v0 + m0^2) + s^2 = 25.14 falls to 2 kappa v0 + s^2 = 15.38."""
    chain, variances = GaussianChain(), []
    with_baseline = 2 * chain.kappa * chain.variance + chain.slope**2
    for normalise, exact in (
        (identity, with_baseline + 2 * chain.kappa * chain.mean(B) ** 2),
        (lambda r: advantages(r, "leave-one-out"), with_baseline),
    ):
        g = chain_gradient(get_objective("ddpo"), chain, B, 200_000, seeded(), identity, normalise)["total"]
        agrees(g, -chain.slope)
        agrees((g - g.mean()).square(), exact)
        variances.append(float(g.var()))
    assert variances[1] < 0.7 * variances[0]


def test_baselines_by_hand():
    """4: what each kind takes away from the rewards of two texts, and what it divides by."""
    r = torch.tensor([2.0, 2.5, 3.0, 4.5]).double()
    spread = torch.tensor([-0.25, 0.25, -0.75, 0.75]).double().square().mean().sqrt()
    by_hand = {
        ("raw", 2): [2.0, 2.5, 3.0, 4.5],
        ("leave-one-out", 2): [-0.5, 0.5, -1.5, 1.5],
        ("leave-one-out", 1): [-4 / 3, -2 / 3, 0.0, 2.0],
        ("group", 2): (torch.tensor([-0.25, 0.25, -0.75, 0.75]) / spread).tolist(),
        ("batch", 2): ((r - 3) / r.std(correction=0)).tolist(),
    }
    for (kind, group), exact in by_hand.items():
        assert advantages(r, kind, group).tolist() == pytest.approx(exact, abs=1e-7)
    assert (
        advantages(r, "batch", 1, clip=1.0).abs().max() == 1
        and (advantages(torch.full((4,), 3.0), "group", 2) == 0).all()
    )


def test_actions_that_were_never_taken_teach_nothing():
    """5, negative control: the score of a fresh action times the reward has mean 0."""
    chain, n, total = GaussianChain(), 100_000, 0
    x = chain.rollout(B, n, seeded())
    for t in range(1, 10):
        fresh = chain.schedule.step(chain.eps(x[t + 1], t, B), x[t + 1], t, normal(n, 1, seed=t), clip=False)
        theta = parameter(n)
        log_prob = chain.schedule.transition_log_prob(
            chain.eps(x[t + 1], t, theta), x[t + 1], fresh, t, clip=False
        )
        total = total + torch.autograd.grad((x[0][:, 0] * log_prob).sum(), theta)[0][:, 0]
    agrees(total, 0.0)
    assert abs(chain.slope) > 100 * float(total.std()) / n**0.5, "and it would be noticed if it had another"


def test_the_action_is_a_number():
    """2: an action that still hangs on the weights has the same score as one that does not."""
    chain = GaussianChain()
    x, theta = chain.rollout(B, 50, seeded()), parameter(50)
    for t in range(1, 10):
        z = normal(50, 1, seed=t)
        eps = chain.eps(x[t + 1], t, theta)
        action = chain.schedule.step(eps, x[t + 1], t, z, clip=False)
        (g,) = torch.autograd.grad(
            chain.schedule.transition_log_prob(eps, x[t + 1], action, t, clip=False).sum(), theta
        )
        sigma = chain.schedule.posterior_variance[t].sqrt()
        torch.testing.assert_close(g, -chain.shift[t] / sigma * z, rtol=1e-9, atol=1e-9)


# --- log-probability, ratio, divergence ---------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), FULL], ids=[*SCHEDULES, "all 1000"])
def test_log_prob_is_of_a_density(schedule, clip):
    """9: the integral over one sample is 1; over two samples it is that of the sum, not of the mean."""
    for t in {1, 2, schedule.num_steps // 2, schedule.num_steps - 1}:
        x_t, eps = torch.tensor([[0.7, -1.3]]).double(), torch.tensor([[0.2, 0.4]]).double()
        mean, sigma = schedule.mean(eps, x_t, t, clip), float(schedule.posterior_variance[t].sqrt())
        line = torch.linspace(-9, 9, 181, dtype=torch.float64) * sigma
        grid = torch.cartesian_prod(line, line) + mean
        wide = [v.expand(len(grid), 2) for v in (eps, x_t)]
        one = schedule.transition_log_prob(
            *(v[:181, :1] for v in wide), line[:, None] + mean[:, :1], t, clip=clip
        )
        assert float(torch.trapezoid(one.exp(), line)) == pytest.approx(1, abs=1e-8)
        two = schedule.transition_log_prob(*wide, grid, t, reduction="sum", clip=clip).view(181, 181)
        assert float(torch.trapezoid(torch.trapezoid(two.exp(), line), line)) == pytest.approx(1, abs=1e-8)


@each_schedule
def test_score_has_mean_zero_and_the_fisher_information(schedule):
    """10: E[score] = 0 and E[score^2] = 2 kappa_t in each step; steps are uncorrelated."""
    chain = Cubature(schedule)
    s = step_scores(chain, chain.rollout(B))
    kappa = chain.shift[1:].square() / (2 * schedule.posterior_variance[1:])
    torch.testing.assert_close(s.mean(1), torch.zeros_like(kappa), rtol=0, atol=1e-9)
    torch.testing.assert_close(s @ s.T / s.shape[1], 2 * kappa.diag(), rtol=1e-9, atol=1e-9)
    sampled = step_scores(GaussianChain(schedule), GaussianChain(schedule).rollout(B, 50_000, seeded()))
    agrees(sampled.sum(0), 0.0)
    agrees(sampled.sum(0).square(), 2 * chain.kappa)


def test_ratio_is_an_exponential():
    """6: at the old weights the loss is -mean(A), its gradient that of the score estimator, and not zero;
    elsewhere it is exp."""
    log_prob, advantage = normal(20, seed=1).requires_grad_(), normal(20, seed=2)
    gradients = []
    for estimator in ("ratio", "score"):
        loss = get_objective("ddpo", estimator=estimator)(Replay(advantage, log_prob, log_prob.detach()))
        gradients.append(torch.autograd.grad(loss.total, log_prob)[0])
        if estimator == "ratio":
            assert loss.total.item() == -advantage.mean().item()
    assert torch.equal(*gradients) and gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[0], -advantage / 20, rtol=1e-15, atol=0)
    d = torch.linspace(-0.15, 0.15, 31, dtype=torch.float64, requires_grad=True)
    factor, ratio, stopped = clipped_ratio(d, torch.zeros(31).double(), torch.ones(31).double(), 0.2)
    assert not stopped.any() and torch.equal(factor, d.exp()) and torch.equal(ratio, d.detach().exp())
    torch.testing.assert_close(torch.autograd.grad(factor.sum(), d)[0], d.detach().exp(), rtol=1e-15, atol=0)


def test_ratio_has_mean_one():
    """6, for several updates: E[p_new / p_old] = 1 wherever the weights have gone."""
    chain, objective, n = GaussianChain(), get_objective("ddpo", clip_range=1e9), 100_000
    x = chain.rollout(B, n, seeded())
    for t in (1, 5, 9):
        old, new = chain.log_prob(x, t, B), chain.log_prob(x, t, B + 0.2)
        agrees(clipped_ratio(new, old, torch.ones(n), 1e9)[1], 1.0)
        stats = objective(Replay(torch.ones(n).double(), new, old)).stats
        assert (
            stats["ratio/mean"].item() == pytest.approx((new - old).exp().mean().item())
            and stats["ratio/clipfrac"] == 0
        )


def test_published_clip_cases(data):
    """7: the fifteen cases, value and gradient."""
    cases = json.loads((data / "ddpo_ppo_and_advantage_cases.json").read_text())["ppo_clip"]
    assert len(cases) == 15
    for case in cases:
        log_prob = torch.tensor([case["logp_minus_old"]], dtype=torch.float64, requires_grad=True)
        advantage = torch.tensor([case["advantage"]], dtype=torch.float64).clamp(
            -case["adv_clip"], case["adv_clip"]
        )
        loss = get_objective("ddpo", clip_range=case["clip"])(
            Replay(advantage, log_prob, torch.zeros(1).double())
        ).total
        loss.backward()
        assert loss.item() == pytest.approx(
            case["loss"], abs=1e-12
        ) and log_prob.grad.item() == pytest.approx(case["dloss_dlogp"], abs=1e-12)


@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_clipped_ratio_is_the_literal_maximum(clip):
    """7 on a grid: both signs, inside and outside the clip, value and gradient;
    also with the weight split in two."""
    d = (3 * clip * normal(2000, seed=1)).requires_grad_()
    old, weight = normal(2000, seed=2), normal(2000, seed=3)
    log_prob = old + d
    factor, ratio, stopped = clipped_ratio(log_prob, old, weight, clip)
    rho = (log_prob - old).exp()
    literal = torch.maximum(-weight * rho, -weight * rho.clamp(1 - clip, 1 + clip))
    torch.testing.assert_close(-weight * factor, literal, rtol=1e-14, atol=0)
    ours, theirs = (
        torch.autograd.grad(v.sum(), d, retain_graph=True)[0] for v in (-weight * factor, literal)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    outside = (ratio - 1).abs() > clip
    assert torch.equal(stopped, outside & (weight.sign() == (ratio - 1).sign())) and torch.equal(
        stopped, ours == 0
    )
    assert 100 < stopped.sum() < outside.sum() < 1900
    pull, hold = weight - 1.5, torch.full_like(weight, 1.5)
    loss = get_objective("klinr", clip_range=clip, beta=1.0)(
        Replay(pull, log_prob, old, in_reward_penalty=-hold)
    )
    torch.testing.assert_close(loss.total, literal.mean(), rtol=1e-12, atol=1e-12)


def test_running_buffer_of_the_original(data):
    """7, the tracker: three updates of the original, and the same with a save and a load in between."""
    tracked = json.loads((data / "ddpo_ppo_and_advantage_cases.json").read_text())["per_prompt_tracker"]
    for interrupted in (False, True):
        buffer = TextBuffer(tracked["buffer_size"], tracked["min_count"])
        for update in tracked["sequence"]:
            ours = advantages(
                torch.tensor(update["rewards"]).double(), "buffer", texts=update["prompts"], buffer=buffer
            )
            assert ours.tolist() == pytest.approx(update["advantages"], abs=1e-6)
            if interrupted:
                state = json.loads(json.dumps(buffer.state_dict()))
                buffer = TextBuffer(tracked["buffer_size"], tracked["min_count"])
                buffer.load_state_dict(state)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), FULL], ids=[*SCHEDULES, "all 1000"])
def test_kl_is_kappa_times_the_squared_difference_and_torchs(schedule):
    """11."""
    eps, ref, x_t = normal(3, 3, 40)
    for t in (1, schedule.num_steps // 2, schedule.num_steps - 1):
        ours = kl_divergence(schedule, eps, ref, x_t, t, reduction="sum", clip=False)
        kappa = schedule.betas[t] / (2 * schedule.alphas[t] * (1 - schedule.alphas_cumprod_prev[t]))
        torch.testing.assert_close(ours, kappa * (eps - ref).square().sum(1), rtol=1e-10, atol=0)
        sigma = schedule.posterior_variance[t].sqrt()
        for clip in (True, False):
            one, two = (Normal(schedule.mean(e, x_t, t, clip), sigma) for e in (eps, ref))
            found = kl_divergence(schedule, eps, ref, x_t, t, reduction="sum", clip=clip)
            torch.testing.assert_close(found, torch_kl(one, two).sum(1), rtol=1e-10, atol=0)


def test_forms_of_the_divergence():
    """11, the simplified forms, with a mask and both reductions;
    at no distance every form and its gradient are exactly 0."""
    schedule, mask = SCHEDULES["geometric 10"], torch.arange(40) < torch.tensor([[40], [7], [23]])
    eps, ref, x_t = normal(3, 3, 40)
    d = (eps - ref) * mask
    n = mask.sum(1)
    by_hand = {
        "mse": d.square().sum(1),
        "l1": d.abs().sum(1),
        "l2": d.square().sum(1).sqrt(),
        "exact": schedule.kl(eps, ref, x_t, 4, mask, "sum"),
    }
    for form in KL_FORMS:
        mean, total = (
            kl_divergence(schedule, eps, ref, x_t, 4, mask, reduction, form) for reduction in ("mean", "sum")
        )
        torch.testing.assert_close(total, by_hand[form], rtol=1e-14, atol=0)
        torch.testing.assert_close(
            mean, total / (n.double().sqrt() if form == "l2" else n), rtol=1e-14, atol=0
        )
        start = eps.clone().requires_grad_()
        found = kl_divergence(schedule, start, eps, x_t, 4, mask, form=form)
        (g,) = torch.autograd.grad(found.sum(), start)
        assert (found == 0).all() and (g == 0).all()
        moving = ref.clone().requires_grad_()
        kl_divergence(schedule, start, moving, x_t, 4, mask, form=form).sum().backward()
        assert moving.grad is None and start.grad.abs().max() > 0, "the reference is a number"
    with pytest.raises(UserError, match="exact, mse, l2, l1"):
        kl_divergence(schedule, eps, ref, x_t, 4, form="js")
    with pytest.raises(ValueError, match="deterministic"):
        kl_divergence(schedule, eps, ref, x_t, 0)


# --- divergence from the reference: DPOK and KLinR ----------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 0.25, B])
@each_schedule
def test_both_brakes_are_absent_at_the_start(schedule, b):
    """12, 15: policy = reference. The penalty and its gradient are exactly 0 for every sample,
    the rest is alpha x DDPO's, bit for bit."""
    chain = GaussianChain(schedule)
    ddpo = chain_gradient(get_objective("ddpo"), chain, b, 500, seeded(), identity)["total"]
    for name in ("dpok", "klinr"):
        found = chain_gradient(get_objective(name, alpha=2.0), chain, b, 500, seeded(), identity, b_ref=b)
        assert (found["penalty"] == 0).all() and torch.equal(found["total"], 2 * ddpo)
    x = chain.rollout(b, 500, seeded())
    for replayed in chain_slices(
        get_objective("klinr"), chain, parameter(500, b), x, x[0][:, 0], seeded(), b_ref=b
    ):
        assert (replayed.in_reward_penalty == 0).all() and torch.equal(replayed.advantage, x[0][:, 0]), (
            "no log-ratio, and the reward as it was"
        )


@each_schedule
def test_gradient_of_the_brakes(schedule):
    """13, 16: 2 (b - b_ref) kappa for both, DPOK's without noise; and the curvature of the path KL."""
    chain = GaussianChain(schedule)
    for b, b_ref in ((B, 0.0), (-0.4, 0.0), (0.1, 0.5)):
        for name in ("dpok", "klinr"):
            found = exactly(get_objective(name, beta=2.0), schedule, b, b_ref=b_ref)
            assert found["penalty"] == pytest.approx(2 * 2 * (b - b_ref) * chain.kappa, rel=1e-9), name
            assert found["policy"] == pytest.approx(-chain.slope, rel=1e-9), name
    theta, x = parameter(1, 0.0), chain.rollout(0.0, 1, seeded())
    path = sum(chain.kl(x, t, theta) for t in range(1, schedule.num_steps)).sum()
    (slope,) = torch.autograd.grad(path, theta, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), theta)
    assert slope.item() == 0 and curvature.item() == pytest.approx(2 * chain.kappa, abs=1e-9)


def test_the_picture_of_pull_and_hold(monkeypatch):
    """Its ways are plain gradient descent; its forces cross where the method rests."""
    chain, pull, hold = GaussianChain(), -2.0, 5.0
    monkeypatch.setattr(plt, "show", lambda: None)
    pull_and_hold(chain, pull, {"held": hold, "free": 0}, rate=0.1, start=-0.1, updates=3)
    forces, ways = plt.gcf().axes
    lines = {line.get_label(): line.get_ydata() for line in ways.lines}
    for label, stiffness in (("held", hold), ("free", 0)):
        b = [-0.1]
        for _ in range(3):
            b.append(b[-1] - 0.1 * (stiffness * b[-1] - pull))
        assert list(lines[label]) == pytest.approx([chain.mean(each) for each in b])
    (rest,) = (line for line in forces.lines if line.get_marker() == "o")
    assert rest.get_xdata()[0] == pytest.approx(chain.mean(pull / hold))
    plt.close("all")


@pytest.mark.parametrize("name", ["dpok", "klinr"])
@each_schedule
def test_where_the_brakes_stop(schedule, name):
    """14: b* = b_ref + alpha s / (2 beta kappa), reached by descent on exact gradients;
    there the gradient is 0."""
    chain = GaussianChain(schedule)
    for alpha, beta, b_ref in ((1.0, 1.0, 0.0), (2.0, 0.5, 0.25)):
        objective = get_objective(name, alpha=alpha, beta=beta)
        optimum = b_ref + alpha * chain.slope / (2 * beta * chain.kappa)
        b = 0.0
        for _ in range(12):
            b -= 0.9 / (2 * beta * chain.kappa) * exactly(objective, schedule, b, b_ref=b_ref)["total"]
        assert b == pytest.approx(optimum, abs=1e-6)
        assert exactly(objective, schedule, optimum, b_ref=b_ref)["total"] == pytest.approx(0, abs=1e-9)


def test_log_ratio_by_sampling():
    """16, 18: E[k score] = 4.048952, E[k] = 0.607343;
    E[exp(-k)] = 1, and the k3 estimator is never negative."""
    chain, n = GaussianChain(), 200_000
    agrees(
        chain_gradient(get_objective("klinr"), chain, B, n, seeded(), identity)["penalty"],
        2 * B * chain.kappa,
    )
    x = chain.rollout(B, n, seeded(1))
    k = sum(chain.log_prob(x, t, B) - chain.log_prob(x, t, 0.0) for t in range(1, 10))
    agrees(k, chain.path_kl(B))
    agrees((-k).exp(), 1.0)
    k3 = (-k).exp() - 1 + k
    assert (k3 >= 0).all()
    agrees(k3, chain.path_kl(B))


def analytic_in_reward(chain, x):
    """Gradient of each sample with the detached analytic KL in the log-ratio's place."""
    theta, actions = parameter(len(x[0])), range(1, chain.schedule.num_steps)
    analytic, total = sum(chain.kl(x, t, B) for t in actions), 0
    for replayed in chain_slices(
        get_objective("klinr"), chain, theta, x, torch.zeros(len(x[0])).double(), seeded()
    ):
        loss = get_objective("klinr")(replace(replayed, in_reward_penalty=analytic))
        total = total + torch.autograd.grad(len(x[0]) * loss.total, theta)[0][:, 0]
    return total


@each_schedule
def test_the_analytic_kl_in_the_reward_is_no_brake(schedule):
    """17, negative control; and the library has no such method:
    KLinR asks for the log-ratio, and only DPOK for the KL."""
    exact, sampled = Cubature(schedule), GaussianChain(schedule)
    assert float(analytic_in_reward(exact, exact.rollout(B)).mean()) == pytest.approx(0, abs=1e-9)
    agrees(analytic_in_reward(sampled, sampled.rollout(B, 20_000, seeded())), 0.0)
    ours = ["rwr", "ddpo", "dpok", "klinr", "dlpo", "onlydl", "released"]
    assert [name for name in ours if "kl" in get_objective(name).needs] == ["dpok"]
    assert [name for name in ours if "log_ratio" in get_objective(name).needs] == ["klinr"]


# --- the denoising loss: DLPO, OnlyDL, RWR, released --------------------------------------------------------


def denoising_parts(schedule, b, **options):
    """Expected gradient of DLPO's two parts on the policy's own samples,
    over all levels and the noise in D: (direct, score)."""
    chain, found = Cubature(schedule), {"direct": 0.0, "score": 0.0}
    K = schedule.num_steps
    x, noise = chain.rollout(b, extra=1), chain.noise(extra=1)[:, [K]]
    theta = parameter(len(noise), b)
    objectives = {
        part: get_objective(
            "dlpo", alpha=0.0, penalty_parts="direct" if part == "direct" else "reward", **options
        )
        for part in found
    }
    for k in range(K):
        d = chain.denoising(x[0], theta, torch.full((len(noise),), k), noise)
        slices = {"direct": [Replay(None, denoising=d)], "score": []}
        for t in range(1, K):
            log_prob = chain.log_prob(x, t, theta)
            slices["score"].append(
                Replay(
                    torch.zeros(len(noise)).double(),
                    log_prob,
                    log_prob.detach(),
                    in_reward_penalty=d.detach(),
                )
            )
        for part, objective in objectives.items():
            loss = sum(objective(s).total for s in slices[part])
            found[part] += float(torch.autograd.grad(loss, theta, retain_graph=True)[0].sum()) / K
    return found["direct"], found["score"]


def brute_denoising(schedule, b):
    """E[D] on the policy's own samples, by cubature."""
    chain, K = Cubature(schedule), schedule.num_steps
    x, noise = chain.rollout(b, extra=1), chain.noise(extra=1)[:, [K]]
    return (
        sum(float(chain.denoising(x[0], b, torch.full((len(noise),), k), noise).mean()) for k in range(K)) / K
    )


@pytest.mark.parametrize(
    "schedule", [SCHEDULES["trailing 10"], SCHEDULES["geometric 10"]], ids=["trailing 10", "geometric 10"]
)
def test_direct_and_score_part(schedule):
    """22, 23, 24: each part, and with the remainder of the last step their sum is what brute force finds."""
    chain = GaussianChain(schedule)
    for b in (B, -0.2):
        direct, score = denoising_parts(schedule, b, beta=2.0)
        assert (direct, score) == pytest.approx([2 * slope for slope in chain.denoising_slopes(b)], rel=1e-9)
        brute = (brute_denoising(schedule, b + 0.1) - brute_denoising(schedule, b - 0.1)) / 0.2
        remainder = float((2 * (chain.overlap * chain.mean(b) + b) * chain.overlap).mean()) * -float(
            chain.shift[0]
        )
        assert (direct + score) / 2 + remainder == pytest.approx(brute, abs=1e-9)
        assert brute_denoising(schedule, b) == pytest.approx(chain.expected_denoising(b), rel=1e-9)


def test_direct_and_score_part_by_sampling():
    """22, 23, Monte Carlo."""
    chain, n = GaussianChain(), 200_000
    for part, exact in zip(("direct", "score"), chain.denoising_slopes(B)):
        objective = get_objective("dlpo", alpha=0.0, penalty_parts="direct" if part == "direct" else "reward")
        agrees(chain_gradient(objective, chain, B, n, seeded(), identity)["penalty"], exact)


def test_the_score_part_on_data_is_noise_and_is_refused():
    """25: E[D score] = 0 on data; the direct part there is 2b, and asking for the score part is an error."""
    chain, n = GaussianChain(), 100_000
    for part, exact in (("score", 0.0), ("direct", 2 * B)):
        objective = get_objective("dlpo", alpha=0.0, penalty_parts="direct" if part == "direct" else "reward")
        agrees(chain_gradient(objective, chain, B, n, seeded(), identity, speech="data")["penalty"], exact)
    for method in ("dlpo", "onlydl"):
        for parts in ("both", "score"):
            with pytest.raises(UserError, match="--denoising-source sample"):
                FinetuneConfig.of(method, penalty_parts=parts, denoising_source="data").resolved().check()
        FinetuneConfig.of(method, denoising_source="data").resolved().check()
        assert not FinetuneConfig.of(method, denoising_source="data").resolved().objective.reward_side
        assert FinetuneConfig.of(method, denoising_source="sample").resolved().objective.reward_side


@each_schedule
def test_a_step_on_the_penalty_lowers_it(schedule):
    """26: on fixed noise, also where log-probabilities are negative on most of the steps."""
    chain, n = GaussianChain(schedule), 2000
    x = chain.rollout(B, n, seeded())
    k = torch.randint(0, schedule.num_steps, (n,), generator=seeded(1))
    noise = normal(n, 1, seed=2)
    theta = torch.tensor(B, dtype=torch.float64, requires_grad=True)
    before = chain.denoising(x[0], theta, k, noise)
    (g,) = torch.autograd.grad(get_objective("dlpo", alpha=0.0)(Replay(None, denoising=before)).total, theta)
    assert g > 0 and chain.denoising(x[0], B - 0.1 * float(g), k, noise).mean() < before.mean()
    both = sum(denoising_parts(schedule, B))
    assert both > 0 and chain.expected_denoising(B - 0.1 * both) < chain.expected_denoising(B)
    negative = -0.5 - 0.5 * math.log(2 * math.pi) - schedule.posterior_variance[1:].sqrt().log() < 0
    assert schedule is not SCHEDULES["trailing 10"] or (int(negative.sum()), len(negative)) == (8, 9)


@pytest.mark.parametrize("name", ["dlpo", "onlydl", "dpok", "klinr"])
def test_gradients_are_linear_in_beta(name):
    """27."""
    zero, one, two = (
        chain_gradient(get_objective(name, beta=beta), GaussianChain(), B, 500, seeded(), identity)["total"]
        for beta in (0.0, 1.0, 2.0)
    )
    assert (one - zero).abs().max() > 0.1
    torch.testing.assert_close(two - one, one - zero, rtol=0, atol=1e-12 * float(two.abs().max()))


def test_limits_of_dlpo_on_the_chain():
    """20, 21: DLPO without penalty is DDPO, DLPO without reward is OnlyDL, and that knows no reward;
    bit for bit."""

    def found(name, reward=identity, **options):
        return chain_gradient(get_objective(name, **options), GaussianChain(), B, 500, seeded(), reward)[
            "total"
        ]

    assert torch.equal(found("dlpo", beta=0.0), found("ddpo"))
    assert torch.equal(found("dlpo", alpha=0.0, beta=0.7), found("onlydl", beta=0.7))
    assert torch.equal(found("onlydl"), found("onlydl", curved)) and not torch.equal(
        found("dlpo"), found("dlpo", curved)
    )


def test_reward_weighted_regression():
    """29: equal weights are plain fine-tuning, all weight on one sample is that sample;
    negative rewards are refused."""
    d = normal(6).square().requires_grad_()
    raw, softmax = get_objective("rwr", rwr_weights="raw"), get_objective("rwr", tau=0.5)
    loss = raw(Replay(raw.weights_of(torch.ones(6).double(), None), denoising=d))
    assert torch.equal(loss.total, d.mean()) and torch.equal(
        torch.autograd.grad(loss.total, d)[0], torch.autograd.grad(d.mean(), d)[0]
    )
    for j in range(6):
        one = torch.zeros(6).double()
        one[j] = 6
        (g,) = torch.autograd.grad(raw(Replay(raw.weights_of(one, None), denoising=d)).total, d)
        assert torch.equal(g, (one > 0).double()), "sample j alone"
    rewards = normal(6, seed=1)
    weights = softmax.weights_of(rewards, None)
    torch.testing.assert_close(
        weights, (rewards / 0.5).exp() / (rewards / 0.5).exp().mean(), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(softmax.weights_of(rewards + 3, None), weights, rtol=1e-13, atol=0)
    with pytest.raises(UserError, match="softmax"):
        raw.weights_of(torch.tensor([1.0, -0.1]), None)


def test_the_best_of_each_text():
    """29, best-of-n: weight G on the best member of each group, none on the others; one member is refused."""
    rewards = torch.tensor([0.1, 0.5, -2.0, -3.0, 4.0, 4.0]).double()
    for size, exact in ((2, [0, 2, 2, 0, 2, 0]), (3, [0, 3, 0, 0, 3, 0]), (6, [0, 0, 0, 0, 6, 0])):
        best = (
            FinetuneConfig.of("rwr", rwr_weights="best", batch_size=6, group_size=size).resolved().objective
        )
        assert best.weights_of(rewards, None).tolist() == exact
    with pytest.raises(UserError, match="at least 2 rollouts per text"):
        FinetuneConfig.of("rwr", rwr_weights="best", group_size=1).resolved()


def test_nft_is_awm_without_its_curvature():
    """The printed loss of DiffusionNFT, times c / beta, is ours and a constant; second derivatives of the two
    are 2 (a + beta) and 2 beta, and at the old policy they have one gradient."""
    v_old, target, at, a = (normal(50, seed=i) for i in range(4))
    v, beta, c = at.requires_grad_(), 0.7, 5.0

    def derivatives(loss, v):
        (slope,) = torch.autograd.grad(loss.sum(), v, create_graph=True)
        return slope, torch.autograd.grad(slope.sum(), v)[0]

    def ours(name, v):
        replayed = Replay(a, denoising=(v - target).square(), denoising_shift=(v - v_old).square())
        return 50 * get_objective(name, beta=beta)(replayed).total

    r, b = (1 + a / c) / 2, beta / c
    plus, minus = v_old + b * (v - v_old), v_old - b * (v - v_old)
    literal = c / b * (r * (plus - target).square() + (1 - r) * (minus - target).square())
    for one, other in zip(derivatives(ours("nft", v), v), derivatives(literal, v)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for name, curvature in (("awm", 2 * (a + beta)), ("nft", torch.full_like(a, 2 * beta))):
        torch.testing.assert_close(derivatives(ours(name, v), v)[1], curvature, rtol=1e-12, atol=1e-12)
    start = v_old.clone().requires_grad_()
    slopes = [derivatives(ours(name, start), start)[0] for name in ("awm", "nft")]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reward", [identity, curved])
@each_schedule
def test_draft_on_the_chain(schedule, reward):
    """Through all steps it is the gradient of E[r], the deterministic step's part too, as common random
    numbers find it; through the last K it is K steps' part of it."""
    chain, K, h = Cubature(schedule), schedule.num_steps, 1e-4
    up, down = (float(reward(chain.rollout(B + d)[0][:, 0]).mean()) for d in (h, -h))
    whole = exactly(get_objective("draft", draft_steps=K, alpha=0.5), schedule, reward=reward)["total"]
    assert whole == pytest.approx(-0.5 * (up - down) / (2 * h), rel=1e-7)
    parts, slope = chain.shift * schedule.alphas_cumprod_prev.sqrt(), 1.0
    if reward is curved:
        slope = -2 * (chain.mean(B) - 1)
    for count in (1, 3, K - 1, K):
        found = exactly(get_objective("draft", draft_steps=count), schedule, reward=reward)
        assert found["policy"] == pytest.approx(float(parts[:count].sum()) * slope, rel=1e-9)
        assert found["penalty"] == 0


def test_draft_sees_no_noise_where_the_reward_is_linear():
    found = chain_gradient(get_objective("draft", draft_steps=10), GaussianChain(), B, 50, seeded(), identity)
    torch.testing.assert_close(found["total"], torch.full((50,), -GaussianChain().mean(1.0)).double())


@pytest.mark.parametrize("name", ["awm", "nft"])
@pytest.mark.parametrize("reward", [identity, curved])
def test_advantage_weighted_matching(name, reward):
    """On the chain: 2 mean(c) Cov(r, x0) = 2 mean(c) v0 E[r'], and 2 beta (b - b_ref) from the base."""
    chain, n, b_ref = GaussianChain(), 50_000, 0.1
    slope = 1.0 if reward is identity else -2 * (chain.mean(B) - 1)
    objective = get_objective(name, alpha=2.0, beta=0.5, anchor="reference")
    found = chain_gradient(
        objective, chain, B, n, seeded(), reward, lambda r: advantages(r, "leave-one-out"), b_ref
    )
    agrees(found["policy"], 2 * 2 * float(chain.overlap.mean()) * chain.variance * slope)
    torch.testing.assert_close(
        found["penalty"], torch.full((n,), B - b_ref, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_released_is_the_gradient_of_d():
    """30, the objective: no reward reaches the gradient, which is that of D on data, bit for bit."""
    objective, d = get_objective("released"), normal(6).square().requires_grad_()
    for rewards in (normal(6, seed=1), 1e6 * normal(6, seed=2)):
        signal = objective.weights_of(rewards, lambda r: r)
        assert (signal == 0).all()
        loss = objective(Replay(signal, denoising=d))
        assert loss.policy is None and torch.equal(
            torch.autograd.grad(loss.total, d)[0], torch.autograd.grad(d.mean(), d)[0]
        )
    gradients = [
        chain_gradient(objective, GaussianChain(), B, 100, seeded(), reward, speech="data")["total"]
        for reward in (identity, curved)
    ]
    assert torch.equal(*gradients)


def test_a_constant_in_the_reward():
    """31: normalised advantages do not see it;
    in raw mode each sample's gradient changes by k times its score, whose mean is 0."""
    chain, k = GaussianChain(), 3.7
    for kind in ("batch", "group", "leave-one-out"):
        one, other = (
            chain_gradient(
                get_objective("ddpo"),
                chain,
                B,
                400,
                seeded(),
                lambda x0: x0 + c,
                lambda r: advantages(r, kind, 4),
            )["total"]
            for c in (0, k)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(one.abs().max()))
    x = chain.rollout(B, 20_000, seeded())
    one, other = (
        chain_gradient(get_objective("ddpo"), chain, B, 20_000, seeded(), lambda x0: x0 + c)["total"]
        for c in (0, k)
    )
    torch.testing.assert_close(one - other, k * step_scores(chain, x).sum(0), rtol=0, atol=1e-11)
    agrees(other - one, 0.0)


def test_spacing_that_rests_on_one_step_warns():
    """39, 40: all levels are the full schedule, bit for bit;
    ten even ones have nearly all of kappa, 32167 of 32174, in one step."""
    with pytest.warns(UserWarning, match="99.98% of the KL"):
        lone = GaussianChain(FULL.respaced(10, "even"))
    kappa = lone.shift.square()[1:] / (2 * lone.schedule.posterior_variance[1:])
    assert float(kappa.max()) == pytest.approx(32167, abs=1) and lone.kappa == pytest.approx(32174, abs=1)
    same, x = GaussianChain(FULL.respaced(1000)), GaussianChain(FULL).rollout(B, 5, seeded())
    assert all(
        torch.equal(same.log_prob(x, t, B), GaussianChain(FULL).log_prob(x, t, B)) for t in (1, 2, 500, 999)
    )
    for schedule in SCHEDULES.values():
        assert (1 - schedule.betas).prod().item() == pytest.approx(FULL.alphas_cumprod[-1].item(), rel=1e-12)


# --- the bandit ---------------------------------------------------------------------------------------------

SIGMA, THETA0, THETA = 0.5, 1.0, 1.8
NODES, WEIGHTS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(6))


def bandit(objective, theta, reward):
    """Gradient of each of six actions theta + sigma z; with WEIGHTS their mean is exact."""
    x, own = theta + SIGMA * NODES, torch.full((6,), theta, dtype=torch.float64, requires_grad=True)
    log_prob = Normal(own, SIGMA).log_prob(x)
    k = (log_prob - Normal(THETA0, SIGMA).log_prob(x)).detach() if "log_ratio" in objective.needs else None
    loss = objective(
        Replay(reward(x), log_prob, log_prob.detach(), (own - THETA0).square() / (2 * SIGMA**2), k)
    )
    return torch.autograd.grad(6 * loss.total, own)[0]


def expected(values):
    return float((WEIGHTS * values).sum() / WEIGHTS.sum())


def test_bandit():
    """The bandit: gradient a + 2 b theta, variances 2 + theta^2 / sigma^2 and 2, the brakes' fixed point,
    and DDPO without one."""
    ddpo, p, q = get_objective("ddpo"), 0.5, -0.7
    assert expected(bandit(ddpo, THETA, lambda x: p * x + q * x * x)) == pytest.approx(
        -(p + 2 * q * THETA), abs=1e-12
    )
    for reward, variance in ((identity, 2 + THETA**2 / SIGMA**2), (lambda x: x - THETA, 2)):
        g = bandit(ddpo, THETA, reward)
        assert expected(g) == pytest.approx(-1, abs=1e-12) and expected((g + 1).square()) == pytest.approx(
            variance, abs=1e-11
        )
    alpha, beta = 1.5, 0.5
    for name in ("dpok", "klinr"):
        objective = get_objective(name, alpha=alpha, beta=beta)
        for theta in (THETA0, THETA, THETA0 + alpha * SIGMA**2 / beta):
            exact = -alpha + beta * (theta - THETA0) / SIGMA**2
            assert expected(bandit(objective, theta, identity)) == pytest.approx(exact, abs=1e-12)
    assert [expected(bandit(ddpo, theta, identity)) for theta in (0.0, 10.0, 1000.0)] == pytest.approx(
        [-1] * 3, abs=1e-9
    ), "no end"


# --- the loop, on a tiny WaveGrad 2 in float64 --------------------------------------------------------------


def exact_model(kind=torch.float64):
    return spoken(make_model(config=TINY).to(kind), 1)


def make(method, model=None, **options):
    """A tuner with small models; recordings where the method asks for them."""
    model = model or exact_model()
    kind = build(method)
    source = (
        "none"
        if "denoising" not in kind.needs
        else options.get(
            "denoising_source", "sample" if method in ("dlpo", "onlydl") else kind.denoising_source
        )
    )
    return make_tuner(
        model,
        corpus=make_corpus(model.width) if source == "data" else None,
        method=method,
        denoising_frames=3,
        **options,
    )


def stray(tuner, amount=0.05, seed=5):
    """Move the policy away from the reference."""
    with torch.no_grad():
        for p in tuner.parameters:
            p += amount * torch.randn(p.shape, generator=seeded(seed)).to(p)
    return tuner


def gathered(tuner, trajectories=None, rewards=None, e=0):
    """Gradients and statistics of the first pass over an episode's batch."""
    trajectories = collect(tuner, e) if trajectories is None else trajectories
    rewards = score_audio(tuner, trajectories) if rewards is None else rewards
    return gradients_of(tuner, trajectories, make_advantages(tuner, rewards, e), e)


def total(gradients):
    return gradients.part("policy") + gradients.part("penalty")


def by_hand(tuner, value):
    """Gradient of a scalar in the tuner's parameters, as one vector."""
    found = torch.autograd.grad(value, tuner.parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(tuner.parameters, found)]
    )


def close(a, b, tolerance=1e-12):
    scale = max(float(a.abs().max()), float(b.abs().max()))
    assert scale > 0 and float((a - b).abs().max()) <= tolerance * scale


def weighted_score(tuner, trajectories, weights):
    """Gradient of sum_i w_i log p_i over the trained steps, weights (batch,)."""
    weights = weights.split([len(t.audio) for t in trajectories])
    return by_hand(
        tuner,
        sum(
            (w * replay(tuner.model, tuner.schedule, t, s)[0]).sum()
            for t, w in zip(trajectories, weights)
            for s in range(len(t.steps))
        ),
    )


def fingerprint(module):
    return hashlib.sha256(
        b"".join(v.detach().numpy().tobytes() for v in module.state_dict().values())
    ).hexdigest()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fork", [0, 3])
def test_the_loop_scores_the_actions_that_were_taken(fork, reduction):
    """5: log-probabilities are of the stored actions, one's action is the next one's state,
    and the last leads to the audio."""
    tuner = make("ddpo", fork=fork, reduction=reduction)
    for t in collect(tuner, 0):
        for s in range(3):
            assert torch.equal(replay(tuner.model, tuner.schedule, t, s)[0].detach(), t.log_prob[s])
        assert (
            torch.equal(t.x_prev[0], t.x_t[1]) and torch.equal(t.x_prev[1], t.x_t[2]) and t.steps == [3, 2, 1]
        )
        level = tuner.schedule.level(0).expand(2, 1)
        eps = tuner.model.predict_noise(
            t.x_prev[2], t.conditioning.hidden.repeat(2, 1, 1), level, t.conditioning.frames.repeat(2)
        )
        assert torch.equal(tuner.schedule.mean(eps, t.x_prev[2], 0).clamp(-1, 1 - 2**-10), t.audio)
    metrics = tuner.episode()
    assert (
        metrics["ratio/mean"] == 1.0 and metrics["ratio/clipfrac"] == 0.0 and metrics["grad_norm/policy"] > 0
    )


@pytest.mark.parametrize("method", ["ddpo", "dlpo", "dpok", "klinr"])
@pytest.mark.parametrize(
    "options", [dict(reduction="sum"), dict(trainable="all"), dict(train_steps="random:2", fork=0)], ids=str
)
def test_the_first_ratio_is_exactly_one(method, options):
    """5, 6 for every way to run the loop."""
    tuner = make(method, **options)
    for _ in range(2):
        assert tuner.episode()["ratio/mean"] == 1.0


def test_gradient_of_the_loop_is_that_of_the_equation():
    """6: -mean(A grad log p), over the batch and summed over the steps, from either estimator;
    and it is not zero."""
    tuner = make("ddpo")
    t = collect(tuner, 0)
    advantage = advantages(score_audio(tuner, t), "group", 2)
    found = {
        estimator: gathered(make("ddpo", estimator=estimator))[0].part("policy")
        for estimator in ("ratio", "score")
    }
    assert torch.equal(found["ratio"], found["score"]) and found["ratio"].norm() > 0.1
    close(found["ratio"], -weighted_score(tuner, t, advantage) / 4)


@pytest.mark.parametrize("form", KL_FORMS)
def test_dpok_begins_as_ddpo(form):
    """12 in the loop: KL and its gradient exactly 0, the rest alpha x DDPO's, bit for bit;
    the same weights after the update."""
    (dpok, stats) = gathered(make("dpok", kl_form=form, alpha=2.0, beta=3.0))
    (ddpo, _) = gathered(make("ddpo"))
    assert (
        stats["kl/policy_states"] == 0.0
        and (dpok.part("penalty") == 0).all()
        and torch.equal(total(dpok), 2 * total(ddpo))
    )
    one, other = make("dpok", kl_form=form, beta=3.0), make("ddpo")
    assert one.episode()["kl"] < 1e-10 and other.episode()["reward/mean"]
    assert fingerprint(one.model) == fingerprint(other.model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_klinr_begins_as_ddpo(reduction):
    """15 in the loop: the log-ratio is 0 for every rollout; DDPO's gradient and update, bit for bit;
    the reward is the same."""
    klinr, ddpo = make("klinr", reduction=reduction, beta=3.0), make("ddpo", reduction=reduction)
    assert torch.equal(log_ratios(klinr, collect(klinr, 0)), torch.zeros(4).double())
    assert torch.equal(total(gathered(klinr)[0]), total(gathered(ddpo)[0]))
    one, other = klinr.episode(), ddpo.episode()
    assert one["kl/log_ratio"] == 0.0 and one["reward/mean"] == other["reward/mean"]
    assert fingerprint(klinr.model) == fingerprint(ddpo.model)


@pytest.mark.parametrize("trainable", ["decoder", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_frozen(method, trainable):
    """19: no gradient, evaluation mode, and the same bits after three updates that moved the policy."""
    tuner = make(method, trainable=trainable, learning_rate=1e-3)
    start = fingerprint(tuner.reference)
    assert fingerprint(tuner.model) == start
    for _ in range(3):
        tuner.episode()
        assert not any(p.requires_grad or p.grad is not None for p in tuner.reference.parameters())
        assert not any(m.training for m in tuner.reference.modules())
    assert fingerprint(tuner.reference) == start != fingerprint(tuner.model)


@pytest.mark.parametrize("source", ["sample", "data"])
def test_the_penalty_of_draft_is_that_of_dlpo(source):
    """Bit for bit: D as a loss, and nothing of the reward in it."""
    settings = dict(beta=0.7, denoising_source=source, denoising_steps=2)
    corpus = make_corpus(exact_model().width) if source == "data" else None
    tuner = make_tuner(exact_model(), corpus=corpus, method="draft", denoising_frames=3, **settings)
    one, other = gathered(tuner)[0], gathered(make("dlpo", penalty_parts="direct", **settings))[0]
    assert torch.equal(one.part("penalty"), other.part("penalty")) and one.part("penalty").any()
    assert torch.equal(one.part("policy"), gathered(make("draft"))[0].part("policy"))


@pytest.mark.parametrize(
    "model, count, options",
    [
        ("conv", 6, dict(fork=0, train_steps="all")),
        ("tiny", 6, dict(fork=0, train_steps="all")),
        ("conv", 4, dict(trainable="all")),  # from the fork, where a text's members share their state
        ("conv", 2, dict(micro_batch=4)),
        ("conv", 1, {}),
        ("toy", 3, {}),
    ],
)
def test_draft_is_the_slope_of_the_reward(model, count, options):
    """Of what the rollouts would have been paid, with the same noise, where the weights of the last steps
    are others: a difference quotient along a random direction."""
    voices = {"conv": ConvPolicy, "tiny": exact_model, "toy": lambda: make_toy_mel(kind=torch.float64)}
    tuner = stray(make("draft", voices[model](), draft_steps=count, **options))
    trajectories = collect(tuner, 0)
    slope = gathered(tuner, trajectories)[0].part("policy")
    direction = torch.randn(len(slope), generator=seeded(3), dtype=torch.float64)

    def paid(amount):
        with torch.no_grad():
            start = torch.nn.utils.parameters_to_vector(tuner.parameters)
            torch.nn.utils.vector_to_parameters(start + amount * direction, tuner.parameters)
            rewards = []
            for t in trajectories:
                said = tuner.model.condition(t.ids, t.lengths, durations=t.conditioning.durations)
                x_0 = last_steps(tuner.model, tuner.schedule, t, count, said)
                rewards.append(quiet(*tuner.model.render(x_0, said.repeat(2)), 0, ""))
            torch.nn.utils.vector_to_parameters(start, tuner.parameters)
        return float(torch.cat(rewards).mean())

    assert paid(0) == pytest.approx(float(score_audio(tuner, trajectories).mean()), rel=1e-6)
    quotient = (paid(1e-7) - paid(-1e-7)) / 2e-7  # a long step would cross kinks
    assert -float(slope @ direction) == pytest.approx(quotient, rel=1e-5) and quotient
    if count == 6:  # all of them: the same as new rollouts from the same noise
        with torch.no_grad():
            for p, d in zip(tuner.parameters, direction.split([p.numel() for p in tuner.parameters])):
                p += 1e-2 * d.view_as(p)
        again = torch.cat([t.x_0.flatten() for t in collect(tuner, 0)])
        ends = [last_steps(tuner.model, tuner.schedule, t, 6).flatten() for t in trajectories]
        torch.testing.assert_close(torch.cat(ends), again, rtol=1e-9, atol=1e-9)


def test_the_yardstick_on_a_policy_of_one_number():
    """The policy gradient recovers what DRaFT finds through all steps but the last; with one parameter there
    is one direction."""
    tuner = make_tuner(
        FlawedPolicy(0.02),
        reward=lambda audio, *rest: audio.mean(1),
        method="draft",
        batch_size=300,
        micro_batch=300,
        fork=0,
        train_steps="all",
    )
    found = reward_gradients(tuner, [1, 6])
    assert {len(g) for g in found.values()} == {150}
    last, policy = (alignment(found[6], found[name]) for name in (1, "policy"))
    assert last["cosine"] == pytest.approx(1) and abs(policy["cosine"] - 1) < 0.1
    assert 0.001 < last["recovered"] < 0.9
    assert abs(policy["recovered"] - 1 + last["recovered"]) < 4 * policy["recovered_error"] < 0.8
    with pytest.raises(UserError, match="at least 3 texts"):
        reward_gradients(make("draft"), [1])


def test_the_control_of_draft_turns_half_of_the_slopes_round():
    weights = make("draft", batch_size=6, control="shuffle-advantages")
    found = [make_advantages(weights, torch.zeros(6), e).tolist() for e in range(3)]
    assert all(sorted(signs) == [-1] * 3 + [1] * 3 for signs in found) and found[0] != found[1]
    assert make_advantages(make("draft"), torch.zeros(4), 0).tolist() == [1] * 4


def test_what_has_no_gradient_is_refused():
    class Deaf(Reward):
        name = "deaf"

    with pytest.raises(UserError, match="'deaf' gives scores without a gradient.*distillmos, dnsmos"):
        make_tuner(reward=Deaf(), method="draft")
    counted = make_tuner(reward=lambda audio, *rest: torch.zeros(len(audio)), method="draft")
    with pytest.raises(UserError, match="compute them from the audio in torch"):
        counted.episode()
    silent = make_tuner(method="draft")
    render = silent.model.render
    with (
        mock.patch.object(silent.model, "render", lambda x, said: render(x.detach(), said)),
        pytest.raises(UserError, match="the sound of this policy has no gradient"),
    ):
        silent.episode()


@pytest.mark.parametrize("source", ["sample", "data"])
def test_dlpo_without_penalty_is_ddpo(source):
    """20 in the loop: loss, gradient and update, bit for bit;
    D draws nothing that the rollouts would have drawn."""
    dlpo, ddpo = make("dlpo", beta=0.0, denoising_source=source), make("ddpo")
    (one, stats), (other, plain) = gathered(dlpo), gathered(ddpo)
    assert torch.equal(total(one), total(other)) and stats["loss"] == plain["loss"]
    for _ in range(2):
        dlpo.episode(), ddpo.episode()
    assert fingerprint(dlpo.model) == fingerprint(ddpo.model)


@pytest.mark.parametrize("source", ["sample", "data"])
def test_onlydl_is_dlpo_without_reward(source):
    """21 in the loop, bit for bit."""
    dlpo, only = make("dlpo", alpha=0.0, denoising_source=source), make("onlydl", denoising_source=source)
    (one, stats), (other, plain) = gathered(dlpo), gathered(only)
    assert torch.equal(total(one), total(other)) and stats["loss"] == plain["loss"]
    only.reward = lambda audio, *rest: torch.arange(len(audio)).double()
    dlpo.episode(), only.episode()
    assert fingerprint(dlpo.model) == fingerprint(only.model)


def test_both_parts_of_dlpo_in_the_loop():
    """22, 23, 27: beta grad D and beta (D - mean of the group) grad log p, from the same D,
    to the right rollouts."""
    tuner = make("dlpo", beta=0.7, denoising_steps=2)
    t = collect(tuner, 0)
    level = [[d for j, n, d, *_ in denoising_losses(tuner, t, "sample", 0, 0) if j == i] for i in range(2)]
    d = (torch.cat(level[0]) + torch.cat(level[1])) / 2
    direct = 0.7 * by_hand(tuner, d.mean())
    centred = (d.view(2, 2) - d.view(2, 2).mean(1, keepdim=True)).flatten().detach()
    score = 0.7 * weighted_score(tuner, t, centred) / 4
    for parts, exact in (("direct", direct), ("reward", score), ("both", direct + score)):
        found = {
            beta: gathered(make("dlpo", beta=beta, denoising_steps=2, penalty_parts=parts))[0]
            for beta in (0.7, 1.4)
        }
        close(found[0.7].part("penalty"), exact)
        close(found[1.4].part("penalty"), 2 * exact)
        close(found[0.7].part("policy"), gathered(make("ddpo"))[0].part("policy"))


@pytest.mark.parametrize("source", ["sample", "data"])
def test_a_step_of_the_loop_lowers_d(source):
    """26 in the loop, on the same speech and noise."""
    tuner = make("dlpo", alpha=0.0, beta=0.7, penalty_parts="direct", denoising_source=source)
    t = collect(tuner, 0)
    g = total(gathered(tuner, t)[0])

    def current():
        return (
            torch.cat([d.detach() for _, _, d, *_ in denoising_losses(tuner, t, source, 0, 0)]).mean().item()
        )

    before, rate = current(), 1e-4
    with torch.no_grad():
        for p, step in zip(tuner.parameters, g.split([p.numel() for p in tuner.parameters])):
            p -= rate * step.view_as(p)
    assert current() - before == pytest.approx(-rate * float(g.square().sum()) / 0.7, rel=0.05)


class Listening(ConvPolicy):
    """Keeps what it is shown."""

    heard = None

    def predict_noise(self, x, hidden, level, frames=None):
        if self.heard is not None:
            self.heard.append((x.detach().clone(), level.clone()))
        return super().predict_noise(x, hidden, level, frames)


def test_the_network_is_told_the_level_of_what_it_sees():
    """28: sqrt(alpha_bar_t) with audio noised at the same t, for every training level;
    and the rollout's own levels in order."""
    policy = Listening(longest=2)
    tuner = make_tuner(policy, method="dlpo")
    audio, hidden, frames = 0.1 * normal(2, 8), normal(2, 2, 2, seed=1), torch.tensor([2, 2])
    for t in range(1000):
        policy.heard = []
        windowed_loss(policy, audio, hidden, frames, tuner.levels, 0, (0, "key", t), t)
        ((x, level),) = policy.heard
        assert torch.equal(level, FULL.level(t).double().expand(2, 1))
        noise = keyed_noise([(0, "key", t, 0), (0, "key", t, 1)], [8, 8])
        assert torch.equal(x, level * audio + (1 - level**2).sqrt() * noise)
    policy.heard = []
    (t, *_), schedule = collect(tuner, 0), tuner.schedule
    assert [float(level[0]) for _, level in policy.heard[:6]] == [
        float(schedule.level(s)) for s in range(5, -1, -1)
    ]
    policy.heard = []
    for s in range(3):
        replay(policy, schedule, t, s)
        assert torch.equal(policy.heard[s][0], t.x_t[s]) and policy.heard[s][1][0] == schedule.level(
            t.steps[s]
        )


def test_rwr_in_the_loop():
    """29: rewards of 1 are OnlyDL's direct part on the same samples, bit for bit;
    a reward for one rollout is D of that one."""
    rwr, only = make("rwr", rwr_weights="raw"), make("onlydl", beta=1.0, penalty_parts="direct")
    t = collect(rwr, 0)
    plain = gathered(rwr, t, torch.ones(4).double())[0].part("policy")
    assert torch.equal(plain, gathered(only, t)[0].part("penalty"))
    d = torch.cat([d for _, _, d, *_ in denoising_losses(rwr, t, "sample", 0, 0)])
    one = torch.tensor([0.0, 0, 4, 0]).double()
    close(gathered(rwr, t, one)[0].part("policy"), by_hand(rwr, d[2]))
    with pytest.raises(UserError, match="negative"):
        rwr.episode()


@pytest.mark.parametrize("trainable", ["decoder", "all"])
@pytest.mark.parametrize("name", ["awm", "nft"])
def test_matching_in_the_loop(name, trainable):
    """Squared errors and shifts at the same draws, the reference hearing with its own encoder; to the right
    rollouts."""
    tuner = stray(make(name, trainable=trainable, alpha=1.5, beta=0.7, anchor="reference"))
    trajectories, weights = collect(tuner, 0), normal(4)

    def errors():
        "D and shift of the batch, (2, 4)."
        found = []
        for t in trajectories:
            heard = [
                policy.condition(t.ids, t.lengths, durations=t.conditioning.durations).repeat(2)
                for policy in (tuner.model, tuner.reference)
            ]
            state = t.x_0, heard[0].hidden, heard[0].frames, tuner.levels, 3, (0, "guidance", 0, 0, 0)
            anchor = tuner.reference, heard[1].hidden
            found.append(torch.stack(windowed_errors(tuner.model, *state, rows=t.rows, anchor=anchor)))
        return torch.cat(found, 1)

    assert errors()[1].min() > 0
    gradients = gradients_of(tuner, trajectories, weights)[0]
    close(gradients.part("penalty"), by_hand(tuner, 0.7 * errors()[1].mean()))
    d, shift = errors()
    matched = d if name == "awm" else d - shift
    close(gradients.part("policy"), by_hand(tuner, 1.5 * (weights * matched).mean()))


def test_the_old_policy_is_the_one_that_spoke():
    """In the first update on a batch it is the policy, and holds nothing; then it stays where it was."""
    seen, tuner = [], make("nft", beta=2.0, inner_epochs=2, learning_rate=1e-2)
    free = gathered(make("awm", beta=0.0))[0].part("policy")
    first = gathered(make("nft", beta=2.0))[0]
    close(first.part("policy"), free, 1e-9)
    assert first.part("penalty").norm() < 1e-9 * free.norm()
    loss = type(tuner.objective).__call__

    def watched(replayed):
        seen.append(float(replayed.denoising_shift.detach().mean()))
        return loss(tuner.objective, replayed)

    spoke = fingerprint(tuner.model)
    anchors, whole = [], finetune.anchor_of
    with mock.patch.object(type(tuner.objective), "__call__", lambda self, replayed: watched(replayed)):
        with mock.patch.object(finetune, "anchor_of", lambda t: anchors.append(whole(t)) or anchors[-1]):
            tuner.episode()
    assert fingerprint(anchors[0][0]) == spoke != fingerprint(tuner.model)
    half = len(seen) // 2
    assert max(seen[:half]) < 1e-20 and min(seen[half:]) > 1e-9


def test_released_in_the_loop():
    """30: whatever the rewards, the gradient is that of D on recordings, bit for bit;
    own speech is refused."""
    tuner = make("released", micro_batch=4)
    audio, hidden, frames, _ = recorded_batch(tuner, "guidance", 0, 0, 0)
    d = windowed_loss(tuner.model, audio, hidden, frames, tuner.levels, 3, (0, "guidance", 0, 0, 0))
    exact = by_hand(tuner, d.mean())
    for rewards in (normal(4), 1e6 * normal(4, seed=1)):
        found = gathered(tuner, rewards=rewards)[0]
        assert torch.equal(found.part("penalty"), exact) and "policy" not in found.parts and exact.norm() > 0
    one, other = make("released"), make("released")
    other.reward = lambda audio, *rest: torch.arange(len(audio)).double()
    one.episode(), other.episode()
    assert fingerprint(one.model) == fingerprint(other.model)
    with pytest.raises(UserError, match="leave it out"):
        FinetuneConfig.of("released", denoising_source="sample").resolved().check()


@pytest.mark.parametrize("kind", ["group", "batch", "leave-one-out", "buffer", "raw"])
def test_a_constant_in_the_reward_in_the_loop(kind):
    """31 in the loop."""
    tuner = make("ddpo", advantage=kind, buffer_min_count=4)
    rewards = torch.tensor([0.5, -1.0, 2.0, 0.25]).double()
    k = 3.7
    t = collect(tuner, 0)
    one, other = (
        total(gathered(make("ddpo", advantage=kind, buffer_min_count=4), t, rewards + c)[0]) for c in (0, k)
    )
    if kind == "raw":
        close(other - one, -k * weighted_score(tuner, t, torch.ones(4).double()) / 4)
    else:
        close(one, other)


@pytest.mark.parametrize(
    "method, options",
    [
        ("ddpo", {}),
        ("dlpo", dict(beta=0.0)),
        ("dpok", {}),
        ("klinr", {}),
        ("dlpo", dict(beta=0.0, denoising_source="data")),
    ],
    ids=str,
)
def test_without_signal_nothing_moves(method, options):
    """32: equal rewards and no penalty leave every bit; Adam with coupled weight decay would not."""
    tuner = make(method, **options)
    tuner.reward = lambda audio, *rest: torch.full((len(audio),), 3.0)
    start = fingerprint(tuner.model)
    assert all(group["weight_decay"] == 0 for group in tuner.optimiser.param_groups)
    for _ in range(2):
        tuner.episode()
    assert fingerprint(tuner.model) == start
    tuner.optimiser = torch.optim.Adam(tuner.parameters, lr=3e-5, weight_decay=1e-6)
    tuner.episode()
    assert fingerprint(tuner.model) != start, "and the test would notice"


def test_order_of_a_batch():
    """33: a permutation of texts, actions and rewards permutes the losses and leaves the gradient."""
    tuner = make("ddpo")
    order, advantage = [2, 0, 1], normal(3)
    found = {}
    for name, perm in (("there", [0, 1, 2]), ("permuted", order)):
        schedule, t = make_rollout(tuner.model, [TEXTS[i] for i in perm], indices=perm)
        log_prob = sum(replay(tuner.model, schedule, t, s)[0] for s in range(3))
        found[name] = log_prob.detach(), by_hand(tuner, (advantage[perm] * log_prob).mean())
    close(found["there"][0][order], found["permuted"][0])
    close(found["there"][1], found["permuted"][1])


@pytest.mark.parametrize("method", ["ddpo", "dlpo", "dpok", "klinr"])
def test_order_of_the_trajectories(method):
    """33 in the loop, with penalties."""
    tuner = stray(make(method, penalty_parts="direct") if method == "dlpo" else make(method))
    t, rewards = collect(tuner, 0), normal(4)
    one, other = gathered(tuner, t, rewards)[0], gathered(tuner, t[::-1], rewards)[0]
    close(one.part("policy"), other.part("policy"))
    if method in ("dpok", "klinr"):
        close(one.part("penalty"), other.part("penalty"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_items_do_not_meet(size):
    """34: another item's states and action change no log-probability and no divergence but its own."""
    tuner = stray(make("dpok"))
    schedule, t = make_rollout(tuner.model, TEXTS[:size])

    def looked(x_t, x_prev):
        changed = replace(t, x_t=(x_t,) + t.x_t[1:], x_prev=(x_prev,) + t.x_prev[1:])
        log_prob, eps = replay(tuner.model, schedule, changed, 0)
        return torch.stack([log_prob, step_kl(tuner, changed, 0, eps)])

    before = looked(t.x_t[0], t.x_prev[0])
    assert before.shape == (2, size)
    for j in range(size):
        other = torch.arange(size)[:, None] == j
        after = looked(t.x_t[0] + other, t.x_prev[0] - 3 * other)
        assert torch.equal(before != after, other.T.expand(2, size))


def test_padding_counts_for_nothing():
    """35: junk behind an item's end changes no log-probability, divergence (of any form),
    denoising loss or reward."""
    schedule, mask = SCHEDULES["geometric 10"], torch.arange(40) < torch.tensor([[40], [25]])
    eps, ref, x_t, x_prev = normal(4, 2, 40)
    policy = ConvPolicy()
    heard = []

    class Counting(Reward):
        def score_clips(self, clips, sample_rate, texts):
            heard.append([len(c) for c in clips])
            return [float(c.square().mean()) for c in clips]

    def looked(junk):
        wide = [torch.where(mask, v, junk) for v in (eps, ref, x_t, x_prev)]
        found = [
            schedule.transition_log_prob(wide[0], *wide[2:], 4, mask, reduction)
            for reduction in ("mean", "sum")
        ]
        found += [
            kl_divergence(schedule, *wide[:3], 4, mask, reduction, form)
            for form in KL_FORMS
            for reduction in ("mean", "sum")
        ]
        if math.isfinite(junk):
            found.append(
                denoising_loss(
                    policy,
                    wide[0],
                    torch.ones(2, 2, 10).double(),
                    torch.full((2, 1), 0.5),
                    wide[1],
                    mask.double(),
                    torch.tensor([10, 6]),
                    "none",
                )
            )
        return found, Counting()(wide[3].clamp(-1, 1), torch.tensor([40, 25]), 1000, ["a", "b"])

    (before, heard_before), alone = looked(0.0), [v[1:, :25] for v in (eps, ref, x_t, x_prev)]
    for junk in (5.0, math.nan):
        after, heard_after = looked(junk)
        assert all(torch.equal(a, b) for a, b in zip(before, after)) and torch.equal(
            heard_before, heard_after
        )
    assert heard[0] == [40, 25]
    close(before[0][1:], schedule.transition_log_prob(alone[0], *alone[2:], 4))
    close(before[2][1:], kl_divergence(schedule, *alone[:3], 4))


@pytest.mark.parametrize("policy", [exact_model, ConvPolicy])
def test_a_batch_is_its_items(policy):
    """35, 36: log-probability, divergence, denoising loss and reward of a padded batch are those of each
    item alone."""
    tuner = stray(make("dpok", policy()))

    def looked(texts, indices):
        schedule, t = make_rollout(tuner.model, texts, indices=indices)
        log_prob, eps = replay(tuner.model, schedule, t, 1)
        noise = keyed_noise([(n,) for n in indices], t.x_0_lengths.tolist())
        mask = state_mask(t.conditioning.frames, tuner.model.width)
        d = denoising_loss(
            tuner.model,
            t.x_0,
            t.conditioning.hidden,
            torch.full((len(texts), 1), 0.8),
            noise,
            mask,
            t.conditioning.frames,
            "none",
        )
        return torch.stack(
            [log_prob, step_kl(tuner, t, 1, eps), d, tuner.reward(t.audio, t.audio_lengths, 1, texts)]
        ), t.audio_lengths

    together, lengths = looked(TEXTS, [0, 1, 2])
    assert len(set(lengths.tolist())) > 1
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(together[:, [i]], looked([text], [i])[0], rtol=1e-12, atol=1e-12)


def test_a_short_recording_is_denoised_as_if_alone(monkeypatch):
    """35: D of a recording that ends inside the window must not depend on the noise behind its end."""
    tuner = make("dlpo", denoising_source="data")
    audio, hidden, frames, _ = recorded_batch(tuner, "any")

    def looked():
        return windowed_loss(tuner.model, audio, hidden, frames, tuner.levels, 0, (0, "key"), 500)

    before, behind = looked(), 1 - state_mask(frames, tuner.model.width)
    assert len(set(frames.tolist())) > 1
    monkeypatch.setattr("dlpo_nb.denoising.keyed_noise", lambda *args: keyed_noise(*args) + behind)
    torch.testing.assert_close(looked(), before, rtol=1e-12, atol=0)


def test_mean_and_sum_differ_by_the_length():
    """37: exactly L_i, for log-probability, divergence, the loop's stored values and its gradient."""
    schedule = SCHEDULES["trailing 10"]
    mask = torch.arange(40) < torch.tensor([[40], [25], [1]])
    lengths = torch.tensor([40, 25, 1])
    eps, ref, x_t, x_prev = normal(4, 3, 40)
    for call in (
        lambda r: schedule.transition_log_prob(eps, x_t, x_prev, 4, mask, r),
        lambda r: kl_divergence(schedule, eps, ref, x_t, 4, mask, r),
        lambda r: kl_divergence(schedule, eps, ref, x_t, 4, mask, r, "mse"),
        lambda r: kl_divergence(schedule, eps, ref, x_t, 4, mask, r, "l1"),
    ):
        assert torch.equal(call("sum") / lengths, call("mean"))
    tuners = {reduction: make("ddpo", reduction=reduction, batch_size=2) for reduction in ("mean", "sum")}
    (mean,), (summed,) = (collect(t, 0) for t in tuners.values())
    assert torch.equal(summed.log_prob / summed.x_0_lengths, mean.log_prob)
    close(
        gathered(tuners["sum"])[0].part("policy"),
        int(mean.audio_lengths[0]) * gathered(tuners["mean"])[0].part("policy"),
    )


@pytest.mark.parametrize("method", ["ddpo", "dpok", "dlpo"])
def test_single_precision_is_close(method):
    """38: the loss in float32 within 1e-4 of that in float64, for the same rollouts."""
    single, double = (
        stray(make(method, exact_model(kind), clip_range=0.1)) for kind in (torch.float32, torch.float64)
    )
    t, rewards = collect(single, 0), normal(4)
    assert t[0].x_t[0].dtype == torch.float32
    assert gathered(single, t, rewards)[1]["loss"] == pytest.approx(
        gathered(double, t, rewards)[1]["loss"], abs=1e-4
    )


def test_autocast_leaves_the_log_probability_alone():
    """38: under bfloat16 autocast the network is coarse, and what follows is float64."""
    tuner = make("ddpo", exact_model(torch.float32))
    t, schedule = collect(tuner, 0)[0], tuner.schedule
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, eps = replay(tuner.model, schedule, t, 0)
    fine = replay(tuner.model, schedule, t, 0)[1]
    wide = [v.repeat(2, 1) for v in (eps, t.x_t[0])]
    assert log_prob.dtype == torch.float64 and not torch.equal(eps, fine)
    assert torch.equal(
        log_prob,
        schedule.transition_log_prob(
            *wide, t.x_prev[0], 3, state_mask(t.conditioning.frames.repeat(2), tuner.model.width)
        ),
    )


def only(t, steps):
    """A trajectory of which only some of the steps are trained."""
    kept = [t.steps.index(s) for s in steps]
    return replace(
        t,
        steps=list(steps),
        x_t=tuple(t.x_t[i] for i in kept),
        x_prev=tuple(t.x_prev[i] for i in kept),
        log_prob=t.log_prob[kept],
    )


@pytest.mark.parametrize("method", ["ddpo", "dpok", "dlpo"])
@pytest.mark.parametrize(
    "subset",
    [[[s] for s in range(1, 6)], [[s, r] for s in range(1, 6) for r in range(1, s)]],
    ids=["singles", "pairs"],
)
def test_random_subsets_average_to_all_steps(subset, method):
    """41: the mean over all subsets, each counted (K - 1) / n times, is the gradient of all steps."""
    tuner = stray(make(method, train_steps="all", fork=0, batch_size=2))
    t, rewards = collect(tuner, 0), normal(2)
    full = gathered(tuner, t, rewards)[0]
    tuner.step_weights = step_weights(f"random:{len(subset[0])}", tuner.schedule)
    assert tuner.step_weights[1:] == [5 / len(subset[0])] * 5
    found = [gathered(tuner, [only(each, steps) for each in t], rewards)[0] for steps in subset]
    for part in ("policy", "penalty"):
        if part in full.parts:
            close(sum(g.part(part) for g in found) / len(subset), full.part(part))


def test_weighted_steps_are_their_weighted_gradients():
    """--step-weights kappa: each step's gradient by 1 / sqrt(kappa_t), in the mean over the actions by 1."""
    tuner = stray(make("ddpo", train_steps="all", fork=0, batch_size=2))
    t, rewards = collect(tuner, 0), normal(2)
    alone = {s: gathered(tuner, [only(each, [s]) for each in t], rewards)[0] for s in range(1, 6)}
    kappa = tuner.schedule.kl_weight(torch.arange(6)).flatten()
    tuner.step_weights = weights = step_weights("all", tuner.schedule, "kappa")
    assert weights[0] == 0 and sum(weights) == pytest.approx(5)
    for s in range(2, 6):
        assert weights[s] / weights[1] == pytest.approx(float((kappa[1] / kappa[s]).sqrt()))
    found = gathered(tuner, t, rewards)[0].part("policy")
    close(found, sum(weights[s] * alone[s].part("policy") for s in alone))
    assert make("ddpo", step_weights="kappa", train_steps="last:2", fork=0).step_weights != [0.0, 1.0, 1.0]


def test_windows_of_steps():
    assert draw_steps("first:3", 10) == [9, 8, 7] and draw_steps("last:3", 10) == [3, 2, 1]
    assert draw_steps("middle:3", 10) == [6, 5, 4] and draw_steps("middle:9", 10) == draw_steps("all", 10)
    with pytest.raises(UserError, match="'first:N', 'middle:N', 'last:N'"):
        draw_steps("middle:10", 10)


@pytest.mark.parametrize("kind", ["wavegrad", "flawed"])
def test_clipped_samples_are_scored_as_they_were_made(kind):
    """42: where the implied audio leaves [-1, 1], stored and recomputed log-probability agree to the bit,
    and there is no gradient."""
    model = exact_model() if kind == "wavegrad" else FlawedPolicy(0.3, hop=40)
    if kind == "wavegrad":
        with torch.no_grad():
            model.decoder.ublock_postconv.conv1d.weight.mul_(100)
    schedule, t = make_rollout(model, steps=[5, 4, 3, 2, 1])
    assert 0.01 < t.x0_clipped_share < 0.99
    for s, step in enumerate(t.steps):
        log_prob, eps = replay(model, schedule, t, s)
        assert torch.equal(log_prob.detach(), t.log_prob[s])
        eps = eps.detach().requires_grad_()
        (g,) = torch.autograd.grad(schedule.transition_log_prob(eps, t.x_t[s], t.x_prev[s], step).sum(), eps)
        outside = schedule.predict_x0(t.x_t[s], eps, step).abs() > 1
        assert torch.equal(g != 0, ~outside & (state_mask(t.conditioning.frames, model.width) > 0))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_one_batch(method):
    """44: texts of unequal length a pair at a time, in pairs of texts, and all at once:
    the same gradients and statistics."""
    found = []
    for size in (2, 4, 6):
        tuner = stray(make(method, batch_size=6, micro_batch=size, denoising_steps=2))
        trajectories = collect(tuner, 0)
        assert [len(t.audio) for t in trajectories] == {2: [2, 2, 2], 4: [4, 2], 6: [6]}[size] and len(
            {n for t in trajectories for n in t.conditioning.frames.tolist()}
        ) > 1
        found.append(gathered(tuner, trajectories, normal(6).abs()))
    for gradients, stats in found[1:]:
        assert gradients.parts.keys() == found[0][0].parts.keys()
        # the other part of onlydl is 0 times the reward, that of nft 0 until the policy has left the old one
        for part in {"onlydl": ["penalty"], "nft": ["policy"]}.get(method, gradients.parts):
            close(found[0][0].part(part), gradients.part(part), 1e-10)
        assert stats == pytest.approx(found[0][1], rel=1e-10)


def test_a_micro_batch_in_seconds_is_the_same_batch():
    """As many texts as fit; one that is longer than a micro-batch goes alone."""
    tuner, found = make("dlpo", batch_size=6, micro_batch=6), []
    frames = collect(tuner, 0)[0].conditioning.frames  # of the three texts, each of which is spoken twice
    _, two, three = (2 * frames.cumsum(0) / tuner.model.frame_rate).tolist()
    for size, count in (
        (6, 1),
        (f"{1.01 * three:.9f}s", 1),
        (f"{(two + three) / 2:.9f}s", 2),
        ("0.000001s", 3),
    ):
        tuner = stray(make("dlpo", batch_size=6, micro_batch=size, denoising_steps=2))
        trajectories = collect(tuner, 0)
        assert len(trajectories) == count
        found.append(gathered(tuner, trajectories, normal(6).abs()))
    for gradients, stats in found[1:]:
        for part in gradients.parts:
            close(found[0][0].part(part), gradients.part(part), 1e-10)
        assert stats == pytest.approx(found[0][1], rel=1e-10)


@pytest.mark.parametrize("size", [0, -1, "s", "4 s", "0s", "many", "1e3", 1.5])
def test_a_micro_batch_is_rollouts_or_seconds(size):
    with pytest.raises(UserError, match=r"--micro-batch .* such as 8, nor seconds of audio, such as 40s"):
        FinetuneConfig.of(micro_batch=size).check()


@pytest.mark.parametrize("method", ["dlpo", "klinr"])
def test_two_and_two_episodes_are_four(method, tmp_path):
    """45: weights, moments, running buffer and episode survive a file;
    texts come again, so that the buffer matters."""

    def fresh():
        return make(
            method,
            ConvPolicy(),
            advantage="buffer",
            buffer_min_count=3,
            buffer_size=5,
            inner_epochs=2,
            learning_rate=1e-3,
        )

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(2):
        whole.episode(), first.episode()
    save_state(first, tmp_path / "state.pt")
    load_state(second, tmp_path / "state.pt")
    assert second.buffer.state_dict() == whole.buffer.state_dict() and len(second.buffer.rewards) > 1
    for _ in range(2):
        assert {k: v for k, v in whole.episode().items() if "seconds" not in k} == {
            k: v for k, v in second.episode().items() if "seconds" not in k
        }
    assert fingerprint(whole.model) == fingerprint(second.model)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_is_a_run(method):
    """46: twice the same seed, the same log; another seed, other rollouts."""

    def log(seed):
        tuner = make(method, ConvPolicy(), seed=seed)
        tuner.texts, tuner.ids = tuner.texts[:1], tuner.ids[:1]
        tuner.reward = lambda audio, *rest: audio.square().mean(1)
        rolled = torch.cat([t.audio.flatten() for t in collect(tuner, 0)]).tolist()
        return [{k: v for k, v in tuner.episode().items() if "seconds" not in k} for _ in range(2)], rolled

    (one, first), (other, second), (third, elsewhere) = log(0), log(0), log(1)
    assert one == other != third and first == second != elsewhere


@pytest.mark.parametrize("trainable", ["decoder", "all"])
def test_no_dropout_in_the_loop(trainable):
    """47: the model has dropout, but two recomputations are the same bits,
    also if it came in training mode."""
    model = exact_model().train()
    assert TINY.dropout > 0
    tuner = make("ddpo", model, trainable=trainable)
    tuner.episode()
    assert not any(m.training for m in tuner.model.modules())
    t = collect(tuner, 1)[0]
    said = tuner.model.condition(t.ids, t.lengths, durations=t.conditioning.durations)
    assert torch.equal(said.hidden, t.conditioning.hidden)
    one, other = (replay(tuner.model, tuner.schedule, t, 0, said)[0] for _ in range(2))
    assert torch.equal(one, other) and torch.equal(one.detach(), t.log_prob[0])


def test_rewards_stay_with_their_rollouts():
    """48, as far as it applies: the reward of each utterance is that of its text,
    in the order of the trajectories."""
    tuner = make("ddpo", batch_size=6, advantage="raw")
    tuner.reward = lambda audio, lengths, rate, texts: torch.tensor(
        [10.0 * TEXTS.index(text) + m for m, text in enumerate(texts)]
    )
    t = collect(tuner, 0)
    rewards = score_audio(tuner, t)
    assert rewards.tolist() == [
        10.0 * TEXTS.index(tuner.texts[i]) + m for i in text_indices(0, 3, 3, 0) for m in range(2)
    ]
    assert rewards[[row for each in t for row in each.rows]].tolist() == [
        10.0 * TEXTS.index(each.texts[0]) + m for each in t for m in range(2)
    ]
    assert torch.equal(make_advantages(tuner, rewards, 0), rewards)


# --- the loop on the chain ----------------------------------------------------------------------------------


@pytest.fixture
def cubature(monkeypatch):
    """Rollouts whose members are the 2d points of the cubature, d samples and steps:
    the loop's gradient is then the expected one."""

    def step_noise(key, indices, sizes, group_size, step, fork, device):
        d, L = group_size // 2, sizes[0]
        points = d**0.5 * torch.cat([torch.eye(d), -torch.eye(d)]).double()
        return points[:, (step - 1) * L : step * L]

    monkeypatch.setattr(mdp, "step_noise", step_noise)


def flawed(method, b=0.02, L=2, K=6, b_ref=0.0, **options):
    """A tuner of the chain as a policy; the flaws of policy and reference."""
    members = 2 * K * L
    settings = (
        dict(
            batch_size=members,
            group_size=members,
            fork=0,
            rollout_steps=K,
            train_steps="all",
            advantage="raw",
        )
        | options
    )
    tuner = make_tuner(
        FlawedPolicy(b, L),
        reward=lambda audio, *rest: audio.mean(1),
        texts=["Rain."],
        method=method,
        **settings,
    )
    with torch.no_grad():
        tuner.reference.decoder[0].fill_(b_ref)
    return tuner


def flawed_slope(tuner):
    """d E[audio] / d b through the actions."""
    s, total = tuner.schedule, 0.0
    A, C = s.alphas.rsqrt(), s.betas / (s.alphas * (1 - s.alphas_cumprod)).sqrt()
    for t in reversed(range(s.num_steps)):
        total = float(A[t] - C[t] * tuner.model.gain(s.level(t).double())) * total - (
            float(C[t]) if t else 0.0
        )
    return total


@pytest.mark.parametrize("spacing", ["geometric", "trailing"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("L", [1, 3])
def test_the_loop_on_the_chain(cubature, L, reduction, spacing):
    """1, 13, 16, 18 in the loop with L samples: slope and 2 b kappa;
    with means, E[k grad mean log p] is the gradient of the KL a sample."""
    b, share = 0.02, 1 if reduction == "sum" else L
    for method in ("ddpo", "dpok", "klinr"):
        tuner = flawed(
            method, b, L, reduction=reduction, spacing=spacing, **({} if method == "ddpo" else dict(beta=2.0))
        )
        kappa = GaussianChain(tuner.schedule).kappa
        (t,) = collect(tuner, 0)
        assert t.x0_clipped_share == 0 and t.audio.shape == (12 * L, L)
        found, stats = gathered(tuner, [t])
        # sigma and level are float32 in the rollout
        assert found.part("policy").item() == pytest.approx(-flawed_slope(tuner) / share, rel=1e-6)
        if method != "ddpo":
            assert found.part("penalty").item() == pytest.approx(2 * 2 * b * kappa * L / share, rel=1e-6)
        if method == "klinr":
            assert stats["kl/log_ratio"] == pytest.approx(b**2 * kappa * L, rel=1e-6)


@pytest.mark.parametrize("method", ["dpok", "klinr"])
def test_where_the_loop_stops(cubature, method):
    """14 in the loop: descent on its gradients ends at b_ref + alpha s / (2 beta kappa L),
    where the gradient is 0."""
    tuner = flawed(method, b=0.0, alpha=0.5, beta=2.0, b_ref=0.01)
    kappa = GaussianChain(tuner.schedule).kappa
    for _ in range(10):
        g = total(gathered(tuner)[0])
        with torch.no_grad():
            tuner.parameters[0] -= 0.9 / (2 * 2.0 * kappa) * g[0]
    assert tuner.parameters[0].item() == pytest.approx(
        0.01 + 0.5 * flawed_slope(tuner) / (2 * 2.0 * kappa * 2), abs=1e-6
    )
    assert abs(float(g)) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trainable", ["decoder", "all"])
def test_log_ratios_are_sums_over_the_samples(reduction, trainable):
    """16, 18: k is the sum over steps and samples, whatever the reduction,
    the reference seeing with its own encoder."""
    tuner = stray(make("klinr", reduction=reduction, trainable=trainable))
    trajectories, exact = collect(tuner, 0), []
    for t in trajectories:
        wide, k = state_mask(t.conditioning.frames.repeat(2), tuner.model.width), 0
        for s, step in enumerate(t.steps):
            for sign, policy in ((1, tuner.model), (-1, tuner.reference)):
                hidden = policy.condition(t.ids, t.lengths, durations=t.conditioning.durations).hidden.repeat(
                    2, 1, 1
                )
                x = t.x_t[s].repeat(2 // len(t.x_t[s]), 1)
                eps = policy.predict_noise(
                    x, hidden, tuner.schedule.level(step).expand(2, 1), t.conditioning.frames.repeat(2)
                )
                k = k + sign * tuner.schedule.transition_log_prob(eps, x, t.x_prev[s], step, wide, "sum")
        exact.append(k.detach())
    found = log_ratios(tuner, trajectories)
    close(found, torch.cat(exact), 1e-10)
    assert not found.requires_grad and found.abs().min() > 1e-3


def test_klinr_on_random_subsets(cubature):
    """41 for KLinR: the mean over all single steps must be the gradient of the KL of the trajectories."""
    tuner = flawed("klinr", beta=1.0)
    t = collect(tuner, 0)
    full = gathered(tuner, t)[0].part("penalty").item()
    tuner.step_weights = step_weights("random:1", tuner.schedule)
    found = [gathered(tuner, [only(t[0], [s])])[0].part("penalty").item() for s in range(1, 6)]
    assert sum(found) / 5 == pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize("kind", ["batch", "group", "raw", "leave-one-out"])
def test_the_penalty_is_freed_of_the_rewards_mean(kind):
    """4: up to the division by the standard deviation, a penalty inside the reward has the baseline that a
    reward has."""
    tuner, values = make("klinr", advantage=kind), torch.tensor([0.5, -1.0, 2.0, 0.25]).double()
    ours, theirs = tuner.objective.centre_penalty(values, 2), advantages(values, kind, 2)
    close(ours, theirs * (ours.square().mean().sqrt() if kind in ("batch", "group") else 1), 1e-7)


# --- end to end ---------------------------------------------------------------------------------------------

FOUR = ["Go home.", "The door is open.", "Rain.", "We saw it."]


BRAKES = dict(ddpo={}, dpok=dict(beta=100.0), klinr=dict(beta=10.0), dlpo=dict(beta=100.0))


def trained(method, reward, updates, **options):
    """A small policy after some updates: the metrics of each, and the tuner."""
    policy = ConvPolicy()
    settings = (
        dict(
            batch_size=12,
            group_size=6,
            fork=0,
            rollout_steps=4,
            train_steps="all",
            learning_rate=8e-3,
            **(dict(denoising_source="data") if method == "dlpo" else {}),
        )
        | options
    )
    tuner = make_tuner(policy, reward, FOUR, make_corpus(policy.width), method=method, **settings)
    return [tuner.episode() for _ in range(updates)], tuner


@cache
def quietened(method):
    """Rise of the reward -mean(x0^2) over 50 updates in standard deviations of one rollout's,
    and how far the policy has gone."""
    metrics, tuner = trained(method, quiet, 50, **BRAKES[method])
    first, last = (sum(row["reward/mean"] for row in rows) / 5 for rows in (metrics[:5], metrics[-5:]))
    gone = drift(tuner, FOUR)
    return (
        (last - first) / (sum(row["reward/std"] for row in metrics[:5]) / 5),
        gone["kl"],
        gone["diffusion_loss/tuned"] / gone["diffusion_loss/base"],
    )


def test_ddpo_learns_and_drifts():
    """49: the reward rises by more than two standard deviations, and the denoising loss on data with it."""
    rise, kl, d = quietened("ddpo")
    assert rise > 2 and d > 1.05 and kl > 0


@pytest.mark.parametrize("method", ["dpok", "klinr", "dlpo"])
def test_a_strong_brake_holds(method):
    """49: with a large beta KL methods stay at the reward of the base, and DLPO at its denoising loss,
    where DDPO does not."""
    (rise, kl, d), (far, free_kl, free_d) = quietened(method), quietened("ddpo")
    assert abs(rise) < 0.5 < far and abs(d - 1) < 0.05 < free_d - 1
    assert kl < (0.1 if method == "dlpo" else 0.01) * free_kl


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_can_be_hacked(sign):
    """50: the reward of a constant offset drives |x0| up where nothing holds,
    and less where something does."""

    def loud(audio, *rest):
        return 3 * sign * audio.mean(1)

    levels = [
        float(
            torch.cat([t.audio.flatten() for t in collect(trained("dlpo", loud, updates, beta=beta)[1], 0)])
            .abs()
            .mean()
        )
        for updates, beta in ((0, 0.0), (20, 0.0), (20, 100.0))
    ]
    assert levels[1] > 2 * levels[0] and levels[1] > 1.5 * levels[2]
