"""What a piece of work asks of a machine, and what the machine can do:
operations, bytes, and the two ceilings."""

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device, repeats=3):
    """The fastest of several runs of work(), after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def ceilings(device, dtype, size=None):
    """Measured here and now: operations per second of a large square matrix product,
    bytes per second of a large copy (read and written)."""
    gpu = torch.device(device).type == "cuda"
    n = size or (8192 if gpu else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / seconds(lambda: a @ b, device, repeats=5)
    source = torch.zeros((2**28 if gpu else 2**24), device=device)
    target = torch.empty_like(source)
    return {
        "flops_per_s": flops,
        "bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), device, repeats=5),
    }


class Bytes(TorchDispatchMode):
    """Adds up what every operation reads and writes if nothing stays in a cache; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.total += sum(x.nbytes for x in tree_leaves((args, kwargs, found)) if torch.is_tensor(x))
        return found


def cost(work):
    """Operations (2 for a multiplication with addition) and bytes of work()."""
    with FlopCounterMode(display=False) as flops, Bytes() as moved:
        work()
    return {"flops": flops.get_total_flops(), "bytes": moved.total}
