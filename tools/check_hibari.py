"""Another aligner's opinion of hibari's durations: `python tools/check_hibari.py` (200 packaged train texts,
2 minutes).

Compares the starts of phones with those that pocketsphinx finds in the same sound,
as made and with each of the decisions of 03c_hibari undone, and writes results/hibari/alignment.json.
"""

import json
import platform
from pathlib import Path

import numpy as np

from dlpo_nb import hibari
from dlpo_nb.core import UserError, environment
from dlpo_nb.corpus import FRAME_RATE
from dlpo_nb.alignment import LAG, Aligner, Alignment, compare_alignments
from dlpo_nb.text import VOWELS, prompts, text_to_phones

COUNT = 200
BINS = list(range(-150, 160, 10))
VARIANTS = (
    "as made",
    "sound not moved",
    "spaces to the phone before",
    "spaces to the phone after",
    "taken for 12.5 ms",
)


def spaces_to(side):
    """`_Phones.space` that gives a space wholly to one side."""

    def space(self, steps):
        before = steps if side == "before" or self.names[-1] in ("sil", "sp") else 0
        self.steps[-1] += before
        self.held += steps - before

    return space


def speak_as(variant, text):
    """(`Utterance` of the text with one decision undone, seconds of a step)."""
    space, early = hibari._Phones.space, hibari.EARLY
    try:
        if variant.startswith("spaces"):
            hibari._Phones.space = spaces_to(variant.split()[-1])
        if variant == "sound not moved":
            hibari.EARLY = 0
        said = hibari.speak(text)
    finally:
        hibari._Phones.space, hibari.EARLY = space, early
    return said, hibari.UNIT / hibari.RATE / (2 if variant == "taken for 12.5 ms" else 1)


def kind_of(phone):
    """vowel (by its digit) or consonant."""
    return f"vowel {phone[-1]}" if phone.rstrip("012") in VOWELS else "consonant"


def compare(said, step, aligner, text):
    """(differences in ms, their kinds, share of pocketsphinx's phones that are the same),
    the first phone left out."""
    audio, _ = hibari.to_frames(said, 22050)
    peak = np.abs(audio).max()
    theirs = aligner(np.round(audio / peak * 32767).astype(np.int16), text)
    ours = Alignment(said.phones, np.cumsum([0, *said.steps]) * step)
    differences, share = compare_alignments(ours, theirs)
    return 1e3 * differences[1:, 0], share


def kinds_as_made(said, aligner, text):
    """[(kind, difference in ms)] phone by phone, where both have the same phones in the same order."""
    audio, _ = hibari.to_frames(said, 22050)
    theirs = aligner(np.round(audio / np.abs(audio).max() * 32767).astype(np.int16), text)
    sides = []
    for alignment in (
        Alignment(said.phones, np.cumsum([0, *said.steps]) * hibari.UNIT / hibari.RATE),
        theirs,
    ):
        sides.append(
            [
                (phone, start)
                for phone, start in zip(alignment.phones, alignment.bounds)
                if phone and phone != "sp"
            ]
        )
    if [p.rstrip("012") for p, _ in sides[0]] != [p.rstrip("012") for p, _ in sides[1]]:
        return []
    return [(kind_of(ours[0]), 1e3 * (ours[1] - other[1])) for ours, other in list(zip(*sides))[1:]]


def summary(values):
    off = np.abs(values)
    return dict(
        phones=len(values),
        median_ms=float(np.median(values)),
        median_abs_ms=float(np.median(off)),
        p90_abs_ms=float(np.quantile(off, 0.9)),
        within_25_ms=float(np.mean(off <= 25)),
        within_50_ms=float(np.mean(off <= 50)),
    )


def main():
    aligner, found, shares, same, refused, kinds = Aligner(), {name: [] for name in VARIANTS}, [], [], [], {}
    for text in prompts("train")[:COUNT]:
        for variant in VARIANTS:
            said, step = speak_as(variant, text)
            try:
                differences, share = compare(said, step, aligner, text)
            except UserError:
                refused.append((variant, text))
                continue
            found[variant].append(differences)
            if variant == "as made":
                shares.append(share)
                same.append(said.phones == text_to_phones(text))
                for kind, value in kinds_as_made(said, aligner, text):
                    kinds.setdefault(kind, []).append(value)
    values = {name: np.concatenate(rows) for name, rows in found.items()}
    report = dict(
        command="python tools/check_hibari.py",
        texts=COUNT,
        utterances=len(shares),
        aligner=f"pocketsphinx, lag {LAG}",
        not_aligned={name: sum(variant == name for variant, _ in refused) for name in VARIANTS},
        same_phones=float(np.mean(shares)),
        same_as_front_end=float(np.mean(same)),
        summary={name: summary(rows) for name, rows in values.items()},
        bins_ms=BINS,
        histograms={name: np.histogram(rows, BINS)[0].tolist() for name, rows in values.items()},
        by_kind_ms={kind: np.round(kinds[kind], 1).tolist() for kind in sorted(kinds)},
        environment=environment(),
        machine=platform.machine(),
    )
    out = Path(__file__).resolve().parents[1] / "results" / "hibari" / "alignment.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in report["summary"].items():
        print(name, row)


if __name__ == "__main__":
    main()
