"""Untrained policies of a few thousand numbers or of one, and the loop around them,
for more than one test file."""

from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from dlpo_nb.config import FinetuneConfig
from dlpo_nb.finetune import Finetuner
from dlpo_nb.gradients import Gradients, Log
from dlpo_nb.mdp import rollout
from dlpo_nb.policy import Conditioning, Policy
from dlpo_nb.text import text_to_ids
from dlpo_nb.wavegrad2.model import AUDIO_MAX, WaveGrad2, WaveGrad2Config

TEXTS = ["Go home.", "The door is open.", "Rain."]
SMALL = WaveGrad2Config(
    encoder_channels=16,
    speaker_channels=4,
    predictor_channels=8,
    first_up=16,
    up=(16, 16, 8, 8, 8),
    first_down=4,
    down=(8, 8, 8, 16),
    preconditioned=True,
    data_std=0.18,
)
TINY = WaveGrad2Config(
    encoder_channels=8,
    speaker_channels=4,
    predictor_channels=4,
    factors=(3, 2),
    first_up=8,
    up=(8, 4),
    up_dilations=((1, 2, 1, 2),) * 2,
    first_down=4,
    down=(8,),
    preconditioned=True,
    data_std=0.18,
)


class Spoken(WaveGrad2):
    """Speaks a few frames for every symbol, whatever its duration predictor says,
    in the precision of its weights."""

    spoken_frames = 4

    def condition(self, ids, lengths, durations=None, **options):
        durations = (ids > 0).long() * self.spoken_frames if durations is None else durations
        return super().condition(ids, lengths, durations=durations, **options)

    def predict_noise(self, x, hidden, level, frames=None):
        kind = next(self.parameters()).dtype
        return super().predict_noise(x.to(kind), hidden.to(kind), level.to(kind), frames)


def make_model(seed=0, config=SMALL):
    torch.manual_seed(seed)
    model = WaveGrad2(config).eval()
    with torch.no_grad():
        model.resampling.duration_predictor.fc[0].weight.fill_(0)
        model.encoder.embedding.weight.mul_(0.5)
        model.decoder.ublock_postconv.conv1d.weight.mul_(0.1)  # as at the start of a training
    return model


def spoken(model, frames=4):
    """The model with predicted durations of a few frames for every symbol."""
    model.__class__, model.spoken_frames = Spoken, frames
    return model


def quiet(audio, lengths, rate, texts):
    """A reward that is cheap and padding-proof: minus the mean power."""
    return torch.stack([-a[:n].square().mean() for a, n in zip(audio, lengths)])


def make_tuner(model=None, reward=quiet, texts=TEXTS, corpus=None, **options):
    settings = (
        dict(
            episodes=2,
            batch_size=4,
            group_size=2,
            fork=3,
            rollout_steps=6,
            train_steps="last:3",
            denoising_frames=8,
        )
        | options
    )
    settings.setdefault("micro_batch", settings["group_size"])
    if corpus is None and settings.get("method", "dlpo") in ("dlpo", "onlydl"):
        settings.setdefault("denoising_source", "sample")
    return Finetuner(FinetuneConfig.of(**settings), model or spoken(make_model()), reward, texts, corpus)


def gradients_of(tuner, trajectories, advantages, e=0):
    """Gradients and statistics of the slices of an update whose optimiser stands still."""
    gradients, logs = [], []

    def kept(kind, place):
        return lambda *arguments: place.append(kind(*arguments)) or place[-1]

    with (
        mock.patch("dlpo_nb.finetune.Gradients", kept(Gradients, gradients)),
        mock.patch("dlpo_nb.finetune.Log", kept(Log, logs)),
        mock.patch.object(tuner.optimiser, "step"),
    ):
        tuner.update(trajectories, advantages, e)
    return gradients[0], logs[0].means()


def make_rollout(model, texts=TEXTS, **options):
    schedule = FinetuneConfig(rollout_steps=6).schedule(model)
    arguments = dict(steps=[3, 2, 1], key=(0, "test"), indices=list(range(len(texts)))) | options
    return schedule, rollout(model, schedule, texts, model.encode(texts), **arguments)


def make_corpus(hop, symbols=(3, 5, 4, 6) * 8, std=0.18, seed=1):
    """Recordings of white noise, a frame a symbol."""
    draw = torch.Generator().manual_seed(seed)
    audio = [
        (std * torch.randn(n * hop, generator=draw)).clamp(-1, 1).mul(32767).round().short().numpy()
        for n in symbols
    ]
    return [
        SimpleNamespace(ids=list(range(1, n + 1)), frames=[1] * n, audio=a, samples=len(a))
        for n, a in zip(symbols, audio)
    ]


class OwnPolicy(Policy):
    """A voice whose state is its audio, with a frame for each of the first symbols, float64."""

    sample_rate = 16000

    def __init__(self, hop, longest):
        super().__init__(None)
        self.width, self.frame_rate, self.longest = hop, 16000 / hop, longest
        self.encoder = nn.Embedding(151, 2, dtype=torch.float64)

    def encode(self, texts):
        return [text_to_ids(text) for text in texts]

    def render(self, x_0, conditioning):
        return x_0.clamp(-1, AUDIO_MAX), conditioning.frames * self.width

    def analyse(self, audio, conditioning):
        return audio

    def denoising_error(self, eps, noise, level):
        return (eps - noise).abs()

    def condition(self, ids, lengths, durations=None):
        mask = ids > 0
        if durations is None:
            durations = mask.long() * (torch.arange(ids.shape[1]) < self.longest)
        frames = durations.sum(1)
        said = [self.encoder(row).repeat_interleave(n, 0) for row, n in zip(ids, durations)]
        hidden = nn.utils.rnn.pad_sequence(said, batch_first=True).transpose(1, 2)
        return Conditioning(hidden, frames, durations, self.encoder.weight.sum() * mask, mask)


class ConvPolicy(OwnPolicy):
    """The best denoiser of white noise, and beside it two convolutions; a batch equals its items alone."""

    def __init__(self, seed=0, hop=4, longest=6, std=0.18, width=8):
        torch.manual_seed(seed)
        super().__init__(hop, longest)
        self.std = std
        self.decoder = nn.ModuleList(
            [
                nn.Conv1d(4, width, 3, padding=1, dtype=torch.float64),
                nn.Conv1d(width, 1, 3, padding=1, dtype=torch.float64),
            ]
        )
        with torch.no_grad():
            self.decoder[1].weight.mul_(0.05), self.decoder[1].bias.mul_(0)

    def predict_noise(self, x, hidden, level, frames=None):
        x, level = x.double(), level.double()
        frames = torch.full((len(x),), hidden.shape[-1]) if frames is None else frames
        mask = (torch.arange(x.shape[1]) < frames[:, None] * self.width).double()[:, None]
        variance = (level * self.std).square() + 1 - level.square()
        seen = torch.cat(
            [
                (x / variance.sqrt())[:, None],
                hidden.repeat_interleave(self.width, 2),
                level[:, :, None].expand(-1, 1, x.shape[1]),
            ],
            1,
        )
        inner = self.decoder[0](seen * mask).tanh() * mask
        more = level * self.std / variance.sqrt() * self.decoder[1](inner)[:, 0]
        return ((1 - level.square()).sqrt() / variance * x + more) * mask[:, 0]


class FlawedPolicy(OwnPolicy):
    """The Gaussian chain as the loop sees it: the best denoiser of N(0, std^2) with a constant flaw b,
    `hop` samples long."""

    def __init__(self, b=0.0, hop=2, std=0.1):
        super().__init__(hop, longest=1)
        self.std, self.decoder = std, nn.ParameterList([nn.Parameter(torch.tensor(b, dtype=torch.float64))])

    def gain(self, level):
        return (1 - level.square()).sqrt() / ((level * self.std).square() + 1 - level.square())

    def predict_noise(self, x, hidden, level, frames=None):
        return self.gain(level.double()) * x.double() + self.decoder[0]
