"""What file systems, NAS boxes, macOS and Windows leave among people's files, under the names of real ones."""

import os
import shutil
from pathlib import Path

FOLDERS = (
    ".cache",
    ".Trash-1000",
    "lost+found",
    "@eaDir",
    "#recycle",
    "__MACOSX",
    "$RECYCLE.BIN",
    "System Volume Information",
)


def litter(root: Path, *files: Path) -> None:
    """Each file hidden, and once more in each of FOLDERS, at the top and one folder down."""
    for place in (root, *(path for path in sorted(root.iterdir()) if path.is_dir())):
        for file in files:
            for copy in (
                place / f".{file.name}",
                place / f"._{file.name}",
                *(place / name / file.name for name in FOLDERS),
            ):
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
        (place / "Thumbs.db").touch()


def unreadable(monkeypatch, *names: str) -> None:
    """Folders of these names cannot be listed, not even by root."""
    scan = os.scandir

    def scandir(path):
        if str(path).endswith(names):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
