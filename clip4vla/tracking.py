"""What is written about a run while it goes on: metrics.jsonl, log.txt, a progress bar on a terminal, wandb."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from clip4vla import distributed
from clip4vla.config import RunConfig, UserError
from clip4vla.settings import to_dict
from clip4vla.shards import write_text

PACKAGES = ("torch", "deepspeed", "open_clip_torch", "nvidia-dali-cuda130", "webdataset")


class Tracker:
    """Rank 0 writes; the other ranks' calls do nothing. Rows of steps after `step`, from a run cut short, are dropped."""

    def __init__(self, cfg: RunConfig, step: int):
        self.active, self.folder = distributed.rank() == 0, Path(cfg.run_dir)
        if not self.active:
            return
        write_text(
            self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in read_rows(self.folder, until=step))
        )
        self.metrics = (self.folder / "metrics.jsonl").open("a")
        self.bar = tqdm(total=cfg.train.max_steps, initial=step, disable=None, dynamic_ncols=True, unit="step")
        self.wandb = _start_wandb(cfg, self.folder)

    def rows_of(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows of finished steps; the last one carries throughput and memory, and is shown."""
        if not self.active or not rows:
            return
        self.metrics.writelines(json.dumps(row) + "\n" for row in rows)
        self.metrics.flush()
        self.bar.update(len(rows))
        last = rows[-1]
        self.say(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in last.items()))
        if self.wandb:
            for row in rows:
                self.wandb.log(row, step=row["step"])

    def say(self, line: str) -> None:
        """One line on the terminal and in log.txt."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def close(self) -> None:
        """Finish the bar and the wandb run."""
        if self.active:
            self.bar.close()
            self.metrics.close()
            if self.wandb:
                self.wandb.finish()


def start_run(cfg: RunConfig, ds: dict[str, Any]) -> None:
    """Make the run folder; write config.yaml (every setting, versions, git commit) and the merged ds.json."""
    if distributed.rank():
        return
    header = f"# git {git_commit()}\n" + "".join(f"# {name} {version}\n" for name, version in versions().items())
    try:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        Path(cfg.run_dir, "config.yaml").write_text(header + yaml.safe_dump(to_dict(cfg), sort_keys=False))
        Path(cfg.run_dir, "ds.json").write_text(json.dumps(ds, indent=1))
    except OSError as error:
        raise UserError(f"run_dir {cfg.run_dir}: cannot be written ({error.strerror})") from None


def read_rows(run_dir: str | Path, until: float = float("inf")) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with step <= until; a line cut short by a crash is left out."""
    file = Path(run_dir, "metrics.jsonl")
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [row for row in (json.loads(line) for line in lines if line.endswith("}\n")) if row["step"] <= until]


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": sys.version.split()[0]} | found


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def git_commit() -> str:
    """Of this program, or `unknown`."""
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _start_wandb(cfg: RunConfig, folder: Path) -> Any:
    mode = cfg.track.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("track.wandb: wandb is not installed: pip install wandb, or set track.wandb=off") from None
    os.environ.setdefault("WANDB_SILENT", "true")
    mark = folder / "wandb_id"  # a resumed run goes on as the same one
    if not mark.exists():
        mark.write_text(uuid.uuid4().hex)
    named = {"project": cfg.track.project, "name": folder.name, "id": mark.read_text()}
    known: dict[str, Any] = named | {"resume": "allow", "config": to_dict(cfg)}
    return wandb.init(dir=folder, mode=mode, **known)
