"""The weights that the Grad-TTS reference outputs were made with;
the hash is that of deterministic_weights."""

import json

import numpy as np
import torch
from deterministic_weights import spread


def weight_values(key, shape):
    """float64 array for one entry of a Grad-TTS or of a HiFi-GAN generator,
    of mean square about 1 / fan-in."""
    count, leaf = int(np.prod(shape)), key.rsplit(".", 1)[-1]
    fan_in, values = count // shape[0] if shape else 1, spread(key, count)
    if leaf == "weight_g":
        gain = 0.5 if key.startswith("conv_") else 2.0 if key.startswith(("ups.0", "ups.1")) else 1.0
        values = gain * (1 + 0.1 * values)
    elif leaf == "g":
        values = 0.3 + 0.1 * values
    elif leaf in ("emb_rel_k", "emb_rel_v"):
        values = 0.5 * values
    elif key == "encoder.emb.weight":
        values = values / shape[-1] ** 0.5
    elif key == "encoder.proj_w.proj.bias":
        values = 2.6 + 0 * values
    elif ".to_qkv." in key:
        values = 0.5 * values / fan_in**0.5
    elif key.startswith("decoder.estimator.ups.") and key.endswith(".3.conv.weight"):
        values = 0.7 * values / (shape[0] * 4) ** 0.5
    elif key == "decoder.estimator.downs.0.0.res_conv.weight":
        values = 0.05 * values / fan_in**0.5
    elif ".res_conv." in key or key.endswith(".3.conv.weight"):
        values = 0.7 * values / fan_in**0.5
    elif len(shape) >= 2 and leaf != "weight_v":
        values = values / fan_in**0.5
    elif leaf in ("weight", "gamma"):
        values = 1 + 0.1 * values
    elif leaf != "weight_v":
        values = 0.1 * values
    return values.reshape(shape)


@torch.no_grad()
def fill(model):
    """Fill a whole model in place."""
    for key, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(weight_values(key, tuple(tensor.shape))))
    return model


def generator_shapes(data):
    """{key: shape} of the released HiFi-GAN generator."""
    return json.loads((data / "hifigan_keys.json").read_text())


def generator(shapes):
    """{key: tensor} of a HiFi-GAN generator of these shapes."""
    return {key: torch.from_numpy(weight_values(key, tuple(shape))).float() for key, shape in shapes.items()}


def small_generator(data):
    """The same layout with 16 channels in place of 512: other sizes of the same kind, as in V2."""
    cut = lambda key, size, axis: 80 if key == "conv_pre" and axis == 1 else max(1, size // 32)
    shapes = {key: list(shape) for key, shape in generator_shapes(data).items()}
    for key, shape in shapes.items():
        for axis in range(min(2, len(shape))):
            if shape[axis] > 1:
                shape[axis] = cut(key.split(".")[0], shape[axis], axis)
    return generator(shapes)
