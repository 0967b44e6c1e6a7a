"""A sentence by a packaged base, as a user would ask for it."""

import subprocess
import sys

import pytest
import soundfile

from dlpo_nb.core import UserError
from dlpo_nb.say import SayConfig, say


def test_the_packaged_voice_speaks(tmp_path):
    command = [sys.executable, "-m", "dlpo_nb.say", "Dr. Lee paid $3.50.", "--out", str(tmp_path / "lee.wav")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Distill-MOS" in done.stdout and "what a machine hears" in done.stdout and "dBFS" in done.stdout
    audio, rate = soundfile.read(tmp_path / "lee.wav")
    assert rate == 24000 and 1.0 < len(audio) / rate < 6.0 and abs(audio).max() > 0.05


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(text="..."), "nothing to speak|no words|nothing"),
        (dict(base="no_such_base"), "no_such_base"),
        (dict(steps=0), "--steps is 0"),
    ],
)
def test_what_cannot_be_spoken_is_one_sentence(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        say(SayConfig(**dict(text="Hello.", out=tmp_path / "a.wav") | change))


def test_a_first_sentence_imports_nothing_that_it_does_not_need(tmp_path):
    """Torch's compiler and transformers took half of the time from the command to the sound."""
    code = (
        "import sys; from dlpo_nb.say import main; "
        "sys.argv = ['say', 'Hello.', '--out', 'a.wav']; main(); "
        "print(sorted({'torch._dynamo', 'transformers', 'sympy', 'pandas', 'matplotlib', 'IPython', 'scipy'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
