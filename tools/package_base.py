"""Put a trained base into the package: `python tools/package_base.py base.safetensors small_base`.

Matrices are stored as float16, which halves the file. Commands then know the base by its name:
`--base-checkpoint small_base`.
"""

import sys

from dlpo_nb.core import PACKAGE, UserError, run_main
from dlpo_nb.policies import load_policy


def main():
    if len(sys.argv) != 3 or not sys.argv[2].isidentifier():
        raise UserError("say python tools/package_base.py FILE NAME, with a NAME such as small_base")
    model, path = load_policy(sys.argv[1]), PACKAGE / "assets" / f"{sys.argv[2]}.safetensors"
    model.save(path, model.metadata, half=True)
    print(
        f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{path.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run_main(main)
