"""Find and read annotation files, and turn their lines into manifest rows, or Skipped with a reason."""

import functools
import html
import math
import re
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from clip4vla.config_io import NOT_UTF8, parse_json, repeated
from clip4vla.data.sample_metadata import CAPTIONS, LONGEST
from clip4vla.errors import UserError
from data_prep.manifest import AmbiguousError, Located, ManifestRow, MediaFolder, Skipped
from data_prep.table_lines import LineReader, column_names, joined_lines

UNDECODED = re.compile("[\0\udc80-\udcff]").search
NAN_IS_NULL: dict[str, Any] = {"parse_constant": lambda _: None}
# of a line; OSError: a name too long for the disk
MISTAKES = (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError)
RowsOrSkipped = Iterator[ManifestRow | Skipped]
Line = tuple[str, str, Any]  # FILE:LINE or FILE: ID, split, what stands there

# Files


def require_files(place: Path, *names: str) -> list[Path]:
    """Return the paths of these files, of which none may be absent; `place` is their folder, or one of them."""
    paths = [_path(place, name) for name in names]
    if absent := [name for name, path in zip(names, paths, strict=True) if not path.is_file()]:
        raise UserError(
            f"annotations={place}: no {', no '.join(absent)} there; the config's header says which files go where"
        )
    return paths


def existing_files(place: Path, splits: dict[str, str]) -> list[tuple[Path, str]]:
    """Return (path, split) of those files that are there; where `place` is one of them, that one alone."""
    files = [(path, split) for name, split in splits.items() if (path := _path(place, name)).is_file()]
    files = [each for each in files if place.is_dir() or each[0].name == place.name]
    if not files:
        raise UserError(
            f"annotations={place}: none of {', '.join(splits)} there; the config's header says which files go where"
        )
    return files


def _path(place: Path, name: str) -> Path:
    """Return where the file is, or should be; its own folder (meta/esc50.csv) may be `place` already."""
    folder = place if place.is_dir() else place.parent
    return path if (path := folder / name).is_file() else folder / Path(name).name


# Reading


def read_lines(path: Path) -> Iterator[tuple[str, str | ValueError]]:
    """Yield (FILE:LINE, text, or why it is none) of lines that are not blank."""
    name = path.name
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            if text := line.removeprefix("\ufeff").strip():
                yield f"{name}:{number}", ValueError(NOT_UTF8) if not_utf8(text) else text


def not_utf8(text: str) -> bool:
    """Tell whether the bytes of a text that was decoded with surrogateescape were something else; UTF-16 has zeros."""
    return "\0" in text if text.isascii() else bool(UNDECODED(text))


def read_csv(
    path: Path, *columns: str, header: bool = True, separator: str = ",", cells_span_lines: bool = False
) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """Yield (FILE:LINE, cells by column, "" where there is none; or why the line is malformed).

    Each line stands for itself, so that a quote that is not closed takes no other line with it, unless cells_span_lines.
    Raises UserError if the header lacks one of the columns or names one twice.
    """
    lines = joined_lines(read_lines(path)) if cells_span_lines else read_lines(path)
    reader = LineReader(separator)
    names = column_names(path, columns, next(lines, ("", ""))[1], reader) if header else list(columns)
    for where, line in lines:
        try:
            cells = reader.cells(line)
            if len(cells) > len(names):
                raise ValueError("more cells than the header has columns")
        except ValueError as error:
            yield where, error
            continue
        if any(cells):
            if len(cells) < len(names):
                cells += [""] * (len(names) - len(cells))
            yield where, dict(zip(names, cells))  # noqa: B905  strict takes time of millions of lines


def read_csvs(place: Path, splits: dict[str, str], *columns: str, header: bool = True) -> Iterator[Line]:
    """Yield the lines of all of these tables that are there."""
    for path, split in existing_files(place, splits):
        yield from ((where, split, line) for where, line in read_csv(path, *columns, header=header))


def by_key(path: Path, split: str, items: list[Any], key: str) -> Iterator[Line]:
    """Yield the items of a JSON list, named by this key's value, or by their number where they have none."""
    for number, item in enumerate(items):
        name = item.get(key, number) if isinstance(item, dict) else number
        yield f"{path.name}: {name}", split, item


def parse_foreign(text: str | bytes) -> Any:
    """Parse JSON of others; ValueError if it is none or repeats a key, of which one would be lost.

    What JSON has no number for, NaN and Infinity, is null.
    """
    return parse_json(text, object_pairs_hook=_object, **NAN_IS_NULL)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {repeated(key for key, _ in pairs)} is given twice")
    return made


def read_json(path: Path, kind: type[list] | type[dict], **keys: type[list] | type[dict]) -> Any:
    """Return the list or dict in a JSON file.

    Raises UserError if it is something else or lacks one of the keys, of its kind.
    """
    try:
        data = parse_foreign(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; get it again") from None
    there = data if isinstance(data, dict) else {}
    if not isinstance(data, kind) or any(not isinstance(there.get(key), below) for key, below in keys.items()):
        form = f"a {kind.__name__} with {' and '.join(keys)}" if keys else f"a {kind.__name__}"
        raise UserError(f"{path}: JSON, but not {form}; is it the right file?")
    return data


def read_lists(files: Iterable[tuple[Path, str]], split_of: dict[str, str]) -> Iterator[Skipped]:
    """Fill `split_of`, the split of each name in lists of names, a name a line; yield the malformed lines."""
    for path, split in files:
        for where, line in read_lines(path):
            if isinstance(line, ValueError):
                yield Skipped("malformed", where, str(line))
            else:
                split_of[line] = split


# Rows


def rows(lines: Iterable[Line], parse: Callable[[str, Any], ManifestRow | None], join: bool = False) -> RowsOrSkipped:
    """Yield Skipped for each line that parse(split, line) refuses with a ValueError, then a ManifestRow for each clip.

    A line that is a ValueError already is malformed. parse returns None for a line that is no sample.
    join: lines of one clip (equal id and split) add their captions to it; else a second one is malformed. A line with
    captions that a clip has no more room for is unusable, and its clip keeps the first ones. A row without media is
    Skipped as missing, one that may be in either of two files as unusable.
    """
    places = Places()
    kept: list[ManifestRow] = []
    joined: dict[tuple[str, str], ManifestRow] = {}
    for where, split, line in lines:
        try:
            if isinstance(line, ValueError):
                raise line
            row = parse(split, line)
        except UserError:
            raise
        except MISTAKES as error:
            yield Skipped("unusable" if isinstance(error, AmbiguousError) else "malformed", where, reason(error))
            continue
        if row is None:
            continue
        is_first = places.is_first(row, where)
        if not is_first and not join:
            yield Skipped("malformed", where, f"duplicate of {places.first(row)}")
            continue
        if join:
            row = _joined(joined.setdefault((row.split, row.id), row), row)
        if len(row.captions) > CAPTIONS:
            yield Skipped("unusable", where, f"more than {CAPTIONS} captions of one clip")
            del row.captions[CAPTIONS:], row.caption_langs[CAPTIONS:]
        if not join and not (row.media or row.picture):
            yield missing(row.id, row.item)
        elif is_first:
            kept.append(row)
    del places
    yield from _checked(kept)


class Places:
    """Remembers where the first line of each clip stands, in 8 bytes beside its id, since there may be millions."""

    def __init__(self) -> None:
        self.files: list[str] = []  # FILE of FILE:LINE, or FILE: ID
        self.places: dict[str, array[int]] = defaultdict(lambda: array("q"))  # by split: file << 32 | line, or 0
        self.ids: dict[str, dict[str, int | None]] = defaultdict(dict)  # numbers among places, once one is asked for
        self.is_numbered = False

    def is_first(self, row: ManifestRow, where: str) -> bool:
        """Tell whether no line before this one had the row's split and id."""
        ids = self.ids[row.split]
        count = len(ids)
        ids.setdefault(row.id, count if self.is_numbered else None)
        if len(ids) == count:
            return False
        file, _, line = where.rpartition(":")
        if not line.isdecimal() or line[0] == "0" or len(line) > 9:
            file, line = where, "0"
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self.places[row.split].append(len(self.files) - 1 << 32 | int(line))
        return True

    def first(self, row: ManifestRow) -> str:
        """Return where the first line with the row's split and id stands."""
        if not self.is_numbered:
            for ids in self.ids.values():
                ids.update({key: number for number, key in enumerate(ids)})
            self.is_numbered = True
        number = self.ids[row.split][row.id]
        assert number is not None
        file, line = divmod(self.places[row.split][number], 1 << 32)
        return f"{self.files[file]}:{line}" if line else self.files[file]


def _joined(kept: ManifestRow, row: ManifestRow) -> ManifestRow:
    """Return the row that was kept of a clip, with the captions, and if it has none the media, of another row of it."""
    if kept is row:
        return kept
    for text, lang in zip(row.captions, row.caption_langs, strict=True):
        if keeps_repeated(row.split) or text not in kept.captions:  # CAPTIONS at most: lines take linear time
            kept.captions.append(text)
            kept.caption_langs.append(lang)
    if not kept.media and not kept.picture:
        kept.media, kept.start, kept.end = row.media, row.start, row.end
        kept.picture, kept.picture_start = row.picture, row.picture_start
    return kept


def _checked(kept: list[ManifestRow]) -> RowsOrSkipped:
    """Yield the rows that have media, and Skipped of those that take the file of another clip of their video."""
    owners: dict[str | tuple[str, str], str] = {}
    contested: set[str | tuple[str, str]] = set()
    for row in kept:
        if row.start is None and row.media and owners.setdefault(_files(row), row.group) != row.group:
            contested.add(_files(row))
    owners.clear()
    for row in kept:
        if not row.media and not row.picture:
            yield missing(row.id, row.item)
        elif row.start is None and row.media and _files(row) in contested:
            yield Skipped("unusable", row.id, f"{row.media} would be another clip of its video too")
        else:
            yield row


def _files(row: ManifestRow) -> str | tuple[str, str]:
    """Return the medium of a row; with the picture if there is one, as several of those may share a sound."""
    return (row.media or "", row.picture) if row.picture else row.media or ""


def whole_row(
    source: str, split: str, name: str, place: Located | None, texts: Any, group: str = "", **more: Any
) -> ManifestRow:
    """Return the row of a whole file, in English."""
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    kept = captions(texts, split)
    row = ManifestRow(name, name, group or name, source, split, kept, ["en"] * len(kept), **more)
    return located(row, place)


def clip_row(
    media: MediaFolder,
    source: str,
    split: str,
    video: str,
    start: float,
    end: float,
    texts: Any,
    naming: Any = None,
    **more: Any,
) -> ManifestRow:
    """Return the row of an interval in seconds of a video, or of the file that was cut from it, in English.

    naming: a dict of what MediaFolder.find_clip is to know of the names beside.
    """
    check_span(start, end)
    if not video:
        raise ValueError("no id")
    name, kept = f"{video}_{short(start)}_{short(end)}", captions(texts, split) if texts is not None else []
    row = ManifestRow(name, sys.intern(video), name, source, split, kept, ["en"] * len(kept), **more)
    return located(row, media.find_clip(video, start, end, **naming) if naming else media.find_clip(video, start, end))


def located(row: ManifestRow, place: Located | None) -> ManifestRow:
    """Return the row with its media, if there are any."""
    if place:
        row.media, row.start, row.end, row.picture, row.picture_start = place
    return row


@functools.lru_cache(1 << 12)  # millions of clips begin at few different times
def short(seconds: float) -> str:
    """Return the seconds as they stand in an id."""
    return f"{seconds:.10g}"


def check_span(start: float | None, end: float | None) -> None:
    """Raises ValueError unless start and end, in seconds (None: the file's own), span some time."""
    if not 0 <= (start or 0) < (math.inf if end is None else end) or end == math.inf:
        raise ValueError(f"start {start} and end {end} do not span any time")


def span_suffix(start: float | None, end: float | None) -> str:
    """Return what tells an interval in seconds from others of its file, in an id; "" for the whole file."""
    return "" if start is end is None else f"@{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"


def keeps_repeated(split: str) -> bool:
    """Tell whether equal captions of a clip count each: what is evaluated must have the published number of queries."""
    return not split.startswith("train")


def captions(texts: Any, split: str = "train") -> list[str]:
    """Return the cleaned texts without empty ones, and in a split to train with without repeated ones."""
    kept = filter(None, cleaned(texts))
    return [*kept] if keeps_repeated(split) else [*dict.fromkeys(kept)]


def cleaned(texts: Any) -> list[str]:
    """Return all texts, each cleaned, of null none; ValueError unless they are a list of texts."""
    if texts is None:
        return []
    if not isinstance(texts, list):
        raise ValueError(f"captions are a list of texts, not {type(texts).__name__}")
    return [clean(text) for text in texts]


def keep_languages(rows: list[ManifestRow], languages: list[str]) -> None:
    """Remove captions of other languages; a row left without captions stays, as its frames and sound are there.

    Raises UserError if that leaves no caption at all.
    """
    known = {lang for row in rows for lang in row.caption_langs}
    if known and not known & set(languages):
        raise UserError(f"languages={','.join(languages)}: no caption is in them; there are {', '.join(sorted(known))}")
    for row in rows:
        kept = [i for i, lang in enumerate(row.caption_langs) if lang in languages]
        row.captions, row.caption_langs = ([texts[i] for i in kept] for texts in (row.captions, row.caption_langs))


def clean(text: Any) -> str:
    """Return the text without HTML entities and doubled white space; ValueError for what is no text."""
    if type(text) is not str:
        if not isinstance(text, str | int | float | None) or isinstance(text, bool):
            raise ValueError(f"a caption is a text, not {type(text).__name__}")
        text = "" if text is None else str(text)
    return " ".join(html.unescape(bounded(text)).split())


def bounded(text: str) -> str:
    """Return the text; ValueError if it is too long for a caption."""
    if len(text) > LONGEST:
        raise ValueError(f"a text of {len(text)} characters")
    return text


def missing(name: str, file: str) -> Skipped:
    """Return the Skipped of a sample whose file is not there."""
    return Skipped("missing", name, f"no file named {file}")


def reason(error: Exception) -> str:
    """Say what is wrong with a line, from the error that reading it raised."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    return str(error) if isinstance(error, ValueError) else f"not of the expected form: {error}"


def as_text(item: ManifestRow | Skipped) -> ManifestRow | Skipped:
    """Return the item; a row that holds half a character, such as a cut emoji, cannot be written and is malformed."""
    name, why = (item.where, item.why) if isinstance(item, Skipped) else (item.id, "malformed")
    try:
        if isinstance(item, ManifestRow):
            f"{name}{item.item}{item.media}{item.picture}{item.label}{item.lang}{''.join(item.labels)}{''.join(item.captions)}".encode()
        else:
            name.encode()
        return item
    except UnicodeEncodeError:
        where = name.encode("utf-8", "replace").decode()
        return Skipped(why, where, "its text or path is not valid Unicode")
