"""A table of experiments over several training seeds: `python tools/run_table.py TABLE`.

    methods   every method beside its control (notebook 71)
    options   the default job with one setting changed: steps, their weights, groups, learning rate, start
    beta      DLPO's penalty from none to all, and a level term in the reward
    guidance  one, five and ten of ten actions in an update, and as many noise levels in the penalty

The same base, texts, noise, number of rollouts and updates for all rows. Keeps settings, environment, metrics
and the scores of each utterance in results/TABLE/ROW-seedN, a control in ROW-control-seedN, and writes
table.json and table.txt beside them: what each row and its control changed, the difference, and the distance
from the base, with intervals over the seeds; and paired tests over the texts with Holm's correction. Of seed
0 it keeps what the tuned models say of a few texts, in docs/audio/TABLE. Runs that are there already are not
run again; one that was interrupted is resumed. Seed by seed: what is there at any time is whole.

    python tools/run_table.py methods --seeds 0 1 2 -- --heldout 96
    python tools/run_table.py methods --seeds          # no more runs, only the table of what is there
"""

import json
import math

import numpy as np
import soundfile
from run_seeds import CONTROL, ROOT, parse, parser_of, run_all

from dlpo_nb.audio import mp3_bytes, read_audio
from dlpo_nb.figures import read_run
from dlpo_nb.heldout import LABELS, ordered
from dlpo_nb.statistics import compare_systems, interval_text, student_interval

METHODS = {
    "dlpo": [],
    "ddpo": ["--method", "ddpo"],
    "dpok": ["--method", "dpok"],
    "klinr": ["--method", "klinr"],
    "rwr": ["--method", "rwr"],
    "best-of-n": ["--method", "rwr", "--rwr-weights", "best"],
    "awm": ["--method", "awm"],
    "nft": ["--method", "nft"],
    "draft": ["--method", "draft"],
    "onlydl": ["--method", "onlydl"],
    "released": ["--method", "released"],
}
OPTIONS = {
    "first-2": ["--train-steps", "first:2"],
    "middle-2": ["--train-steps", "middle:2"],
    "last-2": ["--train-steps", "last:2"],
    "kappa": ["--step-weights", "kappa"],
    "groups-of-4": ["--group-size", "4"],
    "groups-of-16": ["--group-size", "16"],
    "one-start": ["--fork", "4"],
    "rate-half": ["--learning-rate", "7.5e-5"],
    "rate-double": ["--learning-rate", "3e-4"],
}
BETA = {f"beta-{beta}": ["--beta", beta] for beta in ("0.02", "0.05", "0.1", "0.3", "1", "10")} | {
    "level": ["--reward", "distillmos + 0.5*level"]
}
GUIDANCE = {
    f"steps-{n}": ["--rollout-steps", "11", "--train-steps", f"random:{n}", "--denoising-steps", str(n)]
    for n in (1, 5, 10)
}
TABLES = {"methods": METHODS, "options": OPTIONS, "beta": BETA, "guidance": GUIDANCE}
# rows whose runs another table has, the first of these tables: of the seeds that their own rows have
LENT = {
    "options": {"default": "methods/dlpo"},
    "beta": {"beta-0": "methods/ddpo", "beta-0.005": "methods/dlpo"},
}
# rows with a control: of the methods all that a reward reaches
CONTROLLED = {
    "options": ("rate-half", "rate-double"),
    "beta": ("level",),
    "guidance": ("steps-1", "steps-10"),
}
UNREWARDED = ("onlydl", "released")  # the run is its own control
KEYS = ("run", "control", "difference")
HEARD = (0, 1, 2)  # held-out texts whose sound is kept


def jobs_of(table, rows, seeds, flags):
    """(name, flags) of every run, seed by seed."""
    controlled = CONTROLLED.get(table, [name for name in METHODS if name not in UNREWARDED])
    for seed in seeds:
        for name in rows:
            own = [*TABLES[table][name], "--seed", str(seed), *flags]
            yield f"{name}-seed{seed}", own
            if name in controlled:
                yield f"{name}-control-seed{seed}", own + CONTROL


def keep_sound(experiment):
    """Small mp3 of what the first seed of each method says, of the base once."""
    folder = ROOT / "docs" / "audio" / experiment
    folder.mkdir(parents=True, exist_ok=True)
    for done in sorted((ROOT / "runs" / experiment).glob("*-seed0/summary.json")):
        name, samples = done.parent.name.removesuffix("-seed0"), done.parent / "samples"
        for system, kept in (("tuned", name), ("base", "base")):
            for index in HEARD:
                wav = samples / f"{system}_{index:03d}.wav"
                sound = mp3_bytes(read_audio(wav, None), soundfile.info(wav).samplerate)
                (folder / f"{kept}_{index}.mp3").write_bytes(sound)


def seeds_of(folder, row) -> dict:
    """{seed: `RunRecord`} of what is there of TABLE/ROW."""
    runs = [read_run(path.parent) for path in sorted(folder.glob(f"{row}-seed*/summary.json"))]
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
    """Paired tests over texts of each row against the base, and of the others against the first, over the
    seeds that all rows have: a base speaks otherwise from each seed's noise."""
    first = next(iter(found))
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    if not seeds:
        return dict(seeds=[])
    measured = {name: per_text([runs[seed] for seed in seeds], "tuned") for name, runs in found.items()}
    measured["base"] = per_text([found[first][seed] for seed in seeds], "base")
    names = {name: LABELS.get(name, name) for name in (reward, "dnsmos", "nisqa", "wer", "rms_db")}
    against_base = compare_systems(measured, names, "base", lower_is_better=("wer",), neutral=("rms_db",))
    rows = {name: measured[name] for name in found if "control" not in name}
    against_first = compare_systems(rows, names, first, lower_is_better=("wer",), neutral=("rms_db",))
    return dict(seeds=seeds, base=against_base, first=against_first)


def markdown(result) -> str:
    """A line per row: what it and its control changed of the reward, and what else it changed."""
    reward, base = result["reward"], result["base"]
    others = [name for name in ordered(base, reward) if name in ("dnsmos", "nisqa", "wer", "rms_db")]
    columns = [*others, "kl", "diffusion_loss"]
    head = [f"{reward}, run", "its control", "run - control", *columns]
    lines = [f"| | seeds | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for name, row in result["rows"].items():
        metrics = row["metrics"]
        cells = [interval_text(*metrics[reward][key]) if key in metrics[reward] else "-" for key in KEYS]
        cells += [interval_text(*metrics[other]["run"]) if other in metrics else "-" for other in columns]
        lines.append(f"| {name} | {len(row['seeds'])} | {' | '.join(cells)} |")
    values = ", ".join(f"{name} {base[name]:.3f}" for name in (reward, *others))
    return "\n".join([*lines, "", f"Changes over the base ({values}); 95 % intervals over training seeds."])


def of_own_seeds(found, table) -> dict:
    "Runs by row and seed, those of borrowed rows only of the seeds that the table's own rows have."
    borrowed = {row + kind for row in LENT.get(table, {}) for kind in ("", "-control")}
    own = {seed for name, runs in found.items() if name not in borrowed for seed in runs}
    kept = {
        name: {seed: run for seed, run in runs.items() if seed in own} if name in borrowed else runs
        for name, runs in found.items()
    }
    return {name: runs for name, runs in kept.items() if runs}


def summarise(table):
    """Write table.json and table.txt of what is in results/TABLE, and of what it borrows."""
    folder = ROOT / "results" / table
    places = LENT.get(table, {}) | {row: f"{table}/{row}" for row in TABLES[table]}
    found = {}
    for row, place in places.items():
        for name in ("", "-control"):
            if runs := seeds_of(ROOT / "results", place + name):
                found[row + name] = runs
    found = of_own_seeds(found, table)
    rows = [row for row in places if row in found]
    if not folder.is_dir() or not rows:
        return
    records = list(found[rows[0]].values())
    runs = [run for seeds in found.values() for run in seeds.values()]
    texts = {tuple(text["text"] for text in run.rows["base"]) for run in runs}
    if len(texts) > 1:
        sizes = " and ".join(map(str, sorted(map(len, texts))))
        raise SystemExit(
            f"error: the runs of {table} were heard on {sizes} texts; give all the same --heldout"
        )
    evaluations = [record.evaluation["metrics"] for record in records]
    result = dict(
        reward=records[0].config["reward"],
        texts=len(texts.pop()),
        base={name: float(np.mean([e[name]["base"] for e in evaluations])) for name in evaluations[0]},
        rows={row: over_seeds(found[row], found.get(f"{row}-control", {})) for row in rows},
    )
    result["tests"] = tests(found, result["reward"])
    (folder / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.txt").write_text(markdown(result) + "\n")
    print(markdown(result))


def main():
    parser = parser_of(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", nargs="*", default=None, help="some of them; default: all")
    parser.add_argument("--preset", default="tiny")
    args, further = parse(parser)
    rows = args.rows or list(TABLES[args.table])
    if wrong := [row for row in rows if row not in TABLES[args.table]]:
        lent = "".join(f"; {row} is {place}" for row, place in LENT.get(args.table, {}).items())
        parser.error(f"no row {wrong[0]} to run; {args.table} has {', '.join(TABLES[args.table])}{lent}")
    run_all(args.preset, args.table, jobs_of(args.table, rows, args.seeds, further), args)
    keep_sound(args.table)
    summarise(args.table)


if __name__ == "__main__":
    main()
