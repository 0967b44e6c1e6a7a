"""NoiseSchedule against numbers made by other programs (ddpo-pytorch, wavegrad2), and its edges."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dlpo_nb.core import UserError
from dlpo_nb.diffusion import NoiseSchedule, entry

FULL = NoiseSchedule.linear()
CASES = json.loads((Path(__file__).parent / "data" / "ddim_logprob_cases.json").read_text())["cases"]


def case_inputs(case, dtype):
    schedule = NoiseSchedule.from_alphas_cumprod([case["alpha_bar_t"]], final=case["alpha_bar_prev"])
    eps, x_t, x_prev = (torch.tensor(case[k], dtype=dtype) for k in ("eps", "x_t", "x_prev"))
    return (
        schedule,
        eps.requires_grad_(),
        x_t,
        x_prev,
        dict(clip=case["clip_sample"], eta=case["eta"], form="ddim"),
    )


def finite(case):
    return "nan" not in json.dumps(case["ddpo_log_prob_mean"]).lower()


def test_the_file_holds_the_cases_it_should():
    assert len(CASES) == 84 and sum(map(finite, CASES)) == 68


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if finite(c)],
    ids=lambda c: f"{c['schedule'][:4]}-{c['num_inference_steps']}-{c['t']}",
)
def test_log_prob_and_gradient_of_ddpo_pytorch(case):
    schedule, eps, x_t, x_prev, how = case_inputs(case, torch.float64)
    mean = schedule.transition_log_prob(eps, x_t, x_prev, 0, **how)
    total = schedule.transition_log_prob(eps, x_t, x_prev, 0, reduction="sum", **how)
    # an independent float64 restatement: only rounding may differ
    assert torch.allclose(
        mean, torch.tensor(case["f64_log_prob_mean"], dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    assert torch.allclose(
        total, torch.tensor(case["f64_log_prob_sum"], dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    assert torch.allclose(
        schedule.mean(eps, x_t, 0, **how),
        torch.tensor(case["f64_mean"], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
    )
    assert schedule.sigma(0, case["eta"]).item() == pytest.approx(case["f64_std"], rel=1e-6)
    # their own float32 run: the worst case of theirs is 5e-5 off
    assert torch.allclose(
        mean, torch.tensor(case["ddpo_log_prob_mean"], dtype=torch.float64), rtol=1e-4, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(mean.sum(), eps)
    theirs = torch.tensor(case["ddpo_dlogprob_deps"], dtype=torch.float64)
    assert (gradient - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7


def test_every_degenerate_case_raises():
    for case in (c for c in CASES if not finite(c)):
        schedule, eps, x_t, x_prev, how = case_inputs(case, torch.float32)
        with pytest.raises(ValueError, match="deterministic"):
            schedule.transition_log_prob(eps, x_t, x_prev, 0, **how)
        with pytest.raises(ValueError, match="deterministic"):
            schedule.kl(eps, eps, x_t, 0, **how)


def test_a_batch_with_one_deterministic_step_raises():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="deterministic"):
        FULL.transition_log_prob(x, x, x, torch.tensor([0, 5]))


SCHEDULES = {
    "train1000": NoiseSchedule.linear(table_dtype=torch.float32),
    "infer8": NoiseSchedule.inference8(table_dtype=torch.float32),
    "lin10": NoiseSchedule.linear(10, table_dtype=torch.float32),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_tables_are_the_released_models_up_to_rounding(data, name):
    reference, schedule = np.load(data / "schedule_reference.npz"), SCHEDULES[name]
    # 4 ulp: linspace with or without a fused multiply-add, and a vectorised square root, differ by one
    ulps = 4 * np.finfo(np.float32).eps
    tables = dict(
        betas=schedule.betas,
        alphas=schedule.alphas,
        alphas_cumprod=schedule.alphas_cumprod,
        alphas_cumprod_prev=schedule.alphas_cumprod_prev,
        sqrt_alphas_cumprod=schedule.levels,
    )
    for key, table in tables.items():
        np.testing.assert_allclose(table, reference[f"sched_{name}_{key}"], rtol=ulps, err_msg=key)
    # 1 - alpha_bar magnifies an ulp of alpha_bar;
    # what float32 itself costs them, 1.3 % at step 0, is a thousand times as much
    for key, table in dict(
        posterior_mean_coef1=schedule.posterior_mean_coef1, posterior_mean_coef2=schedule.posterior_mean_coef2
    ).items():
        np.testing.assert_allclose(table, reference[f"sched_{name}_{key}"], rtol=1e-5, err_msg=key)
    steps = torch.arange(schedule.num_steps)
    level = schedule.level(steps)[:, 0]
    np.testing.assert_allclose(level, reference[f"sched_{name}_sqrt_alphas_cumprod_prev"][1:], rtol=ulps)
    log_variance = schedule.posterior(torch.zeros(1, 1), torch.zeros(1, 1), steps)[1][:, 0]
    np.testing.assert_allclose(
        log_variance,
        reference[f"sched_{name}_posterior_log_variance_clipped"],
        atol=1e-5,
        err_msg="a logarithm: absolute",
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_float64_tables_differ_from_them_only_by_rounding(data, name):
    reference = np.load(data / "schedule_reference.npz")
    exact = {"train1000": FULL, "infer8": NoiseSchedule.inference8(), "lin10": NoiseSchedule.linear(10)}[name]
    assert exact.betas.dtype == torch.float64
    np.testing.assert_allclose(exact.levels, reference[f"sched_{name}_sqrt_alphas_cumprod"], rtol=3e-6)
    # from step 1 on 1 - alpha_bar loses up to 1.5 % in float32, at step 0 1.3 %
    np.testing.assert_allclose(
        exact.posterior_mean_coef1, reference[f"sched_{name}_posterior_mean_coef1"], rtol=0.04
    )
    assert exact.posterior_mean_coef1[0].item() == pytest.approx(1, abs=1e-9)


def test_algebra_of_the_released_model(data):
    reference, schedule = np.load(data / "schedule_reference.npz"), SCHEDULES["train1000"]
    y, eps, y0 = (torch.from_numpy(reference[f"input_{k}"]) for k in ("y", "eps", "y0"))
    for i, t in enumerate(reference["alg_t"].tolist()):
        assert torch.allclose(
            schedule.predict_x0(y, eps, t),
            torch.from_numpy(reference["alg_predict_start"][i]),
            rtol=1e-5,
            atol=1e-5,
        )
        mean, log_variance = schedule.posterior(y0, y, t)
        assert torch.allclose(
            mean, torch.from_numpy(reference["alg_posterior_mean"][i]), rtol=1e-6, atol=1e-6
        )
        assert log_variance.item() == pytest.approx(float(reference["alg_posterior_logvar"][i]), rel=1e-6)
    mixed = schedule.predict_x0(y, eps, torch.from_numpy(reference["alg_t"][:2]))
    assert torch.allclose(mixed, torch.from_numpy(reference["alg_predict_start_vec_t"]), rtol=1e-5, atol=1e-5)


def tensors(*shape, count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=draw) for _ in range(count)]


@pytest.mark.parametrize("shape", [(3, 16), (3, 8, 5)])
def test_mixed_steps_are_each_step_alone(shape):
    eps, ref, x_t, x_prev = tensors(*shape)
    t = torch.tensor([1, 500, 999])
    calls = dict(
        mean=lambda i, t: FULL.mean(eps[i], x_t[i], t),
        ddim=lambda i, t: FULL.mean(eps[i], x_t[i], t, eta=0.5, form="ddim"),
        step=lambda i, t: FULL.step(eps[i], x_t[i], t, x_prev[i]),
        x0=lambda i, t: FULL.predict_x0(x_t[i], eps[i], t),
        posterior=lambda i, t: FULL.posterior(eps[i], x_t[i], t)[0],
        kl=lambda i, t: FULL.kl(eps[i], ref[i], x_t[i], t),
        log_prob=lambda i, t: FULL.transition_log_prob(eps[i], x_t[i], x_prev[i], t),
    )
    for name, call in calls.items():
        alone = torch.cat([call(slice(i, i + 1), int(s)) for i, s in enumerate(t)])
        assert torch.allclose(call(slice(None), t), alone, rtol=1e-12, atol=1e-12), name
    assert FULL.level(t).shape == FULL.sigma(t).shape == FULL.kl_weight(t).shape == (3, 1)
    assert FULL.level(5).shape == FULL.sigma(5).shape == FULL.kl_weight(5).shape == ()
    assert FULL.level(t).dtype == torch.float32


def test_a_deterministic_step_ignores_its_noise():
    eps, x_t, noise, other = tensors(2, 5)
    assert torch.equal(FULL.step(eps, x_t, 0, noise), FULL.step(eps, x_t, 0))
    t = torch.tensor([0, 700])
    one, two = FULL.step(eps, x_t, t, noise), FULL.step(eps, x_t, t, other)
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


def test_padding_counts_for_nothing_and_sum_is_length_times_mean():
    eps, ref, x_t, x_prev = tensors(2, 40)
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    t, lengths = torch.tensor([30, 800]), torch.tensor([40, 25])
    for call in (
        lambda m, r: FULL.transition_log_prob(eps, x_t, x_prev, t, m, r),
        lambda m, r: FULL.kl(eps, ref, x_t, t, m, r),
    ):
        before = call(mask, "sum")
        assert torch.allclose(before, lengths * call(mask, "mean"), rtol=1e-14)
        for junk in (1e30, float("nan")):
            for tensor in (eps, ref, x_t, x_prev):
                tensor[1, 25:] = junk
            assert torch.equal(call(mask, "sum"), before) and torch.equal(call(mask.float(), "sum"), before)
    with pytest.raises(ValueError, match="reduction"):
        FULL.kl(eps, ref, x_t, t, mask, "max")


def test_the_action_is_detached_and_the_gradient_keeps_the_networks_dtype():
    eps, ref, x_t, x_prev = (x.requires_grad_() for x in tensors(2, 6))
    (FULL.transition_log_prob(eps, x_t, x_prev, 50) + FULL.kl(eps, ref, x_t, 50)).sum().backward()
    assert x_prev.grad is None and ref.grad is None
    assert eps.grad.dtype == torch.float32 and eps.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_precision_under_bfloat16_autocast(reduction):
    eps, ref, x_t, x_prev = tensors(2, 5000)
    eps = eps.bfloat16()
    exact = FULL.transition_log_prob(eps.double(), x_t.double(), x_prev.double(), 20, reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16):
        ours = FULL.transition_log_prob(eps, x_t, x_prev, 20, reduction=reduction)
        assert FULL.mean(eps, x_t, 20).dtype == torch.float32
    assert torch.equal(ours, exact)


def test_kl_is_kappa_times_the_squared_difference_and_torchs_own():
    eps, ref, x_t, _ = (x.double() for x in tensors(4, 64))
    t = torch.tensor([1, 10, 300, 999])
    for schedule, steps in (
        (FULL, t),
        (FULL.respaced(10), torch.tensor([1, 2, 5, 9])),
        (FULL.respaced(10, "geometric"), torch.tensor([1, 2, 5, 9])),
    ):
        ours = schedule.kl(eps, ref, x_t, steps, reduction="sum", clip=False)
        assert torch.allclose(ours, (schedule.kl_weight(steps) * (eps - ref) ** 2).sum(1), rtol=1e-6)
        sigma = entry(schedule.posterior_variance.sqrt(), steps)
        one, two = (torch.distributions.Normal(schedule.mean(e, x_t, steps), sigma) for e in (eps, ref))
        assert torch.allclose(
            schedule.kl(eps, ref, x_t, steps, reduction="sum"),
            torch.distributions.kl_divergence(one, two).sum(1),
            rtol=1e-9,
        )
    assert FULL.kl_weight(0) == float("inf")


def test_clipping_stops_the_gradient():
    eps = torch.zeros(1, 2, requires_grad=True)
    x_t = torch.tensor([[0.1, 3.0]])
    FULL.mean(eps, x_t, 100).sum().backward()
    assert eps.grad[0, 0] != 0 and eps.grad[0, 1] == 0


@pytest.mark.parametrize("spacing", ["trailing", "even"])
@pytest.mark.parametrize(
    "schedule",
    [FULL, SCHEDULES["train1000"], NoiseSchedule.inference8()],
    ids=["float64", "float32", "eight"],
)
def test_visiting_all_levels_changes_no_bit(schedule, spacing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = schedule.respaced(schedule.num_steps, spacing)
    tables = {k: v for k, v in vars(schedule).items() if isinstance(v, torch.Tensor)}
    assert len(tables) == 8 and all(torch.equal(getattr(same, k), v) for k, v in tables.items())


@pytest.mark.parametrize("spacing", ["trailing", "geometric"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 50, 333, 1000])
def test_respaced_ends_where_the_schedule_ends(n, spacing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = FULL.respaced(n, spacing)
    assert new.num_steps == n and (new.betas > 0).all()
    assert (1 - new.betas).prod().item() == pytest.approx(FULL.alphas_cumprod[-1].item(), rel=1e-10)
    assert torch.allclose(new.alphas.cumprod(0), new.alphas_cumprod, rtol=1e-10)


def test_geometric_has_one_kappa():
    new = FULL.respaced(10, "geometric", lo=1e-3)
    ratios = 1 / new.alphas_cumprod - 1
    assert ratios[0].item() == pytest.approx(1e-3) and ratios[-1].item() == pytest.approx(
        (1 / FULL.alphas_cumprod[-1] - 1).item()
    )
    r = (ratios[-1] / ratios[0]) ** (1 / 9)
    assert torch.allclose(new.kl_weight(torch.arange(1, 10)).double(), (r - 1) / 2, rtol=1e-6)


NUMBERS = {  # spacing, steps: sigma min, max, E mean log p min, max, sum of kappa (an independent script's)
    ("trailing", 1000): (0.000957460, 0.0999966, 0.883680, 5.532288, 14.500209),
    ("trailing", 10): (0.193072, 0.780149, -1.170669, 0.225755, 6.748253),
    ("even", 10): (0.000999992, 0.802063, -1.198370, 5.488825, 32174.327),
    ("even", 50): (0.000999765, 0.429833, -0.574580, 5.489052, 1069.3528),
}


@pytest.mark.parametrize("spacing, n", NUMBERS)
def test_numbers_of_the_respaced_schedules(spacing, n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = FULL.respaced(n, spacing)
    sigma = new.posterior_variance[1:].sqrt()
    log_prob = -0.5 - 0.5 * np.log(2 * np.pi) - sigma.log()
    ours = sigma.min(), sigma.max(), log_prob.min(), log_prob.max(), new.kl_weight(torch.arange(1, n)).sum()
    assert [v.item() for v in ours] == pytest.approx(NUMBERS[spacing, n], rel=2e-5)


def test_even_spacing_warns_and_the_others_do_not():
    with pytest.warns(UserWarning, match="99.98% of the KL"):
        FULL.respaced(10, "even")
    with pytest.warns(UserWarning, match="one step holds"):
        FULL.respaced(50, "even")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FULL.respaced(0),
        lambda: FULL.respaced(1001),
        lambda: FULL.respaced(10, "leading"),
        lambda: FULL.respaced(10, "geometric", lo=0),
        lambda: FULL.respaced(10, "geometric", lo=1e6),
        lambda: NoiseSchedule.from_betas([0.1, 1.5]),
        lambda: NoiseSchedule.from_betas([-0.1]),
        lambda: NoiseSchedule.from_betas([]),
        lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.9]),
        lambda: NoiseSchedule.from_betas([float("nan")]),
    ],
)
def test_impossible_schedules_are_user_errors(wrong):
    with pytest.raises(UserError):
        wrong()


def test_wrong_steps_and_forms():
    x = torch.zeros(2, 3)
    for t in (-1, 1000, torch.tensor([0, -1])):
        with pytest.raises(IndexError):
            FULL.level(t)
    for how in (dict(form="ddpm"), dict(eta=0.5)):
        with pytest.raises(ValueError, match="form"):
            FULL.mean(x, x, 5, **how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_as_on_a_cpu():
    eps, ref, x_t, x_prev = tensors(3, 200)
    t = torch.tensor([1, 500, 999])
    here = (
        FULL.transition_log_prob(eps, x_t, x_prev, t),
        FULL.kl(eps, ref, x_t, t),
        FULL.step(eps, x_t, t, ref),
    )
    eps, ref, x_t, x_prev = (v.cuda() for v in (eps, ref, x_t, x_prev))
    for steps in (t, t.cuda()):
        there = (
            FULL.transition_log_prob(eps, x_t, x_prev, steps),
            FULL.kl(eps, ref, x_t, steps),
            FULL.step(eps, x_t, steps, ref),
        )
        assert all(torch.allclose(b.cpu(), a, rtol=1e-5, atol=1e-6) for a, b in zip(here, there))
