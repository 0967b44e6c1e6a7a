"""Grad-TTS: agreement with the released implementation, padding, files, the small network, the vocoder."""

import json
import pickle

import numpy as np
import pytest
import torch
from deterministic_weights import checksum, noise, waveform
from gradtts_weights import fill
from small_gradtts import NARROW, make_unet
from small_policy import TEXTS, make_corpus, make_rollout, make_tuner

from dlpo_nb.core import UserError
from dlpo_nb.gradtts.encoder import whole_frames
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig, load_gradtts
from dlpo_nb.gradtts.sde import alpha_bar, euler_step, noise_of_score, sde_schedule, time_of_level
from dlpo_nb.gradtts.text import GRADTTS_SYMBOLS, clean, read_dictionary, text_to_ids
from dlpo_nb.gradtts.training import (
    aligned_losses,
    cut_windows,
    draw_offsets,
    frame_log_prob,
    monotonic_alignment,
    released_losses,
)
from dlpo_nb.mdp import replay, select_text
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.policy import load_policy, state_mask
from dlpo_nb.text import pad_ids
from dlpo_nb.vocoder import (
    HIFIGAN_MEL,
    SMALL_MEL,
    GriffinLim,
    get_vocoder,
    log_mel,
    mel_filters,
    with_phases_of,
)

# of the reference outputs, ten times what a separate float32 implementation showed
ENCODER, ESTIMATOR, STATES, LOSSES, MEL = 3e-5, 2e-4, 1e-4, 1e-5, 5e-4


@pytest.fixture(scope="module")
def ref(data):
    """Outputs of the released implementation with deterministic weights;
    pictures are thinned to every third frame."""
    return {
        key: torch.from_numpy(value) if value.dtype.kind in "fi" else value.tolist()
        for key, value in np.load(data / "gradtts_reference.npz").items()
    }


@pytest.fixture(scope="module")
def released():
    with torch.device("meta"):
        model = GradTTS(GradTTSConfig.released())
    return fill(model.to_empty(device="cpu")).eval()


def estimate(model, name, T, t, padded=None):
    """The estimator on the named inputs, cut to T frames again."""
    mu, y = (noise((1, 80, T), f"gt/{name}/{what}") for what in ("mu", "y"))
    mask, extra = torch.ones(1, 1, T), (padded or T) - T
    fit = lambda v: torch.nn.functional.pad(v, (0, extra))
    with torch.no_grad():
        return model.decoder.estimator(fit(y + mu), fit(mask), fit(mu), torch.tensor([t]))[0, :, :T]


def small(seed=0, kind=torch.float32, **changes):
    """A narrow small voice with random weights, two or three frames per symbol."""
    torch.manual_seed(seed)
    voice = GradTTS(
        GradTTSConfig.small(
            **({"encoder_channels": 16, "decoder_channels": 24, "decoder_blocks": 2} | changes)
        )
    )
    with torch.no_grad():
        for name, p in voice.named_parameters():
            if p.ndim > 1 and float(p.abs().max()) == 0:
                p.normal_(0, 0.02)
        voice.encoder.log_units.bias.fill_(0.9)
    voice.__dict__["vocoder"] = GriffinLim(voice.mel, iterations=1)
    return voice.to(kind).eval()


# --- as released


def test_layout(data, released):
    """Every key and shape of grad-tts.pt."""
    entries = json.loads((data / "gradtts_keys.json").read_text())
    assert {key: list(value.shape) for key, value in released.state_dict().items()} == entries
    assert sum(p.numel() for p in released.parameters()) == 14_835_032


def test_symbols(ref):
    """The released ids, of texts with numbers, braces and accents;
    "a" is another word in the released dictionary."""
    for i, text in enumerate(ref["texts"]):
        assert text_to_ids(text) == ref[f"ids_{i}"].tolist()
    for text, ids, n in zip(ref["enc_texts"], ref["enc_ids"], ref["enc_lengths"]):
        assert text_to_ids(text) == ids[:n].tolist()
    released = {"a": ["EY1"], "small": "S M AO1 L".split()}
    assert text_to_ids("A small fire.", released) == ref["train_ids"][0].tolist()


@pytest.mark.parametrize(
    "text, words",
    [
        ("$3.50", "three dollars, fifty cents"),
        ("$.5", "five cents"),
        ("$1", "one dollar"),
        ("1984", "nineteen eighty-four"),
        ("1001", "ten oh one"),
        ("2000", "two thousand"),
        ("2005", "two thousand five"),
        ("2010", "twenty ten"),
        ("1100", "eleven hundred"),
        ("10.05", "ten point five"),
        ("103rd", "one hundred and third"),
        ("£3", "psthree"),
        ("Mrs. X", "misess x"),
        (" a\t\nb ", " a b "),
        ("1,234,567", "one million, two hundred thirty-four thousand, five hundred sixty-seven"),
        ("ft. worth", "fort worth"),
    ],
)
def test_cleaning(text, words):
    assert clean(text) == words


def test_texts_that_cannot_be_read(tmp_path):
    for text in ("", "   ", "%%%"):
        with pytest.raises(UserError, match="nothing to speak"):
            text_to_ids(text)
    (tmp_path / "dict").write_text(";;; no entry\n")
    for path in (tmp_path / "dict", tmp_path / "none"):
        with pytest.raises(UserError, match="dictionary"):
            read_dictionary(path)
    (tmp_path / "dict").write_text("A  EY1\nA(1)  AH0\nODD  XX1\n")
    assert read_dictionary(tmp_path / "dict") == {"a": ["EY1"]}
    assert len(GRADTTS_SYMBOLS) == 148


def test_encoder(ref, released):
    """The batch, its items alone, and their frames."""
    ids, lengths = ref["enc_ids"], ref["enc_lengths"]
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        mu, log_durations = released.encoder(ids, mask)
        alone = [
            released.encoder(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())
        ]
    torch.testing.assert_close(mu.transpose(1, 2), ref["enc_mu_x"], atol=ENCODER, rtol=0)
    torch.testing.assert_close(log_durations, ref["enc_logw"], atol=ENCODER, rtol=0)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(alone[i][0], mu[i : i + 1, :n], atol=ENCODER, rtol=0)
        for pace, name in ((1.0, "1"), (0.91, "0.91")):
            frames = released.encoder.round_durations(alone[i][1], mask[i : i + 1, :n], pace)[0]
            assert frames.tolist() == ref[f"dur_frames_{i}_scale{name}"].tolist()


@pytest.mark.parametrize(
    "name, T, t, padded",
    [
        ("est64_t0.05", 64, 0.05, None),
        ("est64_t0.3", 64, 0.3, None),
        ("est64_t1", 64, 1.0, None),
        ("est96_t0.7", 96, 0.7, None),
        ("est64pad96_t0.3", 64, 0.3, 96),
        ("est62_t0.3", 62, 0.3, 64),
    ],
)
def test_estimator(ref, released, name, T, t, padded):
    out = estimate(released, f"est{T}", T, t, padded)
    torch.testing.assert_close(out[:, ::3], ref[name], atol=ESTIMATOR, rtol=0)


def test_noise_of_the_policy(ref, released):
    """Through the level, of items of several lengths:
    62 frames are padded to 64, and share a call with 64."""
    frames = torch.tensor([64, 62])
    mu, y = (torch.zeros(2, 80, 64) for _ in range(2))
    for i, (n, what) in enumerate(((64, "est64"), (62, "est62"))):
        mu[i, :, :n], y[i, :, :n] = (noise((80, n), f"gt/{what}/{part}") for part in ("mu", "y"))
    level = alpha_bar(torch.full((2, 1), 0.3, dtype=torch.float64)).sqrt()
    with torch.no_grad():
        eps = released.predict_noise(y.transpose(1, 2).flatten(1), mu, level.float(), frames).unflatten(
            1, (-1, 80)
        )
    for i, name in enumerate(("est64_t0.3", "est62_t0.3")):
        expected = noise_of_score(ref[name], level[0])
        torch.testing.assert_close(eps[i].T[:, : int(frames[i]) : 3], expected, atol=ESTIMATOR, rtol=0)
    assert (eps[1, 62:] == 0).all()


def test_samplers(ref, released):
    """Three steps, without and with noise; its size is that of states that nothing denoises."""
    mu, mask = noise((1, 80, 64), "gt/est64/mu"), torch.ones(1, 1, 64)
    for name, stochastic in (("sample_det3", False), ("sample_stoc3", True)):
        x = mu + noise((1, 80, 64), "gt/sample/noise")
        for i in range(3):
            t = 1 - (i + 0.5) / 3
            with torch.no_grad():
                score = released.decoder.estimator(x, mask, mu, torch.tensor([t]))
            x = euler_step(
                x, mu, score, t, 1 / 3, noise((1, 80, 64), f"gt/sample/stoc{i}") if stochastic else None
            )
        torch.testing.assert_close(
            x[0, :, ::3], ref[name], atol=STATES * float(ref[name].abs().max()), rtol=0
        )


@pytest.mark.parametrize("name, pace, temperature", [("cli", 0.91, 1.5), ("plain", 1.0, 1.0)])
def test_text_to_mel(ref, released, name, pace, temperature):
    """All of it, as inference.py does it."""
    ids, n = ref["enc_ids"][1:, : ref["enc_lengths"][1]], ref["enc_lengths"][1:]
    with torch.no_grad():
        said = released.condition(ids, n, pace=pace)
        frames = int(said.frames)
        size = -(-frames // 4) * 4
        mu = torch.nn.functional.pad(said.hidden, (0, size - frames))
        mask = (torch.arange(size) < frames).float()[None, None]
        x = (mu + noise((1, 80, size), f"gt/e2e/{name}/noise") / temperature) * mask
        for i in range(3):
            t = 1 - (i + 0.5) / 3
            x = euler_step(x, mu, released.decoder.estimator(x, mask, mu, torch.tensor([t])), t, 1 / 3) * mask
    torch.testing.assert_close(said.hidden[0, :, ::3], ref[f"e2e_{name}_mu_y"], atol=ENCODER, rtol=0)
    expected = ref[f"e2e_{name}_mel"]
    torch.testing.assert_close(
        x[0, :, :frames:3], expected, atol=STATES * float(expected.abs().max()), rtol=0
    )


def training_batch(ref):
    mel, frames = torch.zeros(2, 80, 100), ref["train_y_lengths"]
    for i, n in enumerate(frames.tolist()):
        mel[i, :, :n] = 1.5 * noise((80, n), f"gt/train/y{i}") - 1
    return ref["train_ids"], ref["train_ids_lengths"], mel, frames


def test_alignment(ref, released):
    ids, lengths, mel, frames = training_batch(ref)
    assert checksum(mel)[1] == pytest.approx(21311.8568, rel=1e-6)
    with torch.no_grad():
        mu, _ = released.encoder(ids, torch.arange(ids.shape[1]) < lengths[:, None])
    assert (
        monotonic_alignment(frame_log_prob(mu, mel), lengths, frames).tolist()
        == ref["train_path_frames"].tolist()
    )


@pytest.mark.parametrize("name, size", [("full", 100), ("cut", 64)])
def test_losses(ref, released, name, size):
    """The three parts, and the norms of their gradients."""
    ids, lengths, mel, frames = training_batch(ref)
    window = {} if name == "full" else dict(window=64, offsets=ref["train_cut_offsets"])
    parts = released_losses(
        released,
        ids,
        lengths,
        mel,
        frames,
        ref["train_t"],
        noise((2, 80, size), f"gt/train/{name}/z"),
        **window,
    )
    torch.testing.assert_close(
        torch.stack(parts).double().detach(), ref[f"train_{name}_losses"], rtol=LOSSES, atol=0
    )
    released.zero_grad()
    sum(parts).backward()
    norm = lambda module: float(
        torch.stack([p.grad.square().sum() for p in module.parameters()]).sum().sqrt()
    )
    expected = dict(full=(49.78883, 10.75058), cut=(49.7751, 9.550995))[name]
    assert (norm(released.encoder), norm(released.decoder)) == pytest.approx(expected, rel=1e-3)
    released.zero_grad(set_to_none=True)


def test_mel(ref):
    audio = 0.8 * waveform(8000, "gt/mel/wave") + 0.01 * noise(8000, "gt/mel/noise")
    torch.testing.assert_close(log_mel(audio[None], HIFIGAN_MEL)[0], ref["mel"], atol=MEL, rtol=0)
    assert checksum(mel_filters(HIFIGAN_MEL).T.contiguous())[:2] == pytest.approx(
        (3.7136882, 3.7136882), rel=1e-4
    )


# --- mathematics


def test_time_and_level():
    t = torch.linspace(1e-5, 1, 500, dtype=torch.float64)
    assert (time_of_level(alpha_bar(t).sqrt()) - t).abs().max() < 1e-9
    schedule = sde_schedule()
    assert schedule.num_steps == 1000 and float(schedule.alphas_cumprod[-1]) == pytest.approx(
        4.4e-5, rel=0.02
    )


def test_whole_frames():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        durations = torch.randint(1, 9, (3, 11), generator=generator) * (
            torch.arange(11) < torch.tensor([[11], [7], [1]])
        )
        for pace in (1.0, 0.91, 0.3, 1.7):
            stretched, frames = durations * pace, whole_frames(durations * pace)
            assert torch.equal(frames.sum(1), stretched.sum(1).clamp(min=1).long()) and (frames >= 0).all()
            ends = stretched.cumsum(1)
            by_hand = [
                [sum(lo <= j < hi for j in range(int(total))) for lo, hi in zip([0, *row], row)]
                for row, total in zip(ends.tolist(), frames.sum(1).tolist())
            ]
            assert frames[:2].tolist() == by_hand[:2]


def test_alignment_is_the_best_path():
    """Against all monotone paths of a small table; an item in a batch is aligned as it is alone."""
    from itertools import combinations

    torch.manual_seed(0)
    table = torch.randn(2, 4, 9)
    found = monotonic_alignment(table, torch.tensor([4, 3]), torch.tensor([9, 7]))
    for row, symbols, frames, durations in zip(table, (4, 3), (9, 7), found):
        paths = [np.diff([0, *ends, frames]) for ends in combinations(range(1, frames), symbols - 1)]
        value = lambda d: float(sum(row[i, j] for i, j in zip(np.repeat(range(symbols), d), range(frames))))
        assert durations[:symbols].tolist() == max(paths, key=value).tolist() and durations.sum() == frames
    assert monotonic_alignment(torch.zeros(1, 3, 6), torch.tensor([3]), torch.tensor([6])).tolist() == [
        [1, 1, 4]
    ]


def test_windows():
    rows, frames = torch.arange(20.0).reshape(2, 10, 1), torch.tensor([10, 3])
    cut, count = cut_windows(rows, frames, torch.tensor([4, 0]), 5)
    assert cut[..., 0].tolist() == [[4, 5, 6, 7, 8], [10, 11, 12, 0, 0]] and count.tolist() == [5, 3]
    draws = torch.stack([draw_offsets(frames, 5, torch.Generator().manual_seed(i)) for i in range(200)])
    assert draws[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5] and (draws[:, 1] == 0).all()


# --- files


@pytest.mark.parametrize("speakers, inside", [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("zipped", [True, False])
def test_released_files(tmp_path, speakers, inside, zipped):
    """Of one and of several speakers, in both containers; the sizes come from the shapes."""
    torch.manual_seed(0)
    sizes = dict(n_speakers=speakers, speaker_in_encoder=inside, speaker_channels=16) if speakers > 1 else {}
    model = GradTTS(GradTTSConfig(**sizes, **NARROW)).eval()
    path = tmp_path / "grad-tts.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    again = load_policy(path)
    assert isinstance(again, GradTTS) and again.config == model.config and not again.training
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    if speakers > 1:
        ids = torch.tensor([[5, 6, 7]] * 2)
        lengths = torch.tensor([3, 3])
        durations = torch.tensor([[3, 5, 4]] * 2)
        said = again.condition(ids, lengths, durations, speakers=torch.tensor([0, 3]))
        x = torch.randn(1, 12 * 80).expand(2, -1)
        eps = again.predict_noise(x, said.hidden, torch.full((2, 1), 0.5), said.frames)
        assert said.hidden.shape[1] == 96 and not torch.allclose(eps[0], eps[1], atol=1e-3)
        with pytest.raises(UserError, match="between 0 and 3"):
            again.condition(ids, lengths, speakers=torch.tensor([0, 4]))


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code in a file of weights was run",))


def test_nothing_in_a_file_is_run(tmp_path):
    model = GradTTS(GradTTSConfig(**NARROW))
    path = tmp_path / "grad-tts.pt"
    for zipped in (True, False):
        torch.save({**model.state_dict(), "evil": Evil()}, path, _use_new_zipfile_serialization=zipped)
        try:  # the archive's reader leaves it out, the old container's refuses it
            load_policy(path)
        except UserError as error:
            assert "more than tensors" in str(error) and not zipped
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_policy(path)


def test_other_files(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds no Grad-TTS weights"):
        load_gradtts(path)
    torch.save([torch.zeros(2)], path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="no dictionary of weights"):
        load_gradtts(path)
    state = GradTTS(GradTTSConfig(**NARROW)).state_dict()
    torch.save({key: value for key, value in state.items() if "mid_attn" not in key}, path)
    with pytest.raises(UserError, match="lacks 4 entries"):
        load_gradtts(path)
    with pytest.raises(UserError, match="unet or small"):
        GradTTSConfig("big")
    with pytest.raises(UserError, match="one speaker"):
        GradTTS(GradTTSConfig.small(n_speakers=2))


def test_own_files(tmp_path):
    voice = small()
    voice.save(tmp_path / "voice.safetensors", {"minutes": 3}, half=True)
    again = load_policy(tmp_path / "voice.safetensors")
    assert again.config == voice.config and again.metadata == {"minutes": "3"} and again.sample_rate == 24000
    old = GradTTS(GradTTSConfig(**NARROW))
    torch.save(old.state_dict(), tmp_path / "old.pt")
    assert load_gradtts(tmp_path / "old.pt", time_scale=1).decoder.estimator.time_scale == 1


# --- as a policy


class Calm(GradTTS):
    """The released network at random weights denoises nothing:
    what it says is a small change of a Gaussian's exact answer."""

    def predict_noise(self, x, hidden, level, frames=None):
        variance = 0.1 * level.square() + 1 - level.square()
        exact = (1 - level.square()).sqrt() / variance * x
        return exact.to(x) + 0.1 * level.to(x) * super().predict_noise(x, hidden, level, frames)


VOICES = {"small": small, "unet": lambda: fill(GradTTS(GradTTSConfig(**NARROW))).eval()}


@pytest.fixture(params=VOICES)
def voice(request):
    voice = VOICES[request.param]()
    voice.__dict__["vocoder"] = GriffinLim(voice.mel, iterations=1)
    if request.param == "unet":
        voice.__class__ = Calm
        with torch.no_grad():
            voice.encoder.proj_w.proj.bias.fill_(0.2)
    return voice


def test_a_batch_is_its_items_alone(voice):
    _, together = make_rollout(voice, group_size=2, fork=3)
    for i, text in enumerate(TEXTS):
        schedule, alone = make_rollout(voice, [text], indices=[i], group_size=2, fork=3)
        chosen = select_text(together, i)
        assert chosen.audio_lengths.tolist() == alone.audio_lengths.tolist()
        for name in ("x_0", "log_prob"):
            torch.testing.assert_close(getattr(chosen, name), getattr(alone, name), atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(
            replay(voice, schedule, chosen, 0)[0], chosen.log_prob[0], atol=1e-4, rtol=0
        )
    assert (together.x_0 * (1 - state_mask(together.x_0_lengths, 1)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unequal_lengths_share_a_call_of_the_unet(dtype):
    """Each as if it were alone, with its gradients; what lies past its end is not heard."""
    torch.manual_seed(0)
    decoder, frames = make_unet().decoder.to(dtype), torch.tensor([13, 24, 7])
    with torch.no_grad():
        for name, value in decoder.named_parameters():
            if name.endswith(".fn.g"):  # gains of the attention
                value.fill_(0.3)
    y, hidden = torch.randn(3, 24, 80, dtype=dtype), torch.randn(3, 80, 24, dtype=dtype)
    level, found = torch.tensor([[0.3], [0.6], [0.9]], dtype=dtype), []
    for batching in ("alone", "packed"):
        eps = decoder.predict_noise(y, hidden, level, frames, batching)
        grads = torch.autograd.grad(
            (eps * torch.linspace(0.2, 1, 80, dtype=dtype)).sum(), [*decoder.parameters()]
        )
        found.append([eps.detach(), *grads])
        y[0, 13:], hidden[0, :, 13:] = 1e3, 1e3
    scale = 1e-12 if dtype == torch.float64 else 2e-5  # thousands of places in a norm's sums
    for alone, packed in zip(*found):
        assert (packed - alone).abs().max() <= scale * alone.abs().max()
        scale = max(scale, 1e-10 if dtype == torch.float64 else 1e-3)  # of the gradients
    assert not found[1][0][0, 13:].any()


def test_sound_and_state(voice):
    """Lengths; what a recording is analysed to stands for its own mel; the same alone and in a batch."""
    said = voice.condition(*pad_ids(voice.encode(TEXTS)))
    N = int(said.frames.max()) * voice.hop
    audio = 0.1 * torch.randn(len(TEXTS), N) * (torch.arange(N) < said.frames[:, None] * voice.hop)
    with torch.no_grad():
        state = voice.analyse(audio, said)
        mels = voice.to_log_mel(state, said)
        sound, lengths = voice.render(state, said)
    assert lengths.tolist() == (said.frames * voice.hop).tolist() and sound.shape == (len(TEXTS), N)
    for i, n in enumerate(said.frames.tolist()):
        expected = log_mel(audio[i : i + 1, : n * voice.hop], voice.mel)[0]
        torch.testing.assert_close(mels[i, :, : n * voice.stack], expected, atol=1e-4, rtol=0)
        alone = voice.render(state[i : i + 1, : n * voice.width], said.select(i))[0][0]
        torch.testing.assert_close(alone, sound[i, : n * voice.hop], atol=1e-4, rtol=0)
        assert (sound[i, n * voice.hop :] == 0).all()


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_every_method(voice, method):
    """The first ratio is 1, only the decoder moves."""
    tuner = make_tuner(voice, method=method, corpus=make_corpus(voice.hop), rollout_steps=4)
    before = {key: value.clone() for key, value in voice.state_dict().items()}
    first, second = tuner.episode(), tuner.episode()
    assert (
        first["kl"] < 1e-10 < second["kl"]  # 0, but where copies of the weights lie elsewhere in memory
        and first.get("ratio/mean", 1.0) == second.get("ratio/mean", 1.0) == 1.0
    )
    assert {
        key.split(".")[0] for key, value in voice.state_dict().items() if not torch.equal(value, before[key])
    } == {"decoder"}


def test_aligned_losses(voice):
    """Each part by hand, and its gradient's way:
    the noise never reaches mu, the durations only their own head."""
    torch.manual_seed(0)
    ids, lengths = pad_ids(voice.encode(TEXTS[:2]))
    durations = torch.randint(1, 4, ids.shape) * (torch.arange(ids.shape[1]) < lengths[:, None])
    T = int(durations.sum(1).max())
    x = torch.randn(2, T, voice.width)
    noise_ = torch.randn(2, T, voice.width)
    level = torch.tensor([[0.4], [0.8]])
    parts = aligned_losses(voice, ids, lengths, durations, x, level, noise_)
    said = voice.condition(ids, lengths, durations)
    inside = (torch.arange(T) < said.frames[:, None]).double()
    mu = said.hidden[:, -voice.width :].transpose(1, 2).double()
    prior = float(((x.double() - mu).square().sum(2) * inside).sum().detach() / inside.sum() / voice.width)
    assert float(parts.prior.detach()) == pytest.approx(prior, rel=1e-4)
    head = "proj_m" if voice.config.network == "unet" else "mu"
    parts.diffusion.backward(retain_graph=True)
    assert (
        voice.encoder.get_submodule(head).weight.grad is None
        or float(voice.encoder.get_submodule(head).weight.grad.abs().max()) == 0
    )
    voice.zero_grad(set_to_none=True)
    parts.duration.backward()
    moved = {name for name, p in voice.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all(
        name.startswith(("encoder.proj_w", "encoder.duration", "encoder.log_units")) for name in moved
    )


def test_v_of_the_small_network():
    """The squared error of the noise over level^2 is that of v."""
    voice = small()
    y0, eps = torch.randn(1, 6, 200), torch.randn(1, 6, 200)
    level = torch.tensor([[0.3]])
    y = level[..., None] * y0 + (1 - level[..., None] ** 2).sqrt() * eps
    hidden, frames = torch.randn(1, 216, 6), torch.tensor([6])
    with torch.no_grad():
        v = voice.decoder(y, hidden, level, frames)
        predicted = voice.decoder.predict_noise(y, hidden, level, frames)
    target = level[..., None] * eps - (1 - level[..., None] ** 2).sqrt() * y0
    torch.testing.assert_close(
        voice.denoising_error(predicted, eps, level[..., None]), (v - target).square(), atol=1e-3, rtol=1e-3
    )


# --- vocoder


@pytest.mark.parametrize("mel", [HIFIGAN_MEL, SMALL_MEL])
def test_griffin_lim(mel):
    """Items of a batch sound as alone, twice the same; the mel of the result is near the wanted one."""
    audio = 0.5 * waveform(12 * mel.hop * 4, "gt/mel/wave")
    wanted = log_mel(audio[None], mel).repeat(3, 1, 1)
    frames = torch.tensor([wanted.shape[2], 30, 30])
    vocoder = get_vocoder("griffinlim", mel)
    sound, state = vocoder(wanted, frames), torch.random.get_rng_state()
    assert torch.equal(vocoder(wanted, frames), sound) and torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(vocoder(wanted[:1, :, :30], frames[1:2])[0], sound[1, : 30 * mel.hop])
    assert torch.equal(sound[1], sound[2]) and (sound[1, 30 * mel.hop :] == 0).all()
    amplitudes = [values[..., 4:-4].exp() for values in (log_mel(sound[:1], mel), wanted[:1])]
    assert (amplitudes[0] - amplitudes[1]).abs().sum() < 0.15 * amplitudes[1].sum()
    with pytest.raises(UserError, match="understands"):
        vocoder(wanted[:, 1:], frames)


@pytest.mark.parametrize("mel", [HIFIGAN_MEL, SMALL_MEL])
def test_gradient_of_griffin_lim(mel):
    """With the phases held the sound is linear in the magnitudes, and its slope exact;
    asking for a gradient changes no bit of the sound."""
    vocoder, frames = GriffinLim(mel, iterations=4), torch.tensor([40])
    wish = log_mel(0.5 * waveform(40 * mel.hop, "gt/mel/wave")[None], mel).requires_grad_()
    sound = vocoder(wish, frames)
    assert torch.equal(sound.detach(), vocoder(wish.detach(), frames))
    whole = vocoder.find_phases(vocoder.magnitudes(wish.detach()))
    size = slice(0 if mel.centred else mel.hop // 2, None)
    held = lambda mels: with_phases_of(whole, vocoder.magnitudes(mels), mel)[:, size][:, : 40 * mel.hop]
    direction = torch.randn(wish.shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((sound * sound.detach()).sum(), wish)
    up, down = (float((held(wish.detach() + d * direction) * sound).sum().detach()) for d in (1e-2, -1e-2))
    # in float32, and exp bends by the square of the step
    assert float((slope * direction).sum()) == pytest.approx((up - down) / 2e-2, rel=1e-2)


def test_log_mel_of_short_audio():
    assert log_mel(torch.zeros(1, 300), SMALL_MEL).shape == (1, 100, 1)
    with pytest.raises(UserError, match="less than one frame"):
        log_mel(torch.zeros(1, 299), SMALL_MEL)
