"""Plan which row goes into which shard. Rows always keep their shard; new ones get new shards after the old ones.

OUT/manifest.jsonl: the first line lists the units (one unit is one shard), the others are their rows, in order.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_text
from data_prep.manifest import ManifestRow, Skipped

MANIFEST = "manifest.jsonl"
Key = tuple[str, str, str]  # source, split, id


@dataclass(frozen=True)
class ShardPlan:
    """Describe one shard to be: its rows are the `size` bytes from `offset` of the manifest.

    first: number of its first row among those of its folder OUT/SOURCE/SPLIT; sample keys begin with it.
    """

    out: str
    source: str
    split: str
    number: int
    first: int
    rows: int
    offset: int
    size: int

    def __str__(self) -> str:
        return str(self.tar)

    @property
    def folder(self) -> Path:
        """Return the folder that the shard goes to."""
        return Path(self.out, self.source, self.split)

    @property
    def tar(self) -> Path:
        """Return the path of the shard."""
        return self.folder / f"{self.source}-{self.split}-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        """Return the path of the note that says that the shard is finished."""
        return self.folder / ".parts" / f"{self.tar.stem}.json"

    def text(self) -> bytes:
        """Read the rows as the manifest has them, a line each."""
        with Path(self.out, MANIFEST).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def read(self) -> list[ManifestRow]:
        """Parse the rows; UserError if the manifest is corrupt."""
        try:
            return [_row(line) for line in self.text().splitlines()]
        except (ValueError, TypeError, AttributeError):
            raise _none(self.out) from None


def read_plan(out: Path) -> tuple[int, list[ShardPlan]] | None:
    """Return (samples_per_shard, units) of the manifest in `out`; None if there is none."""
    try:
        with (out / MANIFEST).open("rb") as file:
            line = file.readline()
            head = parse_json(line)
            units = _units(out, head["units"], len(line))
            whole = file.seek(0, os.SEEK_END) == len(line) + sum(unit.size for unit in units)
            if not whole or type(head["samples_per_shard"]) is not int:
                raise ValueError(line)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise _none(out) from None
    return head["samples_per_shard"], units


def _units(out: Path, heads: list, offset: int) -> list[ShardPlan]:
    """Return the units that the first line lists, the first one's rows at `offset`.

    ValueError or TypeError if malformed.
    """
    units = []
    for source, split, *numbers, size in heads:
        number, first, rows = numbers
        unit = ShardPlan(str(out), source, split, number, first, rows, offset, size)
        if any(type(number) is not int or number < 0 for number in (*numbers, size)) or unit.folder.parts[-2:] != (
            source,
            split,
        ):
            raise ValueError(unit)
        units.append(unit)
        offset += size
    return units


def _row(line: bytes) -> ManifestRow:
    """Parse one line of the manifest; ValueError or TypeError if it cannot be a row."""
    row = ManifestRow(**parse_json(line))
    texts = [row.id, row.item, row.group, row.source, row.split, row.lang, row.audio_type]
    texts += [text for text in (row.picture, row.media, row.label) if text is not None]
    for some in (texts, row.captions, row.caption_langs, row.labels):
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            raise ValueError(line)
    if not all(type(end) in (int, float, type(None)) for end in (row.start, row.end, row.picture_start)):
        raise ValueError(line)
    if not all(type(part) in (int, str) for place in row.places.values() for part in place):
        raise ValueError(line)
    return row


def _none(out: str | Path) -> UserError:
    return UserError(f"{Path(out, MANIFEST)}: not a manifest of shard.py: delete it, the next run makes it again")


def make_plan(out: Path, rows: Iterable[ManifestRow], skipped: list[Skipped], size: int) -> list[ShardPlan]:
    """Write the manifest, with shards of `size` rows; rows of the plan before stay where they are.

    So does a row whose media are gone by now, as its shard may be finished; a row that left the annotations is dropped.
    """
    new: dict[Key, tuple[str, str]] = {(row.source, row.split, row.id): (row.block(), _line(row)) for row in rows}
    gone = {item.where for item in skipped if item.why == "missing"}
    before = read_plan(out)
    filled: list[tuple[ShardPlan, list[str]]] = []
    for unit in before[1] if before and before[0] == size else []:
        lines = []
        for row, line in zip(unit.read(), unit.text().splitlines(), strict=True):
            kept = ("", line.decode() if gone & {row.id, row.item, *row.archives()} else "")
            _, text = new.pop((row.source, row.split, row.id), kept)
            lines += [text] if text else []
        filled.append((unit, lines))
    _write(out, size, [*_heads(filled), *_new_units(new, filled, size)])
    after = read_plan(out)
    assert after
    return after[1]


def _line(row: ManifestRow) -> str:
    return json.dumps(row.as_json(), ensure_ascii=False, separators=(",", ":"))


def _heads(filled: list[tuple[ShardPlan, list[str]]]) -> list[tuple]:
    """Return (source, split, number, first, lines) of the units of the plan before."""
    return [(unit.source, unit.split, unit.number, unit.first, lines) for unit, lines in filled if lines]


def _new_units(new: dict[Key, tuple[str, str]], filled: list[tuple[ShardPlan, list[str]]], size: int) -> list[tuple]:
    """Return (source, split, number, first, lines) of units for new lines, by folder, in a fixed pseudo-random order.

    Rows of one block stay together, in their order.
    """
    folders: dict[tuple[str, str], list[tuple[bytes, str]]] = defaultdict(list)
    number: Counter[tuple[str, str]] = Counter()
    first: Counter[tuple[str, str]] = Counter()
    for (source, split, _), (block, line) in new.items():
        folders[source, split].append((hashlib.blake2b(block.encode(), digest_size=8).digest(), line))
    for unit, _ in filled:
        number[unit.source, unit.split] = max(number[unit.source, unit.split], unit.number + 1)
        first[unit.source, unit.split] = max(first[unit.source, unit.split], unit.first + unit.rows)
    units = []
    for folder, members in sorted(folders.items()):
        lines = [line for _, line in sorted(members, key=lambda member: member[0])]
        for i, start in enumerate(range(0, len(lines), size)):
            units.append((*folder, number[folder] + i, first[folder] + start, lines[start : start + size]))
    return units


def _write(out: Path, size: int, units: list[tuple]) -> None:
    texts = ["".join(line + "\n" for line in unit[-1]) for unit in units]
    heads = [[*unit[:-1], len(unit[-1]), len(text.encode())] for unit, text in zip(units, texts, strict=True)]
    head = json.dumps({"samples_per_shard": size, "units": heads}, separators=(",", ":"))
    write_text(out / MANIFEST, head + "\n" + "".join(texts))
