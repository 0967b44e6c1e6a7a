"""Execute notebooks and store their outputs: `python tools/run_nb.py [NOTEBOOK ...]` (default: all in nbs/).

Cells marked `#| eval: false`, `#| slow` or `#| gpu` are skipped and keep the outputs they have.
Widget state is not stored; `nbdev_clean` runs at the end, so that a second run changes nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SKIP = re.compile(r"^#\|\s*(eval:\s*false|slow|gpu)", re.MULTILINE)


class Client(NotebookClient):
    """Runs a notebook from top to bottom, leaving skipped cells as they are."""

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and SKIP.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path):
    nb = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    Client(
        nb,
        timeout=600,
        kernel_name="python3",
        resources=resources,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    nbformat.write(nb, path)


def main():
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted((ROOT / "nbs").glob("*.ipynb"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for path in paths:
        print(path.relative_to(ROOT), flush=True)
        run(path)
    subprocess.run([str(Path(sys.executable).with_name("nbdev_clean"))], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
