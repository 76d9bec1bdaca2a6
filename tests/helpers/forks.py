"""Scripts as forks of one process that has already imported what they import: the same programs, seconds earlier."""

import contextlib
import ctypes
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent
OURS = ("clip4vla", "data_prep", "launch")  # a copy of the repository imports its own
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


@functools.cache
def start_server() -> None:
    """Start the process that scripts are forks of; it imports preloaded.py."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS), before.get("PYTHONPATH")]))
    os.environ |= {
        "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),  # as in launch/demo.sh
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask for GPUs does not start CUDA, which no fork can use
    }
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def stop_server() -> None:
    """End that process, if there is one, and wait for it, so that its CPU time and its scripts' are known."""
    if start_server.cache_info().currsize:
        multiprocessing.forkserver._forkserver._stop()


class Job:
    """A script on some ranks; those that are left are killed when the `with` block ends."""

    def __init__(self, ranks: int, words: list[str], env: dict[str, str], port: int, cwd: Path = ROOT):
        start_server()
        self.folder = Path(tempfile.mkdtemp(prefix="fork"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
        self.ranks = []
        for rank in range(ranks):
            place = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            files = [str(self.folder / f"{name}{rank}") for name in ("out", "err")]
            process = _context.Process(target=_script, args=(words, {**os.environ, **env, **place}, files, cwd))
            process.start()
            self.ranks.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def wait(self, timeout: float = 300) -> CompletedProcess:
        """What the launcher would give: the first failure ends the other ranks and is the exit code."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.ranks):
            if time.monotonic() > end:
                raise TimeoutExpired("forked ranks", timeout, self.said("out"), self.said("err"))
            if any(process.exitcode for process in self.ranks):
                self._end()
            time.sleep(0.02)
        code = next((process.exitcode for process in self.ranks if process.exitcode), 0)
        return CompletedProcess([], code, self.said("out"), self.said("err"))

    def _end(self, grace: float = 3.0) -> None:
        for process in self.ranks:
            process.join(grace)
        for process in self.ranks:
            process.kill()
            process.join()

    def said(self, stream: str) -> str:
        """All ranks' `out` or `err`."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob(f"{stream}*")))


def _script(words: list[str], env: dict[str, str], files: list[str], cwd: Path) -> None:
    """In the fork: what `python WORDS` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored if a shell runs the tests with `&`
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for file, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    if _cuda_has_started():
        os.execv(sys.executable, [sys.executable, *words])
    script = str(cwd / words[0])
    sys.argv = [words[0], *words[1:]]
    sys.path[:] = [str(Path(script).parent), *(p for p in sys.path if p != str(HELPERS))]
    if cwd != ROOT:
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    with contextlib.redirect_stdout(sys.stdout):
        runpy.run_path(script, run_name="__main__")


def _cuda_has_started() -> bool:
    """Whether an import in the process that this is a fork of has started CUDA, which then fails in the fork."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0
    except OSError:  # no driver
        return False
