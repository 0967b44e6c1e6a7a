"""Weights and waveforms by formula, for which the scores in data/utmos_reference.npz were computed:
sines of quadratic phases.

The released network cannot be kept here (411 MB); a network filled like this takes part in every operation
with numbers that every machine can make again. Its scores mean nothing.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

SHAPES = Path(__file__).resolve().parent / "data" / "utmos_shapes.json"
PERIODS = 100003, 65536  # of the linear and of the quadratic part of the phase


def sines(key, count):
    """float64 (count,) in [-1, 1]; the phase depends on crc32(key)."""
    seed = zlib.crc32(key.encode())
    slope, start = 0.5 + (seed & 0xFFFF) / 65536, (seed >> 16) / 65536 * 2 * np.pi
    linear = slope * np.arange(PERIODS[0], dtype=np.float64) + start
    square = np.arange(PERIODS[1], dtype=np.int64) ** 2 * 40503 + seed
    quadratic = 2 * np.pi * (square % 65536).astype(np.float64) / 65536
    values = np.resize(linear, count) + np.resize(quadratic, count)
    return np.sin(values, out=values)


def weight(key, shape):
    """float32 tensor for one entry of the released file."""
    values, leaf = sines(key, math.prod(shape)), key.split(".")[-1]
    if len(shape) == 1:
        values = 1.0 + 0.1 * values if leaf == "weight" else 0.05 * values
    elif leaf == "weight_g":
        values = 0.6 + 0.2 * values
    elif not leaf.endswith("_emb"):
        values *= 1.4
        values /= np.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def shapes():
    """{name: shape} of the 225 tensors of the released file."""
    return {key: tuple(shape) for key, shape in json.loads(SHAPES.read_text()).items()}


def weights():
    """All of them, {name: float32 tensor}: 103 million numbers, some seconds."""
    return {key: weight(key, shape) for key, shape in shapes().items()}


def waveform(name, count, rate):
    """float64 tensor (count,) in about [-0.5, 0.5]:
    twelve gliding partials under an envelope, and a little noise."""
    seed, time = zlib.crc32(name.encode()), np.arange(count, dtype=np.float64) / rate
    pitch = 90.0 + (seed & 0xFF)
    phase = 2 * np.pi * pitch * time + 3.0 * np.sin(2 * np.pi * 5.0 * time + (seed >> 8 & 0xFF) / 40)
    tone = np.zeros(count)
    for k in range(1, 13):
        tone += (0.6 + 0.4 * np.sin(k * (1.3 + (seed >> 16 & 0xFF) / 256))) / k * np.sin(k * phase)
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * time + (seed >> 24) / 30)
    return torch.from_numpy(0.2 * envelope * tone + 0.02 * sines("noise/" + name, count))
