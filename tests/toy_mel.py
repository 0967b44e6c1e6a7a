"""The voice of 04b_policy, whose state is a spectrogram: the second policy that everything is tested on."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.policy import POLICIES, Conditioning, Policy, state_mask
from dlpo_nb.text import text_to_ids


@dataclass(frozen=True)
class ToyMelConfig:
    bands: int = 8
    hop: int = 80  # samples per frame, 5 ms at 16 kHz
    std: float = 0.3  # of the log-amplitudes around their means


@POLICIES.register("toy_mel")
class ToyMel(Policy):
    """A voice of a few sine waves; the state of a frame is their log-amplitudes,
    minus the means that the text asks for."""

    kind, Config, sample_rate = "toy_mel", ToyMelConfig, 16000

    def __init__(self, config):
        super().__init__(config)
        self.width, self.frame_rate = config.bands, self.sample_rate / config.hop
        turns = torch.arange(config.hop) / config.hop * torch.arange(1, config.bands + 1)[:, None]
        self.register_buffer("waves", (2 * math.pi * turns).sin())  # (bands, hop), orthogonal
        # seconds per symbol
        self.encoder = nn.Embedding(151, config.bands)
        self.pace = nn.Parameter(torch.tensor(0.04))
        self.decoder = nn.Conv1d(2 * config.bands, config.bands, 3, padding=1)

    def encode(self, texts):
        return [text_to_ids(text) for text in texts]

    def condition(self, ids, lengths, durations=None):
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        seconds = self.pace * mask
        durations = (seconds * self.frame_rate).round().long() if durations is None else durations
        rows = [self.encoder(row).repeat_interleave(n, 0) - 4 for row, n in zip(ids, durations)]
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)
        return Conditioning(hidden, durations.sum(1), durations, seconds, mask)

    def predict_noise(self, x, hidden, level, frames=None):
        frames = torch.full((len(x),), hidden.shape[2], device=x.device) if frames is None else frames
        x, level, mask = x.to(hidden), level.to(hidden), state_mask(frames, 1)[:, None]
        variance = (level * self.config.std).square() + 1 - level.square()  # of x, at this level
        seen = (
            torch.cat([(x / variance.sqrt()).unflatten(1, (-1, self.width)).transpose(1, 2), hidden], 1)
            * mask
        )
        learnt = (self.decoder(seen) * mask).transpose(1, 2).flatten(1)
        return ((1 - level.square()).sqrt() / variance * x + 0.1 * level * learnt) * state_mask(
            frames, self.width
        )

    def render(self, x_0, conditioning):
        amplitudes = (x_0.unflatten(1, (-1, self.width)) + conditioning.hidden.transpose(1, 2)).exp()
        audio = (amplitudes @ self.waves).flatten(1) * state_mask(conditioning.frames, self.config.hop)
        return audio.clamp(-1, 1), conditioning.frames * self.config.hop

    def analyse(self, audio, conditioning):
        amplitudes = (
            audio.to(self.waves).unflatten(1, (-1, self.config.hop)) @ self.waves.T * 2 / self.config.hop
        )
        return (amplitudes.clamp(min=1e-6).log() - conditioning.hidden.transpose(1, 2)).flatten(1)

    def training_schedule(self):
        return NoiseSchedule.linear().bounded(None)


def make_toy_mel(seed=0, kind=torch.float32, pace=0.015):
    """The voice at random weights, three frames per symbol."""
    torch.manual_seed(seed)
    voice = ToyMel(ToyMelConfig()).to(kind).eval()
    with torch.no_grad():
        voice.pace.fill_(pace)
    return voice
