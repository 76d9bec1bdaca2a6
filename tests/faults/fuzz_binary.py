"""Binary files that are corrupt or hostile: tars, pictures, media, weights. Every case gives a right result, a corrupt sample
that is counted, or one line; none runs code, hangs, or takes more memory than stated."""

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import torch

from faults import _media, _pictures, _tars, _weights
from faults._cases import capped, trial

CASES = 1000  # of each target
MIB = {"tars": 256, "pictures": 256, "pictures_in_shards": 512, "media": 512, "weights": 512}
HOSTILE_MIB = {"tars": 512, "pictures": 1536, "pictures_in_shards": 512, "media": 1536, "weights": 512}
ADDRESSES = 8.0  # GiB that a hostile case may ask for: what would fill the machine fails instead


def campaign(folder: Path, seed: int, cases: int = CASES) -> dict[str, Any]:
    """Outcomes by target, of mutated files and of those that are hostile by design."""
    _quiet()
    found = {
        name: {"mutated": mutated(name, folder, seed, cases), "hostile": hostile(name, folder, seed)} for name in MIB
    }
    return {"cases_of_each": cases, "targets": found}


def mutated(name: str, folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """That many mutated files of a target."""
    make = {
        "tars": _tars.mutated, "pictures": _pictures.stills_mutated, "pictures_in_shards": _pictures.in_shards,
        "media": _media.mutated, "weights": _weights.mutated,
    }[name]  # fmt: skip
    place = folder / f"{name}-mutated"
    place.mkdir()
    return trial(make(place), cases, seed, mib=MIB[name])


def hostile(name: str, folder: Path, seed: int, only: str = "") -> dict[str, Any]:
    """Every hostile file of a target, each in a process of its own; only: the first ones in a row whose name has this."""
    place, outcomes = folder / f"{name}-hostile", {}
    place.mkdir(exist_ok=True)
    canary = folder / "canary"
    for case, do in HOSTILE[name](place, canary):
        if only in case:
            outcomes[case] = trial(_limited(do), 1, seed, limit=60, mib=HOSTILE_MIB[name])
            assert not os.path.lexists(canary), f"seed {seed}: {name}: {case} made {canary}"
        elif outcomes:
            break
    kinds = Counter(kind for o in outcomes.values() for kind in ("correct", "counted", "refused") if kind in o)
    worst = {key: max(o[key] for o in outcomes.values()) for key in ("slowest_s", "peak_mib")}
    by_kind = {kind: [case for case, o in outcomes.items() if kind in o] for kind in kinds}
    return {"cases": len(outcomes), **dict(kinds), **worst, "bound_mib": HOSTILE_MIB[name], "names": by_kind}


def _limited(do: Callable[[], str | None]) -> Callable[[int, random.Random], str | None]:
    def case(number: int, rng: random.Random) -> str | None:
        capped(ADDRESSES)
        return do()

    return case


Named = Iterable[tuple[str, Callable[[], str | None]]]


def _hostile_tars(folder: Path, canary: Path) -> Named:
    for name, data in _tars.hostile(canary).items():
        place = folder / name
        place.mkdir()
        yield name, lambda place=place, name=name, data=data: _tars.survives(place, name, data, canary)


def _hostile_pictures(folder: Path, _: Path) -> Named:
    for name, data in _pictures.hostile():
        (folder / name).write_bytes(data)
        yield name, lambda name=name: _pictures.read(folder / name)


def _hostile_strips(folder: Path, _: Path) -> Named:
    for name, data in _pictures.hostile_strips().items():
        place = folder / name
        place.mkdir()
        yield name, lambda place=place, data=data: _pictures.one_of_a_batch(place, 1, data)


def _hostile_media(folder: Path, _: Path) -> Named:
    for name, path in _media.hostile(folder):
        yield name, lambda path=path: _media.every_way(path, random.Random(0))


def _hostile_weights(folder: Path, canary: Path) -> Named:
    files = _weights.Files(folder)
    for name, (suffix, data) in _weights.hostile(files, canary).items():
        path = folder / f"{name.partition('.')[0]}{suffix}"
        path.write_bytes(data)
        yield name, lambda path=path: _weights.brought(path)
    for name, change in _weights.CONFIGS.items():
        yield name, lambda change=change: _weights.configured(files, folder, change)
    yield "code for DeepSpeed", lambda: _weights.deepspeed_with_code(folder, canary)


HOSTILE: dict[str, Callable[[Path, Path], Named]] = {
    "tars": _hostile_tars, "pictures": _hostile_pictures, "pictures_in_shards": _hostile_strips, "media": _hostile_media,
    "weights": _hostile_weights,
}  # fmt: skip


def _quiet() -> None:
    """Without the libraries' own complaints; as many threads as a worker has."""
    av.logging.set_level(av.logging.PANIC)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
