"""WaveGrad 2: agreement with the released implementation, padding, precision, files."""

import json
import os
import pickle
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from deterministic_weights import checksum, fill, integers, noise, uniform, waveform
from safetensors.torch import save_file
from torch.nn import functional as F

from dlpo_nb.core import UserError
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.wavegrad2.plain import level_embedding, plain_noise
from dlpo_nb.wavegrad2.encoder import length_mask
from dlpo_nb.policy import denoising_loss, duration_loss
from dlpo_nb.wavegrad2.model import WaveGrad2, WaveGrad2Config, load_wavegrad2
from dlpo_nb.wavegrad2.upsampling import round_durations

NARROW = WaveGrad2Config(
    encoder_channels=24,
    speaker_channels=4,
    predictor_channels=12,
    first_up=24,
    up=(24, 16, 16, 8, 8),
    first_down=4,
    down=(8, 8, 16, 24),
)
LARGE = dict(double_blocks=True, up_dilations=((1, 2, 4, 8),) * 5)
# The level's angle goes up to 5000 radians, where float32 numbers are 5e-4 apart: a power function that
# rounds otherwise moves its sine by 1e-3, and with it the decoder's output (up to 1.7) by 1e-4, the losses by
# 1e-5, norms of gradients by 1e-4. Ten times that is allowed.
ENCODER, LEVEL, DECODER, SAMPLES, LOSS, GRADIENT = 3e-5, 1e-2, 1e-3, 1e-3, 1e-4, 1e-3


@pytest.fixture(scope="module")
def ref(data):
    """Outputs of the released implementation (some arrays thinned), Base, deterministic weights."""
    return {key: torch.from_numpy(value) for key, value in np.load(data / "wavegrad2_reference.npz").items()}


@pytest.fixture(scope="module")
def base():
    return fill(load_free(WaveGrad2Config(dropout=0.0))).eval()


def load_free(config):
    """A model without the time-consuming initial weights."""
    with torch.device("meta"):
        model = WaveGrad2(config)
    return model.to_empty(device="cpu")


def narrow(seed=0, **changes):
    """A narrow model with random weights and durations of a few frames."""
    torch.manual_seed(seed)
    model = WaveGrad2(replace(NARROW, **changes)).eval()
    with torch.no_grad():
        model.resampling.duration_predictor.fc[0].weight.uniform_(0.0, 0.01)
        model.decoder.ublock_postconv.conv1d.weight.mul_(0.1)
        for name, p in model.resampling.duration_predictor.lstm.named_parameters():
            if "bias" in name:
                p.add_(1.0)
    return model


def assert_near(ours, theirs, atol):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < atol


def assert_close(ours, theirs, rtol):
    """As `assert_near`, relative to the largest value (random weights can give large ones)."""
    assert_near(ours, theirs, rtol * max(1.0, theirs.abs().max().item()))


def assert_checksum(tensor, expected):
    """Sums agree relative to the sum of magnitudes."""
    assert np.abs(np.array(checksum(tensor)) - np.asarray(expected)).max() < LOSS * expected[1]


# --- agreement with the released implementation


@torch.no_grad()
def test_encoder(base, ref):
    ids, lengths = ref["text_ids"], ref["text_lengths"]
    alone = ref["enc_single_last"]
    assert_near(base.encoder(ids, lengths, reference_padding=True), ref["enc_out"], ENCODER)
    assert_near(base.encoder(ids[1:, :6], lengths[1:]), alone, ENCODER)
    assert_near(base.encoder(ids, lengths)[1:, :6], alone, ENCODER)
    assert (ref["enc_out"][1:, :6] - alone).abs().max() > 0.2, "the released way leaks"


@torch.no_grad()
def test_encoder_in_training(base, ref):
    norm = base.encoder.cnn[0][1]
    saved = {key: value.clone() for key, value in base.encoder.state_dict().items()}
    base.encoder.train()
    try:
        assert_near(
            base.encoder(ref["text_ids"], ref["text_lengths"], reference_padding=True),
            ref["enc_out_trainbn"],
            ENCODER,
        )
        assert_near(norm.running_mean, ref["enc_trainbn_running_mean0"], ENCODER)
        assert_near(norm.running_var, ref["enc_trainbn_running_var0"], ENCODER)
    finally:
        base.encoder.load_state_dict(saved)
        base.encoder.eval()


def memory(model, ids, lengths):
    text = model.encoder(ids, lengths, reference_padding=True)
    voice = model.speaker_embedding.weight[0].expand(*ids.shape, -1)
    return torch.cat([text, voice], -1)


@torch.no_grad()
def test_resampling_teacher_forced(base, ref):
    up = base.resampling(
        memory(base, ref["text_ids"], ref["text_lengths"]),
        ref["text_lengths"],
        ref["durations"],
        reference_padding=True,
    )
    assert torch.equal(up.frames, ref["output_lengths"])
    assert_near(up.hidden[:, ::8], ref["tf_hidden_rep"], ENCODER)
    assert_near(up.alignment, ref["tf_alignment"], ENCODER)
    assert_near(up.seconds, ref["tf_duration_seconds"], ENCODER)
    assert_near(up.sigma, ref["tf_sigma"], ENCODER)


@pytest.mark.parametrize("pace, suffix", [(1.0, ""), (1.5, "_pace1.5")])
@torch.no_grad()
def test_inference_durations(base, ref, pace, suffix):
    ids, lengths = ref["inf_text_ids"], torch.tensor([6])
    up = base.resampling(memory(base, ids, lengths), lengths, pace=pace)
    assert_near(up.seconds, ref["inf_duration_seconds"], ENCODER)
    assert torch.equal(up.durations, ref["inf_duration_frames" + suffix])
    assert_near(up.sigma, ref["inf_sigma" + suffix], ENCODER)
    if pace == 1:
        said = base.condition(ids, lengths)
        assert_near(said.hidden[:, ::8], ref["inf_hidden_rep"], ENCODER)
        assert_near(up.alignment, ref["inf_alignment"], ENCODER)


@pytest.mark.parametrize("name", ["step1", "step500", "step1000", "mixed"])
@torch.no_grad()
def test_decoder(base, ref, name):
    hidden = 0.25 * noise((2, 576, 4), "ref/dec/hidden")
    eps = base.predict_noise(ref[f"dec_q_sample_{name}"], hidden, ref[f"dec_noise_level_{name}"])
    assert_near(eps, ref[f"dec_eps_{name}"], DECODER)


@pytest.mark.parametrize("name", ["step1", "step500", "step1000", "mixed"])
@torch.no_grad()
def test_plain_transcription(base, ref, name):
    """What our decoder is compared with, in notebook 07b and in tools/bench, is the reference, too."""
    eps = plain_noise(
        base.decoder.state_dict(),
        ref[f"dec_q_sample_{name}"],
        0.25 * noise((2, 576, 4), "ref/dec/hidden"),
        ref[f"dec_noise_level_{name}"],
    )
    assert_near(eps, ref[f"dec_eps_{name}"], DECODER)


def test_gradients_against_plain_transcription():
    """Of the weights, the frames and the samples; long enough for the weights' gradient by taps."""
    model, grads = narrow().double(), {}
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.decoder.named_parameters()}
    samples = torch.randn(2, 300 * 30).double()
    frames = torch.randn(2, 28, 30).double()
    level = torch.tensor([[0.3], [0.9]]).double()
    ours = dict(model.decoder.named_parameters())
    for decode, parameters in ((model.predict_noise, ours), (partial(plain_noise, weights), weights)):
        x, hidden = samples.clone().requires_grad_(), frames.clone().requires_grad_()
        decode(x, hidden, level).square().mean().backward()
        for key, value in (parameters | dict(x=x, hidden=hidden)).items():
            grads.setdefault(key, []).append(value.grad)
    for key, (ours, theirs) in grads.items():
        assert (ours - theirs).norm() < 1e-10 * theirs.norm(), key


@pytest.mark.parametrize("changes", [dict(), dict(preconditioned=True, data_std=0.2), LARGE])
def test_same_bits_with_and_without_gradients(changes):
    """What makes the first ratio after a rollout exactly 1."""
    model = narrow(**changes)
    x, hidden, level = torch.randn(3, 300 * 40), torch.randn(3, 28, 40), torch.tensor([[0.3], [0.8], [0.999]])
    for frames in (None, torch.tensor([40, 1, 7])):
        with torch.no_grad():
            silent = model.predict_noise(x, hidden, level, frames)
        assert torch.equal(model.predict_noise(x, hidden, level, frames).detach(), silent)
        # nor does it matter how the frames lie in memory
        other = hidden.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(model.predict_noise(x, other, level, frames).detach(), silent)


def test_level_embedding(ref):
    for film, channels in (("film0", 32), ("film4", 512)):
        assert_near(
            level_embedding(ref["dec_noise_level_mixed"], channels), ref[f"posenc_{film}_mixed"], LEVEL
        )


@torch.no_grad()
def test_inside_the_decoder(base, ref):
    expected = {
        "dblock_preconv": (-56.5364827, 26032.9037, -246.124548),
        "dblocks.0": (-788.741077, 29543.1598, -0.710228552),
        "dblocks.3": (-84.2305071, 1621.65277, -10.9135359),
        "ublock_preconv": (-7.13570856, 823.929067, -2.08890016),
        "films.2.shift_conv": (-2306.37848, 64189.4239, -106.868552),
        "films.4.scale_conv": (-6.46493309, 8558.85206, 84.4979117),
        "ublocks.0": (-376.156549, 6101.69231, 94.6204963),
        "ublocks.4": (-3733.50551, 149648.777, -51.5897394),
    }
    found = {}
    hooks = [
        base.decoder.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: found.update({name: out})
        )
        for name in expected
    ]
    base.predict_noise(
        ref["dec_q_sample_mixed"], 0.25 * noise((2, 576, 4), "ref/dec/hidden"), ref["dec_noise_level_mixed"]
    )
    for hook in hooks:
        hook.remove()
    for name, sums in expected.items():
        assert_checksum(found[name], sums)


SCHEDULES = {
    "lin10": lambda: NoiseSchedule.linear(10, 1e-6, 1e-2, table_dtype=torch.float32),
    "lin1000_start10": lambda: NoiseSchedule.linear(1000, 1e-6, 1e-2, table_dtype=torch.float32),
    "infer8": lambda: NoiseSchedule.inference8(table_dtype=torch.float32),
}


@torch.no_grad()
def reference_chain(model, schedule, hidden, name, start):
    """Every state of the chain under the reference noise."""
    shape = (len(hidden), 300 * hidden.shape[2])
    states = [noise(shape, f"{name}/yT")]
    for t in reversed(range(start)):
        eps = model.predict_noise(states[-1], hidden, schedule.level(t))
        z = noise(shape, f"{name}/z{t}") if t else torch.zeros(shape)
        states.append(schedule.step(eps, states[-1], t, z))
    return states


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples(base, ref, name):
    schedule = SCHEDULES[name]()
    start = 8 if name == "infer8" else 10
    states = reference_chain(
        base, schedule, 0.25 * noise((2, 576, 4), "ref/sample/hidden"), f"ref/sample/{name}", start
    )
    kept = [states[1], states[len(states) // 2], states[-1]]
    assert_near(torch.stack(kept), ref[f"sample_{name}_states"], SAMPLES)


@torch.no_grad()
def test_text_to_audio(base, ref):
    said = base.condition(ref["inf_text_ids"], torch.tensor([6]))
    assert torch.equal(said.durations, ref["e2e_infer8_duration_frames"])
    audio = reference_chain(base, SCHEDULES["infer8"](), said.hidden, "ref/e2e", 8)[-1].clamp(-1, 1 - 2**-10)
    assert_near(audio, ref["e2e_infer8_wav"], SAMPLES)


def training_case(model, ref, size, starts):
    """Audio and hidden windows (B, 300 * size), (B, C, size), and the conditioning,
    as the released trainer cuts them."""
    lengths = ref["output_lengths"]
    extra = integers(2, "ref/wavextra", 1, 300)
    waves = [
        waveform(300 * int(n) + int(e), f"ref/train/wav{i}") for i, (n, e) in enumerate(zip(lengths, extra))
    ]
    assert [len(w) for w in waves] == ref["train_wav_lengths"].tolist()
    audio = torch.zeros(2, 300 * (max(map(len, waves)) // 300 + 1 + size))
    for row, wave in zip(audio, waves):
        row[: len(wave)] = wave
    said = model.condition(ref["text_ids"], ref["text_lengths"], ref["durations"], reference_padding=True)
    hidden = F.pad(said.hidden, (0, size))
    windows = [(a[300 * s : 300 * (s + size)], h[:, s : s + size]) for a, h, s in zip(audio, hidden, starts)]
    return *(torch.stack(v) for v in zip(*windows)), said


@pytest.mark.parametrize("size", [8, 256])
@torch.no_grad()
def test_training_losses(base, ref, size):
    name, shape = f"train{size}", (2, 300 * size)
    audio, hidden, said = training_case(
        base, ref, size, ref["train8_starts"].tolist() if size == 8 else [0, 0]
    )
    level = SCHEDULES["lin1000_start10"]().levels.float()[ref["train_step"] - 1][:, None]
    eps = noise(shape, f"ref/train/eps{size}")
    diffusion = denoising_loss(base, audio, hidden, level, eps)
    seconds = duration_loss(said.seconds, ref["durations"], said.mask, 73.5)
    total, l1, duration = ref[f"{name}_losses"].tolist()
    assert diffusion.item() == pytest.approx(l1, rel=LOSS) and seconds.item() == pytest.approx(
        duration, rel=LOSS
    )
    assert (diffusion + seconds).item() == pytest.approx(total, rel=LOSS)
    sums = ref[f"{name}_checksums"].numpy()
    for tensor, expected in ((audio, sums[0]), (eps, sums[2]), (hidden, sums[4])):
        assert_checksum(tensor, expected)


def test_gradients(base, ref):
    audio, hidden, said = training_case(base, ref, 8, ref["train8_starts"].tolist())
    level = SCHEDULES["lin1000_start10"]().levels.float()[ref["train_step"] - 1][:, None]
    loss = denoising_loss(base, audio, hidden, level, noise((2, 2400), "ref/train/eps8"))
    base.zero_grad()
    (loss + duration_loss(said.seconds, ref["durations"], said.mask, 73.5)).backward()
    norms = {
        name: torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
        for name, m in base.named_children()
    }
    base.zero_grad()
    expected = dict(encoder=0.3958072, speaker_embedding=0.006735903, resampling=0.3040983, decoder=6.706299)
    assert norms == pytest.approx(expected, rel=GRADIENT)


@torch.no_grad()
def test_training_mode_loss(base, ref):
    saved = {
        key: value.clone() for key, value in base.state_dict().items() if "running" in key or "tracked" in key
    }
    table = torch.cat([torch.ones(1), SCHEDULES["lin1000_start10"]().levels.float()])
    u, step = uniform(2, "ref/train/rand"), ref["train_step"]
    level = (u * table[step - 1] + (1 - u) * table[step])[:, None]
    assert_near(level, ref["train_mode_noise_level"], 1e-7)
    base.train()
    try:
        audio, hidden, said = training_case(base, ref, 8, ref["train8_starts"].tolist())
        diffusion = denoising_loss(base, audio, hidden, level, noise((2, 2400), "ref/train/eps8")).item()
        seconds = duration_loss(said.seconds, ref["durations"], said.mask, 73.5).item()
    finally:
        base.load_state_dict(saved, strict=False)
        base.eval()
    assert [diffusion + seconds, diffusion, seconds] == pytest.approx(
        ref["train8_trainmode_losses"].tolist(), rel=LOSS
    )
    assert_near(hidden[:, ::8], ref["train8_trainmode_hidden_rep_sliced"], ENCODER)


@pytest.mark.parametrize("size, total", [("base", 44_079_009), ("large", 55_788_961)])
def test_keys_and_sizes(data, size, total):
    expected = json.loads((data / "wavegrad2_keys.json").read_text())[size]
    with torch.device("meta"):
        model = WaveGrad2(getattr(WaveGrad2Config, size)())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == total


# --- Large, against the formulas written out


def by_the_book(state, config, x, hidden, level):
    """The decoder as functions of its state_dict, with plain interpolation everywhere."""

    def conv(name, v, dilation=1):
        weight = state[f"{name}.conv1d.weight"]
        return F.conv1d(
            v,
            weight,
            state[f"{name}.conv1d.bias"],
            padding=dilation * (weight.shape[2] - 1) // 2,
            dilation=dilation,
        )

    def act(v):
        return torch.where(v > 0, v, 0.2 * v)

    def to(v, size):
        return F.interpolate(v, size=size, mode="linear", align_corners=False)

    def down(name, v, factor, first):
        size = v.shape[2] // factor
        main = to(v, size)
        for k, dilation in enumerate((1, 2, 4)):
            main = conv(f"{name}.main_branch.{k + first}.convolution", act(main), dilation)
        return main + to(conv(f"{name}.residual_branch.0", v), size)

    def up(name, v, factor, first, dilations, film):
        def mod(part, v, dilation):
            return conv(f"{name}.{part}.convolution", act(film[0] * v + film[1]), dilation)

        size = v.shape[2] * factor
        main = conv(f"{name}.first_block_main_branch.{first}", to(act(v), size), dilations[0])
        v = mod("first_block_main_branch.modulation", main, dilations[1]) + to(
            conv(f"{name}.first_block_residual_branch.0", v), size
        )
        main = mod("second_block_main_branch.modulation_0", v, dilations[2])
        return v + mod("second_block_main_branch.modulation_1", main, dilations[3])

    def film(i, v):
        z = act(conv(f"films.{i}.signal_conv.0", v))
        angle = torch.stack(
            [5000 * level[:, 0] * 10 ** (-4 * k / (z.shape[1] / 2)) for k in range(z.shape[1] // 2)], 1
        )
        z = z + torch.cat([angle.sin(), angle.cos()], 1)[..., None]
        return conv(f"films.{i}.scale_conv", z), conv(f"films.{i}.shift_conv", z)

    v = conv("dblock_preconv", x[:, None])
    films = [film(0, v)]
    for i, factor in enumerate(config.factors[:0:-1]):
        v = down(f"dblocks.{i}.downsampling_basic_block", v, factor, 1)
        v = down(f"dblocks.{i}", v, 1, 0)
        films.append(film(i + 1, v))
    u = conv("ublock_preconv", hidden)
    for i, (factor, dilations) in enumerate(zip(config.factors, config.up_dilations)):
        u = up(f"ublocks.{i}.upsampling_basic_block", u, factor, "upsampling.2", dilations, films[4 - i])
        u = up(f"ublocks.{i}", u, 1, "noupsampling.1", dilations, films[4 - i])
    return conv("ublock_postconv", u)[:, 0]


@torch.no_grad()
def test_large_forward():
    model = narrow(**LARGE).double()
    x = torch.randn(2, 1500).double()
    hidden = torch.randn(2, 28, 5).double()
    level = torch.tensor([[0.1], [0.9]]).double()
    expected = by_the_book(model.decoder.state_dict(), model.config, x, hidden, level)
    assert_near(model.predict_noise(x, hidden, level), expected, 1e-10)


# --- padding


CASES = [dict(), dict(preconditioned=True, data_std=0.2), LARGE]


def batch_of_three():
    torch.manual_seed(1)
    lengths = torch.tensor([4, 11, 7])
    mask = length_mask(lengths, 11)
    return torch.randint(1, 151, (3, 11)) * mask, lengths, torch.randint(0, 5, (3, 11)) * mask


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("predicted", [True, False])
@torch.no_grad()
def test_batch_equals_alone(changes, predicted):
    model = narrow(**changes)
    ids, lengths, durations = batch_of_three()
    said = model.condition(ids, lengths, None if predicted else durations)
    assert len(set(said.frames.tolist())) > 1
    x, level = torch.randn(3, 300 * said.hidden.shape[2]), torch.tensor([[0.3], [0.8], [0.999]])
    eps = model.predict_noise(x, said.hidden, level, said.frames)
    for i, (n, t) in enumerate(zip(lengths.tolist(), said.frames.tolist())):
        alone = model.condition(
            ids[i : i + 1, :n], lengths[i : i + 1], None if predicted else durations[i : i + 1, :n]
        )
        assert torch.equal(alone.durations[0], said.durations[i, :n]) and alone.frames.tolist() == [t]
        assert_near(said.hidden[i : i + 1, :, :t], alone.hidden, 1e-5)
        assert (said.hidden[i, :, t:] == 0).all() and (eps[i, 300 * t :] == 0).all()
        assert_close(
            eps[i : i + 1, : 300 * t],
            model.predict_noise(x[i : i + 1, : 300 * t], alone.hidden, level[i : i + 1]),
            1e-4,
        )  # sums of 1000 products in another order


def test_gradients_do_not_depend_on_the_batch():
    model = narrow().double()
    ids, lengths, durations = batch_of_three()

    def gradient(rows):
        model.zero_grad()
        for i in rows:
            n = int(lengths[i.start : i.stop].max())
            said = model.condition(ids[i, :n], lengths[i], durations[i, :n])
            t, level = said.hidden.shape[2], torch.full((len(said.hidden), 1), 0.5)
            mask = length_mask(300 * said.frames, 300 * t)
            error = (model.predict_noise(x[i, : 300 * t], said.hidden, level, said.frames) - 1).abs() * mask
            (error.sum() + said.seconds.sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    x = torch.randn(3, 300 * int(durations.sum(1).max())).double()
    together, apart = gradient([slice(0, 3)]), gradient([slice(i, i + 1) for i in range(3)])
    assert (together - apart).abs().max() < 1e-9 * apart.abs().max()


@torch.no_grad()
def test_training_statistics_do_not_count_padding():
    ids, lengths, _ = batch_of_three()
    buffers = []
    for width in (11, 30):
        model = narrow(dropout=0.0).train()
        model.condition(F.pad(ids, (0, width - 11), value=5), lengths)
        buffers.append(torch.cat([b.flatten().float() for b in model.encoder.buffers()]))
    assert_near(*buffers, 1e-6)


@torch.no_grad()
def test_same_length_needs_no_frames():
    model = narrow()
    x, hidden = torch.randn(2, 900), torch.randn(2, 28, 3)
    assert torch.equal(
        model.predict_noise(x, hidden, 0.5),
        model.predict_noise(x, hidden, torch.full((2, 1), 0.5), torch.tensor([3, 3])),
    )


def test_synthesis():
    model, schedule = narrow().train(), NoiseSchedule.inference8()
    texts, seeds = ["Yes.", "The kettle is on the table.", "Good morning."], range(3)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    together = model.synthesise(texts, schedule, generators)
    assert model.training, "the mode is restored"
    for text, seed, audio in zip(texts, seeds, together):
        (alone,) = model.synthesise(text, schedule, torch.Generator().manual_seed(seed))
        assert_near(audio, alone, 1e-4)  # float32 rounding, carried through eight steps
        assert audio.abs().max() <= 1 and len(audio) % 300 == 0
    assert len(model.synthesise([[3, 70, 80], torch.tensor([90, 91])], schedule)) == 2
    assert model.synthesise([], schedule) == []
    slow = model.synthesise(texts[:1], schedule, torch.Generator().manual_seed(0), pace=2.0)
    assert len(slow[0]) > 1.5 * len(together[0])
    with pytest.raises(UserError):
        model.synthesise(texts, schedule, generators[:2])


# --- durations


def test_durations_are_never_negative_or_nothing():
    seconds = torch.tensor([[-0.5, -0.2, 0.0], [0.1, -0.1, 0.02], [float("nan"), 0.0, 0.0]])
    mask = length_mask(torch.tensor([2, 3, 3]), 3)
    assert round_durations(seconds[:2], mask[:2], 73.5).tolist() == [[0, 1, 0], [7, 0, 1]]
    assert round_durations(seconds[:2], mask[:2], 73.5, keep_negative=True)[0, 0] < 0
    with pytest.raises(UserError, match="not finite"):
        round_durations(seconds, mask, 73.5)


@pytest.mark.parametrize("reference_padding", [False, True])
@torch.no_grad()
def test_negative_total_does_not_crash(reference_padding):
    model = narrow()
    model.resampling.duration_predictor.fc[0].weight.fill_(-1.0)
    ids, lengths, _ = batch_of_three()
    said = model.condition(ids, lengths, reference_padding=reference_padding)
    assert said.frames.tolist() == [1, 1, 1] and torch.isfinite(said.hidden).all()
    assert model.condition(ids, lengths, torch.zeros(3, 11)).frames.tolist() == [1, 1, 1]


# --- precision and devices


@torch.no_grad()
def test_double_and_bfloat16():
    model = narrow(preconditioned=True, data_std=0.2)
    ids, lengths, durations = batch_of_three()
    said = model.condition(ids, lengths, durations)
    x, level = torch.randn(3, 300 * said.hidden.shape[2]), torch.tensor([[0.3], [0.8], [0.97]])
    single = model.predict_noise(x, said.hidden, level, said.frames)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.predict_noise(x, model.condition(ids, lengths, durations).hidden, level, said.frames)
    model.double()
    told = model.condition(ids, lengths, durations)
    double = model.predict_noise(x.double(), told.hidden, level, told.frames)
    assert (single.dtype, half.dtype, double.dtype, told.hidden.dtype) == (
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float64,
    )
    assert_near(single.double(), double, 1e-2)  # the level's float32 sine against float64: 1e-3
    assert (half - single).norm() < 0.05 * single.norm()


def test_training_step_under_autocast():
    model = narrow(preconditioned=True, data_std=0.2).train()
    ids, lengths, durations = batch_of_three()
    with torch.autocast("cpu", torch.bfloat16):
        said = model.condition(ids, lengths, durations)
        loss = denoising_loss(
            model,
            torch.randn(3, 300 * said.hidden.shape[2]),
            said.hidden,
            torch.tensor([[0.5]] * 3),
            torch.randn(3, 300 * said.hidden.shape[2]),
        )
    (loss + duration_loss(said.seconds, durations, said.mask, 73.5)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_gpu():
    model = narrow()
    ids, lengths, durations = batch_of_three()
    said = model.condition(ids, lengths, durations)
    x = torch.randn(3, 300 * said.hidden.shape[2])
    here = model.predict_noise(x, said.hidden, 0.5, said.frames)
    model.cuda()
    told = model.condition(ids.cuda(), lengths.cuda(), durations.cuda())
    there = model.predict_noise(x.cuda(), told.hidden, 0.5, told.frames)
    assert (there.cpu() - here).norm() < 1e-2 * here.norm()  # convolutions in TF32
    model.synthesise(["Yes.", "Good morning."], NoiseSchedule.inference8())


# --- bad input


@pytest.mark.parametrize(
    "ids, lengths",
    [
        (torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)),
        (torch.tensor([[1, 2]]), torch.tensor([3])),
        (torch.tensor([[1, 2]]), torch.tensor([0])),
        (torch.tensor([[1, 200]]), torch.tensor([2])),
        (torch.tensor([[1, -1]]), torch.tensor([2])),
        (torch.tensor([1, 2]), torch.tensor([2])),
    ],
)
def test_bad_symbols(ids, lengths):
    with pytest.raises(UserError):
        narrow().condition(ids, lengths)


def test_bad_decoder_input():
    model, x, hidden = narrow(), torch.randn(2, 600), torch.randn(2, 28, 2)
    for args in [
        (x[:, :599], hidden, 0.5),
        (x[:1], hidden, 0.5),
        (x, hidden, torch.rand(3, 1)),
        (x, hidden, 0.5, torch.tensor([1, 3])),
        (x, hidden, 0.5, torch.tensor([1])),
        (x, hidden, 0.5, torch.tensor([0, 2])),
    ]:
        with pytest.raises(UserError):
            model.predict_noise(*args)


@pytest.mark.parametrize(
    "changes",
    [
        dict(up=(8, 8)),
        dict(encoder_channels=7),
        dict(first_down=3),
        dict(up_dilations=((1, 2),) * 5),
        dict(first_up=0),
        dict(factors=(5, 5, 12)),
    ],
)
def test_bad_configuration(changes):
    with pytest.raises(UserError):
        replace(NARROW, **changes)


# --- files


@pytest.fixture
def saved(tmp_path):
    model, path = narrow(preconditioned=True, data_std=0.2), tmp_path / "model.safetensors"
    model.save(path, {"note": "hello", "steps": 3})
    return model, path


def assert_same(model, other, atol=0.0):
    theirs = other.state_dict()
    assert all((value - theirs[key]).abs().max() <= atol for key, value in model.state_dict().items())
    assert all(value.dtype == theirs[key].dtype for key, value in model.state_dict().items())
    assert not other.training and all(p.requires_grad for p in other.parameters())


def test_round_trip(saved, tmp_path):
    model, path = saved
    again = load_wavegrad2(path)
    assert_same(model, again)
    assert again.config == model.config and again.metadata == {"note": "hello", "steps": "3"}
    model.save(path, half=True)
    assert_same(model, load_wavegrad2(path), 1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "no temporary file stays"
    loss = denoising_loss(
        again.train(), torch.randn(1, 600), torch.randn(1, 28, 2), torch.tensor([[0.5]]), torch.randn(1, 600)
    )
    loss.backward()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class OmegaConfLike:
    def __init__(self):
        self.content, self.parent = {"lr": 3e-4}, [self]


@pytest.fixture(scope="module")
def large_state():
    """Large, two speakers, with room for the weights but few distinct numbers."""
    with torch.device("meta"):
        expected = WaveGrad2(replace(WaveGrad2Config.large(), n_speakers=2)).state_dict()
    return {key: torch.full(value.shape, 0.5, dtype=value.dtype) for key, value in expected.items()}


def test_released_layout(large_state, tmp_path):
    evidence, path = tmp_path / "owned", tmp_path / "wavegrad2_epoch=211.ckpt"
    torch.save(
        {
            "epoch": 211,
            "state_dict": large_state,
            "hyper_parameters": OmegaConfLike(),
            "callbacks": {Evil: {"best": 1.0}},
            "optimizer_states": [Evil(evidence)],
        },
        path,
    )
    model = load_wavegrad2(path)
    assert not evidence.exists(), "nothing in the file was run"
    assert model.config == replace(WaveGrad2Config.large(), n_speakers=2)
    assert all(torch.equal(value, large_state[key]) for key, value in model.state_dict().items())
    ids, lengths = torch.tensor([[70, 80]]), torch.tensor([2])
    with torch.no_grad():
        said = model.condition(ids, lengths, torch.tensor([[1, 1]]), speakers=torch.tensor([1]))
    assert said.hidden.shape == (1, 576, 2)


def test_bare_and_safetensors_without_configuration(tmp_path):
    with torch.device("meta"):
        expected = WaveGrad2(WaveGrad2Config.base()).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in expected.items()}
    torch.save(state, tmp_path / "wavegrad2_epoch=1_EMA")
    assert load_wavegrad2(tmp_path / "wavegrad2_epoch=1_EMA").config == WaveGrad2Config.base()
    save_file(state, tmp_path / "base.safetensors")
    assert load_wavegrad2(str(tmp_path / "base.safetensors")).config == WaveGrad2Config.base()


def test_evil_pickle_in_place_of_the_weights(tmp_path):
    evidence, path = tmp_path / "owned", tmp_path / "evil.ckpt"
    for content in (
        Evil(evidence),
        {"state_dict": Evil(evidence)},
        {"encoder.embedding.weight": Evil(evidence)},
    ):
        torch.save(content, path)
        with pytest.raises(UserError):
            load_wavegrad2(path)
    path.write_bytes(pickle.dumps(Evil(evidence)))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_wavegrad2(path)
    assert not evidence.exists()


def test_tensor_larger_than_its_data(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.zeros(4).expand(1000, 4)}, path)
    with pytest.raises(UserError, match="larger than its data"):
        load_wavegrad2(path)


def test_files_that_are_no_checkpoints(saved, tmp_path):
    _, good = saved
    bad = tmp_path / "bad"
    whole = good.read_bytes()
    archive = tmp_path / "archive"
    torch.save({"state_dict": {"a": torch.ones(3)}}, archive)
    with zipfile.ZipFile(tmp_path / "docs.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    contents = {
        b"": "not a checkpoint",
        b"<html></html>": "web page",
        b"version https://git-lfs.github.com/spec/v1": "not a checkpoint",
        whole[:5]: "not a checkpoint",
        whole[:200]: "damaged",
        whole[: len(whole) // 2]: "damaged",
        archive.read_bytes(): "no WaveGrad 2",
        archive.read_bytes()[:-40]: "damaged",
        (tmp_path / "docs.zip").read_bytes(): "not one of torch.save",
    }
    for content, message in contents.items():
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_wavegrad2(bad)
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="cannot read"):
            load_wavegrad2(path)


def test_wrong_entries(saved, tmp_path):
    model, _ = saved
    path = tmp_path / "other.safetensors"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    notes = {
        "wavegrad2": json.dumps(
            {
                "encoder_channels": 24,
                "speaker_channels": 4,
                "predictor_channels": 12,
                "first_up": 24,
                "up": [24, 16, 16, 8, 8],
                "first_down": 4,
                "down": [8, 8, 16, 24],
            }
        )
    }

    def refused(match, metadata=notes, **changes):
        tensors = {key: value for key, value in {**state, **changes}.items() if value is not None}
        save_file(tensors, path, metadata)
        with pytest.raises(UserError, match=match):
            load_wavegrad2(path)

    key = "speaker_embedding.weight"
    refused("lacks 1 entry, ", **{key: None})
    refused("has 1 entry too many", **{"surplus": torch.zeros(1)})
    refused("has shape", **{key: torch.zeros(1, 5)})
    refused("not finite", **{key: torch.full((1, 4), torch.nan)})
    refused("has shape", metadata=None)
    refused("cannot be used", metadata={"wavegrad2": "{"})
    refused("cannot be used", metadata={"wavegrad2": '{"width": 3}'})
    refused("even", metadata={"wavegrad2": '{"encoder_channels": 3}'})


def test_saving_where_it_cannot_be(saved, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        saved[0].save(tmp_path / "no" / "folder" / "model.safetensors")
