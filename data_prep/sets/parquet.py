"""Read tables of parquet or Arrow whose columns are media, as bytes or paths, and texts: those of Hugging Face, and any other.

Texts are read once, by row groups; media stay where they are, and shard.py reads each cell when it makes the shard.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip4vla.config import DataConfig
from clip4vla.errors import UserError, one_line
from clip4vla.media.source import suffix_of
from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import ManifestRow, Skipped, inside, on_disk
from data_prep.media_names import seconds
from data_prep.packed import fields
from data_prep.packed.listing import list_archives
from data_prep.packed.tables import MISTAKES, ROWS, Cells, Table

PATHS = ("path", "file_name", "file", "filename")  # columns of paths: the first that is there, if no column has bytes
SUFFIXES = {"Image": ".png", "Audio": ".wav", "Video": ".mp4"}  # by Hugging Face's type, of a cell without a path
SPAN = ("start", "end")  # s in a file, beside a column of paths


@dataclass
class _Column:
    """Says where a column of media has its bytes and its paths, A.B for the field B of A; empty: it has none."""

    bytes_in: str
    path_in: str
    suffix: str = ""  # of what has no path

    def medium(self, base: str, name: str, number: int, path: str | None) -> str | None:
        """Return the path of a row's medium: TABLE/ROW/NAME of bytes; None for a file that is not there."""
        if not self.bytes_in:
            if not path:
                raise ValueError("no path")
            path = posixpath.normpath(inside(path))
            if suffix_of(path) not in fields.KINDS:
                raise ValueError(f"{path}: unknown kind of file, not one of {' '.join(fields.KINDS)}")
            return path if "://" in base else on_disk(Path(base), path)
        label = posixpath.basename(path or "").lstrip(".") or self.bytes_in.partition(".")[0]
        label += "" if suffix_of(label) in fields.KINDS else self.suffix
        return f"{name}/{number}/{label}"


def parquet(cfg: DataConfig) -> RowsOrSkipped:
    """One row is one sample; rows of a row group stay together and in order."""
    base, names, _ = list_archives("parquet", cfg.media_root)
    skipped: list[Skipped] = []

    def lines() -> Iterator[Line]:
        for name in names:
            try:
                yield from _lines(cfg, base, name)
            except FileNotFoundError:
                skipped.append(Skipped("missing", name, "no such table"))
            except UserError:
                raise
            except MISTAKES as error:
                skipped.append(Skipped("malformed", name, f"unreadable table: {one_line(error)}"))

    yield from annotation_io.rows(lines(), lambda name, line: _row(cfg, base, name, *line), join=True)
    yield from skipped


def _lines(cfg: DataConfig, base: str, name: str) -> Iterator[Line]:
    """Yield a line for each row: (row group, row in it, row in the table), the cells by column, the columns of media."""
    table = Table(base, name)
    media = _media_columns(cfg, table)
    read = _text_columns(cfg, table, media) + [column.path_in for column in media if column.path_in]
    classes = {column: feature["names"] for column, feature in table.features().items() if "names" in feature}
    number, before, first = 0, -1, 0
    for group, batch in table.batches(list(dict.fromkeys(read)), ROWS):
        first, before = (first if group == before else number), group
        for cells in batch.to_pylist():
            for column in classes.keys() & cells.keys():
                cells[column] = _class(classes[column], cells[column])
            yield f"{name}: row {number}", name, ((group, number - first, number), cells, media)
            number += 1


def _class(names: list[str], number: Any) -> Any:
    """Return the name of a class; None for -1, which stands for none."""
    if not isinstance(number, int):
        return number
    return names[number] if 0 <= number < len(names) else None


def _row(
    cfg: DataConfig, base: str, name: str, at: tuple[int, int, int], cells: dict[str, Any], media: list[_Column]
) -> ManifestRow:
    group, row, number = at
    there: fields.Media = {}
    path: str | None = None
    for column in media:
        path = fields.lookup(cells, column.path_in) if column.path_in else None
        if medium := column.medium(base, name, number, path):
            there[medium] = [name, group, row, column.bytes_in] if column.bytes_in else []
    label = fields.lookup(cells, cfg.label_from) if cfg.label_from else cells.get(fields.LABEL)
    start, end = (None if cells.get(key) is None else seconds(cells[key]) for key in SPAN)
    made = fields.row(cfg, name, there, fields.captions(cells, cfg.captions_from), label, (start, end))
    if not there:
        made.id = made.item = path or f"{name}/{number}"
    return made


def _text_columns(cfg: DataConfig, table: Table, media: list[_Column]) -> list[str]:
    """List the columns of captions, label and interval; UserError if one that is named is not there."""
    there = table.schema.names
    named = [*cfg.captions_from, *filter(None, [cfg.label_from])]
    for column in named:
        _check_column(table, column if column in there else column.partition(".")[0])
    named += [] if cfg.captions_from else [column for column in fields.CAPTIONS if column in there][:1]
    named += [fields.LABEL] if fields.LABEL in there and not cfg.label_from else []
    named += [column for column in SPAN if column in there and not all(medium.bytes_in for medium in media)]
    return list(dict.fromkeys(named))


def _check_column(table: Table, column: str) -> None:
    if column not in table.schema.names:
        raise UserError(f"{table.name}: no column {column}; there are {', '.join(table.schema.names)}")


def _media_columns(cfg: DataConfig, table: Table) -> list[_Column]:
    """Choose the columns of media; UserError if there is none, or if one that is named is not there or of another type."""
    for column in cfg.media_from:
        _check_column(table, column)
    columns = {column: _column(table, column) for column in cfg.media_from or table.schema.names}
    if cfg.media_from:
        media = list(columns.values())
    else:
        with_bytes = [column for column in columns.values() if column and column.bytes_in]
        media = [*with_bytes] or [columns[column] for column in PATHS if column in columns][:1]
    if not media or None in media:
        names = ", ".join(cfg.media_from or table.schema.names)
        raise UserError(
            f"{table.name}: no media, bytes or paths, in {names}; name their columns, as media_from=[audio]"
        )
    return [column for column in media if column]


def _column(table: Table, name: str) -> _Column | None:
    """Describe a column of media; None if it holds neither bytes of media nor texts, which may be paths."""
    from pyarrow import types  # an extra

    kind = table.schema.field(name).type
    inner = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if types.is_string(kind) or types.is_large_string(kind):
        return _Column("", name)
    if not (types.is_binary(kind) or types.is_large_binary(kind) or "bytes" in inner):
        return None
    column = _Column(f"{name}.bytes" if inner else name, f"{name}.path" if "path" in inner else "")
    column.suffix = SUFFIXES.get(str(table.features().get(name, {}).get("_type")), "")
    if f".{name.lower()}" in fields.KINDS:  # video2dataset's columns are mp4, m4a, jpg, ..
        column.suffix = f".{name.lower()}"
    if column.suffix:
        return column
    from data_prep.packed.media import suffix_of_bytes  # it decodes, with torch, which takes half a gigabyte

    try:
        column.suffix = suffix_of_bytes(Cells((table.base, table.name, column.bytes_in), 0).read(0))
    except UserError:  # the URL does not answer
        raise
    except MISTAKES:  # no cell, an empty one, or bytes of no known kind: not a column of media
        return None
    return column
