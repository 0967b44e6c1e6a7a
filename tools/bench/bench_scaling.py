"""What a second process gives on a CPU, and what exchanging gradients costs:
`python tools/bench/bench_scaling.py`.

The same episodes of the main job in one process and in two, a thread each, in turns; and the sum of a vector
as long as the gradients of WaveGrad 2 Base's decoder over two processes. Writes results/bench/scaling.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dlpo_nb.core import environment, read_jsonl
from dlpo_nb.distributed import all_reduce_sum, join, leave, rank, torchrun_command
from dlpo_nb.cost import stand_in_base

ROUNDS, EPISODES = 3, 3


def episode(processes):
    """Metrics of the last of a few episodes."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--episodes",
            EPISODES,
            "--heldout",
            0,
            "--threads",
            1,
            "--nproc-per-node",
            processes,
            "--device",
            "cpu",
            "--out",
            Path(folder) / "run",
        ]
        subprocess.run(
            [sys.executable, "-m", "dlpo_nb.launch", "wavegrad-tiny", *map(str, flags)],
            check=True,
            capture_output=True,
        )
        return read_jsonl(Path(folder) / "run" / "metrics.jsonl")[-1]


def exchange(path):
    """Under torchrun: the fastest of several sums of a vector as long as the decoder's gradients."""
    from roofline import seconds

    join("cpu")
    vector = torch.zeros(sum(p.numel() for p in stand_in_base().decoder.parameters()))
    spent = seconds(lambda: all_reduce_sum(vector), "cpu", repeats=5)
    if rank() == 0:
        Path(path).write_text(json.dumps({"numbers": vector.numel(), "seconds": spent}))
    leave()


def main():
    rows = {1: [], 2: []}
    for _ in range(ROUNDS):
        for processes, found in rows.items():
            found.append(episode(processes))
    best = {
        n: {
            phase: min(row[phase] for row in found)
            for phase in ("seconds/rollout", "seconds/update", "seconds")
        }
        for n, found in rows.items()
    }
    speedup = {phase: best[1][phase] / best[2][phase] for phase in best[1]}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(torchrun_command(__file__, f"{folder}/sum"), check=True, capture_output=True)
        summed = json.loads(Path(folder, "sum").read_text())
    print(
        f"two processes: {speedup['seconds']:.2f} times as fast (rollouts "
        f"{speedup['seconds/rollout']:.2f}, update {speedup['seconds/update']:.2f}); "
        f"{summed['numbers']:,} gradients are exchanged in {1000 * summed['seconds']:.0f} ms"
    )
    path = Path(__file__).resolve().parents[2] / "results" / "bench" / "scaling.json"
    path.write_text(
        json.dumps(
            {
                "how": "python tools/bench/bench_scaling.py",
                "one process": best[1],
                "two to one": speedup,
                "exchange": summed,
                "environment": environment(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    exchange(sys.argv[1]) if len(sys.argv) > 1 else main()
