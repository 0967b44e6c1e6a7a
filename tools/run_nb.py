"""Execute notebooks and store their outputs: `python tools/run_nb.py [NOTEBOOK ...]` (default: all in nbs/).

Cells marked `#| eval: false`, `#| slow` or `#| gpu` are skipped and keep the outputs they have.
Widget state is not stored; figures are stored with 256 colours each, which takes a third of the room;
`nbdev_clean` runs at the end, so that a second run changes nothing.
"""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SKIP = re.compile(r"^#\|\s*(eval:\s*false|slow|gpu)", re.MULTILINE)


class Client(NotebookClient):
    """Runs a notebook from top to bottom, leaving skipped cells as they are."""

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and SKIP.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def smaller(png):
    """A figure, base64 of a PNG without transparency, with the 256 colours that fit it best."""
    image, file = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if image.mode == "P" or image.convert("RGBA").getextrema()[3][0] < 255:
        return png
    plain = image.convert("RGB")
    plain.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


def shrink(nb):
    """All figures of a notebook `smaller`."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])


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
    shrink(nb)
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
