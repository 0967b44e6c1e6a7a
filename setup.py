"""Package metadata, read from settings.ini (which nbdev also reads)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    url=cfg["git_url"],
    packages=find_packages(include=["dlpo_nb", "dlpo_nb.*"]),
    package_data={"dlpo_nb": ["assets/*", "assets/speech_train/*", "assets/speech_train/audio/*",
                              "assets/speech_hibari/*", "assets/speech_hibari/audio/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "voice": cfg["voice_requirements"].split(),
        "whisper": cfg["whisper_requirements"].split(),
        "dev": " ".join(cfg[name] for name in ("dev_requirements", "voice_requirements", "whisper_requirements")).split(),
    },
)
