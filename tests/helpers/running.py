"""Scripts of the repository as a user runs them: one process, gloo ranks, the deepspeed launcher; what their runs log."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from forks import ROOT, Job

STEPS = 8  # of a tiny run
PATIENCE = 300  # s that a test waits for what takes seconds on a machine with nothing else to do
ONE_HEAD = {  # as of a weights file, whose heads are taken to be 64 wide
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
TINY = ONE_HEAD | {  # an even number of heads, as every CLIP has: nn.MultiheadAttention has a way of its own for them
    "vision_cfg": ONE_HEAD["vision_cfg"] | {"head_width": 32},
    "text_cfg": ONE_HEAD["text_cfg"] | {"heads": 2},
}
NARROW = TINY | {"text_cfg": TINY["text_cfg"] | {"width": 16}}  # most of TINY's weights are its tokens'


def trace(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """Losses by step; json prints floats so that they come back to the last bit."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: tuple(v for k, v in sorted(row.items()) if k.startswith("loss")) for row in rows}


def optimizer_groups(checkpoint: Path) -> list[list[tuple[float, float]]]:
    """For each rank (share of the learning rate, weight decay) of the optimizer's groups when it wrote a checkpoint."""
    from clip4vla.checkpoints.universal import load_tensors

    states = [load_tensors(str(file))["optimizer_state_dict"] for file in sorted(checkpoint.glob("*_optim_states.pt"))]
    inner = [state.get("base_optimizer_state") or state["optimizer_state_dict"] for state in states]  # or of ZeRO-3
    return [[(group["lr_scale"], group["weight_decay"]) for group in state["param_groups"]] for state in inner]


def wait_for(file: Path, step: int) -> None:
    """Until that step stands in metrics.jsonl."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if file.exists() and re.search(rf'"step": {step},', file.read_text(encoding="utf-8")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


def run(
    *words: object, env: dict[str, str] | None = None, timeout: float = PATIENCE, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """A python script of the repository, from its root, as one process."""
    if str(words[0]).endswith(".py"):
        with job(1, *words, env=env, cwd=cwd) as started:
            return started.wait(timeout)
    return _call([sys.executable, *words], env, timeout)


def evaluation(run_dir: Path, stdout: str) -> Path:
    """The folder of an evaluation, whose name the command printed."""
    (name,) = re.findall(r"^(\S+), type token ", stdout, re.M)
    return run_dir / "eval" / name


def ranks(count: int, *words: object, env: dict[str, str] | None = None, timeout: float = PATIENCE):
    """The same on gloo ranks, without the seconds that a launcher and its imports take."""
    with job(count, *words, env=env) as started:
        return started.wait(timeout)


def job(count: int, *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Job:
    """Started, not waited for; to be used in a `with` block. Its `ranks` are processes to kill and to signal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = {"PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return Job(count, [str(word) for word in words], full, free_port(), cwd)


def deepspeed(ranks: int, *words: object, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
    """A launch script under the deepspeed launcher, on gloo ranks."""
    return _call(deepspeed_command(ranks, *words), None, timeout)


def deepspeed_command(ranks: int, *words: object) -> list[str]:
    """The command line, on a port of its own."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *map(str, words)]


def free_port() -> int:
    """A TCP port nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _call(words: list[object], env: dict[str, str] | None, timeout: float) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout)
