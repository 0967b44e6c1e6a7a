"""HiFi-GAN: equal to the reference from every kind of file, alone as in a batch; other files are refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deterministic_weights import noise
from dlpo_nb.core import UserError
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.hifigan import HifiGan, fold
from dlpo_nb.vocoder import HIFIGAN_MEL, SMALL_MEL, GriffinLim, get_vocoder
from dlpo_nb.vocos import Vocos, default_vocoder
from gradtts_weights import generator, generator_shapes, small_generator

AUDIO = 1e-4  # the reference's tolerance; float32 differs from float64 by 8e-7
NEW = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def renamed(key):
    for old, new in NEW.items():
        key = key.replace(old, new)
    return key


@pytest.fixture(scope="module")
def state(data):
    return generator(generator_shapes(data))


@pytest.fixture(scope="module")
def small(data):
    return small_generator(data)


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def test_equal_to_the_reference_from_the_old_container(state, data, tmp_path):
    path = saved({"generator": state}, tmp_path / "hifigan.pt", _use_new_zipfile_serialization=False)
    sound = HifiGan(weights=path)(2 * noise((1, 80, 12), "gt/voc/mel") - 4, torch.tensor([12]))
    np.testing.assert_allclose(sound[0], np.load(data / "hifigan_reference.npz")["audio"], atol=AUDIO)


def test_every_kind_of_file_gives_the_same_network(small, tmp_path):
    files = [
        saved({"generator": small, "steps": 7}, tmp_path / "zip.pt"),
        saved(small, tmp_path / "bare.pt"),
        saved({"generator": {renamed(k): v for k, v in small.items()}}, tmp_path / "new names.pt"),
        saved({"state_dict": fold(small)}, tmp_path / "folded.pt"),
    ]
    save_file(small, tmp_path / "hifigan.safetensors")
    mel = 2 * noise((1, 80, 9), "kinds") - 4
    sounds = [HifiGan(weights=f)(mel, torch.tensor([9])) for f in [*files, tmp_path / "hifigan.safetensors"]]
    assert sounds[0].shape == (1, 9 * 256) and sounds[0].abs().max() > 0
    for sound in sounds[1:]:
        torch.testing.assert_close(sound, sounds[0], atol=1e-5, rtol=0)


def test_folding_is_torchs_weight_norm(state):
    up = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(6, 4, 8, 4, 2))
    plain = fold({f"ups.0.{key}": value.detach() for key, value in up.state_dict().items()})
    assert plain.keys() == {"ups.0.weight", "ups.0.bias"}
    torch.testing.assert_close(plain["ups.0.weight"], up.weight.detach())
    assert len(fold(state)) == 156 and sum(value.numel() for value in fold(state).values()) == 13_926_017


def test_batches_are_their_items_and_autocast_changes_nothing(small, tmp_path):
    vocoder = get_vocoder("hifigan", HIFIGAN_MEL, weights=saved(small, tmp_path / "small.pt"))
    mels, frames = 2 * noise((3, 80, 20), "batch") - 4, torch.tensor([20, 7, 20])
    together = vocoder(mels, frames)
    assert together.shape == (3, 20 * 256) and not together[1, 7 * 256 :].any()
    for i, n in enumerate(frames.tolist()):
        alone = vocoder(mels[i : i + 1, :, :n], frames[i : i + 1])[0]
        torch.testing.assert_close(together[i, : n * 256], alone, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vocoder(mels, frames), together)


def test_a_policy_with_hifigans_mel_speaks_through_it_where_weights_are_named(small, tmp_path, monkeypatch):
    monkeypatch.delenv("DLPO_HIFIGAN_WEIGHTS", raising=False)
    assert isinstance(default_vocoder(HIFIGAN_MEL), GriffinLim)
    monkeypatch.setenv("DLPO_HIFIGAN_WEIGHTS", str(saved(small, tmp_path / "small.pt")))
    assert isinstance(default_vocoder(SMALL_MEL), Vocos)
    policy = GradTTS(GradTTSConfig(encoder_layers=1, decoder_channels=8))
    assert isinstance(policy.vocoder, HifiGan) and not any("vocoder" in key for key in policy.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "convs1" not in k},
            "not a HiFi-GAN generator of version 1 or 2",
        ),
        (lambda s: {k: v for k, v in s.items() if "ups" not in k}, "not a HiFi-GAN generator"),
        (lambda s: {"conv.weight": torch.zeros(3)}, "not a HiFi-GAN generator"),
        (lambda s: {k: v for k, v in s.items() if "conv_post" not in k}, "lacks 2 entries"),
        (lambda s: {**s, "one.more": torch.zeros(1)}, "1 entry too many"),
        (lambda s: {**s, "ups.1.bias": torch.zeros(5)}, "ups.1.bias"),
        (lambda s: {**s, "conv_pre.bias": s["conv_pre.bias"] / 0}, "not finite"),
        (lambda s: {**s, "conv_pre.weight_v": s["conv_pre.weight_v"][:, :64]}, "64 bands.*80 and 256"),
    ],
)
def test_other_files_are_refused_in_one_sentence(small, tmp_path, change, words):
    path = saved({"generator": change(small)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=words):
        HifiGan(weights=path)


def test_a_mel_of_other_frames_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="80 bands into 256 samples.*100 and 300"):
        get_vocoder("hifigan", SMALL_MEL, weights=saved(small, tmp_path / "small.pt"))


def test_without_weights_it_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.delenv("DLPO_HIFIGAN_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="hifigan.pt.*DLPO_HIFIGAN_WEIGHTS"):
        HifiGan()
    with pytest.raises(UserError, match="none.pt"):
        HifiGan(weights=tmp_path / "none.pt")
