"""A command as torchrun runs it; fails where threads of gloo outlive its work:
python leaving.py MODULE FLAGS"""

import importlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    importlib.import_module(sys.argv.pop(1)).main()
    left = [
        name
        for task in os.listdir("/proc/self/task")
        if "gloo" in (name := Path("/proc/self/task", task, "comm").read_text().strip())
    ]
    sys.exit(f"left: {left}" if left else 0)
