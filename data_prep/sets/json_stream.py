"""Read JSON objects that are too large for memory, key by key."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from clip4vla.config_io import NOT_UTF8
from clip4vla.errors import UserError, one_line
from data_prep.annotation_io import NAN_IS_NULL, not_utf8

BLOCK, PAIR = 1 << 20, 1 << 26  # characters: of the file read at once; of a key with its value
QUOTED = 20  # characters of what is no JSON that a message repeats
MARK = re.compile(r"\s*([{}:,])\s*").match


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
