"""WaveGrad 2's decoder and its reverse step as the reference computes them, written out plainly: what
`bench_decoder.py` compares with.

Nothing is clever here: every signal is (B, C, N), each activation is a new tensor, signals are stretched
before they are convolved, and a 1x1 convolution runs before its result is shortened. Weights are those of
`dlpo_nb.wavegrad2.decoder.Decoder`, under the released keys. Base only.
"""

import torch
from torch import nn
from torch.nn import functional as F

FACTORS, DILATIONS = (5, 5, 3, 2, 2), ((1, 2, 4, 8),) * 3 + ((1, 2, 1, 2),) * 2


def activate(x):
    return F.leaky_relu(x, 0.2)


def resize(x, size):
    """Linear interpolation of x (B, C, N) to `size` samples."""
    return F.interpolate(x, size=size, mode="linear", align_corners=False)


class PlainDecoder(nn.Module):
    """eps (B, N) from x (B, N), hidden (B, C, T) and level (B, 1)."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value.clone()))

    def conv(self, name, x, dilation=1):
        weight, bias = (
            getattr(self, f"{name}.conv1d.{kind}".replace(".", "/")) for kind in ("weight", "bias")
        )
        return F.conv1d(x, weight, bias, padding=dilation * (weight.shape[2] - 1) // 2, dilation=dilation)

    def down(self, name, x, factor):
        size = x.shape[2] // factor
        main = resize(x, size)
        for k, dilation in enumerate((1, 2, 4)):
            main = self.conv(f"{name}.main_branch.{1 + k}.convolution", activate(main), dilation)
        return main + resize(self.conv(f"{name}.residual_branch.0", x), size)

    def film(self, name, x, level):
        z = activate(self.conv(f"{name}.signal_conv.0", x))
        half = z.shape[1] // 2
        angle = 5000 * level * 1e-4 ** (torch.arange(half, dtype=level.dtype) / half)
        z = z + torch.cat([angle.sin(), angle.cos()], 1)[..., None].to(z.dtype)
        return self.conv(f"{name}.scale_conv", z), self.conv(f"{name}.shift_conv", z)

    def modulate(self, name, v, film, dilation):
        scale, shift = film
        return self.conv(f"{name}.convolution", activate(scale * v + shift), dilation)

    def up(self, name, u, film, factor, dilations):
        size = u.shape[2] * factor
        first, second = f"{name}.first_block_main_branch", f"{name}.second_block_main_branch"
        v = self.conv(f"{first}.upsampling.2", resize(activate(u), size), dilations[0])
        v = self.modulate(f"{first}.modulation", v, film, dilations[1])
        v = v + resize(self.conv(f"{name}.first_block_residual_branch.0", u), size)
        w = self.modulate(f"{second}.modulation_0", v, film, dilations[2])
        return v + self.modulate(f"{second}.modulation_1", w, film, dilations[3])

    def forward(self, x, hidden, level):
        v = self.conv("dblock_preconv", x[:, None])
        films = [self.film("films.0", v, level)]
        for i, factor in enumerate(FACTORS[:0:-1]):
            v = self.down(f"dblocks.{i}", v, factor)
            films.append(self.film(f"films.{i + 1}", v, level))
        u = self.conv("ublock_preconv", hidden)
        for i, (factor, dilations) in enumerate(zip(FACTORS, DILATIONS)):
            u = self.up(f"ublocks.{i}", u, films[4 - i], factor, dilations)
        return self.conv("ublock_postconv", u)[:, 0]


class PlainTables:
    """The reference's float32 tables for betas (S,), and its reverse step."""

    def __init__(self, betas):
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1), kept[:-1]])
        self.level = kept.sqrt()
        self.of_x = (1 / kept).sqrt()
        self.of_eps = (1 - kept).sqrt() * (1 / kept).sqrt()
        self.of_x0 = betas * before.sqrt() / (1 - kept)
        self.of_y = (1 - before) * (1 - betas).sqrt() / (1 - kept)
        self.log_variance = (betas * (1 - before) / (1 - kept)).clamp(min=1e-20).log()

    def step(self, decoder, y, hidden, t, z):
        """The estimated noise, and y at step t - 1, (B, N) each, from y at step t and noise z."""
        eps = decoder(y, hidden, self.level[t].expand(len(y), 1))
        x0 = (self.of_x[t] * y - self.of_eps[t] * eps).clamp(-1, 1)
        return eps, self.of_x0[t] * x0 + self.of_y[t] * y + (0.5 * self.log_variance[t]).exp() * z
