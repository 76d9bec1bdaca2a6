"""Disks and file systems: full, read-only, corrupt under the reader, with two writers, and with a clock that jumps."""

import random
from pathlib import Path
from typing import Any

from faults import _damage, _full, _others
from faults._disk import Disk, can_mount
from faults._small import Small


def campaign(folder: Path, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """All of it; scale: of the numbers of cases. Without the right to mount, what needs a disk of its own is left out."""
    rng, small, rounds = random.Random(seed), Small(folder / "small"), max(1, round(3 * scale))
    found = mounted(folder, small, rng, scale) if can_mount() else {"left out": "mounting a tmpfs is not permitted"}
    _full.no_stdout(small)
    found["corrupt samples"] = _damage.campaign(folder, small, rng, rounds)
    found["two writers"] = _others.writers(folder / "writers", small)
    found["clock"] = _others.clock(folder / "clock", small, rng.uniform(0.2, 1.5))
    return found


def mounted(folder: Path, small: Small, rng: random.Random, scale: float) -> dict[str, Any]:
    """Full and read-only disks: by command how many sizes of the disk were refused, and how many were enough."""
    with Disk(folder / "full") as disk:
        cases = _full.cases(disk.folder, small, scale)
        full = {name: _full.fill(disk, name, case, rng) for name, case in cases.items()}
        full["logs"] = _full.while_it_logs(disk, small, rng, max(1, round(8 * scale)))
    with Disk(folder / "read-only") as disk:
        return {"full": full, "read-only": _others.read_only(disk, small)}
