"""A Grad-TTS of a few thousand weights, and a corpus of noise at its rate, for more than one test file."""

from unittest import mock

import numpy as np
import torch

from dlpo_nb.core import append_jsonl
from dlpo_nb.corpus import keep_utterance
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.vocoder import GriffinLim

SIZES = dict(encoder_channels=16, decoder_channels=16, decoder_blocks=2)
SMALL = GradTTSConfig.small(**SIZES)
NARROW = dict(
    encoder_channels=16, encoder_hidden=32, duration_hidden=16, encoder_layers=2, decoder_channels=16
)


def shrunk():
    """A context in which the architecture gradtts-small has the size for tests."""
    small = GradTTSConfig.small
    return mock.patch.object(
        GradTTSConfig, "small", classmethod(lambda cls, *known, **more: small(*known, **(SIZES | more)))
    )


def make_gradtts(seed=0):
    """The small network with weights that do something, heard through two iterations of Griffin-Lim."""
    torch.manual_seed(seed)
    voice = GradTTS(SMALL).eval()
    with torch.no_grad():
        for layer in (
            voice.decoder.leave,
            voice.decoder.gain,
            *(block.down for block in voice.decoder.blocks),
        ):
            layer.weight.normal_(std=0.05)
    voice.__dict__["vocoder"] = GriffinLim(voice.mel, iterations=2)
    return voice


def make_unet(seed=0):
    """The released network, narrow, with random weights, heard through one iteration of Griffin-Lim."""
    torch.manual_seed(seed)
    voice = GradTTS(GradTTSConfig(**NARROW)).eval()
    voice.__dict__["vocoder"] = GriffinLim(voice.mel, iterations=1)
    return voice


def write_corpus(folder, sample_rate=24000, count=8, seed=0):
    """Utterances of coloured noise, two corpus frames per symbol; returns the folder."""
    draw = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True)
    words = ["AA1", "B", "IY1", "S", "OW1", "K", "UW1", "T"]
    for i in range(count):
        phones = [words[j] for j in draw.integers(0, 8, 14 + i)]
        audio = (3000 * draw.standard_normal(600 * len(phones))).astype(np.int16)
        row = keep_utterance(
            folder, f"{i:06d}", f"Text {i}.", audio, phones, [2] * len(phones), sample_rate=sample_rate
        )
        append_jsonl(folder / "manifest.jsonl", row)
    return folder
