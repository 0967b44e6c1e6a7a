"""Our reading of the 13,100 LJSpeech texts against the released phones:
`python tools/phone_error_rate.py FOLDER`.

FOLDER holds metadata.csv of LJSpeech and train.txt, val.txt of maum-ai/wavegrad2. Writes
results/frontend/phone_error_rate.json: edits over released phones, and what they come from, word by word. The
released phones were chosen by a forced aligner that heard the reader, and an `spn` stands for each word that
its word list lacked.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import jiwer

from dlpo_nb.core import UserError, run_main, split_lines
from dlpo_nb.tokens import dictionary
from dlpo_nb.text import pronunciations, text_to_words

OUT = Path(__file__).resolve().parents[1] / "results" / "frontend" / "phone_error_rate.json"
LITTLE = set(
    "a an and as at been can could do for from had has have he her him his i if in into is it its me "
    "must my nor not of on or our shall she "
    "should so some such than that the them then there they this those to up us was we were when which "
    "who will with would you your".split()
)


def bare(phones):
    return [phone.rstrip("012") for phone in phones]


def words_of(text):
    return [word for word in text_to_words(text) if word != ","]


def read(folder):
    "id -> (text, normalised text of LJSpeech, released phones)."
    lines = split_lines((folder / "metadata.csv").read_text(encoding="utf-8"))
    texts = {name: both for name, *both in (line.split("|") for line in lines)}
    released = {}
    for name in ("train.txt", "val.txt"):
        for line in split_lines((folder / name).read_text(encoding="utf-8")):
            utterance, _, phones, _ = line.split("|")
            released[utterance] = phones.strip("{}").split()
    if texts.keys() != released.keys():
        raise UserError(f"metadata.csv and the released lists in {folder} name different utterances")
    return {name: (*texts[name], released[name]) for name in texts}


def cause(word, ours, theirs):
    "Why `ours` of a word differs from the released phones beside it; None where it does not."
    if ours == theirs:
        return None
    if "spn" in theirs or not theirs:  # an unknown first or last word was cut away with the silence
        return "words that the released list lacks (spn)"
    if bare(ours) == bare(theirs):
        return "stress alone"
    if word in LITTLE:
        return "little words (the, of, to, ...)"
    if word.isupper():
        return "spelled letters"
    if bare(theirs) in map(bare, pronunciations(word)):
        return "another entry of the dictionary (homographs, variants)"
    if word not in dictionary():
        return "words that our dictionary lacks"
    vowels = [(a, b) for a, b in zip(ours, theirs) if a != b]
    if len(ours) == len(theirs) and all(a[-1] in "02" and b[-1] in "02" for a, b in vowels):
        return "weak vowels (AH0, IH0, ...)"
    return "other entries in the two word lists"


def beside(ours, theirs):
    """For each of our phones the released ones beside it: lists of indices into `theirs`; what stands
    between two goes with the first."""
    output = jiwer.process_words(" ".join(theirs), " ".join(ours))
    places, last = [[] for _ in ours], 0
    for chunk in output.alignments[0]:
        mine = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        other = range(chunk.ref_start_idx, chunk.ref_end_idx)
        for i, j in zip(mine, other):
            places[i].append(j)
        if not mine:
            places[max(0, chunk.hyp_start_idx - 1)] += other
    return output.substitutions + output.deletions + output.insertions, places


def compare(text, released):
    "Counter of edits by kind of comparison, and {word: [(cause, edits, ours, theirs)]}."
    said = [(word, pronunciations(word)[0]) for word in words_of(text)]
    ours = [phone for _, phones in said for phone in phones]
    theirs = [phone for phone in released if phone != "sp"]
    counts = Counter(utterances=1, phones=len(theirs), words=len(said))
    counts["edits"], places = beside(ours, theirs)
    counts["edits without stress"], _ = beside(bare(ours), bare(theirs))
    found, at = defaultdict(list), 0
    for word, phones in said:
        segment = [theirs[j] for place in places[at : at + len(phones)] for j in sorted(place)]
        at += len(phones)
        why = cause(word, phones, segment)
        if why:
            edits = beside(phones, segment)[0] if segment else len(phones)
            found[word].append((why, edits, " ".join(phones), " ".join(segment)))
    return counts, found


def pauses(text, released):
    """Counter of pauses inside the text: ours at punctuation, the released ones, those that both have;
    and of all edits, pauses too."""
    ours = [p for word in text_to_words(text) for p in (["sp"] if word == "," else pronunciations(word)[0])]
    ours = ours[: len(ours) - (ours[-1] == "sp")]  # released phones have no silence at the end
    edits, places = beside(ours, released)
    both = sum(ours[i] == "sp" and any(released[j] == "sp" for j in place) for i, place in enumerate(places))
    return Counter({"ours": ours.count("sp"), "released": released.count("sp"), "both": both, "edits": edits})


def main():
    if len(sys.argv) != 2:
        raise UserError(__doc__.split("\n")[0])
    total, silence, causes, words = Counter(), Counter(), Counter(), defaultdict(Counter)
    for raw, text, released in read(Path(sys.argv[1])).values():
        if raw != text:
            total += {"unnormalised": 1, "read otherwise": int(words_of(raw) != words_of(text))}
        counts, found = compare(text, released)
        total += counts
        silence += pauses(text, released)
        for word, cases in found.items():
            for why, edits, ours, theirs in cases:
                causes[why] += edits
                words[why][f"{word}: {ours} / {theirs}"] += edits
    result = dict(
        texts="metadata.csv, third field",
        utterances=total["utterances"],
        phones=total["phones"],
        words=total["words"],
        phone_error_rate=total["edits"] / total["phones"],
        without_stress=total["edits without stress"] / total["phones"],
        with_pauses=silence.pop("edits") / (total["phones"] + silence["released"]),
        share_of_phones={why: count / total["phones"] for why, count in causes.most_common()},
        most_frequent={why: dict(words[why].most_common(12)) for why, _ in causes.most_common()},
        pauses=dict(silence),
        unnormalised_texts=total["unnormalised"],
        read_otherwise=total["read otherwise"],
    )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "most_frequent"}, indent=1))


if __name__ == "__main__":
    run_main(main)
