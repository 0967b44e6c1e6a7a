"""The loop: exact ratio, forks, controls, what must and what must not change."""

from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
import torch
from small_policy import TEXTS, TINY, make_model, make_rollout, make_tuner, quiet, spoken

from dlpo_nb.core import UserError
from dlpo_nb.corpus import load_corpus
from dlpo_nb.config import FinetuneConfig, applicable, from_flags
from dlpo_nb.denoising import grid_level
from dlpo_nb.diagnostics import gradient_signal
from dlpo_nb.finetune import Finetuner, load_state, save_state
from dlpo_nb.lora import adapters, merged, without_adapters
from dlpo_nb.mdp import draw_steps, replay, rollout
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.objectives.base import PolicyGradient
from dlpo_nb.policy import state_mask
from dlpo_nb.rewards.base import as_reward
from dlpo_nb.rewards.formula import CombinedReward
from dlpo_nb.rollouts import text_indices


@pytest.mark.parametrize("group_size, fork", [(1, None), (2, None), (3, 3), (2, 4)])
def test_ratio_is_exactly_one(group_size, fork):
    model = spoken(make_model())
    schedule, t = make_rollout(model, group_size=group_size, fork=fork)
    for s in range(3):
        log_prob, _ = replay(model, schedule, t, s)
        assert torch.equal(log_prob.detach(), t.log_prob[s]) and log_prob.requires_grad


def test_batched_equals_alone():
    model = spoken(make_model())
    _, together = make_rollout(model)
    for i, text in enumerate(TEXTS):
        _, alone = make_rollout(model, [text], indices=[i])
        n = int(alone.audio_lengths[0])
        assert n == int(together.audio_lengths[i])
        torch.testing.assert_close(together.audio[i, :n], alone.audio[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.log_prob[:, i], alone.log_prob[:, 0], atol=1e-5, rtol=0)
        assert (together.audio[i, n:] == 0).all()


def test_forked_members_share_the_chain_above_the_fork():
    _, t = make_rollout(spoken(make_model()), group_size=3, fork=2, steps=[2, 1])
    assert len(t.x_t[0]) == len(TEXTS) and len(t.x_prev[0]) == 3 * len(TEXTS) == len(t.x_t[1])
    assert not torch.equal(t.x_prev[0][0], t.x_prev[0][1])


def test_training_above_the_fork_is_refused():
    with pytest.raises(UserError, match="fork"):
        make_rollout(spoken(make_model()), group_size=2, fork=2)


@pytest.mark.parametrize(
    "spec", ["", "all:2", "last:0", "last:6", "random:x", "first:0", "middle:6", "second:2", "last:-1"]
)
def test_bad_train_steps(spec):
    with pytest.raises(UserError, match="train steps"):
        draw_steps(spec, 6)


def test_mask():
    assert state_mask(torch.tensor([2, 1]), 3).tolist() == [[1] * 6, [1] * 3 + [0] * 3]


def test_dlpo_without_penalty_is_ddpo_bit_for_bit():
    dlpo, ddpo = make_tuner(method="dlpo", beta=0.0), make_tuner(method="ddpo")
    for _ in range(2):
        dlpo.episode(), ddpo.episode()
    assert all(torch.equal(a, b) for a, b in zip(dlpo.model.parameters(), ddpo.model.parameters()))


def test_alpha_zero_ignores_the_reward():
    one, other = make_tuner(alpha=0.0), make_tuner(alpha=0.0)
    other.reward = lambda audio, *rest: torch.arange(len(audio)).float()
    one.episode(), other.episode()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


def test_equal_rewards_change_nothing_without_penalty():
    tuner = make_tuner(method="ddpo")
    tuner.reward = lambda audio, *rest: torch.full((len(audio),), 3.0)
    before = [p.clone() for p in tuner.model.parameters()]
    tuner.episode()
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.model.parameters()))


@pytest.mark.parametrize(
    "trainable, changed",
    [("decoder", {"decoder"}), ("all", {"decoder", "encoder", "resampling", "speaker_embedding"})],
)
def test_only_what_is_trainable_changes(trainable, changed):
    tuner = make_tuner(trainable=trainable)
    start = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    tuner.episode()
    moved = {k.split(".")[0] for k, v in tuner.model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == changed
    reference = tuner.reference.state_dict()
    assert all(torch.equal(reference[k], start[k]) for k in start), "the reference is frozen"
    assert not any(p.requires_grad for p in tuner.reference.parameters()) and not tuner.reference.training


def test_shuffled_control_sees_the_same_rollouts_but_other_advantages():
    true, control = make_tuner(), make_tuner(control="shuffle-advantages", seed=0)
    a, b = true.episode(), control.episode()
    assert a["reward/mean"] == b["reward/mean"] and a["advantage/std"] == pytest.approx(b["advantage/std"])
    assert any(not torch.equal(p, q) for p, q in zip(true.model.parameters(), control.model.parameters()))


def test_same_seed_same_run_other_seed_other_run():
    first, second, third = make_tuner(), make_tuner(), make_tuner(seed=1)
    drop = lambda m: {k: v for k, v in m.items() if "seconds" not in k}
    assert drop(first.episode()) == drop(second.episode()) != drop(third.episode())


def test_inner_epochs_move_the_ratio():
    metrics = make_tuner(inner_epochs=3, learning_rate=1e-2).episode()
    assert (
        metrics["ratio/mean"] != 1.0 and metrics["ratio/approx_kl"] > 0 and metrics["ratio/clipfrac"] > 0
    ), "those of the last epoch"
    assert metrics["kl"] < 1e-10, "all else is that of the first"


def test_a_reward_that_is_not_finite_names_its_text():
    tuner = make_tuner(max_skipped=1)
    tuner.reward = lambda audio, *rest: torch.full((len(audio),), float("nan"))
    before = [p.clone() for p in tuner.model.parameters()]
    with pytest.raises(UserError, match="not finite") as error:
        tuner.episode()
    assert any(text in str(error.value) for text in TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.model.parameters()))


def test_a_state_is_of_one_method(tmp_path):
    save_state(make_tuner(method="ddpo"), tmp_path / "state.pt")
    with pytest.raises(UserError, match="--method ddpo"):
        load_state(make_tuner(method="klinr"), tmp_path / "state.pt")


def test_an_objective_of_ones_own(tmp_path):
    """The example of CONTRIBUTING.md, as it stands there."""
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```python\n")[1:] if "objectives.cautious" in block]
    exec(
        compile(example.split("```")[0], "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": __name__}
    )
    try:
        tuner = make_tuner(method="cautious", episodes=2)
        assert tuner.episode()["grad_norm/penalty"] == 0 and tuner.episode()["grad_norm/penalty"] > 0
    finally:
        OBJECTIVES.entries.pop("cautious")


def test_a_slice_offers_the_reference_and_the_group():
    """With these a method can be held by an estimate of the KL,
    or compare the rollouts of a text (k3, DPO)."""
    seen = []

    @OBJECTIVES.register("watching")
    @dataclass
    class Watching(PolicyGradient):
        tau: float = 0.5
        needs = ("policy", "reference")

        def __call__(self, replay):
            seen.append(replay)
            return self.policy_loss(replay)

    try:
        tuner = make_tuner(method="watching", tau=0.25, learning_rate=1e-2)
        tuner.episode(), tuner.episode()
        assert (
            from_flags(FinetuneConfig, ["--method", "watching", "--tau", "2"], {}, "x", "").objective.tau
            == 2.0
        )
    finally:
        OBJECTIVES.entries.pop("watching")
    first, last = seen[0], seen[-1]
    assert tuner.objective.tau == 0.25 and not last.reference_log_prob.requires_grad
    torch.testing.assert_close(first.reference_log_prob, first.log_prob.detach(), atol=1e-9, rtol=0)
    assert (last.reference_log_prob - last.log_prob.detach()).abs().min() > 1e-9
    assert sorted({tuple(replay.group.tolist()) for replay in seen}) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("form", ["mse", "l1", "l2"])
def test_kl_form_reaches_the_loss(form):
    exact, other = make_tuner(method="dpok"), make_tuner(method="dpok", kl_form=form)
    for tuner in (exact, other):
        tuner.episode()
    assert exact.episode()["kl/policy_states"] != other.episode()["kl/policy_states"]


def test_what_is_left_to_the_method():
    found = {m: FinetuneConfig.of(m).resolved() for m in OBJECTIVES.names()}
    built = {m: c.objective for m, c in found.items()}
    betas = dict(
        rwr=None,
        ddpo=None,
        dpok=0.1,
        klinr=0.1,
        dlpo=0.5,
        onlydl=0.5,
        released=None,
        awm=1.0,
        nft=1.0,
        draft=0.0,
    )
    assert {m: getattr(built[m], "beta", None) for m in betas} == betas
    assert (
        built["rwr"].denoising_source == "sample"
        and built["released"].denoising_source == built["dlpo"].denoising_source == "data"
    )
    assert (
        FinetuneConfig.of(reduction="sum").resolved().objective.clip_range == 0.2
        and built["ddpo"].clip_range == 1e-4
    )
    assert FinetuneConfig.of("rwr", tau=2.0).resolved().objective.tau == 2.0 and not built["dlpo"].reward_side
    assert all(c.resolved() == c for c in found.values()), (
        "resolving again changes nothing, so that a run can be resumed"
    )
    assert all(FinetuneConfig.of(**applicable(FinetuneConfig, c.flat())) == c for c in found.values()), (
        "and what is written down is read again"
    )


def test_levels_on_the_grid():
    assert [grid_level(j, 11) for j in range(11)] == [
        999,
        900,
        801,
        702,
        603,
        504,
        405,
        306,
        207,
        108,
        9,
    ] and grid_level(1, 2) == 9


def test_quiet_is_learnt_and_its_control_is_not():
    """From the first three episodes to the last three the reward rises by 2 to 3 standard deviations of a
    rollout (seeds 0 to 2); the control's falls."""
    end, settings = {}, dict(episodes=12, batch_size=12, group_size=4, learning_rate=5e-3, beta=0.0)
    for name, control in (("true", "none"), ("control", "shuffle-advantages")):
        tuner = make_tuner(spoken(make_model(config=TINY)), control=control, **settings)
        rewards = [tuner.episode()["reward/mean"] for _ in range(12)]
        end[name] = sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3
    assert end["true"] > 0 and end["true"] > end["control"]


def test_gradient_signal_counts_groups():
    measured = gradient_signal(make_tuner(batch_size=48, group_size=4))
    assert measured["groups"] == 12 and measured["noise"] > 0


def test_texts_of_an_epoch_are_a_permutation():
    seen = sum((text_indices(e, 3, 12, seed=5) for e in range(4)), [])
    assert sorted(seen) == list(range(12)) and seen != list(range(12))


def test_broken_state_file(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="state.pt"):
        load_state(make_tuner(), tmp_path / "state.pt")


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(method="ddpo", kl_form="l1"), "option of dpok"),
        (dict(method="released", denoising_source="sample"), "option of dlpo, draft, onlydl"),
        (dict(rollout_steps=1, fork=0, train_steps="all"), "at least 2"),
        (dict(batch_size=1, group_size=1, advantage="batch"), "at least 2 rewards"),
        (dict(beta=float("nan")), "beta"),
        (dict(train_steps="last:²"), "train steps"),
        (dict(method="dpok", tau=2.0), "option of rwr"),
        (dict(method="dpok", anchor="old"), "option of awm, nft"),
        (dict(method="draft", draft_steps=7), "more than the 6 steps"),
        (dict(method="draft", draft_steps=6), "--train-steps last:5, or all"),
        (dict(method="draft", train_steps="random:2", fork=0), "keeps no state"),
        (dict(method="draft", draft_steps=0), "at least 1"),
        (dict(method="awm", group_size=1, fork=0), "group advantages need at least 2"),
        (dict(method="rwr", rwr_weights="best", group_size=1, fork=0), "at least 2 rollouts per text"),
        (dict(batch_size=5), "group-size"),
        (dict(control="x"), "control"),
        (dict(episodes=0), "episodes"),
        (dict(trainable="x"), "trainable"),
        (dict(fork=6), "fork"),
        (dict(train_steps="all"), "--fork"),
        (dict(train_steps="random:2"), "--fork"),
        (dict(method="x"), "dlpo"),
        (dict(advantage="x"), "advantage"),
        (dict(group_size=1, fork=0), "group"),
    ],
)
def test_bad_settings(options, word):
    with pytest.raises(UserError, match=word):
        make_tuner(**options).episode()


def test_penalty_on_recordings(data):
    corpus = load_corpus(data / "corpus_tiny")
    config = dict(
        episodes=1,
        batch_size=4,
        group_size=2,
        fork=3,
        rollout_steps=6,
        denoising_frames=8,
        denoising_source="data",
    )
    tuner = Finetuner(FinetuneConfig.of(**config), spoken(make_model()), quiet, TEXTS, corpus)
    assert not tuner.objective.reward_side, "on recordings the score part is pure variance"
    metrics = tuner.episode()
    assert metrics["diffusion_loss"] > 0 and metrics["grad_norm/penalty"] > 0 and metrics["ratio/mean"] == 1.0
    with pytest.raises(UserError, match="denoising-source"):
        Finetuner(FinetuneConfig.of(**config), make_model(), quiet, TEXTS)


def test_bfloat16_is_close_and_on_policy():
    """Half precision in the network moves the numbers a little, the first ratio not at all."""
    exact, half = (make_tuner(method="dpok", precision=kind).episode() for kind in ("float32", "bfloat16"))
    assert half["ratio/mean"] == 1.0 and half["kl"] < 1e-10
    assert half["reward/mean"] != exact["reward/mean"] == pytest.approx(half["reward/mean"], rel=0.05)
    # 8 bits in each product: 1 to 2 %, by processor
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.2)


def test_parts_of_a_reward_are_logged():
    reward = CombinedReward(
        {"quiet": 1.0, "seconds": 0.0},
        {"quiet": as_reward(quiet), "seconds": as_reward(lambda a, n, rate, texts: n / rate)},
    )
    tuner = make_tuner(reward=reward)
    metrics = tuner.episode()
    assert metrics["reward/quiet"] == pytest.approx(metrics["reward/mean"]) and metrics[
        "reward/seconds"
    ] * 4 == pytest.approx(metrics["audio_seconds"])
    assert metrics["reward/failed"] == 0 and metrics["seconds/scoring"] > 0


def test_scoring_overlaps_the_rollouts(monkeypatch):
    """The first micro-batch's score waits until the second is being sampled."""
    begun, heard, places = Event(), [], []

    def reward(audio, *rest):
        heard.append(begun.wait(60))
        return audio.square().mean(1)

    def watched(*arguments, **options):
        places.append(options["indices"])
        if len(places) == 2:
            begun.set()
        return rollout(*arguments, **options)

    monkeypatch.setattr("dlpo_nb.rollouts.rollout", watched)
    make_tuner(batch_size=12, reward=reward).episode()
    assert len(places) == len(heard) == 6 and all(heard)


@pytest.mark.parametrize("method", ["dlpo", "dpok", "klinr"])
def test_low_rank_changes_begin_at_the_reference(method):
    """Ratio 1 and KL 0 at the start, without a second model;
    the base is untouched and is the reference to the end."""
    plain, tuner = make_tuner(method=method) if method != "dlpo" else make_tuner(), None
    before = {k: v.clone() for k, v in plain.model.state_dict().items()}
    tuner = make_tuner(method=method, lora_rank=2, learning_rate=1e-2)
    first, second = tuner.episode(), tuner.episode()
    assert first["ratio/mean"] == second["ratio/mean"] == 1.0 and first["kl"] < 1e-10 < second["kl"]
    assert first["reward/mean"] == plain.episode()["reward/mean"] and len(tuner.parameters) == 2 * len(
        adapters(tuner.model)
    )
    with without_adapters(tuner.model):
        kept = merged(tuner.model).state_dict()
    assert kept.keys() == before.keys() and all(torch.equal(kept[k], before[k]) for k in before)
    assert {
        k.split(".")[0] for k, v in merged(tuner.model).state_dict().items() if not torch.equal(v, before[k])
    } == {"decoder"}


def test_low_rank_changes_are_saved_and_resumed(tmp_path):
    whole, first, second = (make_tuner(lora_rank=2) for _ in range(3))
    whole.episode(), whole.episode(), first.episode()
    save_state(first, tmp_path / "state.pt")
    load_state(second, tmp_path / "state.pt")
    second.episode()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters))


def test_bfloat16_sees_the_weights_of_each_step():
    """Autocast keeps the casted weights as long as it lasts;
    the second inner epoch must not compute with those of the first."""
    metrics = make_tuner(inner_epochs=2, learning_rate=1e-2, precision="bfloat16").episode()
    assert metrics["ratio/mean"] != 1.0 and metrics["ratio/approx_kl"] > 0


def test_a_method_that_is_defined_again_keeps_its_name(monkeypatch):
    """As when the cell of its notebook is run after the library was imported."""
    monkeypatch.setitem(OBJECTIVES.entries, "dlpo", type("DLPO", (), {}))
    assert FinetuneConfig().method == "dlpo"
