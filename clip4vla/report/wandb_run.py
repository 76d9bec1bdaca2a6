"""Log a run to wandb, which only watches: whatever fails there costs one warning, and the run goes on."""

import contextlib
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.config_io import to_dict
from clip4vla.errors import one_line
from clip4vla.io.atomic import write_text

DEFAULTS = {  # of wandb's own settings, where the environment has none; s: it would wait for 90, and at the end without limit
    "WANDB_SILENT": "true",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}


class WandbRun:
    """Logs rows of metrics in the mode that WANDB_MODE or track.wandb names, or offline once that fails."""

    def __init__(self, cfg: RunConfig, folder: Path):
        self.cfg, self.folder = cfg, folder
        self.run: Any = None
        self.modes = _modes(cfg.track.wandb)
        self._start()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log rows, each under its step."""
        try:
            for row in rows if self.run else ():
                self.run.log(row, step=row["step"])
        except Exception as error:
            self._start(error)

    def finish(self) -> None:
        """Send what is left; what takes too long stays on the disk."""
        try:
            if self.run:
                self.run.finish()
        except Exception as error:
            self.modes = []
            self._start(error)

    def _start(self, failed: Exception | None = None) -> None:
        """Start in the next mode that works; warn if it is not the one that was asked for. failed: why the last one ended."""
        self.run = None
        if failed:
            _teardown()
        while self.modes and not self.run:
            mode = self.modes.pop(0)
            try:
                self.run = self._init(mode)
            except Exception as error:  # wandb has many kinds, and so have the libraries below it
                failed = failed or error
                _teardown()
        if failed:
            logging.warning(
                f"track.wandb: {one_line(failed, 300)}; the run goes on"
                f"{f', and wandb sync {self.folder}/wandb/*run-* sends it later' if self.run else ' without wandb'}"
            )

    def _init(self, mode: str) -> Any:
        """Start wandb; a resumed run goes on as the same one."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        import wandb

        mark = self.folder / "wandb_id"
        if not mark.exists():
            write_text(mark, uuid.uuid4().hex)
        words: dict[str, Any] = {"id": mark.read_text(encoding="utf-8"), "name": self.folder.name, "resume": "allow"}
        words |= {"project": self.cfg.track.project, "config": to_dict(self.cfg), "mode": mode, "dir": self.folder}
        return wandb.init(**words)


def _modes(setting: str) -> list[str]:
    """List the modes to try, in order: WANDB_MODE's before the setting's, but for off; then offline."""
    mode = os.environ.get("WANDB_MODE") or setting
    if setting == "off" or mode == "disabled":
        return []
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return [mode, "offline"]


def _teardown() -> None:
    """End wandb's own process, which else keeps the run's id and fails once more at the exit."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
    time.sleep(1)  # a folder is named by its second: what starts in the same one would take this one's place
