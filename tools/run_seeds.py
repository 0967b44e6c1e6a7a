"""A preset and its control over several training seeds: `python tools/run_seeds.py PRESET NAME`.

Keeps settings, environment, metrics and the scores of each utterance (no audio, no checkpoints) in
results/NAME/, and beside them seeds.json and seeds.txt: what runs and controls changed, with intervals over
the seeds. Runs that are there already are not run again; one that was interrupted is resumed.

    python tools/run_seeds.py tiny default_job --seeds 0 1 2 3 4
    python tools/run_seeds.py wavegrad-tiny tiny_dlpo
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlpo_nb.figures import across_seeds, read_run, seeds_table

ROOT = Path(__file__).resolve().parents[1]
CONTROL = ["--control", "shuffle-advantages"]
KEEP = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "evaluation.csv")


def run(preset, experiment, name, flags, threads):
    """One launch into runs/EXPERIMENT/NAME, its numbers copied to results/EXPERIMENT/NAME;
    returns the run directory."""
    out, kept = ROOT / "runs" / experiment / name, ROOT / "results" / experiment / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if (kept / "summary.json").exists():
        return out
    resume = ["--resume"] if (out / "config.json").exists() else []
    command = [sys.executable, "-m", "dlpo_nb.launch", preset, "--out", str(out.relative_to(ROOT))]
    with open(out.parent / f"{name}.log", "a") as log:
        command += ["--threads", str(threads), *flags, *resume]
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEEP:
        shutil.copy(out / file, kept / file)
    print(name, "done", flush=True)
    return out


def parser_of(about):
    """The arguments that all tables of runs have."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What stands after -- goes to dlpo_nb.launch.",
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    return parser


def parse(parser):
    """The arguments of a tool, and the flags of dlpo_nb.launch that stand after --."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:end]), given[end + 1 :]


def run_all(preset, experiment, named, args):
    """All runs of (name, flags) pairs, some at a time, in this order."""
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(run, preset, experiment, name, flags, args.threads) for name, flags in named]
        for future in started:
            future.result()


def markdown(across, reward) -> str:
    """The table of `across_seeds`."""
    lines = ["| | base | run - base | control - base | run - control |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join([label, *cells])} |" for label, cells in seeds_table(across, reward).items()]
    seeds = ", ".join(map(str, across["seeds"]))
    return "\n".join([*lines, "", f"95 % intervals over training seeds {seeds} (Student's t)."])


def summarise(experiment):
    """Write seeds.json and seeds.txt of what is in results/EXPERIMENT."""
    folder = ROOT / "results" / experiment
    runs = [read_run(path.parent) for path in sorted(folder.glob("*-seed*/summary.json"))]
    across = across_seeds(runs)
    if across:
        (folder / "seeds.json").write_text(json.dumps(across, indent=1) + "\n")
        (folder / "seeds.txt").write_text(markdown(across, runs[0].config["reward"]) + "\n")
        print((folder / "seeds.txt").read_text())


def main():
    parser = parser_of(__doc__)
    parser.add_argument("preset")
    parser.add_argument("name", help="of the folder in results/")
    args, further = parse(parser)
    named = []
    for seed in args.seeds:
        flags = ["--seed", str(seed), *further]
        named.append((f"dlpo-seed{seed}", flags))
        named.append((f"control-seed{seed}", [*flags, *CONTROL]))
    run_all(args.preset, args.name, named, args)
    summarise(args.name)


if __name__ == "__main__":
    main()
