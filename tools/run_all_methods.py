"""The experiment of nbs/experiments/71: `python tools/run_all_methods.py [--jobs 2]`.

One tiny run of each method from the packaged base: same seed, same texts, same noise, same number of rollouts
and updates. Keeps what the notebook draws in results/all_methods/METHOD/, and two of the held-out sentences
of each in docs/audio/methods/. Methods that are there already are not run again.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run_seeds import ROOT, run

from dlpo_nb.audio import mp3_bytes, read_audio
from dlpo_nb.objectives import OBJECTIVES

HEARD = (0, 3)  # held-out texts whose audio is kept


def keep_audio(method, out):
    """Small mp3 of what the tuned model says; of the base once."""
    folder = ROOT / "docs" / "audio" / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    for name, system in ((method, "tuned"), ("base", "base")):
        for i in HEARD:
            (folder / f"{name}_{i}.mp3").write_bytes(
                mp3_bytes(read_audio(out / "samples" / f"{system}_{i:03d}.wav"))
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=OBJECTIVES.names())
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("flags", nargs="*", help="further flags of dlpo_nb.launch, after --")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            method: pool.submit(
                run, "wavegrad-tiny", "all_methods", method, ["--method", method, *args.flags], args.threads
            )
            for method in args.methods
        }
        for method, job in jobs.items():
            if (out := Path(job.result())).exists():
                keep_audio(method, out)


if __name__ == "__main__":
    main()
