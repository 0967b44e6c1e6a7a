"""How often each text normaliser reads written English as expected: ours, NeMo text processing and WeText where installed.

    python tools/compare_normalisers.py [--out results/text/normalisers.json]

Sentences: tests/data/written_english.tsv (class, text, expected words). Punctuation, hyphens and case are not compared, nor
"o" against "oh", nor letters written together against letters apart.
"""
import argparse
import json
import re
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from dlpo_nb.core import split_lines
from dlpo_nb.normalisation import normalise

ROOT = Path(__file__).resolve().parents[1]


def comparable(text):
    "Small letters without punctuation and spaces; o and oh alike."
    words = re.sub(r"[^a-zé' ]", " ", text.lower()).replace("'", "").split()
    return "".join("oh" if word == "o" else word for word in words if word != "and")


def wetext():
    from wetext import Normalizer
    return Normalizer(lang="en", operator="tn").normalize


def nemo():
    from nemo_text_processing.text_normalization.normalize import Normalizer
    normaliser = Normalizer(input_case="cased", lang="en")
    return lambda text: normaliser.normalize(text, verbose=False)


def judge(normaliser, rows):
    "Share of the rows read as expected, by class, and what went wrong."
    right, wrong = Counter(), []
    for kind, text, words in rows:
        try:
            read = normaliser(text)
        except Exception as error:  # a normaliser of others may fail anywhere
            read = f"{type(error).__name__}"
        right[kind] += comparable(read) == comparable(words)
        if comparable(read) != comparable(words):
            wrong.append([text, read])
    return right, wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [line.split("\t") for line in split_lines((ROOT / "tests/data/written_english.tsv").read_text(encoding="utf-8"))[1:]]
    count, result = Counter(kind for kind, *_ in rows), {"sentences": len(rows), "of": dict(Counter(kind for kind, *_ in rows))}
    for name, package, make in (("ours", None, lambda: normalise), ("WeText", "wetext", wetext), ("NeMo", "nemo_text_processing", nemo)):
        start = time.process_time()
        try:
            normaliser = make()
        except ImportError:
            print(f"{name}: not installed")
            continue
        right, wrong = judge(normaliser, rows)
        result[name] = {"version": package and metadata.version(package), "right": sum(right.values()), "by_class": dict(right),
                        "cpu_seconds": round(time.process_time() - start, 1), "wrong": wrong}
        print(f"{name}: {sum(right.values())} of {len(rows)};", ", ".join(f"{k} {right[k]}/{count[k]}" for k in count))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
