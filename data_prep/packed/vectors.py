"""Read vectors of captions and pictures that another program computed, from .parquet, .npz and .safetensors files.

Clips have the ids of the shards. A clip's `text` are vectors of its captions, in their order; `vision` of its frames, or of the
clip as a whole: (n, D), or (D,) for one vector, of any numbers with a point; D is the same in all files.

.parquet       a row for each clip: id (string), text and vision (lists of numbers, or lists of such lists; null: none)
.npz           an array for each clip and kind, named KIND/ID: text/ID, vision/ID
.safetensors   a tensor for each, named so

`space`, a text in the parquet schema's or the safetensors' metadata, or an array of the npz, names the encoder that the vectors
are of, best with a hash. Files that state the same are of one space; without it these files alone are, by their sha256.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip4vla.errors import UserError, one_line
from data_prep.packed.tables import MISTAKES, Table

KINDS = ("text", "vision")
ENDINGS = (".parquet", ".npz", ".safetensors")
ROWS = 64  # of a table that are read at once
BROKEN = -1  # in place of a number of vectors: some are not finite, or zero
Entry = tuple[str, str, Tensor]  # kind, id, vectors (n, D)


class _Run(NamedTuple):
    """Locates a clip's vectors of one kind: the first of them, and how many."""

    first: int
    vectors: int


class VectorFiles:
    """Holds the unit vectors of some files in a temporary one, as float16; in memory, the clips' ids and where theirs are."""

    def __init__(self, files: Sequence[str], folder: Path):
        """Read the files once, from their starts to their ends; the temporary one lies in `folder`.

        Raises UserError for what is none of them, an id that comes twice, and vectors of several widths or spaces.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.width, self.length, self.last = 0, 0, ""
        self.runs: dict[str, dict[str, _Run]] = {kind: {} for kind in KINDS}
        self.spill = tempfile.TemporaryFile(dir=folder)
        stated = {file: _read(file, self._add) for file in files}
        if not self.width:
            raise UserError(
                f"--from {' '.join(files)}: no vectors there: text/ID, vision/ID, or columns id, text, vision"
            )
        self.identity = _identity(stated)

    def _add(self, file: str, entry: Entry) -> None:
        """Copy the vectors of a clip to the temporary file."""
        kind, key, vectors = entry
        if key in self.runs[kind]:
            raise UserError(f"--from {file}: the {kind} vectors of id {key!r} come twice: leave one out")
        self.width = self.width or vectors.shape[1]
        if vectors.shape[1] != self.width:
            raise UserError(
                f"--from {file}: {kind} vectors of id {key!r} have width {vectors.shape[1]}, those before {self.width}"
            )
        vectors = vectors.float()
        usable = bool(vectors.isfinite().all()) and bool(vectors.any(1).all())
        self.runs[kind][key] = _Run(self.length, len(vectors) if usable else BROKEN)
        if usable:
            self.spill.write(F.normalize(vectors, dim=-1).half().numpy().astype("<f2").tobytes())
            self.length += len(vectors)

    def kinds(self) -> list[str]:
        """List the kinds that there are vectors of."""
        return [kind for kind in KINDS if self.runs[kind]]

    def count(self, kind: str, key: str) -> int:
        """Count a clip's vectors of a kind; BROKEN if some are not finite, or zero."""
        return self.runs[kind].get(key, _Run(0, 0)).vectors

    def get(self, kind: str, key: str) -> bytes:
        """Return a clip's unit vectors of a kind, little-endian float16, none if there are none."""
        first, count = self.runs[kind].get(key, _Run(0, 0))
        self.spill.seek(2 * self.width * first)
        return self.spill.read(2 * self.width * max(0, count))


def _identity(stated: dict[str, str]) -> str:
    """Return the sha256 of the space that the files state, or else of their bytes; UserError if they state several."""
    if len(set(stated.values())) > 1:
        named = ", ".join(f"{file}: {space or 'none'}" for file, space in stated.items())
        raise UserError(f"--from: files of several spaces ({named}): embed those of one at a time")
    (space,) = set(stated.values())
    if space:
        return hashlib.sha256(space.encode()).hexdigest()
    digests = []
    for file in stated:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _read(file: str, add: Any) -> str:
    """Give a file's entries to `add`; return the space that it states, "" if none."""
    readers = dict(zip(ENDINGS, (_parquet, _npz, _safetensors), strict=True))
    read = readers.get(Path(file).suffix)
    if not read:
        raise UserError(f"--from {file}: none of {', '.join(ENDINGS)}; files come last on the command line")
    if not Path(file).is_file():
        raise UserError(f"--from {file}: no such file")
    try:
        space, entries = read(file)
        for entry in entries:
            add(file, entry)
        return space
    except UserError:
        raise
    except (*MISTAKES, zipfile.BadZipFile, EOFError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--from {file}: unreadable vectors ({one_line(error)})") from None


def _safetensors(file: str) -> tuple[str, Iterator[Entry]]:
    opened = safe_open(file, framework="pt")
    entries = ((*_named(name), _rows(opened.get_tensor(name))) for name in opened.keys())
    return (opened.metadata() or {}).get("space", ""), entries


def _npz(file: str) -> tuple[str, Iterator[Entry]]:
    opened = np.load(file, allow_pickle=False)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise ValueError("one array, not several by name")
    entries = ((*_named(name), _rows(torch.from_numpy(opened[name]))) for name in opened.files if name != "space")
    return str(opened["space"]) if "space" in opened.files else "", entries


def _named(name: str) -> tuple[str, str]:
    """Split KIND/ID; raises ValueError for another name."""
    kind, _, key = name.partition("/")
    if kind not in KINDS or not key:
        raise ValueError(f"an array is named {name!r}, not text/ID or vision/ID")
    return kind, key


def _parquet(file: str) -> tuple[str, Iterator[Entry]]:
    import pyarrow

    table = Table("", file)
    columns = [kind for kind in KINDS if kind in table.schema.names]
    if "id" not in table.schema.names or not columns:
        raise ValueError(f"columns are {', '.join(table.schema.names)}: needs id, and text or vision")
    types = pyarrow.types
    for name in columns:
        kind = table.schema.field(name).type
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if not types.is_floating(kind) or kind == table.schema.field(name).type:
            raise ValueError(f"column {name} is {table.schema.field(name).type}: needs lists of floating point numbers")
    space = (table.schema.metadata or {}).get(b"space", b"").decode()
    return space, _cells(table, columns)


def _cells(table: Table, columns: list[str]) -> Iterator[Entry]:
    """Yield the vectors of a table's rows, a few rows in memory at a time."""
    for _, batch in table.batches(["id", *columns], ROWS):
        for row, key in enumerate(batch.column("id").to_pylist()):
            if not isinstance(key, str):
                raise ValueError(f"an id is {key!r}, no text")
            for kind in columns:
                cell = batch.column(kind)[row]
                if cell.is_valid and len(cell.values):
                    yield kind, key, _rows(_tensor(cell.values))


def _tensor(values: Any) -> Tensor:
    """Convert a list of numbers, or of lists of them, to a tensor (D,) or (n, D); NaN for null."""
    import pyarrow.compute

    if not pyarrow.types.is_nested(values.type):
        return torch.tensor(values.to_numpy(zero_copy_only=False))
    widths = set(pyarrow.compute.list_value_length(values).to_pylist())
    if len(widths) > 1 or None in widths:
        raise ValueError(f"vectors of widths {', '.join(map(str, widths))} in one cell")
    return torch.tensor(values.flatten().to_numpy(zero_copy_only=False)).view(len(values), -1)


def _rows(vectors: Tensor) -> Tensor:
    """Return vectors (n, D) of (n, D), or of one vector (D,); raises ValueError for other shapes and kinds of numbers."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.shape[1]:
        raise ValueError(
            f"vectors of shape {(*vectors.shape,)} and {vectors.dtype}: needs (D,) or (n, D) floating point"
        )
    return vectors
