"""Split the lines of tables of text, such as CSV, into cells."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from clip4vla.config_io import repeated
from clip4vla.errors import UserError


class LineReader:
    """Splits lines of a table, each for itself: a reader of the module csv takes several where a quote is not closed."""

    def __init__(self, separator: str = ",") -> None:
        self.pending: list[str] = []
        self.reader = csv.reader(iter(self.pending.pop, None), delimiter=separator, skipinitialspace=True, strict=True)

    def cells(self, line: str | ValueError) -> list[str]:
        """Split a line; ValueError if it is malformed."""
        if isinstance(line, ValueError):
            raise line
        self.pending.append(line)
        try:
            return next(self.reader)
        except (csv.Error, IndexError) as error:  # IndexError: it wants a second line
            why = "unexpected end of data" if isinstance(error, IndexError) else error
            raise ValueError(
                f"not a line of a table ({why}): write a quote inside a cell twice, and a cell in one line"
            ) from None


def joined_lines(lines: Iterable[tuple[str, str | ValueError]]) -> Iterator[tuple[str, str | ValueError]]:
    """Join each line with those after it while a quote is open, that is while the quotes are odd in number."""
    begun: tuple[str, str] | None = None
    for where, line in lines:
        if isinstance(line, str) and begun:
            where, line = begun[0], f"{begun[1]} {line}"
        begun = (where, line) if isinstance(line, str) and line.count('"') % 2 else None
        if not begun:
            yield where, line
    if begun:
        yield begun


def column_names(path: Path, columns: tuple[str, ...], line: str | ValueError, reader: LineReader) -> list[str]:
    """Return the columns that the first line names; UserError if it lacks one of `columns`, or names one twice."""
    try:
        names = reader.cells(line)
    except ValueError as error:
        raise UserError(f"{path}: the first line is malformed: {error}") from None
    if missing := set(columns) - set(names):
        raise UserError(f"{path}: the first line names no column {' and '.join(sorted(missing))}")
    if twice := repeated(names):
        raise UserError(f"{path}: the first line names column {twice} twice; rename or remove one")
    return names
