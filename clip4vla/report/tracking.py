"""Write about a run while it goes on: metrics.jsonl, log.txt, samples/, a progress bar on a terminal, wandb.

metrics.jsonl is part of the run, which goes on from it. What only watches ends no run: it is left out, with a warning.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from clip4vla.config import RunConfig
from clip4vla.config_io import parse_json, to_dict
from clip4vla.data.batch import Batch
from clip4vla.distributed import collectives
from clip4vla.errors import UserError, one_line
from clip4vla.io import atomic
from clip4vla.io.atomic import atomic_write, write_text
from clip4vla.report.wandb_run import WandbRun

WAIT = 60.0  # s for another run in the folder: a requeued job may start while the old one is dying
PACKAGES = ("torch", "deepspeed", "open_clip_torch", "nvidia-dali-cuda130", "webdataset")


class Tracker:
    """Write a run's records: rank 0 writes; the other ranks list their samples alone.

    Rows after `step`, from a run cut short, are dropped.
    """

    def __init__(self, cfg: RunConfig, step: int):
        self.active, self.folder = collectives.rank() == 0, Path(cfg.run_dir)
        self.samples = _open_samples(self.folder / "samples", step) if cfg.track.log_sample_ids else None
        if not self.active:
            return
        _cut(self.folder / "metrics.jsonl", step)
        self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        (self.folder / "log.txt").open("a", encoding="utf-8").close()  # where it never can be written, no run begins
        self.lost: set[str] = set()  # what failed to write
        self.bar = tqdm(total=cfg.train.max_steps, initial=step, disable=None, dynamic_ncols=True, unit="step")
        self.wandb = WandbRun(cfg, self.folder)

    def took(self, step: int, micros: list[Batch]) -> None:
        """Note the ids of this rank's samples of a step, with track.log_sample_ids; of a corrupt one it is empty."""
        if self.samples:
            self.samples.write(
                json.dumps({"step": step, "ids": [name for micro in micros for name in micro.ids]}) + "\n"
            )

    def rows_of(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows of finished steps; the last one carries throughput and memory, and is shown."""
        if not self.active or not rows:
            return
        self.metrics.writelines(json.dumps(row) + "\n" for row in rows)
        self.metrics.flush()
        self._let("progress bar", lambda: self.bar.update(len(rows)))
        last = rows[-1]
        self.say(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in last.items()))
        self.wandb.log(rows)

    def say(self, line: str) -> None:
        """Print one line on the terminal and into log.txt."""
        if self.active:
            self._let("stdout", lambda: _print(line))
            self._let("log.txt", lambda: self._log(line))

    def _log(self, line: str) -> None:
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _let(self, name: str, write: Callable[[], object]) -> None:
        """Let something that only watches write; once it has failed it is left out."""
        if name not in self.lost:
            try:
                write()
            except Exception as error:
                self.lost.add(name)
                _warn(name, error)

    def close(self) -> None:
        """Finish the bar and the wandb run."""
        if self.samples:
            self.samples.close()
        if self.active:
            self._let("progress bar", self.bar.close)
            self.metrics.close()
            self.wandb.finish()


@contextlib.contextmanager
def watching(name: str, *but: type[Exception]) -> Iterator[None]:
    """Turn whatever fails in the block, which only watches a run, into a warning; `but` these, which are raised."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    logging.warning(f"{name}: {one_line(error)}: the run goes on without it")


def _print(line: str) -> None:
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # what waits in the buffer would fail once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def own(cfg: RunConfig) -> Iterator[None]:
    """Hold, on rank 0, a lock on the run folder, which it makes: another run, or one that dies, has a minute to end.

    Raises UserError if it cannot be had. It is free, too, when the process is gone. A run that fails before it wrote
    anything leaves no folder.
    """
    with contextlib.ExitStack() as stack:
        if collectives.rank() == 0:
            stack.enter_context(atomic.removed_if_empty(Path(cfg.run_dir), ".lock"))
            stack.enter_context(_locked(cfg))
        yield


def _locked(cfg: RunConfig) -> TextIO:
    end = time.monotonic() + min(WAIT, 30 * cfg.train.hang_timeout_minutes)
    while time.monotonic() < end:
        try:
            Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
            lock = Path(cfg.run_dir, ".lock").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run_dir {cfg.run_dir}: cannot be written ({error.strerror})") from None
        if atomic.lock(lock):
            return lock
        lock.close()
        time.sleep(0.5)
    raise UserError(f"run_dir {cfg.run_dir}: another run is writing there; wait for it, or choose another run_dir")


def start_run(cfg: RunConfig, ds: dict[str, Any]) -> None:
    """Make the run folder; write config.yaml (every setting, versions, git commit) and the merged ds.json."""
    if collectives.rank():
        return
    header = f"# git {git_commit()}\n" + "".join(f"# {name} {version}\n" for name, version in versions().items())
    try:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(cfg.run_dir, "config.yaml"), header + yaml.safe_dump(to_dict(cfg), sort_keys=False))
        write_text(Path(cfg.run_dir, "ds.json"), json.dumps(ds, indent=1))
    except OSError as error:
        raise UserError(f"run_dir {cfg.run_dir}: cannot be written ({error.strerror})") from None


def read_rows(run_dir: str | Path, until: float = float("inf")) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl with step <= until; a line cut short by a crash is left out."""
    return [row for _, row in _rows(Path(run_dir, "metrics.jsonl"), until)]


def _rows(file: Path, until: float) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, row) of whole lines with step <= until, one at a time: a long run has GBs of them."""
    try:
        with file.open("rb") if file.exists() else io.BytesIO() as lines:
            for line in lines:
                if not line.endswith(b"}\n"):
                    continue
                row = parse_json(line)
                if not (isinstance(row, dict) and type(row["step"]) is int and abs(row["step"]) < 2**53):
                    raise KeyError("step")
                if row["step"] <= until:
                    yield line, row
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not readable ({error}); correct it or remove it") from None


def _cut(file: Path, step: int) -> None:
    """Drop the rows after a step."""
    with atomic_write(file) as stream:
        stream.writelines(line for line, _ in _rows(file, step))


def _open_samples(folder: Path, step: int) -> TextIO:
    """Open this rank's list of samples, to append to; the lists of ranks that are no more are cut to `step` too."""
    mine = folder / f"rank-{collectives.rank():05d}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for file in {mine, *folder.glob("rank-?????.jsonl")}:
        if int(file.stem[5:]) % collectives.world_size() == collectives.rank():
            _cut(file, step)
    return mine.open("a", buffering=1)  # a line is there as soon as its step is done


def versions() -> dict[str, str]:
    """Return the installed versions of what decides the numbers."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": sys.version.split()[0]} | packages


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def git_commit() -> str:
    """Return the git commit of this program, or `unknown`."""
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
