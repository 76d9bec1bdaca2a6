"""Choose the kind of faiss index that fits in memory, make it, keep it in a file, and query it.

n items of d = P D numbers (P parts: pictures, and sound under each type token). Bytes in memory, as in the file:

    flat    n (2 d + 8)                          exact; fp16, as the vectors are stored
    fp16    n (2 d + 8) + 4 L d                  inverted lists: 1/8 of the L lists is looked into
    8bit    n (d + 8) + 4 L d + 8 d
    pqM     n (M + 8) + 4 L d + 1024 d           product quantiser, M bytes a vector: d/4, d/8, d/16 or d/32

L = 4 sqrt(n), rounded to a power of two, and few enough that 39 vectors for each fit half of the memory while they are learnt.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip4vla.errors import UserError
from clip4vla.io.atomic import atomic_path

FEW = 10_000  # fewer items are always flat: quantisers cannot be learnt from them
SCANNED = 8e9  # bytes that a query of a flat index reads at most: about half a second
LEARN = 39  # vectors for each list, faiss's own least number
GROWTH = 2  # lists learnt from n items serve up to GROWTH n
PROBED = 8  # one list in PROBED is looked into
BLOCK = 1 << 24  # numbers of the vectors in memory while an index is made


@dataclass(frozen=True)
class IndexType:
    """Name a kind of index: flat, fp16, 8bit or pqM, its number of lists, and the items and vector width planned for."""

    name: str
    lists: int
    items: int
    width: int

    @property
    def bytes(self) -> int:
        """Return the bytes that it takes in memory and on disk."""
        return memory(self, self.items)


def faiss() -> Any:
    """Return the package; UserError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError("faiss is not installed: pip install 'clip4vla[web]'") from None
    return faiss


def memory(kind: IndexType, items: int) -> int:
    """Return the bytes of an index with `items` items."""
    codes = {"flat": 2 * kind.width, "fp16": 2 * kind.width, "8bit": kind.width}
    size = codes[kind.name] if kind.name in codes else int(kind.name[2:])
    tables = {"8bit": 8 * kind.width}.get(kind.name, 1024 * kind.width if kind.name.startswith("pq") else 0)
    return items * (size + 8) + 4 * kind.lists * kind.width + tables


def kinds(items: int, width: int, budget: float) -> list[IndexType]:
    """Return all kinds of index for `items` vectors of `width` numbers, from exact to small."""
    lists = 1 << round(math.log2(4 * math.sqrt(max(items, 1))))
    while lists > 1 and lists * LEARN > min(items, budget / 2 / (4 * width)):
        lists //= 2
    quantisers = [f"pq{width // share}" for share in (4, 8, 16, 32) if width % share == 0]
    return [
        IndexType(name, 0 if name == "flat" else lists, items, width) for name in ("flat", "fp16", "8bit", *quantisers)
    ]


def choose(every: list[IndexType], budget: float) -> IndexType | None:
    """Return the first kind that fits in `budget` bytes, flat only while a query reads little; always flat for FEW."""
    if every[0].items < FEW:
        return every[0]
    fits = [kind for kind in every if kind.bytes <= budget and (kind.name != "flat" or kind.bytes <= SCANNED)]
    return fits[0] if fits else None


def plan(items: int, width: int, budget: float) -> IndexType:
    """Return the kind for `items` items; UserError if none fits in `budget` bytes."""
    every = kinds(items, width, budget)
    chosen = choose(every, budget)
    if not chosen:
        raise UserError(
            f"--memory-gb {budget / 1e9:g}: {items} items of {width} numbers take {every[-1].bytes / 1e9:.3g} GB at least"
        )
    return chosen


def make(kind: IndexType, vectors: Callable[[float], Iterator[tuple[np.ndarray, np.ndarray]]]) -> Any:
    """Make a faiss index of all vectors.

    vectors(share): (numbers, vectors (n, d)) in blocks, of a share of them spread evenly.
    """
    index = _empty(kind)
    if kind.lists:
        index.train(_sample(kind, vectors))
    for numbers, block in vectors(1.0):
        index.add_with_ids(block, numbers)
    return index


def _sample(kind: IndexType, vectors: Callable) -> np.ndarray:
    """Return vectors (n, d) to learn lists and quantisers from, spread over all."""
    wanted = min(kind.items, LEARN * max(kind.lists, 256))  # the product quantiser has 256 centroids
    learnt, filled = np.empty((wanted, kind.width), np.float32), 0
    for _, block in vectors(min(1.0, 1.1 * wanted / kind.items)):  # spread by a hash: some more or less
        part = block[: wanted - filled]
        learnt[filled : filled + len(part)] = part
        filled += len(part)
    return learnt[:filled]


def _empty(kind: IndexType) -> Any:
    lib = faiss()
    names = {"flat": "IDMap,SQfp16", "fp16": "SQfp16", "8bit": "SQ8"}
    name = names.get(kind.name, kind.name.upper() + "x8")
    full = name if kind.name == "flat" else f"IVF{kind.lists},{name}"
    index = lib.index_factory(kind.width, full, lib.METRIC_INNER_PRODUCT)
    if kind.name.startswith("pq"):
        index.do_polysemous_training = False  # for another way to search; takes minutes
        index.pq.cp.max_points_per_centroid = LEARN
    if kind.name == "flat":  # room for all at once, not twice as much in between
        codes = lib.downcast_index(index.index).codes
        codes.resize(2 * kind.width * kind.items)
        codes.resize(0)
    return index


def still_serves(made: IndexType, wanted: IndexType) -> bool:
    """Tell whether an index that was made for `made` can take what is new, or has to be made again."""
    same = (made.name, made.width) == (wanted.name, wanted.width)
    return same and (not made.lists or made.items / GROWTH <= wanted.items <= made.items * GROWTH)


def save(index: Any, path: Path) -> None:
    """Write an index, complete or not at all; UserError if the disk does not take it."""
    try:
        with atomic_path(path) as partial:
            faiss().write_index(index, str(partial))
    except RuntimeError as error:
        why = str(error).strip().rpartition(": ")[2]
        raise UserError(f"{path}: cannot be written ({why}): make room and run the build again") from None


def load(path: Path) -> Any:
    """Read an index; RuntimeError if it is absent or unreadable."""
    return faiss().read_index(str(path))


def selector(without: np.ndarray) -> Any:
    """Return the selector, for `candidates`, of all but these numbers (n,); None if there are none."""
    if not len(without):
        return None
    bits = np.zeros(int(without.max()) // 8 + 1, np.uint8)
    np.bitwise_or.at(bits, without // 8, (1 << (without % 8)).astype(np.uint8))
    lib = faiss()
    return lib.IDSelectorNot(lib.IDSelectorBitmap(bits))


def candidates(index: Any, kind: IndexType, query: np.ndarray, k: int, chosen: Any = None) -> np.ndarray:
    """Return the numbers (<= n,) of candidates for the k best for a query (d,): k, or of an inexact index more."""
    lib = faiss()
    if kind.lists:
        how = lib.SearchParametersIVF(nprobe=max(min(8, kind.lists), kind.lists // PROBED), sel=chosen)
        k = max(10 * k, 200)
    else:
        how = lib.SearchParameters(sel=chosen)
    numbers = index.search(query[None].astype(np.float32), min(k, max(1, index.ntotal)), params=how)[1][0]
    return numbers[numbers >= 0]
