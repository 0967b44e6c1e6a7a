"""Half precision as a GPU computes it, imitated on a CPU: who asks for which type, and who must not care."""

import os

import pytest
import torch
from gradtts_weights import fill
from small_gradtts import make_gradtts
from small_policy import TEXTS, make_model, make_tuner, spoken
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from toy_mel import make_toy_mel

from dlpo_nb import checkpoints, diagnostics
from dlpo_nb.core import environment
from dlpo_nb.finetune import load_state, save_state
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.launch import speak_heldout
from dlpo_nb.lora import LowRank
from dlpo_nb.policy import Policy
from dlpo_nb.precision import compute_in, without_autocast
from dlpo_nb.text import pad_ids
from dlpo_nb.wavegrad2 import layers

TINY_UNET = GradTTSConfig(
    encoder_channels=16, encoder_hidden=32, duration_hidden=16, encoder_layers=2, decoder_channels=16
)
HALF = dict(precision="bfloat16", denoising_frames=8)


def half():
    return torch.autocast("cpu", torch.bfloat16)


def test_without_autocast_takes_every_argument():
    @without_autocast
    def product(a, *, b):
        return a @ b

    with half():
        assert product(torch.eye(2), b=torch.eye(2)).dtype == torch.float32
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16, "what was on is on again"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Stretching gives float32 under autocast, as some CUDA operations do; its convolutions want one type."
    plain = layers.stretch

    def stretch(x, factor):
        return plain(x.float() if torch.is_autocast_enabled("cpu") and factor > 1 else x, factor)

    monkeypatch.setattr(layers, "stretch", stretch)


@pytest.mark.parametrize("options", [dict(method="dpok"), dict(method="dlpo", trainable="all")])
def test_a_gradient_is_taken_outside_autocast(options, as_on_a_gpu):
    metrics = make_tuner(**HALF, **options).episode()
    assert metrics["ratio/mean"] == 1.0 and metrics["grad_norm"] > 0


class CudasLists(TorchFunctionMode):
    "Inside, operations that CUDA's autocast computes in float32 do so under a CPU's, too."

    WIDE = {"group_norm", "layer_norm", "softmax", "exp", "log", "pow", "rsqrt", "softplus", "cumsum", "norm"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.WIDE and torch.is_autocast_enabled("cpu"):
            args = tree_map(lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x, args)
        return function(*args, **(kwargs or {}))


def make_unet():
    "The released kind of Grad-TTS, narrow; what random weights say is heard as silence."
    voice = fill(GradTTS(TINY_UNET)).eval()
    with torch.no_grad():
        voice.encoder.proj_w.proj.bias.fill_(0.3)  # a frame or two a symbol
    voice.__dict__["vocoder"] = lambda mels, frames: torch.zeros(len(mels), int(frames.max()) * voice.hop)
    return voice


def places(audio, lengths, rate, texts):
    "A reward that tells rollouts apart whatever they sound like."
    return torch.arange(float(len(texts)))


@pytest.mark.parametrize("make", [make_gradtts, make_unet], ids=["small", "unet"])
def test_grad_tts_in_bfloat16(make):
    """Which preset gradtts asks for: on policy; 8 bits in each product move the gradient by a few percent."""
    rows = []
    for precision in ("float32", "bfloat16"):
        with CudasLists():
            options = dict(method="dpok", micro_batch=4, rollout_steps=4, train_steps="last:2", fork=2)
            rows.append(make_tuner(make(), places, **HALF | dict(precision=precision), **options).episode())
    exact, half = rows
    assert half["ratio/mean"] == 1.0 and half["kl"] == pytest.approx(0, abs=1e-9)
    assert half["grad_norm"] != exact["grad_norm"] == pytest.approx(half["grad_norm"], rel=0.2)


@pytest.mark.parametrize(
    "make", [make_model, make_gradtts, make_toy_mel], ids=["wavegrad2", "gradtts", "toy"]
)
def test_conditioning_is_not_subject_to_autocast(make):
    """Lengths, too, are those of float32."""
    policy = make()
    ids, lengths = pad_ids(policy.encode(TEXTS))
    plain = policy.condition(ids, lengths)
    with half():
        inside = policy.condition(ids, lengths)
    assert torch.equal(inside.hidden, plain.hidden) and torch.equal(inside.seconds, plain.seconds)
    assert torch.equal(inside.frames, plain.frames) and inside.hidden.dtype == plain.hidden.dtype


def test_recordings_are_not_subject_to_autocast():
    """Those of a mel spectrogram, whose filters are a product."""
    policy, draw = make_gradtts(), torch.Generator().manual_seed(0)
    said = policy.condition(*pad_ids(policy.encode(TEXTS)))
    audio = torch.randn(len(TEXTS), int(said.frames.max()) * policy.hop, generator=draw)
    plain = policy.analyse(audio, said)
    with half():
        inside = policy.analyse(audio, said)
    assert torch.equal(inside, plain) and inside.dtype == torch.float32


def test_a_policy_of_ones_own_is_conditioned_without_autocast():
    class Own(make_toy_mel().__class__):
        def condition(self, ids, lengths, durations=None):
            assert not torch.is_autocast_enabled("cpu")
            return super().condition(ids, lengths, durations)

    policy = make_toy_mel()
    policy.__class__ = Own
    with half():
        assert policy.condition(*pad_ids(policy.encode(TEXTS))).hidden.isfinite().all()
    assert "condition" in Policy.__abstractmethods__ and not Own.__abstractmethods__


def test_low_rank_products_keep_their_digits():
    torch.manual_seed(0)
    weight = torch.randn(8, 8, 3)
    change = LowRank(weight, 2, 1.0)
    torch.nn.init.normal_(change.b)
    plain = change(weight)
    with half():
        assert torch.equal(change(weight), plain)


@pytest.fixture
def asked(monkeypatch):
    "Whether a convolution of the decoder was asked for under autocast, each time."
    found, plain = [], F.conv2d

    def conv2d(*arguments, **options):
        found.append(torch.is_autocast_enabled("cpu"))
        return plain(*arguments, **options)

    monkeypatch.setattr(F, "conv2d", conv2d)
    return found


def watch(tuner):
    checkpoints.heldout_reward(tuner, TEXTS)


def speak(tuner):
    speak_heldout(tuner, tuner.config, TEXTS[:1])


def drift(tuner):
    diagnostics.drift(tuner, TEXTS[:1])


def signal(tuner):
    diagnostics.gradient_signal(tuner)


@pytest.mark.parametrize("look", [watch, speak, drift, signal])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_is_looked_at_in_its_own_precision(look, precision, asked):
    tuner = make_tuner(spoken(make_model()), precision=precision, batch_size=6)
    asked.clear()
    look(tuner)
    assert asked and set(asked) == {precision == "bfloat16"}


def test_step_counts_of_a_resumed_optimiser_stay_on_the_cpu(tmp_path):
    first, second = make_tuner(), make_tuner()
    first.episode()
    save_state(first, tmp_path / "state.pt")
    second.device = torch.device("meta")  # an accelerator from which nothing can be read
    load_state(second, tmp_path / "state.pt")
    counts = [state["step"] for state in second.optimiser.state.values()]
    assert counts and all(count.device.type == "cpu" and count == 1 for count in counts)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters))


@pytest.fixture
def restored():
    "What is set for the whole process is as it was before, after the test."
    yield
    compute_in("float32")
    torch.backends.cudnn.allow_tf32 = True


def test_float32_means_float32(restored):
    for precision in ("tf32", "float32", "bfloat16"):
        compute_in(precision)
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        assert flags == (precision == "tf32",) * 2
    compute_in(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    compute_in()
    assert not torch.are_deterministic_algorithms_enabled()


def test_environment_says_how_a_gpu_computes(restored, monkeypatch):
    assert "tf32" not in environment(), "it decides nothing on a CPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "pretended")
    compute_in("float32", deterministic=True)
    there = environment()
    assert there["tf32"] is False and there["deterministic"] is True
