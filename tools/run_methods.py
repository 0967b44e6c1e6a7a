"""Every method beside its control, over several training seeds: `python tools/run_methods.py [PRESET NAME]`.

The same base, texts, noise, number of rollouts and updates for all; what a method needs beyond (the weight of
its penalty, a temperature) stands in the preset. Keeps settings, environment, metrics and the scores of each
utterance in results/NAME/METHOD-seedN, its control in METHOD-control-seedN, and writes methods.json and
methods.txt beside them: what each method and its control changed, the difference, and the distance from the
base, with intervals over the seeds; and paired tests over the texts with Holm's correction. Of the first seed
it keeps what the tuned models say of a few texts, in docs/audio/NAME. Runs that are there already are not run
again; one that was interrupted is resumed. Seed by seed, so that what is there at any time is whole.

    python tools/run_methods.py tiny methods --seeds 0 1 2 -- --heldout 96
    python tools/run_methods.py tiny methods --seeds          # no more runs, only the tables of what is there
"""

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
from run_seeds import ROOT, parse, run

from dlpo_nb.audio import mp3_bytes, read_audio
from dlpo_nb.figures import read_run
from dlpo_nb.heldout import LABELS, ordered
from dlpo_nb.statistics import compare_systems, student_interval

METHODS = {  # flags of each row of the table
    "dlpo": [],
    "ddpo": ["--method", "ddpo"],
    "dpok": ["--method", "dpok"],
    "klinr": ["--method", "klinr"],
    "rwr": ["--method", "rwr"],
    "best-of-n": ["--method", "rwr", "--rwr-weights", "best"],
    "awm": ["--method", "awm"],
    "nft": ["--method", "nft"],
    "onlydl": ["--method", "onlydl"],
    "released": ["--method", "released"],
}
UNREWARDED = ("onlydl", "released")  # whom no reward reaches: the run is its own control
CONTROL = ["--control", "shuffle-advantages"]
KEYS = ("run", "control", "difference")
HEARD = (0, 1, 2)  # held-out texts whose sound is kept


def jobs_of(methods, seeds, flags):
    """(name, flags) of every run, seed by seed."""
    for seed in seeds:
        for method in methods:
            own = [*METHODS[method], "--seed", str(seed), *flags]
            yield f"{method}-seed{seed}", own
            if method not in UNREWARDED:
                yield f"{method}-control-seed{seed}", own + CONTROL


def keep_sound(experiment):
    """Small mp3 of what the first seed of each method says, of the base once."""
    folder = ROOT / "docs" / "audio" / experiment
    folder.mkdir(parents=True, exist_ok=True)
    for samples in sorted((ROOT / "runs" / experiment).glob("*-seed0/samples")):
        name = samples.parent.name.removesuffix("-seed0")
        for system, kept in (("tuned", name), ("base", "base")):
            for index in HEARD:
                wav, mp3 = samples / f"{system}_{index:03d}.wav", folder / f"{kept}_{index}.mp3"
                if wav.exists() and not mp3.exists():
                    rate = soundfile.info(wav).samplerate
                    mp3.write_bytes(mp3_bytes(read_audio(wav, None), rate))


def seeds_of(folder, name) -> dict:
    """{seed: `RunRecord`} of what is there of a row."""
    runs = [read_run(path.parent) for path in sorted(folder.glob(f"{name}-seed*/summary.json"))]
    return {run.config["seed"]: run for run in runs}


def changes(run) -> dict:
    """What a run changed, a mean over its texts: {measurement: number}; its distance from the base too."""
    metrics, drift = run.evaluation["metrics"], run.summary["drift"]
    moved = drift["diffusion_loss/tuned"] - drift["diffusion_loss/base"]
    far = dict(kl=drift["kl"], diffusion_loss=moved, minutes=run.summary["minutes"])
    return {name: metric["difference"] for name, metric in metrics.items()} | far


def interval(values):
    """Mean, low, high over seeds; the ends are None of a single one."""
    return [None if math.isnan(x) else x for x in student_interval(values)]


def over_seeds(runs, controls) -> dict:
    """Of each measurement mean and interval over the seeds: of runs, controls, and their differences."""
    mine, theirs = ({seed: changes(run) for seed, run in side.items()} for side in (runs, controls))
    both, table = [seed for seed in mine if seed in theirs], {}
    for name in next(iter(mine.values())):
        row = dict(run=interval([change[name] for change in mine.values()]))
        if both:
            row["control"] = interval([theirs[seed][name] for seed in both])
            row["difference"] = interval([mine[seed][name] - theirs[seed][name] for seed in both])
        table[name] = row
    return dict(seeds=list(mine), controls=both, metrics=table)


def per_text(records, system) -> list:
    """A dict per text: measurements of base or tuned model, means over the seeds."""
    rows = [record.rows[system] for record in records]
    known = [set.intersection(*(set(row) for row in texts)) - {"text"} for texts in zip(*rows)]
    return [
        {"text": texts[0]["text"]} | {name: float(np.mean([row[name] for row in texts])) for name in names}
        for texts, names in zip(zip(*rows), known)
    ]


def tests(found, reward) -> dict:
    """Paired tests over texts of each method against the base, and of the others against DLPO."""
    measured = {name: per_text(list(runs.values()), "tuned") for name, runs in found.items()}
    measured["base"] = per_text(list(found["dlpo"].values()), "base")
    names = {name: LABELS.get(name, name) for name in (reward, "dnsmos", "nisqa", "wer", "rms_db")}
    against_base = compare_systems(measured, names, "base", lower_is_better=("wer",), neutral=("rms_db",))
    methods = {name: measured[name] for name in found if "control" not in name}
    against_dlpo = compare_systems(methods, names, "dlpo", lower_is_better=("wer",), neutral=("rms_db",))
    return dict(base=against_base, dlpo=against_dlpo)


def cell(values) -> str:
    """Mean and interval as text."""
    mean, low, high = values
    return f"{mean:+.3f}" if low is None else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown(result) -> str:
    """A line per method: what it and its control changed of the reward, and what else it changed."""
    reward, base = result["reward"], result["base"]
    others = [name for name in ordered(base, reward) if name in ("dnsmos", "nisqa", "wer", "rms_db")]
    columns = [*others, "kl", "diffusion_loss"]
    head = [f"{reward}, method", "its control", "method - control", *columns]
    lines = [f"| | seeds | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for method, row in result["methods"].items():
        metrics = row["metrics"]
        cells = [cell(metrics[reward][key]) if key in metrics[reward] else "-" for key in KEYS]
        cells += [cell(metrics[name]["run"]) if name in metrics else "-" for name in columns]
        lines.append(f"| {method} | {len(row['seeds'])} | {' | '.join(cells)} |")
    values = ", ".join(f"{name} {base[name]:.3f}" for name in (reward, *others))
    return "\n".join([*lines, "", f"Changes over the base ({values}); 95 % intervals over training seeds."])


def summarise(experiment):
    """Write methods.json and methods.txt of what is in results/EXPERIMENT."""
    folder = ROOT / "results" / experiment
    rows = [name for method in METHODS for name in (method, f"{method}-control")]
    found = {name: runs for name in rows if (runs := seeds_of(folder, name))}
    if "dlpo" not in found:
        return
    records = list(found["dlpo"].values())
    evaluations = [record.evaluation["metrics"] for record in records]
    result = dict(
        reward=records[0].config["reward"],
        texts=len(records[0].rows["base"]),
        base={name: float(np.mean([e[name]["base"] for e in evaluations])) for name in evaluations[0]},
        methods={
            method: over_seeds(found[method], found.get(f"{method}-control", {}))
            for method in METHODS
            if method in found
        },
    )
    result["tests"] = tests(found, result["reward"])
    (folder / "methods.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "methods.txt").write_text(markdown(result) + "\n")
    print(markdown(result))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What stands after -- goes to dlpo_nb.launch.",
    )
    parser.add_argument("preset", nargs="?", default="tiny")
    parser.add_argument("name", nargs="?", default="methods", help="of the folder in results/")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    args, further = parse(parser)
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [
            pool.submit(run, args.preset, args.name, name, flags, args.threads)
            for name, flags in jobs_of(args.methods, args.seeds, further)
        ]
        for future in started:
            future.result()
    keep_sound(args.name)
    summarise(args.name)


if __name__ == "__main__":
    main()
