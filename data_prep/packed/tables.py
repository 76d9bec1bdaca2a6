"""Read tables of parquet or Arrow: texts by row groups, and media cell by cell, so that one cell is in memory at a time."""

import json
import os
from collections.abc import Iterator
from typing import Any

from clip4vla.errors import UserError
from data_prep.packed.listing import open_archive

ROWS = 1024  # of text columns that are read at once
BUFFER = 1 << 20  # bytes of a column that are read at once
MISTAKES = (ValueError, OSError, KeyError, IndexError, TypeError, NotImplementedError)  # pyarrow's own are among them
Cell = tuple[str, str, str]  # base, table, column


class Table:
    """Reads a parquet file, or an Arrow file in either of its two forms; a record batch of those is a row group."""

    def __init__(self, base: str, name: str) -> None:
        """Open it; raises ValueError or OSError for what is none."""
        import pyarrow.ipc  # an extra
        import pyarrow.parquet

        self.base, self.name, self.parquet, self.groups = base, name, None, 0
        place = open_archive(base, name) if "://" in base else os.path.join(base, name)
        if name.endswith(".parquet"):
            self.parquet = pyarrow.parquet.ParquetFile(place, buffer_size=BUFFER, pre_buffer=False)
            self.groups, self.schema = self.parquet.num_row_groups, self.parquet.schema_arrow
            return
        file = pyarrow.memory_map(place) if isinstance(place, str) else place
        try:
            self.arrow = pyarrow.ipc.open_file(file)
            self.groups = self.arrow.num_record_batches
        except pyarrow.ArrowInvalid:  # as `datasets` writes them: a stream
            file.seek(0)
            self.arrow = pyarrow.ipc.open_stream(file)
        self.schema = self.arrow.schema

    def batches(self, columns: list[str], rows: int, group: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (row group, record batch of at most `rows` rows) of all row groups, or of one.

        columns: names, or NAME.FIELD of a struct.
        """
        if self.parquet:
            for number in range(self.groups) if group is None else [group]:
                for batch in self.parquet.iter_batches(rows, [number], columns, use_threads=False):
                    yield number, batch
            return
        numbered = ((i, self.arrow.get_batch(i)) for i in range(self.groups)) if self.groups else enumerate(self.arrow)
        for number, batch in numbered:
            for first in range(0, batch.num_rows if group in (None, number) else 0, rows):
                yield number, _selected(batch.slice(first, rows), columns)
            if number == group:
                return

    def features(self) -> dict[str, dict[str, Any]]:
        """Return the types that Hugging Face's `datasets` gave the columns; none if it did not write the table."""
        try:
            features = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
            return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
        except (KeyError, ValueError, TypeError, AttributeError):
            return {}


def _selected(batch: Any, columns: list[str]) -> Any:
    """Return a record batch with these columns alone, of a struct the fields that are named."""
    import pyarrow

    inner: dict[str, list[str]] = {}
    for column in columns:
        name, _, field = (column, "", "") if column in batch.schema.names else column.partition(".")
        inner.setdefault(name, []).append(field)
    arrays = [
        batch.column(name)
        if "" in some
        else pyarrow.StructArray.from_arrays([batch.column(name).field(field) for field in some], some)
        for name, some in inner.items()
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, list(inner))


class Cells:
    """Reads the cells of a column of a row group, forward."""

    def __init__(self, cell: Cell, group: int) -> None:
        base, name, column = cell
        self.column, *self.field = column.split(".")
        self.batches = Table(base, name).batches([column], 1, group)
        self.next = 0

    def read(self, row: int) -> bytes:
        """Return the bytes of a row; ValueError if it has none or the table is corrupt."""
        batch = None
        while self.next <= row:
            _, batch = next(self.batches, (0, None))
            self.next += 1
        if batch is None:
            raise ValueError(f"no row {row} in its row group")
        value = batch.column(self.column)
        for field in self.field:
            value = value.field(field)
        if not value[0].is_valid:
            raise ValueError(
                "no bytes in its cell: where they are in files of their own, name the column of paths, or embed them"
            )
        return memoryview(value[0].as_buffer()).tobytes()


_reading: dict[str, tuple[Cell, int, Cells]] = {}  # by column: rows of a shard are read in order


def read_cell(base: str, name: str, group: int, row: int, column: str) -> bytes:
    """Read the bytes of a cell; `row` counts within its row group. Raises ValueError for a corrupt table.

    What follows the row before costs what lies between; going back reads the row group from its start.
    """
    cell: Cell = (base, name, column)
    try:
        if column not in _reading or _reading[column][:2] != (cell, group) or _reading[column][2].next > row:
            _reading.pop(column, None)  # before the next one: each may hold a whole row group
            _reading[column] = cell, group, Cells(cell, group)
        return _reading[column][2].read(row)
    except UserError:
        raise
    except MISTAKES as error:
        _reading.pop(column, None)
        raise ValueError(f"unreadable table: {' '.join(str(error).split())[:150]}") from None
