"""Find and read annotation files, and turn their lines into manifest rows, or Skipped with a reason."""

import csv
import html
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from clip4vla.config_io import NOT_UTF8, parse_json, repeated
from clip4vla.data.sample_metadata import CAPTIONS, LONGEST
from clip4vla.errors import UserError, one_line
from data_prep.manifest import ManifestRow, MediaFolder, Skipped

BLOCK, PAIR = 1 << 20, 1 << 26  # characters: of a large JSON file read at once; of a key with its value
QUOTED = 20  # characters of what is no JSON that a message repeats
UNDECODED = re.compile("[\0\udc80-\udcff]").search
MARK = re.compile(r"\s*([{}:,])\s*").match
NAN_IS_NULL: dict[str, Any] = {"parse_constant": lambda _: None}
MISTAKES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    OSError,
)  # of a line: a name too long for the disk
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
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            if text := line.removeprefix("\ufeff").strip():
                yield f"{path.name}:{number}", ValueError(NOT_UTF8) if not_utf8(text) else text


def not_utf8(text: str) -> bool:
    """Tell whether the bytes of a text that was decoded with surrogateescape were something else; UTF-16 has zeros."""
    return bool(UNDECODED(text))


def read_csv(
    path: Path, *columns: str, header: bool = True, separator: str = ",", cells_span_lines: bool = False
) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """Yield (FILE:LINE, cells by column, "" where there is none; or why the line is malformed).

    Each line stands for itself, so that a quote that is not closed takes no other line with it, unless cells_span_lines.
    Raises UserError if the header lacks one of the columns or names one twice.
    """
    lines = _joined_lines(read_lines(path)) if cells_span_lines else read_lines(path)
    names = _header(path, columns, next(lines, ("", ""))[1], separator) if header else list(columns)
    for where, line in lines:
        try:
            cells = _cells(line, separator)
            if len(cells) > len(names):
                raise ValueError("more cells than the header has columns")
        except ValueError as error:
            yield where, error
            continue
        if any(cells):
            yield where, dict(itertools.zip_longest(names, cells, fillvalue=""))


def _joined_lines(lines: Iterable[tuple[str, str | ValueError]]) -> Iterator[tuple[str, str | ValueError]]:
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


def _header(path: Path, columns: tuple[str, ...], line: str | ValueError, separator: str) -> list[str]:
    try:
        names = _cells(line, separator)
    except ValueError as error:
        raise UserError(f"{path}: the first line is malformed: {error}") from None
    if missing := set(columns) - set(names):
        raise UserError(f"{path}: the first line names no column {' and '.join(sorted(missing))}")
    if twice := repeated(names):
        raise UserError(f"{path}: the first line names column {twice} twice; rename or remove one")
    return names


def _cells(line: str | ValueError, separator: str) -> list[str]:
    """Split one line of a table; ValueError if it is malformed."""
    if isinstance(line, ValueError):
        raise line
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"not a line of a table ({error}): write a quote inside a cell twice, and a cell in one line"
        ) from None


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


def stream_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON object that is too large for memory."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _pairs(file)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, 300)
        what = NOT_UTF8 if not_utf8(what) else what
        raise UserError(f"{path}: not valid JSON, perhaps cut short: {what}; get it again") from None


def _pairs(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of an open file.

    ValueError for what is no JSON, or for a pair of more than PAIR characters.
    """
    decode, text, at, awaited = json.JSONDecoder(**NAN_IS_NULL).raw_decode, "", 0, "{"
    while True:
        try:
            mark, begin = _mark(text, at)
            if (awaited, mark) == (",", "}") or (awaited == "{" and "".join(text.split()) == "{}"):
                return
            if mark != awaited:
                raise ValueError(text[at : at + QUOTED])
            key, end = decode(text, begin)
            value, end = decode(text, _mark(text, end)[1])
            if not isinstance(key, str):
                raise ValueError(text[begin : begin + QUOTED])
            _mark(text, end)  # after a number that is cut another digit may follow
        except ValueError:
            more = file.read(max(BLOCK, len(text) - at)) if len(text) - at < PAIR else ""
            if not more:
                raise
            text, at = text[at:] + more, 0
            continue
        awaited, at = ",", end
        yield key, value


def _mark(text: str, at: int) -> tuple[str, int]:
    """Return the brace, colon or comma at `at`, and where the next word begins."""
    if not (match := MARK(text, at)):
        raise ValueError(text[at : at + QUOTED])
    return match[1], match.end()


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
    Skipped as missing.
    """
    held: dict[tuple[str, str], tuple[str, ManifestRow]] = {}
    for where, split, line in lines:
        try:
            if isinstance(line, ValueError):
                raise line
            row = parse(split, line)
        except MISTAKES as error:
            yield Skipped("malformed", where, reason(error))
            continue
        if row is None:
            continue
        first, kept = held.setdefault((row.split, row.id), (where, row))
        if kept is not row and join:
            for text, lang in zip(row.captions, row.caption_langs, strict=True):
                if text not in kept.captions:  # of CAPTIONS at most, so that all lines take linear time
                    kept.captions.append(text)
                    kept.caption_langs.append(lang)
        elif kept is not row:
            yield Skipped("malformed", where, f"duplicate of {first}")
        if len(kept.captions) > CAPTIONS:
            yield Skipped("unusable", where, f"more than {CAPTIONS} captions of one clip")
            del kept.captions[CAPTIONS:], kept.caption_langs[CAPTIONS:]
    yield from (row if row.media or row.picture else missing(row.id, row.item) for _, row in held.values())


def whole_row(
    source: str, split: str, name: str, path: str | None, texts: Any, group: str = "", **more: Any
) -> ManifestRow:
    """Return the row of a whole file, in English."""
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    kept = captions(texts)
    return ManifestRow(name, name, group or name, source, split, kept, ["en"] * len(kept), media=path, **more)


def clip_row(
    media: MediaFolder, source: str, split: str, video: str, start: float, end: float, texts: Any, **more: Any
) -> ManifestRow:
    """Return the row of an interval in seconds of a video, or of the file that was cut from it, in English."""
    check_span(start, end)
    if not video:
        raise ValueError("no id")
    name, kept = f"{video}_{start:.10g}_{end:.10g}", captions(texts)
    path, first, last = media.find_clip(video, start, end) or (None, start, end)
    more |= {"media": path, "start": first, "end": last}
    return ManifestRow(name, video, name, source, split, kept, ["en"] * len(kept), **more)


def check_span(start: float | None, end: float | None) -> None:
    """Raises ValueError unless start and end, in seconds (None: the file's own), span some time."""
    if not 0 <= (start or 0) < (math.inf if end is None else end) or end == math.inf:
        raise ValueError(f"start {start} and end {end} do not span any time")


def span_suffix(start: float | None, end: float | None) -> str:
    """Return what tells an interval in seconds from others of its file, in an id; "" for the whole file."""
    return "" if start is end is None else f"@{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"


def captions(texts: Any) -> list[str]:
    """Return the cleaned texts, without empty and repeated ones."""
    return list(dict.fromkeys(filter(None, cleaned(texts))))


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
    if not isinstance(text, str | int | float | None) or isinstance(text, bool):
        raise ValueError(f"a caption is a text, not {type(text).__name__}")
    return " ".join(html.unescape(bounded("" if text is None else str(text))).split())


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
    words: list[str | None] = [item.id if isinstance(item, ManifestRow) else item.where]
    if isinstance(item, ManifestRow):
        words += [item.item, item.media, item.picture, item.label, item.lang, *item.labels, *item.captions]
    try:
        "".join(filter(None, words)).encode()
        return item
    except UnicodeEncodeError:
        where = str(words[0]).encode("utf-8", "replace").decode()
        why = "malformed" if isinstance(item, ManifestRow) else item.why
        return Skipped(why, where, "its text or path is not valid Unicode")
