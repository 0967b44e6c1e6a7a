"""The experiment of nbs/experiments/70: `python tools/run_tiny_experiment.py [--seeds 0 1 2] [--jobs 2]`.

Runs the main job and its shuffled-advantage control with each seed, and keeps what the notebook draws
(settings, environment, metrics, scores of each utterance; no audio, no checkpoints) in results/tiny_dlpo/.
Runs that are there already are not run again.
"""

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEEP = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "evaluation.csv")


def run(experiment, name, flags, threads):
    """One launch into runs/EXPERIMENT/NAME, its numbers copied to results/EXPERIMENT/NAME;
    returns the run directory."""
    out, kept = ROOT / "runs" / experiment / name, ROOT / "results" / experiment / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if (kept / "summary.json").exists():
        return out
    resume = ["--resume"] if (out / "checkpoints" / "state.pt").exists() else []
    command = [
        sys.executable,
        "-m",
        "dlpo_nb.launch",
        "wavegrad-tiny",
        "--out",
        str(out.relative_to(ROOT)),
        "--threads",
        str(threads),
        *flags,
        *resume,
    ]
    with open(out.parent / f"{name}.log", "a") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEEP:
        shutil.copy(out / file, kept / file)
    print(name, "done", flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("flags", nargs="*", help="further flags of dlpo_nb.launch, after --")
    args = parser.parse_args()
    jobs = []
    for seed in args.seeds:
        jobs.append((f"dlpo-seed{seed}", ["--seed", str(seed), *args.flags]))
        jobs.append(
            (f"control-seed{seed}", ["--seed", str(seed), "--control", "shuffle-advantages", *args.flags])
        )
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run, "tiny_dlpo", name, flags, args.threads) for name, flags in jobs]:
            future.result()


if __name__ == "__main__":
    main()
