"""Files of weights that are damaged, disguised or hostile, for every reader: read where that is right, else
refused in one sentence with the true reason; nothing in them is run, and the memory stays small."""

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import utmos_weights
from dlpo_nb.core import UserError, asset
from dlpo_nb.finetune import load_state, save_state
from dlpo_nb.gradtts.model import GradTTS, GradTTSConfig
from dlpo_nb.hifigan import load_generator as load_hifigan
from dlpo_nb.policies import load_policy
from dlpo_nb.rewards.nisqa import OPTIONS, load_nisqa
from dlpo_nb.rewards.utmos import load_utmos
from dlpo_nb.rewards.wer import FasterWhisper, load_whisper, packaged_whisper
from dlpo_nb.vocos import load_generator as load_vocos
from dlpo_nb.weights import read_safetensors, read_weights
from gradtts_weights import small_generator
from small_policy import TINY, make_model, make_tuner
from tiny_whisper import save_tiny_whisper

NARROW = dict(
    encoder_channels=16, encoder_hidden=32, duration_hidden=16, encoder_layers=1, decoder_channels=8
)


class Kind(NamedTuple):
    "A kind of file: its tensors, how it is written and how it is read."

    name: str
    tensors: dict
    wrap: Callable | None  # tensors -> what torch.save writes; None: a safetensors file
    metadata: dict  # of a safetensors file
    load: Callable
    matrix: str  # a tensor whose second axis no configuration is read from

    @property
    def suffix(self):
        return ".pt" if self.wrap else ".safetensors"


def write(kind, path, tensors):
    if kind.wrap:
        torch.save(kind.wrap(tensors), path)
    else:
        save_file({name: value.clone() for name, value in tensors.items()}, path, kind.metadata)
    return path


def nisqa_network():
    from torchmetrics.functional.audio.nisqa import _NISQADIM

    torch.manual_seed(0)
    return _NISQADIM(OPTIONS)


@pytest.fixture(scope="module")
def kinds(data):
    torch.manual_seed(0)
    voice, vocos = make_model(config=TINY), read_safetensors(asset("vocos_small.safetensors"))
    sizes = {"kind": "wavegrad2", "wavegrad2": json.dumps(TINY.__dict__)}
    grad = GradTTS(GradTTSConfig(**NARROW)).state_dict()
    utmos = {name: torch.zeros(1).expand(shape) for name, shape in utmos_weights.shapes().items()}
    embedding, hifigan = "speaker_embedding.weight", small_generator(data)
    found = [
        Kind("ours", voice.state_dict(), None, sizes, load_policy, embedding),
        Kind("gradtts", grad, lambda x: x, {}, load_policy, "decoder.estimator.final_conv.weight"),
        Kind("hifigan", hifigan, lambda x: {"generator": x}, {}, load_hifigan, "conv_post.bias"),
        Kind("vocos", vocos[0], None, vocos[1], load_vocos, "head.weight"),
        Kind(
            "nisqa", nisqa_network().state_dict(), lambda x: {"args": OPTIONS, "model_state_dict": x}, {},
            load_nisqa, "cnn.model.conv1.weight",
        ),
        Kind("utmos", utmos, lambda x: x, {}, load_utmos, "judge_emb"),
    ]  # fmt: skip
    return {kind.name: kind for kind in found}


NAMES = ["ours", "gradtts", "hifigan", "vocos", "nisqa", "utmos"]


@pytest.fixture(params=NAMES)
def kind(request, kinds):
    return kinds[request.param]


def refusal(kind, path):
    "The sentence by which a file is refused."
    with pytest.raises(UserError) as caught:
        kind.load(path)
    said = str(caught.value)
    assert "\n" not in said and path.name in said and "weights_only" not in said, said
    return said


# tensors that are not what they should be


def changed(kind, function):
    return kind.tensors | {kind.matrix: function(kind.tensors[kind.matrix])}


def test_tensors_of_another_shape_or_content(kind, tmp_path):
    path = tmp_path / f"file{kind.suffix}"
    cases = [
        (lambda x: torch.full_like(x, float("nan")), "finite"),
        (lambda x: torch.full_like(x, float("inf")), "finite"),
        (lambda x: torch.cat([x, x]), "shape"),
        (lambda x: torch.ones(x.shape, dtype=torch.int8), "fraction|whole"),
    ]
    for function, words in cases:
        said = refusal(kind, write(kind, path, changed(kind, function)))
        assert any(word in said for word in words.split("|")), said
    less = {name: value for name, value in kind.tensors.items() if name != kind.matrix}
    assert kind.matrix in refusal(kind, write(kind, path, less))
    more = kind.tensors | {"a.further.one": torch.zeros(2)}
    assert "too many" in refusal(kind, write(kind, path, more))
    assert refusal(kind, write(kind, path, {"layer.weight": torch.ones(3, 3)}))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_model_that_was_wrapped_is_the_model(kind, tmp_path, prefix):
    wrapped = {prefix + name: value for name, value in kind.tensors.items()}
    assert kind.load(write(kind, tmp_path / f"file{kind.suffix}", wrapped))


@pytest.mark.parametrize("name", ["gradtts", "hifigan", "nisqa", "utmos"])
def test_dictionaries_around_the_weights(kinds, tmp_path, name):
    kind, path = kinds[name], tmp_path / "file.pt"
    for wrap in (
        lambda x: {"model": x, "epoch": 3},
        lambda x: {"state_dict": {f"module.{name}": value for name, value in x.items()}},
        lambda x: {"model": {"state_dict": x}},
    ):
        torch.save(wrap(kind.tensors), path)
        assert kind.load(path)


@pytest.mark.parametrize("name", ["ours", "gradtts", "hifigan", "vocos", "nisqa"])
def test_float8_and_bfloat16_are_numbers(kinds, tmp_path, name):
    kind = kinds[name]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
        narrow = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in kind.tensors.items()
        }
        model = kind.load(write(kind, tmp_path / f"file{kind.suffix}", narrow))
        kept = dict(model.state_dict())
        assert all(value.dtype == torch.float32 for value in kept.values() if value.is_floating_point())


def test_the_kinds_are_not_swapped(kinds, tmp_path):
    for kind in kinds.values():
        for other in kinds.values():
            path = write(other, tmp_path / f"{other.name}{kind.suffix}", other.tensors)
            if kind is not other and {kind.name, other.name} != {"ours", "gradtts"}:
                refusal(kind, path)
    for name, kind in (("ours", "gradtts"), ("gradtts", "wavegrad2")):
        path = write(kinds[name], tmp_path / "voice", kinds[name].tensors)
        with pytest.raises(UserError, match="policy of the kind"):
            load_policy(path, kind=kind)


# bytes that are not what they should be


def test_bytes_that_are_no_weights(kind, tmp_path):
    good = write(kind, tmp_path / f"good{kind.suffix}", kind.tensors).read_bytes()
    path = tmp_path / f"file{kind.suffix}"
    contents = [
        b"",
        b"<!DOCTYPE html><title>Not Found</title>",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(5000),
        good[: len(good) // 2],
        good[:-9],
        good[:60],
    ]
    for content in contents:
        path.write_bytes(content)
        refusal(kind, path)


class Evil:
    "Unpickling it makes a folder."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_run(kind, tmp_path):
    path, evidence = tmp_path / "file.pt", tmp_path / "owned"
    for content in (Evil(evidence), {"model": Evil(evidence)}, {kind.matrix: Evil(evidence)}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            refusal(kind, path)
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps(Evil(evidence), protocol))
        refusal(kind, path)
    if kind.wrap:  # beside the weights
        torch.save(kind.wrap(kind.tensors) | {"evil": Evil(evidence)}, path)
        try:
            kind.load(path)
        except UserError as error:
            assert "\n" not in str(error)
    assert not evidence.exists()


# memory


def archive_of(path, listing: bytes, storage=b"", compression=zipfile.ZIP_STORED):
    "A torch.save archive whose structure is the given pickle."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", listing)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", storage)
    return path


def most_memory(work):
    "Bytes that Python asked for at once, at most, during the work."
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_stays_small(kind, tmp_path):
    bomb = archive_of(tmp_path / "file.pt", pickle.dumps({}), bytes(200_000_000), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1e6
    said = []
    assert most_memory(lambda: said.append(refusal(kind, bomb))) < 50e6
    assert "compressed" in said[0], said


class Store:
    "In a pickle: the storage 0, of some float32 numbers."


class View:
    "In a pickle: a tensor of `shape`, a view of the storage 0."

    def __init__(self, shape):
        self.shape = shape

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Store(), 0, self.shape, (0,) * len(self.shape), False, {})


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Store) else None


def listing_of(count, shape):
    "A pickle of `count` tensors that are views of one storage."
    out = io.BytesIO()
    Pickler(out, 2).dump({f"layer{i}.weight": View(shape) for i in range(count)})
    return out.getvalue()


@pytest.mark.parametrize("count, shape", [(1, (10**12,)), (10_000, (10_000,)), (1, (-5, 7)), (1, (2**70,))])
def test_tensors_that_are_larger_than_the_file(tmp_path, count, shape):
    path = archive_of(tmp_path / "file.pt", listing_of(count, shape), bytes(40_000))

    def read():
        with pytest.raises(UserError, match="larger than its data|damaged"):
            read_weights(path)

    assert most_memory(read) < 100e6


def test_a_pickle_that_wants_to_remember_much(tmp_path):
    many = b"\x80\x02N" + b"r" + struct.pack("<I", 2**31 - 1) + b"."  # None, as the 2147483647th memo
    path = archive_of(tmp_path / "file.pt", many)
    with pytest.raises(UserError, match="no dictionary of weights"):
        read_weights(path)


def test_a_pickle_cannot_change_the_reader(tmp_path):
    "BUILD would give a state, attributes that is, to a function of the reader."
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("os", "x")):
        code = f"c{module}\n{name}\n".encode() + b"(dS'__doc__'\nS'changed'\ns."
        build = code[:-1] + b"b."
        tuple_state = f"c{module}\n{name}\n".encode() + b"N(dS'__doc__'\nS'changed'\ns\x86b."
        for listing in (build, tuple_state):
            with pytest.raises(UserError):
                read_weights(archive_of(tmp_path / "file.pt", listing))
    from dlpo_nb import weights

    for entry in (weights.rebuild_tensor, weights.PlainDict, weights.Inert):
        assert entry.__doc__ != "changed"


def test_unusual_tensors_are_named(tmp_path):
    path = tmp_path / "file.pt"
    cases = {
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(3, dtype=torch.complex64),
    }
    for name, tensor in cases.items():
        torch.save({"state_dict": {name: tensor}}, path)
        with pytest.raises(UserError, match=f"{name} is"):
            read_weights(path)


def test_empty_and_shared_tensors_are_read(tmp_path):
    both = torch.arange(6.0)
    torch.save({"empty": torch.empty(0), "row": both[:3], "all": both, "again": both}, tmp_path / "file.pt")
    read = read_weights(tmp_path / "file.pt")[0]
    assert list(read) == ["empty", "row", "all", "again"] and torch.equal(read["row"], both[:3])
    read["all"].zero_()
    assert torch.equal(read["again"], both), "what is trained in one is not trained in the other"


# configurations


@pytest.mark.parametrize(
    "change",
    [
        {"factors": [2] * 100_000},
        {"first_up": 10**30},
        {"first_up": -8},
        {"first_up": "8"},
        {"data_std": float("nan")},
        {"data_std": "wide"},
        {"sample_rate": None},
        {"no_such_size": 1},
    ],
)
def test_sizes_that_are_none(kinds, tmp_path, change):
    words = json.dumps(TINY.__dict__ | change)
    kind = kinds["ours"]._replace(metadata={"kind": "wavegrad2", "wavegrad2": words})
    assert (
        most_memory(lambda: refusal(kind, write(kind, tmp_path / "file.safetensors", kind.tensors))) < 100e6
    )


@pytest.mark.parametrize("words", ["", "[]", "3", "{", '{"network": ["unet"]}', "[" * 100_000])
def test_metadata_that_are_no_configuration(kinds, tmp_path, words):
    for name in ("wavegrad2", "gradtts"):
        kind = kinds["ours"]._replace(metadata={"kind": name, name: words})
        refusal(kind, write(kind, tmp_path / "file.safetensors", kind.tensors))
    kind = kinds["vocos"]._replace(metadata={"vocos": words})
    refusal(kind, write(kind, tmp_path / "file.safetensors", kind.tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_layers": 10**9},
        {"network": "small", "decoder_blocks": 10**9},
        {"mel_mean": float("nan")},
        {"residual_std": float("inf")},
        {"encoder_channels": "many"},
        {"encoder_channels": 10**30},
        {"vocoder": "no_such_vocoder"},
    ],
)
def test_sizes_of_a_gradtts_that_are_none(kinds, tmp_path, change):
    kind = kinds["ours"]._replace(metadata={"kind": "gradtts", "gradtts": json.dumps(NARROW | change)})
    path = write(kind, tmp_path / "file.safetensors", kind.tensors)

    def read():
        with pytest.raises(UserError):
            load_policy(path)

    assert most_memory(read) < 100e6


def test_blocks_of_a_vocoder_that_no_file_holds(kinds, tmp_path):
    kind = kinds["vocos"]._replace(metadata={"vocos": json.dumps({"dilations": [1] * 100_000})})
    assert "blocks" in refusal(kind, write(kind, tmp_path / "file.safetensors", kind.tensors))


# states of runs


def test_states_of_a_run(tmp_path):
    tuner, path = make_tuner(method="ddpo"), tmp_path / "state-000001.pt"
    save_state(tuner, path)
    load_state(tuner, path)
    bomb = archive_of(tmp_path / "bomb.pt", pickle.dumps({}), bytes(200_000_000), zipfile.ZIP_DEFLATED)
    torch.save({"method": "ddpo", "model": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:-100])

    def read():
        for name in ("bomb", "evil", "list", "half"):
            with pytest.raises(UserError, match=f"{name}.pt cannot be read"):
                load_state(tuner, tmp_path / f"{name}.pt")

    assert most_memory(read) < 50e6 and bomb and not (tmp_path / "owned").exists()


# folders of a recogniser


def test_folders_of_a_whisper(tmp_path):
    good = save_tiny_whisper(tmp_path / "good", seconds=3)
    state = load_file(good / "model.safetensors")
    notes = {"format": "pt"}
    one = next(iter(state))

    def config(to, **changes):
        settings = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(settings | changes))

    def as_bin(to, content):
        (to / "model.safetensors").unlink()
        torch.save(content, to / "pytorch_model.bin")

    def bomb(to):
        (to / "model.safetensors").unlink()
        archive_of(to / "pytorch_model.bin", pickle.dumps({}), bytes(100_000_000), zipfile.ZIP_DEFLATED)

    damages = {
        "nan": (
            lambda to: save_file(state | {one: state[one] * float("nan")}, to / "model.safetensors", notes),
            "finite",
        ),
        "shape": (
            lambda to: save_file(state | {one: torch.zeros(5, 5)}, to / "model.safetensors", notes),
            "could be read",
        ),
        "layers": (lambda to: config(to, encoder_layers=10**9), "layers"),
        "evil": (lambda to: as_bin(to, state | {"evil": Evil(tmp_path / "owned")}), "could be read"),
        "bomb": (bomb, "compressed"),
    }
    for name, (damage, words) in damages.items():
        damage(Path(shutil.copytree(good, tmp_path / name)))
        with pytest.raises(UserError, match=words) as caught:
            load_whisper(tmp_path / name)
        assert "\n" not in str(caught.value)
    narrow = {
        name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value
        for name, value in state.items()
    }
    shutil.copytree(good, tmp_path / "float8")
    save_file(narrow, tmp_path / "float8" / "model.safetensors", notes)
    assert load_whisper(tmp_path / "float8")[1].dtype == torch.float32
    assert not (tmp_path / "owned").exists()


def test_folders_of_a_faster_whisper(tmp_path):
    if not (folder := packaged_whisper()):
        pytest.skip("no Whisper of CTranslate2 is installed")
    head = (folder / "model.bin").read_bytes()[:20_000_000]
    for name, content in (("half", head), ("page", b"<!DOCTYPE html>"), ("empty", b""), ("long", head[:40])):
        to = tmp_path / name
        to.mkdir()
        for file in folder.iterdir():
            if file.name != "model.bin":
                shutil.copy(file, to)
        (to / "model.bin").write_bytes(content)
        with pytest.raises(UserError, match="could be read") as caught:
            FasterWhisper(to, device="cpu")
        assert "\n" not in str(caught.value)
