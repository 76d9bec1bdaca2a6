"""A real disk of a chosen size: a tmpfs, which can be filled, made read-only, grown and looked at."""

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

LOCKS = (".lock", ".plan.lock", "lock")


class Disk:
    """A tmpfs at `folder`, of 1 GiB until it is made smaller; unmounted at the end of the `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "Disk":
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", self.folder], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)

    def leave(self, kib: int) -> None:
        """Have so much room left, to the page of 4 KiB."""
        self._remount(f"size={max(self.used() + kib, 4)}k")  # 0 is no bound

    def start_decoding(self) -> None:
        """Have as much room as anybody needs."""
        self._remount("size=1g")

    def read_only(self, on: bool = True) -> None:
        """Refuse all writes, or no longer."""
        self._remount("ro" if on else "rw")

    def used(self) -> int:
        """KiB that are taken."""
        stat = os.statvfs(self.folder)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize // 1024

    def empty(self) -> None:
        """Remove everything in it."""
        subprocess.run(["find", self.folder, "-mindepth", "1", "-delete"], check=True)

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.folder], check=True)


def can_mount() -> bool:
    """Whether this user and kernel mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by path of all complete files: not of locks, nor of what was being written under another name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOCKS)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "partial" not in str(path.relative_to(folder))
    }


def refused(done: CompletedProcess, case: str) -> str:
    """The one line, with exit code 2; AssertionError for a traceback, or any other end."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    noise = re.search(r"Traceback|Exception ignored|core dumped", done.stderr)
    assert done.returncode == 2 and len(said) == 1 and not noise, f"{case}: {done.returncode}\n{done.stderr[-3000:]}"
    return said[0]


def well(done: CompletedProcess, case: str) -> CompletedProcess:
    """The same, if it ended in good order."""
    assert done.returncode == 0, f"{case}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done
