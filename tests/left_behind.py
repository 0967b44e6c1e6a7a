"""What a run leaves in its folder, but for the times: equal for two runs that are one."""

from dlpo_nb.core import read_jsonl
from dlpo_nb.weights import read_safetensors


def left_behind(out):
    """All that must not depend on where the run was interrupted."""
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_jsonl(out / "metrics.jsonl")]
    files = {path.name: read(path) for path in (out / "checkpoints").iterdir()}
    return rows, files


def read(path):
    """Every number in a file, as something that can be compared;
    the order of a .safetensors' notes is drawn by lot."""
    if path.suffix == ".safetensors":
        tensors, notes = read_safetensors(path)
        return notes, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return path.read_bytes()
