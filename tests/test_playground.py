"""The playground without a browser: its buttons pressed, its mistakes answered."""

import re

import pytest
import torch

from dlpo_nb.core import RunDir, UserError, asset
from dlpo_nb.playground import Playground, finished, in_a_row, speak_both, unfinished
from dlpo_nb.policies import load_policy
from dlpo_nb.say import SayConfig

WISH = SayConfig("Rain.", base="tiny_base", steps=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run's folder whose tuned model is the packaged WaveGrad 2 with moved weights."
    run, policy = (
        RunDir(tmp_path_factory.mktemp("runs") / "mine <1>"),
        load_policy(asset("tiny_base.safetensors")),
    )
    with torch.no_grad():
        for weight in policy.decoder.parameters():
            weight *= 1.05
    run.write_json("config.json", dict(base_checkpoint="tiny_base"))
    policy.save(run.path / "checkpoints" / "tuned.safetensors")
    return run.path


@pytest.fixture
def panel(run):
    "A panel that asks for that run."
    made = Playground("Rain.", "tiny_base", str(run), judges=("dnsmos",))
    made.wishes.steps.value, made.ask.value = 4, False
    return made


def test_a_chain_is_what_the_rollout_made(run):
    base, tuned = speak_both(WISH, f" {run} ")
    assert [base.name, tuned.name] == ["base", "tuned (mine <1>)"] and base.length == tuned.length == 4
    assert torch.equal(base.made.x_t[0], tuned.made.x_t[0]), "the same noise"
    assert not torch.equal(base.made.x_0, tuned.made.x_0)
    clip = base.heard(4)
    assert torch.equal(clip.audio, base.made.audio[0]) and clip.sample_rate == base.policy.sample_rate
    sounds = [base.heard(done).audio for done in range(5)]
    assert all(not torch.equal(a, b) for a, b in zip(sounds, sounds[1:]))
    (again,) = speak_both(WISH)
    assert torch.equal(again.made.x_0, base.made.x_0), "a seed is a sound"


def test_noise_is_not_played_at_full_scale(run):
    (base,) = speak_both(WISH)
    title, clip = unfinished(base, 0)
    assert "after 0 of 4 steps" in title and clip.audio.square().mean().sqrt() < 0.06
    page = in_a_row([finished(base), (title, clip)])
    assert page.count("<audio") == page.count("<img") == 2


def test_speak_shows_players_states_and_scores(panel):
    assert len(panel.children) == 3
    panel.ask.value = True
    panel.button.click()
    assert panel.status.value == "Done." and len(panel.children) == 7 and not panel.button.disabled
    assert panel.sounds.value.count("<audio") == panel.states.value.count("<audio") == 2
    assert "mine &lt;1&gt;" in panel.sounds.value and "<1>" not in panel.sounds.value + panel.scores.value
    assert len(re.findall(r"<td>dnsmos</td><td>\d\.\d\d</td><td>\d\.\d\d</td>", panel.scores.value)) == 1
    panel.ask.value = False
    panel.button.click()
    assert panel.status.value == "Done." and not panel.scores.value, (
        "the scores of before are of another sound"
    )


def test_the_slider_walks_through_the_steps(panel):
    panel.button.click()
    assert (panel.place.min, panel.place.max, panel.place.value) == (0, 4, 2)
    assert "after 2 of 4 steps" in panel.states.value
    panel.place.value = 4
    assert "after 4 of 4 steps" in panel.states.value
    panel.wishes.steps.value, panel.wishes.tuned.value = 3, ""
    panel.button.click()
    assert (panel.place.max, panel.place.value) == (3, 1) and panel.states.value.count("<audio") == 1


MISTAKES = [
    ("text", " \n", "no text"),
    ("text", "...", "speak|words"),
    ("text", "long " * 1500, "at most"),
    ("tuned", "nowhere", "nowhere"),
    ("tuned", "gradtts_small", "base that it was tuned from"),
    ("tuned", "FOLDER", "config.json"),
    ("tuned", "FOLDER/a.safetensors", "a.safetensors"),
    ("tuned", "a\0b", "there is no run"),
    ("vocoder", "griffinlim", "leave out --vocoder"),
]


def test_a_mistake_is_one_sentence_and_breaks_nothing(panel, tmp_path):
    (tmp_path / "a.safetensors").write_text("<b>not weights</b>")
    panel.button.click()
    before = panel.sounds.value
    for wish, value, sentence in MISTAKES:
        control = getattr(panel.wishes, wish)
        right, control.value = control.value, value.replace("FOLDER", str(tmp_path))
        panel.button.click()
        said = panel.status.value
        assert re.search(sentence, said) and "\n" not in said and "<" not in said, said
        assert panel.sounds.value == before and not panel.button.disabled
        control.value = right
    panel.button.click()
    assert panel.status.value == "Done."


def test_a_run_without_a_tuned_model(tmp_path):
    RunDir(tmp_path).write_json("config.json", dict(base_checkpoint="tiny_base"))
    with pytest.raises(UserError, match="no tuned model yet"):
        speak_both(WISH, str(tmp_path))


def test_judges_that_cannot_be_had_are_named(panel, monkeypatch):
    monkeypatch.delenv("DLPO_NISQA_WEIGHTS", raising=False)
    panel.names, panel.ask.value = ("nisqa",), True
    panel.button.click()
    assert "nisqa" in panel.status.value and panel.sounds.value.count("<audio") == 2
