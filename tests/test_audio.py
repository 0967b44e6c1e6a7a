"""import_torchaudio in fresh processes, and files, rates and players at their edges."""

import base64
import math
import os
import re
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
import torch

from dlpo_nb.audio import (
    SAMPLE_RATE,
    SoundWarning,
    beyond_full_scale,
    is_silent,
    log_mel,
    log_mel_distance,
    mp3_bytes,
    noise_floor_db,
    play_row,
    player_html,
    read_audio,
    resample,
    rms_db,
    sound_faults,
    spectrogram_png,
    write_audio,
)
from dlpo_nb.core import UserError, asset


def python(code, first_on_path=None):
    paths = [str(p) for p in (first_on_path, *sys.path) if p]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(folder, **files):
    (folder / "torchaudio").mkdir()
    for name, text in files.items():
        (folder / "torchaudio" / f"{name}.py").write_text(text)
    return folder


def test_resample_of_a_sine_beside_this_torch():
    assert (
        python("""
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
""")
        == "16000 True"
    )


def test_transformers_audio_models_import_afterwards():
    pytest.importorskip("transformers")
    assert (
        python("""
from dlpo_nb.audio import import_torchaudio
import_torchaudio()
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
import numpy as np
inputs = WhisperFeatureExtractor()(np.zeros(16000), sampling_rate=16000, return_tensors="np")
print(inputs.input_features.shape)
""")
        == "(1, 80, 3000)"
    )


def test_a_healthy_torchaudio_is_taken_as_it_is(tmp_path):
    package(
        tmp_path,
        __init__="from . import functional\nhealthy = True",
        functional="def resample(x, a, b): return 'real'",
    )
    code = (
        "from dlpo_nb.audio import *; a = import_torchaudio(); "
        "print(a.healthy, resample([1], 2, 1), a is import_torchaudio())"
    )
    assert python(code, tmp_path) == "True real True"


@pytest.mark.parametrize("text", ["raise OSError('libc10_cuda.so')", "import a_module_that_is_not_there"])
def test_a_torchaudio_beyond_help_is_a_clear_error_and_leaves_nothing(tmp_path, text):
    package(tmp_path, __init__=f"from . import functional\n{text}", functional="")
    assert (
        python(
            """
import sys
from dlpo_nb.audio import import_torchaudio
from dlpo_nb.core import UserError
try: import_torchaudio()
except UserError as error:
    print("pip install torchaudio" in str(error), [n for n in sys.modules if n.startswith("torchaudio")])
""",
            tmp_path,
        )
        == "True []"
    )


def test_audio_imports_without_torchaudio_and_matplotlib():
    assert (
        python(
            "import sys, dlpo_nb.audio; print([n for n in ('torchaudio', 'matplotlib', "
            "'IPython') if n in sys.modules])"
        )
        == "[]"
    )


@pytest.mark.parametrize(
    "suffix, error", [("wav", 1 / 2**15), ("flac", 1 / 2**15), ("ogg", 0.05), ("mp3", 0.05)]
)
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

    assert torch.equal(
        resample(audio, 22050, 16000), import_torchaudio().functional.resample(audio, 22050, 16000)
    )
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


def test_a_row_of_players_leaves_out_what_is_not_there(tmp_path, monkeypatch, capsys):
    shown, audio = [], 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(plt.gcf()))
    write_audio(tmp_path / "b.wav", audio, 16000)
    play_row({"a": audio, "<b>": tmp_path / "b.wav", "gone": tmp_path / "gone.wav"})
    players, picture = shown
    assert players.data.count("<audio") == 2 and "&lt;b&gt;" in players.data and "gone" not in players.data
    assert [ax.get_title() for ax in picture.axes] == ["a", "<b>"]
    plt.close("all")
    play_row({"gone": tmp_path / "gone.wav"})
    assert len(shown) == 2 and "nothing" in capsys.readouterr().out


# faults that a score does not show


def hum(seconds=1.0, level=0.3, rate=SAMPLE_RATE):
    "A voiced sound (N,) with syllables."
    t = torch.arange(int(seconds * rate)) / rate
    return (
        level
        * (0.6 + 0.4 * torch.sin(2 * torch.pi * 4 * t))
        * torch.sin(2 * torch.pi * 150 * t + 2 * torch.sin(2 * torch.pi * 75 * t))
    ).float()


def click(place, value=1.0, n=SAMPLE_RATE):
    return torch.zeros(n).index_fill(0, torch.tensor(place % n), value)


@pytest.mark.parametrize("sound, silent, kinds", [
    (hum(), False, []), (hum(level=0.005), False, []), (hum(0.2), False, []), (hum(rate=48000), False, []),
    (hum() + 0.01, False, []), (hum() - 0.1, False, ["offset"]), (hum(level=0.003) + 0.01, False, ["offset"]),
    (torch.zeros(SAMPLE_RATE), True, ["silence"]), (torch.zeros(5), True, ["silence"]),
    (hum(level=1e-4), True, ["silence"]), (torch.full((SAMPLE_RATE,), -0.5), True, ["silence", "offset"]),
    (click(9000), True, ["silence", "click"]), (click(-1), True, ["silence", "click"]),
    (click(0, -0.5), True, ["silence", "click"]), (0.02 * hum() + click(9000), False, ["click"]),
    (0.02 * hum() + click(-1, -0.9), False, ["click"]), (0.01 * hum() + click(0), False, ["click"]),
    (hum(level=2.0), False, ["clipping"]), (torch.full((100,), math.nan), True, []),
    (torch.zeros(0), True, []),
])  # fmt: skip
def test_faults_are_named_and_voices_have_none(sound, silent, kinds):
    assert (
        list(sound_faults(sound)) == kinds and is_silent(sound) == silent and beyond_full_scale(sound) is None
    )


@pytest.mark.parametrize("scale", [128, 32768, 2**23, 2**31])
def test_integers_kept_as_floats_are_refused_with_file_and_value(tmp_path, scale):
    path = tmp_path / "mine.wav"
    soundfile.write(path, (hum(level=0.5) * scale).numpy(), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(
        UserError, match=r"mine.wav: its samples reach [\d.e+]+, but those of float audio lie in \[-1, 1\]"
    ):
        read_audio(path)


def test_reading_warns_of_faults_with_file_and_value(tmp_path):
    for name, sound, words in [
        ("a", hum() + 0.1, "a.wav: it has a DC offset of 0.1"),
        ("b", torch.zeros(9000), "b.wav: it is digital silence"),
        ("c", 0.01 * hum() + click(5000), "c.wav: it has a single click of 1 at 0.23 s"),
    ]:
        write_audio(tmp_path / f"{name}.wav", sound)
        with pytest.warns(SoundWarning, match=words):
            assert len(read_audio(tmp_path / f"{name}.wav")) == len(sound)


def test_a_natural_voice_has_no_faults():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in sorted(asset("speech_train").glob("audio/*.flac"))[:20]:
            read_audio(path)


def test_the_reported_recordings_are_named(shared):
    folder = shared / "public_reports" / "audio"
    with pytest.raises(UserError, match="float_in_int16_range.wav: its samples reach 32766"):
        read_audio(folder / "float_in_int16_range.wav")
    for name, words in [
        ("click_then_quiet", "single click of 1 at 1.85 s, 46 dB above"),
        ("digital_silence", "digital silence"),
    ]:
        with pytest.warns(SoundWarning, match=f"{name}.wav: .*{words}"):
            read_audio(folder / f"{name}.wav")


def test_a_short_sound_is_short_and_not_silent():
    sine = torch.sin(torch.arange(2205) / 20) / 4
    assert "lasts 0.0136 s" in sound_faults(sine[:300])["silence"] and "silence" not in sound_faults(sine)
