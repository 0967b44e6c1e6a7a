"""Every voice is trained by the same loop: shares add up, resuming is exact, something is learnt."""

import json
from dataclasses import replace
from pathlib import Path

import commands
import pretrain_process
import pytest
import torch
import toy_mel
from small_gradtts import SMALL, make_gradtts, shrunk, write_corpus

from dlpo_nb import recipes
from dlpo_nb.core import UserError
from dlpo_nb.corpus import load_corpus
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.locks import unlock_folders
from dlpo_nb.policy import load_policy, recorded, state_durations
from dlpo_nb.pretrain import fit, prepare
from dlpo_nb.pretrain_settings import PretrainConfig, parse
from dlpo_nb.training_run import first_model
from dlpo_nb.recipes import budget_batches, recipe_for, stratified_levels
from dlpo_nb.vocoder import GriffinLim
from dlpo_nb.vocos import Vocos

TINY_UNET = GradTTSConfig(
    encoder_channels=16, encoder_hidden=32, duration_hidden=16, encoder_layers=2, decoder_channels=16
)
RATES = {"gradtts-small": 24000, "gradtts": 22050, "toy_mel": 16000}
RATES_OF_TWO = {"tiny": 22050, "gradtts-small": 24000, "toy_mel": 16000}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """The architectures by their names, at a size for tests; the folders of a run are let go."""
    monkeypatch.setattr(GradTTSConfig, "released", classmethod(lambda cls: TINY_UNET))
    with shrunk():
        yield
    unlock_folders()


@pytest.fixture(params=RATES)
def config(request, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", RATES[request.param])
    settings = dict(batch_seconds=1.0, held_out=2, log_every=4, sample_every=0, score=False, device="cpu")
    return PretrainConfig(
        corpus,
        tmp_path / "run",
        arch=request.param,
        steps=8,
        optimiser="adamw",
        precision="float32",
        **settings,
    )


def test_resume_is_exact(config, tmp_path):
    whole = prepare(config)
    fit(whole, progress=False)
    parts = replace(config, out=tmp_path / "parts")
    fit(prepare(parts), last_step=3, progress=False)
    second = prepare(replace(parts, resume=True))
    assert second.step == 3
    fit(second, progress=False)
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, second.ema.state_dict()[name]), name
    rows = whole.folder.metrics()
    assert [row["loss"] for row in second.folder.metrics()] == [row["loss"] for row in rows]
    assert set(rows[-1]["validation"]) >= {"16", "850", "duration"}
    saved = load_policy(config.out / "base.safetensors")
    assert saved.kind == whole.model.kind and saved.metadata["steps"] == "8"


def test_a_base_is_heard_by_a_vocoder_that_knows_its_speaker(tmp_path, monkeypatch):
    """The packaged one knows hibari only; the choice is kept in the base."""
    monkeypatch.delenv("DLPO_VOCODER", raising=False)
    items = load_corpus(write_corpus(tmp_path / "corpus", 24000), 24000)
    recipe = recipe_for(PretrainConfig(tmp_path, tmp_path, arch="gradtts-small", steps=1))
    other, known = recipe.new_policy(items), recipe.new_policy([replace(i, voice="hibari") for i in items])
    assert isinstance(other.vocoder, GriffinLim) and isinstance(known.vocoder, Vocos)
    assert (other.config.voice, known.config.voice) == ("", "hibari")
    known.save(tmp_path / "known.safetensors")
    begun = first_model(replace(recipe.config, start_from=str(tmp_path / "known.safetensors")), recipe, items)
    assert isinstance(begun.vocoder, GriffinLim) and begun.config.mel_mean == known.config.mel_mean
    assert begun.config.voice == ""
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), known.parameters(), strict=True))
    other.save(tmp_path / "base.safetensors")
    assert isinstance(load_policy(tmp_path / "base.safetensors").vocoder, GriffinLim)


def test_processes_add_up(config, monkeypatch):
    """Two processes' parts of a step, in one: the losses of the whole batch."""
    recipe = recipe_for(replace(config, batch_seconds=3.0))
    items = load_corpus(config.corpus, recipe.sample_rate)
    torch.manual_seed(0)
    policy = recipe.new_policy(items).eval()

    def parts(rows):
        monkeypatch.setattr(recipes, "shard", lambda whole: list(whole)[rows])
        batch = recipe.steps(policy, items)[1]
        return torch.stack(recipe.losses(policy, batch))

    whole = parts(slice(None))
    # sums in float32
    torch.testing.assert_close(
        parts(slice(0, None, 2)) + parts(slice(1, None, 2)), whole, rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """States of a few steps by one process and by two, of each voice."""
    folder = tmp_path_factory.mktemp("processes")
    settings = dict(steps=3, batch_size=3, batch_seconds=2.0, window_frames=16, warmup_steps=1, held_out=2)
    settings |= dict(sample_every=0, score=False, optimiser="adamw", precision="float32", device="cpu")
    for name in ("one", "two"):
        jobs = [
            settings
            | dict(corpus=str(folder / f"corpus {arch}"), arch=arch, out=str(folder / f"{name} {arch}"))
            for arch in RATES_OF_TWO
        ]
        (folder / f"{name}.json").write_text(json.dumps(jobs))
    for arch, rate in RATES_OF_TWO.items():
        write_corpus(folder / f"corpus {arch}", rate)
    done = commands.torchrun(Path(__file__).parent / "pretrain_process.py", folder / "two.json")
    assert done.returncode == 0, done.stderr
    pretrain_process.train(folder / "one.json")
    return {
        arch: [torch.load(folder / f"{n} {arch}" / "state.pt", weights_only=True) for n in ("one", "two")]
        for arch in RATES_OF_TWO
    }


def moments(state):
    """Means of the gradients, as the optimisers keep them."""
    kept = (entry for optimiser in state["optimisers"] for entry in optimiser["state"].values())
    return torch.cat([entry["exp_avg"].double().flatten() for entry in kept])


@pytest.mark.parametrize("arch", RATES_OF_TWO)
def test_two_processes_are_one(arch, both):
    """In float64 but for losses; Grad-TTS, which measures spectrograms in float32, in that."""
    one, two = both[arch]
    gradient, weight = (1e-5, 1e-5) if arch == "gradtts-small" else (1e-7, 1e-9)
    torch.testing.assert_close(one["sums"], two["sums"], rtol=1e-5, atol=0)
    assert (moments(one) - moments(two)).norm() <= gradient * moments(one).norm() > 0
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert (value.double() - two[part][key].double()).abs().max() < weight, key
    assert any(not torch.equal(value, one["ema"][key]) for key, value in one["model"].items())


def test_something_is_learnt(config):
    run = prepare(replace(config, steps=60, log_every=30, lr=3e-3, warmup_steps=5))
    fit(run, progress=False)
    first, last = run.folder.metrics()
    assert last["duration_loss"] < first["duration_loss"] or last["loss"] < first["loss"]


def test_levels_next_to_clean_are_finite():
    """In float32 a level above that of the first step may be 1."""
    voice = make_gradtts()
    level = torch.tensor([[1.0], [0.9999999], [0.5]])
    assert torch.isfinite(voice.decoder.features(level)).all()
    schedule = voice.training_schedule()
    levels = stratified_levels(500, schedule, torch.Generator().manual_seed(0))
    assert levels.sort(0).values.diff(dim=0).min() >= 0 and levels.max() <= 1
    assert levels.min() >= schedule.levels[-1].float()


def test_durations_of_another_frame():
    voice = make_gradtts()  # a frame of 600 samples
    durations = torch.tensor([[2, 4, 6, 2], [3, 1, 0, 0]])
    found = state_durations(voice, durations, torch.tensor([4, 2]), 300)
    assert found.tolist() == [[1, 2, 3, 1], [2, 1, 0, 0]]
    crowded = state_durations(voice, torch.tensor([[1, 0, 0, 1]]), torch.tensor([4]), 300)
    assert crowded.tolist() == [[1, 1, 1, 1]]


def test_recorded_speech_is_as_long_as_its_frames(tmp_path):
    voice, items = make_gradtts(), load_corpus(write_corpus(tmp_path / "c"), 24000)
    batch = recorded(voice, items[:3])
    assert batch["audio"].shape[1] == 600 * int(batch["frames"].max())
    assert batch["frames"].tolist() == [len(item.ids) for item in items[:3]]


def test_batches_keep_to_their_budget():
    sizes = torch.rand(200, generator=torch.Generator().manual_seed(0)).add(0.5).tolist()
    batches = budget_batches(sizes, 6.0, 2, torch.Generator().manual_seed(1))
    assert sorted(sum(batches, [])) == list(range(200))
    assert all(len(batch) >= 2 for batch in batches)
    assert sum(sum(sizes[i] for i in batch) <= 6.0 for batch in batches) >= len(batches) - 1


def test_command_line_knows_what_each_voice_wants():
    small = parse("--corpus c --out o --steps 5 --arch gradtts-small".split())
    assert (small.optimiser, small.lr) == ("adamw", 1.5e-3)
    assert parse("--corpus c --out o --steps 5 --arch=gradtts-small --lr 0.001".split()).lr == 0.001
    assert parse("--corpus c --out o --steps 5".split()).optimiser == "muon"
    with pytest.raises(UserError, match="no architecture 'huge'.*gradtts-small.*toy_mel"):
        parse("--corpus c --out o --steps 5 --arch huge".split())


def test_a_base_of_another_size_is_refused(tmp_path):
    make_gradtts().save(tmp_path / "base.safetensors")
    config = PretrainConfig(
        write_corpus(tmp_path / "c"), tmp_path / "run", arch="gradtts-small", steps=1, score=False, held_out=2
    )
    prepare(replace(config, start_from=str(tmp_path / "base.safetensors"), out=tmp_path / "same"))
    toy_mel.make_toy_mel().save(tmp_path / "toy.safetensors")
    with pytest.raises(UserError, match="is not of the size --arch gradtts-small"):
        prepare(replace(config, start_from=str(tmp_path / "toy.safetensors")))


def test_statistics_are_those_of_the_corpus(tmp_path):
    items = load_corpus(write_corpus(tmp_path / "c"), 24000)
    policy = recipe_for(PretrainConfig(tmp_path, tmp_path, arch="gradtts-small", steps=1)).new_policy(items)
    batch = recorded(policy, items.items)
    mel = policy.normalised_mel(batch["audio"], batch["frames"])
    inside = torch.arange(mel.shape[1]) < batch["frames"][:, None]
    values = mel[inside]
    # the whole corpus is measured, here in units of 25 ms
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert isinstance(policy, GradTTS) and policy.config != SMALL
