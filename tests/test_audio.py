"""import_torchaudio in fresh processes, and files, rates and players at their edges."""
import base64
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from dlpo_nb.audio import (
    SAMPLE_RATE, log_mel, log_mel_distance, mp3_bytes, noise_floor_db, player_html, read_audio, resample, rms_db, spectrogram_png, write_audio)
from dlpo_nb.core import UserError


def python(code, first_on_path=None):
    paths = [str(p) for p in (first_on_path, *sys.path) if p]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(folder, **files):
    (folder / "torchaudio").mkdir()
    for name, text in files.items():
        (folder / "torchaudio" / f"{name}.py").write_text(text)
    return folder


def test_resample_of_a_sine_beside_this_torch():
    assert python("""
import sys, torch
from dlpo_nb.audio import import_torchaudio
torchaudio = import_torchaudio()
loaded = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "torchaudio"}
# whole modules only: each is what its parent's attribute names
for name, module in loaded.items():
    parent, _, child = name.rpartition(".")
    assert module is not None and (not parent or getattr(loaded[parent], child) is module), name
    assert not getattr(module.__spec__, "_initializing", False), name
assert sys.modules["torchaudio"] is torchaudio is import_torchaudio()
t = torch.arange(22050) / 22050
new = torchaudio.functional.resample(torch.sin(2 * torch.pi * 440 * t), 22050, 16000)
true = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
print(len(new), bool((new - true)[100:-100].abs().max() < 2e-3))
""") == "16000 True"


def test_transformers_audio_models_import_afterwards():
    pytest.importorskip("transformers")
    assert python("""
from dlpo_nb.audio import import_torchaudio
import_torchaudio()
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
import numpy as np
print(WhisperFeatureExtractor()(np.zeros(16000), sampling_rate=16000, return_tensors="np").input_features.shape)
""") == "(1, 80, 3000)"


def test_a_healthy_torchaudio_is_taken_as_it_is(tmp_path):
    package(tmp_path, __init__="from . import functional\nhealthy = True", functional="def resample(x, a, b): return 'real'")
    code = "from dlpo_nb.audio import *; a = import_torchaudio(); print(a.healthy, resample([1], 2, 1), a is import_torchaudio())"
    assert python(code, tmp_path) == "True real True"


@pytest.mark.parametrize("text", ["raise OSError('libc10_cuda.so')", "import a_module_that_is_not_there"])
def test_a_torchaudio_beyond_help_is_a_clear_error_and_leaves_nothing(tmp_path, text):
    package(tmp_path, __init__=f"from . import functional\n{text}", functional="")
    assert python("""
import sys
from dlpo_nb.audio import import_torchaudio
from dlpo_nb.core import UserError
try: import_torchaudio()
except UserError as error: print("pip install torchaudio" in str(error), [n for n in sys.modules if n.startswith("torchaudio")])
""", tmp_path) == "True []"


def test_audio_imports_without_torchaudio_and_matplotlib():
    assert python("import sys, dlpo_nb.audio; print([n for n in ('torchaudio', 'matplotlib', 'IPython') if n in sys.modules])") == "[]"


@pytest.mark.parametrize("suffix, error", [("wav", 1 / 2**15), ("flac", 1 / 2**15), ("ogg", 0.05), ("mp3", 0.05)])
def test_files_come_back(tmp_path, suffix, error):
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(8820) / SAMPLE_RATE)
    write_audio(tmp_path / f"tone.{suffix}", tone)
    back = read_audio(tmp_path / f"tone.{suffix}")
    assert back.dtype == torch.float32 and len(back) == len(tone)
    assert (back - tone)[1000:-1000].abs().max() <= error


def test_stereo_is_averaged_and_loud_audio_clipped(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([np.full(100, 0.5), np.zeros(100)], 1), SAMPLE_RATE)
    assert torch.allclose(read_audio(path), torch.full((100,), 0.25), atol=1e-4)
    write_audio(path, torch.tensor([2.0, -2.0]))
    assert torch.allclose(read_audio(path), torch.tensor([1.0, -1.0]), atol=1e-4)


def test_bad_files_are_user_errors(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    write_audio(tmp_path / "empty.wav", torch.zeros(0))
    write_audio(tmp_path / "slow.wav", torch.zeros(160), 16000)
    for name in ("text.wav", "empty.wav", "slow.wav", "none.wav", "."):
        with pytest.raises(UserError):
            read_audio(tmp_path / name)
    for name in ("a.xyz", "none/a.wav"):
        with pytest.raises(UserError, match="cannot write audio"):
            write_audio(tmp_path / name, torch.zeros(10))
    with pytest.raises(UserError, match="no MP3"):
        mp3_bytes(torch.zeros(1000), 12345)


def test_resample_equals_torchaudio_on_a_batch():
    audio = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    from dlpo_nb.audio import import_torchaudio
    assert torch.equal(resample(audio, 22050, 16000), import_torchaudio().functional.resample(audio, 22050, 16000))
    assert torch.equal(resample(audio, 22050, 22050), audio)


@pytest.mark.parametrize("length", [1, 299, 300, 513, 5000])
def test_short_audio_has_a_mel(length):
    mel = log_mel(torch.randn(length), n_mels=40)
    assert mel.shape == (1, 40, max(length, 513) // 300 + 1) and torch.isfinite(mel).all()
    assert np.isfinite([rms_db(torch.randn(length)), noise_floor_db(torch.randn(length))]).all()


def test_mel_of_a_batch_is_the_mels_of_its_items():
    audio = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(log_mel(audio), torch.cat([log_mel(a) for a in audio]), atol=1e-5)
    assert log_mel_distance(log_mel(audio[0]), log_mel(audio[0, :3000])[..., :-2]) < 1e-5


def test_player_holds_sound_and_picture():
    audio = 0.1 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    text = player_html(audio, 'say "<hi>"')
    sound, picture = (base64.b64decode(d) for d in re.findall(r"base64,([A-Za-z0-9+/=]+)", text))
    assert sound == mp3_bytes(audio) and picture == spectrogram_png(audio) and picture.startswith(b"\x89PNG")
    assert "<hi>" not in text and "http" not in text
    assert "image/png" not in player_html(audio, picture=False)


def test_what_is_odd_about_a_recording_is_said(tmp_path):
    from dlpo_nb.audio import is_silent, remarks

    t = torch.arange(22050) / 22050
    speech = torch.sin(2 * torch.pi * 200 * t) * torch.sin(torch.pi * t) / 4
    click = torch.zeros(22050).index_fill_(0, torch.tensor([9000]), 0.9)
    assert remarks(speech) == [] and remarks(speech / 30) == [] and not is_silent(speech / 30)
    for clip, word in [(0 * speech, "silent"), (0 * speech - 0.2, "silent"), (click, "silent"), (speech + 0.05, "DC offset"), (speech / 50 + click, "click"),
                       (6 * speech, "full scale"), (torch.zeros(0), "empty"), (speech * torch.nan, "nan")]:
        assert any(word in remark for remark in remarks(clip)), word
    soundfile.write(tmp_path / "ints.wav", (20000 * speech).numpy(), 22050, subtype="FLOAT")
    with pytest.raises(UserError, match="whole numbers as floats"):
        read_audio(tmp_path / "ints.wav")
    soundfile.write(tmp_path / "hot.wav", (6 * speech).numpy(), 22050, subtype="FLOAT")
    assert len(read_audio(tmp_path / "hot.wav")) == 22050
