"""Every method beside its control, over several training seeds: `python tools/run_methods.py [PRESET NAME]`.

The same base, texts, noise, number of rollouts and updates for all; what a method needs beyond (the weight of
its penalty, a temperature) stands in the preset. Keeps settings, environment, metrics and the scores of each
utterance in results/NAME/METHOD-seedN, its control in METHOD-control-seedN, and writes methods.json and
methods.txt beside them: what each method changed, its control, and the difference, with intervals over the
seeds. Runs that are there already are not run again; one that was interrupted is resumed. Seed by seed, so
that what is there at any time is whole.

    python tools/run_methods.py tiny methods --seeds 0 1 2
    python tools/run_methods.py tiny methods --seeds        # no more runs; the tables of what is there
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

from run_seeds import parse, run

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


def jobs_of(methods, seeds, flags):
    """(name, flags) of every run, seed by seed."""
    for seed in seeds:
        for method in methods:
            own = [*METHODS[method], "--seed", str(seed), *flags]
            yield f"{method}-seed{seed}", own
            if method not in UNREWARDED:
                yield f"{method}-control-seed{seed}", own + CONTROL


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


if __name__ == "__main__":
    main()
