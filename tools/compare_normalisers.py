"""How often each text normaliser reads written English as expected:
ours, and NeMo, WeText, gruut where installed.

    python tools/compare_normalisers.py [--out results/text/normalisers.json] [--ljspeech FOLDER]
    [--nemo-cases FOLDER]
        [--before RECORD]

Our own sentences: tests/data/written_english.tsv (class, text, expected words), which our rules were mended
with, written_english_fresh.tsv, which was written before the rules of today, and written_english_unseen.tsv,
written after them and never used to mend one (several readings may be right, " | " between them). Texts of
LJSpeech whose normalised field differs from the raw one (--ljspeech: the folder of metadata.csv). The test
cases of NeMo text processing (--nemo-cases: its folder
tests/nemo_text_processing/en/data_text_normalization), which are at home there. --before: the record of an
earlier version, whose own counts are kept as "before". Punctuation, hyphens, case and spaces are not
compared, nor "and", nor "o" against "oh", nor "negative" against "minus". gruut was run in an environment of
its own and its counts joined; "before" is commit 8589c80.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from dlpo_nb.core import split_lines
from dlpo_nb.normalisation import normalise

ROOT = Path(__file__).resolve().parents[1]
LJSPEECH_TEXTS = 300  # drawn with seed 0: NeMo takes a tenth of a second for each


def comparable(text):
    "Small letters without punctuation and spaces; o and oh, negative and minus alike."
    words = re.sub(r"[^a-zé' ]", " ", text.lower()).replace("'", "").split()
    return "".join({"o": "oh", "negative": "minus"}.get(word, word) for word in words if word != "and")


def wetext():
    from wetext import Normalizer

    return Normalizer(lang="en", operator="tn").normalize


def nemo():
    from nemo_text_processing.text_normalization.normalize import Normalizer

    normaliser = Normalizer(input_case="cased", lang="en")
    return lambda text: normaliser.normalize(text, verbose=False)


def gruut():
    from gruut import sentences

    return lambda text: " ".join(
        sentence.text_spoken for sentence in sentences(text, lang="en-us", phonemes=False)
    )


def rows_of(path, separator="\t"):
    return [line.split(separator) for line in split_lines(path.read_text(encoding="utf-8"))]


def material(options):
    "name -> [(class, text, right readings)]."
    sets = {
        name: [
            (kind, text, words.split(" | "))
            for kind, text, words in rows_of(ROOT / "tests" / "data" / f"{name}.tsv")[1:]
        ]
        for name in ("written_english", "written_english_fresh", "written_english_unseen")
    }
    if options.ljspeech:
        differ = [
            ("ljspeech", raw, [words])
            for _, raw, words in rows_of(options.ljspeech / "metadata.csv", "|")
            if raw != words
        ]
        sets["LJSpeech"] = random.Random(0).sample(differ, LJSPEECH_TEXTS)
    if options.nemo_cases:
        sets["cases of NeMo"] = [
            (path.stem.removeprefix("test_cases_"), row[0], [row[-1]])
            for path in sorted(options.nemo_cases.glob("*.txt"))
            for row in rows_of(path, "~")
            if len(row) == 2
        ]
    return sets


def judge(normaliser, rows):
    "Number of rows read as expected, by class, and what went wrong."
    right, wrong = Counter(), []
    for kind, text, readings in rows:
        try:
            read = normaliser(text)
        except Exception as error:  # a normaliser of others may fail anywhere
            read = f"{type(error).__name__}"
        if comparable(read) in map(comparable, readings):
            right[kind] += 1
        else:
            wrong.append([text, read])
    return right, wrong


def main():
    parser = argparse.ArgumentParser()
    for flag in ("--out", "--ljspeech", "--nemo-cases", "--before"):
        parser.add_argument(flag, type=Path)
    options = parser.parse_args()
    sets = material(options)
    result = {
        name: {"sentences": len(rows), "of": dict(Counter(kind for kind, *_ in rows))}
        for name, rows in sets.items()
    }
    for name, counts in json.loads(
        options.before.read_text(encoding="utf-8") if options.before else "{}"
    ).items():
        result[name]["before"] = {key: counts["ours"][key] for key in ("right", "by_class")}
    for system, package, make in (
        ("ours", None, lambda: normalise),
        ("WeText", "wetext", wetext),
        ("NeMo", "nemo_text_processing", nemo),
        ("gruut", "gruut", gruut),
    ):
        try:
            normaliser = make()
        except ImportError:
            print(f"{system}: not installed")
            continue
        for name, rows in sets.items():
            start = time.process_time()
            right, wrong = judge(normaliser, rows)
            result[name][system] = {
                "version": package and metadata.version(package),
                "right": sum(right.values()),
                "by_class": dict(right),
                "cpu_seconds": round(time.process_time() - start, 1),
                "wrong": wrong if name.startswith("written") else len(wrong),
            }
            print(f"{system} on {name}: {sum(right.values())} of {len(rows)}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
