"""What a WaveGrad 2 should be taught with: `python tools/choose_base.py FESTIVAL HIBARI`.

FESTIVAL and HIBARI are corpora of the same texts by `python -m dlpo_nb.data`, both at its 22050 Hz; the
denoising losses of one voice say nothing of the other. Each setting trains a fresh network for the same
minutes of processor time (one thread, seed 0), and is then judged on held-out texts: the denoising loss of
the averaged model at each level, and what judges and a recogniser make of its speech. Keeps settings, curve
and scores in results/base_choice/NAME. What was as long and heard as many texts is not run again; what was
interrupted, or is to be longer, is resumed, on the same corpus only.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEEP = ("config.json", "environment.json", "metrics.jsonl")
MEL = ["--mel-weight", "1"]
SETTINGS = {  # voice and flags
    "tiny": ("festival", []),
    "tiny-mel": ("festival", MEL),
    "tiny-mel-levels": ("festival", [*MEL, "--level-weights", "10"]),
    "mini-mel": ("festival", ["--arch", "mini", *MEL]),
    "small-mel": ("festival", ["--arch", "small", *MEL]),
    "hibari-mini-mel": ("hibari", ["--arch", "mini", *MEL]),
    "mini-mel-quarter": ("festival", ["--arch", "mini", "--mel-weight", "0.25"]),
    "mini-mel-long": ("festival", ["--arch", "mini", *MEL, "--window-frames", "88", "--batch-size", "2"]),
    "mini-mel-two": ("festival", ["--arch", "mini", *MEL, "--batch-size", "2"]),
}


def is_there(kept, args):
    """Whether a setting was trained for these minutes and heard on so many texts."""
    if not (kept / "scores.json").exists():
        return False
    trained, heard = (json.loads((kept / name).read_text()) for name in ("config.json", "scores.json"))
    return (trained["minutes"], heard[0]["texts"]) == (args.minutes, args.texts)


def try_out(name, corpora, args):
    """Train and judge one setting; returns its row."""
    voice, flags = SETTINGS[name]
    out, kept = ROOT / "runs" / "base_choice" / name, ROOT / "results" / "base_choice" / name
    if not is_there(kept, args):
        kept.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        here = out.relative_to(ROOT)
        length = f"--minutes {args.minutes} --warmup-steps 100 --threads 1 --held-out 64 --sample-every 0"
        train = ["-m", "dlpo_nb.pretrain", "--corpus", corpora[voice], "--out", here, "--resume", *flags]
        judge = ["tools/score_base.py", here / "base.safetensors", "--out", here / "scores" / "scores.json"]
        judged = ["--texts", args.texts, "--schedules", "geometric 25"]
        with open(out.parent / f"{name}.log", "a") as log:
            for command in ([*train, *length.split(), "--no-score"], [*judge, *judged]):
                command = [sys.executable, *map(str, command)]
                subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
        for file in KEEP:
            shutil.copy(out / file, kept / file)
        shutil.copy(out / "scores" / "scores.json", kept / "scores.json")
    last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads((kept / "scores.json").read_text())[0]
    levels = {level: round(last["validation"][level], 3) for level in ("16", "80", "250")}
    judged = {judge: scores[judge] for judge in ("distillmos", "p808", "nisqa", "wer") if judge in scores}
    return dict(name=name, steps=last["step"], **levels, **judged)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("festival")
    parser.add_argument("hibari")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2, help="settings at a time")
    args = parser.parse_args()
    corpora = dict(festival=args.festival, hibari=args.hibari)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda name: try_out(name, corpora, args), args.only):
            print(row, flush=True)


if __name__ == "__main__":
    main()
