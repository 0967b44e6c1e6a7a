"""Weights and inputs from an integer hash, so that every machine gets the numbers the reference outputs were
made with.

A stream is named; its numbers are splitmix64 of crc32(name) * 2**32 + index, in float64,
cast to float32 last.
"""

import zlib

import numpy as np
import torch

STEP, MIX1, MIX2 = (np.uint64(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def bits(name, count, start=0):
    """53 random bits each, uint64 (count,)."""
    first = (zlib.crc32(name.encode()) << 32) + start + 1
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(first)) * STEP
        z = (z ^ (z >> np.uint64(30))) * MIX1
        z = (z ^ (z >> np.uint64(27))) * MIX2
    return (z ^ (z >> np.uint64(31))) >> np.uint64(11)


def unit(name, count, start=0):
    """float64 in [0, 1)."""
    return bits(name, count, start) * 2.0**-53


def spread(name, count):
    """float64, mean 0, variance 1, uniform."""
    return (2 * unit(name, count) - 1) * 3**0.5


def weight_values(key, shape):
    """float64 array for one entry of a state_dict; None: leave it."""
    count, leaf = int(np.prod(shape)), key.split(".")[-1]
    fan_in = count // shape[0] if shape else 1
    decoder, lstm, duration = key.startswith("decoder."), "lstm" in key, "duration_predictor" in key
    if leaf == "num_batches_tracked":
        return None
    if leaf == "running_var":
        values = 0.6 + 0.8 * unit(key, count)
    elif leaf == "running_mean":
        values = 0.1 * spread(key, count)
    elif "embedding" in key:
        values = 0.5 * spread(key, count)
    elif duration and ".fc." in key:
        values = (0.45 + 3.0 * spread(key, count)) / shape[-1]
    elif lstm and leaf.startswith("bias_"):
        values = (0.3 if duration else 0.0) + 0.1 * spread(key, count)
    elif len(shape) >= 2:
        values = (0.75 if decoder else 2.0 if lstm else 1.0) * spread(key, count) / fan_in**0.5
    elif leaf == "weight":
        values = 1.0 + 0.1 * spread(key, count)
    else:
        values = (0.02 if decoder else 0.1) * spread(key, count)
    return values.reshape(shape)


@torch.no_grad()
def fill(model):
    """Fill a whole WaveGrad2 in place."""
    for key, tensor in model.state_dict().items():
        values = weight_values(key, tuple(tensor.shape))
        if values is not None:
            tensor.copy_(torch.from_numpy(values))
    return model


def as_float32(values, shape):
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def noise(shape, name):
    """float32 tensor, mean 0, variance 1: the sum of 12 uniforms."""
    count = int(np.prod(shape))
    total = np.zeros(count)
    for k in range(12):
        total = total + unit("noise/" + name, count, k * count)
    return as_float32(total - 6, shape)


def uniform(shape, name):
    """float32 tensor in [0, 1), exact in 24 bits."""
    return as_float32(np.floor(unit("uniform/" + name, int(np.prod(shape))) * 2**24) / 2**24, shape)


def integers(shape, name, low, high):
    """int64 tensor, low <= value < high."""
    values = bits("ints/" + name, int(np.prod(shape))) % np.uint64(high - low)
    return torch.from_numpy(low + values.astype(np.int64)).reshape(shape)


def waveform(count, name):
    """float32 tensor (count,), four partials under a slow envelope."""
    t = np.arange(count) / 22050.0
    random = unit("wave/" + name, 9)
    phase, pitch = random * 2 * np.pi, 90 + 60 * random[8]
    partials = [(0.50, 1), (0.25, 3), (0.12, 11), (0.03, 31)]
    tone = sum(a * np.sin(2 * np.pi * n * pitch * t + phase[i + 1]) for i, (a, n) in enumerate(partials))
    return as_float32((0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * t + phase[0])) * tone, (count,))


def checksum(tensor):
    """(sum, sum of |x|, sum of x * c) in float64."""
    values = tensor.detach().double().numpy().ravel()
    return values.sum(), np.abs(values).sum(), (values * spread("checksum", values.size)).sum()
