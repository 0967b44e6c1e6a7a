"""What an installation brings: pins that fit the requirements, licences that are listed, a whole wheel,
imports that wait, a start without a network."""

import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def requirements():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = [value for key, value in config["DEFAULT"].items() if key.endswith("requirements")]
    return [Requirement(word) for line in lines for word in line.split()]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_pins_are_of_versions_that_are_allowed(requirements, pins):
    for need in requirements:
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need


def test_nothing_is_without_an_upper_bound(requirements):
    for need in requirements:
        assert any(bound.operator in ("<", "==", "<=", "~=") for bound in need.specifier), need


def test_licences_are_listed(requirements, pins):
    listed = (ROOT / "LICENSES.md").read_text()
    for name in [*(canonicalize_name(need.name) for need in requirements), *pins]:
        assert f"| {name} |" in listed, f"{name}: run python tools/licences.py"
    packages = listed.split("## Packaged files")[0]
    assert not re.search(r"(?<!L)GPL|Affero|not stated", packages)  # what would bind a user of the library
    assets = {path.name for path in (ROOT / "dlpo_nb" / "assets").iterdir()} - {"cmudict_license.txt"}
    for name in assets:
        assert name in listed or name.removesuffix(".safetensors") in listed, name


def test_both_commands_of_the_readme_install_the_pins():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and all("-c constraints.txt" in command for command in commands)


HEAVY = (
    "matplotlib",
    "transformers",
    "librosa",
    "onnxruntime",
    "torchaudio",
    "pandas",
    "IPython",
    "scipy.stats",
)


def test_an_import_loads_no_more_than_it_needs():
    code = "import sys; import dlpo_nb; first = 'torch' in sys.modules; import dlpo_nb.launch; "
    code += f"print(first, [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False []", done.stdout + done.stderr


NO_NETWORK = """
import socket
def refused(*args, **kwargs):
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
"""


def test_the_default_job_starts_without_a_network(tmp_path):
    start = "import sys; sys.argv[0] = 'launch'; from dlpo_nb.core import run_main; "
    start += "from dlpo_nb.launch import main; run_main(main)"
    flags = ["--episodes", "1", "--batch-size", "4", "--group-size", "4", "--heldout", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + start, *flags, "--out", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks, as from a fresh clone."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in tracked:
        if re.match(r"dlpo_nb/|setup.py|settings.ini|pyproject.toml|README.md|LICENSE$", name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_is_whole_and_speaks_from_an_empty_folder(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("dlpo_nb/")}
        archive.extractall(tmp_path / "site")
    here = (
        path for path in (ROOT / "dlpo_nb").rglob("*") if path.is_file() and "__pycache__" not in str(path)
    )
    assert packed == {str(path.relative_to(ROOT)) for path in here}
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.delenv("HOME", raising=False)
    command = [sys.executable, "-m", "dlpo_nb.say", "Hello there.", "--out", "hello.wav", "--no-judge"]
    done = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty" / "hello.wav").is_file()
