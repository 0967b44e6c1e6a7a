"""Quality against sampling steps, the study of nbs/experiments/72: `python tools/few_steps.py`.

The packaged base speaks held-out texts from the same start noise with every schedule: trailing, even,
geometric, the released model's eight hand-picked steps, and schedules of 6 and 10 steps searched as in
WaveGrad (Chen et al. 2021), on other texts than those of the study. A search moves one noise level at a time
and keeps what brings the log-mel closer to the speaker's own reading: that is the measure of the paper's
search, and neither p808, the reward, nor NISQA, its judge, is spent on it. Few texts for long schedules: 16
up to 50 steps, 8 for 100, 4 for 1000 (which all spacings but the geometric share). Writes
results/few_steps/search.json and study.json, what is there already is not done again, and
docs/audio/few_steps/*.mp3.
"""

import argparse
import json
import shlex
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dlpo_nb.audio import SAMPLE_RATE, mp3_bytes
from dlpo_nb.core import UserError, asset, atomic_write, environment, run_main
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.heldout import measure, speaker_log_mels, synthesise_all
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards.nisqa import NISQA, find_nisqa_weights
from dlpo_nb.text import prompts
from dlpo_nb.wavegrad2.model import load_wavegrad2

ROOT = Path(__file__).resolve().parents[1]
FULL = NoiseSchedule.linear()
SEARCHED = (6, 10)
STUDY = (
    "searched 6", "geometric 6", "trailing 6", "even 6", "hand-picked 8", "searched 10", "geometric 10",
    "trailing 10", "even 10",
    *(f"{spacing} {steps}" for steps in (25, 50, 100) for spacing in ("geometric", "trailing", "even")),
    "trailing 1000",
)  # fmt: skip
SEARCH_TEXTS = slice(60, 64)  # the last that the speaker has read; the study takes the first
HEARD = 0  # the text whose audio is kept


def texts_for(steps, most):
    "How many texts a schedule of `steps` steps speaks: long ones fewer."
    return min(most, 16 if steps <= 50 else 8 if steps <= 100 else 4)


def from_ratios(ratios):
    "The schedule that visits the rising noise-to-signal ratios (1 - alpha_bar) / alpha_bar (n,)."
    return NoiseSchedule.from_alphas_cumprod(
        1 / (1 + torch.as_tensor(ratios, dtype=torch.float64)), FULL.alphas_cumprod_prev[0]
    )


def search(score, start, factors=(3.0, 1.7), gap=1.05):
    """Coordinate search over rising `start` (n,): one entry at a time times or over a factor, kept where
    `score` falls.

    One sweep per factor, from the smallest entry; the last one, where sampling starts, stays. `gap` is the
    least ratio of neighbours. Returns best entries, their score, and every (entries, score) that was asked
    for."""
    best, tried = list(start), []
    lowest = score(best)
    tried.append((best, lowest))
    for factor in factors:
        for i in range(len(best) - 1):
            for move in (factor, 1 / factor):
                entries = [*best[:i], best[i] * move, *best[i + 1 :]]
                if any(b < gap * a for a, b in zip(entries, entries[1:])):
                    continue
                value = score(entries)
                tried.append((entries, value))
                if value < lowest:
                    best, lowest = entries, value
                    break
    return best, lowest, tried


def named_schedule(name, found):
    "The schedule called `name`; `found` maps searched lengths to their ratios."
    spacing, steps = name.split()
    if spacing == "searched":
        return from_ratios(found[steps]["ratios"])
    if spacing == "hand-picked":
        return NoiseSchedule.inference8()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even spacing is a known trap; here it is asked for
        return FULL.respaced(int(steps), spacing)


def read(path, seed):
    "What earlier calls left in `path`, with this call noted; UserError where that was another seed."
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seed": seed, "calls": []}
    if content["seed"] != seed:
        raise UserError(f"{path} was made with seed {content['seed']}, not {seed}; give another --out")
    content["calls"].append(
        {"how": shlex.join(["python", "tools/few_steps.py", *sys.argv[1:]]), **environment()}
    )
    return content


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def rounded(row):
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


def search_schedule(model, steps, seed, judges):
    "Search a schedule of `steps` steps from the geometric one; every judge hears start and end."
    texts = prompts("heldout")[SEARCH_TEXTS]
    speaker = speaker_log_mels(texts)

    def means(ratios, judges):
        rows = measure(synthesise_all(model, texts, from_ratios(ratios), seed), texts, judges, speaker)
        return {k: float(np.mean([row[k] for row in rows])) for k in rows[0] if k != "text"}

    def score(ratios):
        value = means(ratios, {})["log_mel_to_reference"]
        bar.set_postfix(log_mel=f"{value:.4f}")
        bar.update()
        return value

    start = (1 / FULL.respaced(steps, "geometric").alphas_cumprod - 1).tolist()
    with tqdm(desc=f"searching {steps} steps", unit="schedule") as bar:
        best, _, tried = search(score, start)
    return {
        "texts": texts,
        "ratios": best,
        "betas": from_ratios(best).betas.tolist(),
        "tried": tried,
        "start": rounded(means(start, judges)),
        "found": rounded(means(best, judges)),
    }


def speak(model, schedule, texts, seed, judges, bar):
    """One schedule of the study: its levels, seconds of CPU per second of audio,
    and the scores of each text; and the audio."""
    start = time.process_time()
    audio = synthesise_all(
        model, texts, schedule, seed, on_audio=lambda i, sound: bar.update(schedule.num_steps)
    )
    seconds = (time.process_time() - start) / (sum(map(len, audio)) / SAMPLE_RATE)
    scores = [rounded(row) for row in measure(audio, texts, judges, speaker_log_mels(texts))]
    return {
        "steps": schedule.num_steps,
        "cpu_seconds_per_second": round(seconds, 3),
        "levels": schedule.levels.tolist(),
        "scores": scores,
    }, audio


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=16, help="at most so many of the first held-out texts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, for search and study")
    parser.add_argument("--schedules", nargs="+", default=STUDY, metavar="'SPACING STEPS'")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "few_steps")
    parser.add_argument(
        "--audio",
        type=Path,
        default=ROOT / "docs" / "audio" / "few_steps",
        help="folder of the mp3 of one text",
    )
    args = parser.parse_args()
    if not 1 <= args.texts <= SEARCH_TEXTS.start:
        raise UserError(
            f"--texts {args.texts} must be 1 to {SEARCH_TEXTS.start}: "
            "the texts after those are for the search"
        )
    model, judges = load_wavegrad2(asset("tiny_base.safetensors")), {"p808": get_reward("dnsmos")}
    if weights := find_nisqa_weights():
        judges["nisqa"] = NISQA(weights)
    found, study = read(args.out / "search.json", args.seed), read(args.out / "study.json", args.seed)
    for steps in SEARCHED:
        if f"searched {steps}" in args.schedules and str(steps) not in found:
            found[str(steps)] = search_schedule(model, steps, args.seed, judges)
            write(args.out / "search.json", found)
    # the first call is slow, and is not timed
    synthesise_all(model, prompts("heldout")[:1], FULL.respaced(2), args.seed)
    rows = study.setdefault("schedules", {})
    todo = {name: named_schedule(name, found) for name in args.schedules if name not in rows}
    count = {name: texts_for(s.num_steps, args.texts) for name, s in todo.items()}
    with tqdm(total=sum(count[name] * s.num_steps for name, s in todo.items()), unit="step") as bar:
        for name, schedule in todo.items():
            bar.set_description(name)
            rows[name], audio = speak(
                model, schedule, prompts("heldout")[: count[name]], args.seed, judges, bar
            )
            write(args.out / "study.json", study)
            args.audio.mkdir(parents=True, exist_ok=True)
            (args.audio / f"{name.replace(' ', '_')}.mp3").write_bytes(mp3_bytes(audio[HEARD]))


if __name__ == "__main__":
    run_main(main)
