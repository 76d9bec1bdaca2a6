"""Share between benchmarks: arguments that count, ranks, the versions and the machine."""

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    "clip4vla torch torchaudio deepspeed open_clip_torch webdataset nvidia-dali-cuda130 numpy av pillow soundfile librosa "
    "opencv-python-headless faiss-cpu"
)


def count(text: str) -> int:
    """Parse an argument that counts something: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of PACKAGES."""
    known = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: known[name] for name in PACKAGES.split() if name in known}


def machine() -> dict[str, Any]:
    """Return the processor, its cores, and how many processes wanted to run when the figures were done."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"cpu": [*models, platform.machine()][0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def free_port() -> int:
    """Find a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(work: Callable[..., None], processes: int, *args: Any) -> None:
    """Run work(number, *args) in `processes` processes at once, forks of one that has imported the work's module."""
    from torch.multiprocessing import start_processes  # the command line is read before torch is imported

    multiprocessing.set_forkserver_preload([work.__module__, "deepspeed", "open_clip"])
    stdout = os.dup(1)
    os.dup2(2, 1)  # what they print is no figure
    try:
        start_processes(work, args, processes, start_method="forkserver")
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def timed_on_all_ranks(action: Any) -> float:
    """Measure the seconds until all ranks have done it."""
    from clip4vla.distributed import collectives  # the command line is read before torch is imported

    collectives.barrier()
    start = time.perf_counter()
    action()
    collectives.barrier()
    return time.perf_counter() - start
