"""One process fails, while the other waits in a group that cannot be destroyed meanwhile, as with NCCL:
torchrun_command(failing_alone.py)"""

import time

import torch
import torch.distributed as dist

from dlpo_nb.core import run_main
from dlpo_nb.distributed import all_reduce_sum, join, rank, run_process


def work():
    join("cpu")
    if rank() == 1:
        raise torch.OutOfMemoryError("out of memory")
    all_reduce_sum(torch.ones(1))


if __name__ == "__main__":
    dist.destroy_process_group = lambda: time.sleep(1000)
    run_main(lambda: run_process(work))
