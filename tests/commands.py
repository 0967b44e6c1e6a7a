"""Commands of the package as a user gives them, in processes of their own, without importing torch each time:
a server that has imported the libraries forks one for each command, and torchrun forks its workers there."""

import importlib
import json
import multiprocessing
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

from dlpo_nb.distributed import torchrun_command

ROOT = Path(__file__).resolve().parents[1]
# what the commands import; not onnxruntime, which starts a thread: a process with threads cannot be forked
LIBRARIES = "torch torch.distributed.nn torch.distributed.run torch._dynamo scipy.stats soundfile tyro tqdm"
COMMANDS = {"data", "doctor", "evaluate", "launch", "listen", "ljspeech", "pretrain", "report", "say"}
SERVER = Path(__file__).resolve()
ELASTIC = "torch.distributed.elastic.multiprocessing"


def run(module, *flags, **options) -> subprocess.CompletedProcess:
    "python -m dlpo_nb.MODULE FLAGS, with the options of `python`."
    return python("-m", f"dlpo_nb.{module}", *flags, **options)


def torchrun(*program, processes=2, **options) -> subprocess.CompletedProcess:
    "A script, or -m and a module, in several processes."
    return python(*torchrun_command(*program, processes=processes)[1:], **options)


def python(*words, cwd=ROOT, timeout=600, **env) -> subprocess.CompletedProcess:
    """-m and a module, or a script, and its flags: returncode, stdout and stderr. Raises TimeoutExpired.

    Variables in `env` that torch reads when it is imported come too late."""
    words = [str(word) for word in words]
    if not hasattr(os, "fork"):
        options = dict(cwd=cwd, timeout=timeout, env=os.environ | env)
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        job = dict(
            words=words,
            cwd=str(cwd),
            env=os.environ | env,
            stdout=str(Path(folder) / "stdout"),
            stderr=str(Path(folder) / "stderr"),
        )
        code = _ask(server(), job, timeout)
        said = [Path(job[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, code, *said)


@lru_cache
def server():
    "The one of this process; it ends when its input does."
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # what has worked in several threads cannot be forked
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, SERVER], cwd=ROOT, env=one, **pipes)


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
        raise subprocess.TimeoutExpired(job["words"], timeout)
    return code


def fork(work, *arguments):
    """A copy of this process that does the work. Its end is quick: taking apart all that was imported
    would last longer than most commands."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def become(job):
    "Turn this forked process into the command."
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    handler = importlib.import_module(f"{ELASTIC}.subprocess_handler.subprocess_handler")
    handler.Popen = Worker
    interpret(job["words"], job["env"])


def interpret(words, env):
    "What python does with these words, in this process."
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-m":
        module, sys.argv[1:], sys.path[0] = words[1], words[2:], os.getcwd()
        sys.modules.pop(module, None)  # some commands are imported by others
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:], sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


class Worker:
    "What torchrun takes for the `Popen` of a worker: a copy of this process, which imports nothing again."

    def __init__(self, args, env, **_):
        words = [word for word in args[1:] if word != "-u"]
        self.process = fork(self.work, words, env)
        self.pid = self.process.pid
        os.setpgid(self.pid, self.pid)  # here too: torchrun ends the group, which may be at once

    @staticmethod
    def work(words, env):
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun's own are for torchrun
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interpret(words, env)

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout)
        return self.poll()


def serve():
    "Fork a process for each line of standard input; write its number, then its exit status."
    for name in LIBRARIES.split():
        importlib.import_module(name)
    package = importlib.import_module("dlpo_nb")
    for module in pkgutil.walk_packages(package.__path__, "dlpo_nb."):
        if module.name.split(".")[-1] not in COMMANDS | {"_modidx"}:
            importlib.import_module(module.name)
    while line := sys.stdin.readline():
        child = fork(become, json.loads(line))
        print(child.pid, flush=True)
        child.join()
        print(child.exitcode, flush=True)


if __name__ == "__main__":
    serve()
