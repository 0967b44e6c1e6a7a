"""Commands of the package as a user gives them, in processes of their own, without importing torch each time:
a server that has imported the libraries forks one for each command."""

import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the commands import; not onnxruntime, which starts a thread: a process with threads cannot be forked
LIBRARIES = "torch torch.distributed scipy.stats soundfile tyro tqdm".split()
COMMANDS = {"data", "doctor", "evaluate", "launch", "listen", "ljspeech", "pretrain", "report", "say"}
SERVER = Path(__file__).resolve()


def run(module, *flags, cwd=ROOT, timeout=600, **env) -> subprocess.CompletedProcess:
    """python -m dlpo_nb.MODULE FLAGS: its returncode, stdout and stderr. Raises TimeoutExpired.

    Variables in `env` that torch reads when it is imported come too late."""
    if not hasattr(os, "fork"):
        command = [sys.executable, "-m", f"dlpo_nb.{module}", *map(str, flags)]
        options = dict(cwd=cwd, timeout=timeout, env=os.environ | env)
        return subprocess.run(command, capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        job = dict(
            module=f"dlpo_nb.{module}",
            flags=[str(flag) for flag in flags],
            cwd=str(cwd),
            env=os.environ | env,
            stdout=str(Path(folder) / "stdout"),
            stderr=str(Path(folder) / "stderr"),
        )
        code = _ask(server(), job, timeout)
        said = [Path(job[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([module, *flags], code, *said)


@lru_cache
def server():
    "The one of this process; it ends when its input does."
    return subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def _ask(process, job, timeout):
    "Exit status of a job."
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    if not (answer := process.stdout.readline()):
        server.cache_clear()
        raise RuntimeError(f"the server of the commands has ended with status {process.wait()}")
    child, late = int(answer), threading.Event()
    alarm = threading.Timer(timeout, lambda: (late.set(), os.kill(child, signal.SIGKILL)))
    alarm.start()
    code = int(process.stdout.readline())
    alarm.cancel()
    if late.is_set():
        raise subprocess.TimeoutExpired(job["flags"], timeout)
    return code


def become(job):
    "Turn this forked process into the command."
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv[1:] = job["flags"]
    sys.path[0] = job["cwd"]
    sys.modules.pop(job["module"], None)  # some commands are imported by others
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


def serve():
    "Fork a process for each line of standard input; write its number, then its exit status."
    for name in LIBRARIES:
        importlib.import_module(name)
    package = importlib.import_module("dlpo_nb")
    for module in pkgutil.walk_packages(package.__path__, "dlpo_nb."):
        if module.name.split(".")[-1] not in COMMANDS | {"_modidx"}:
            importlib.import_module(module.name)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if found := serve():
        become(found)
