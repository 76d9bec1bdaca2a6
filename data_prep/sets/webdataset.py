"""Read tars of media with texts beside them, as video2dataset, img2dataset and LAION write them, by the places of members.

A tar's headers are read once, from one to the next; media stay where they are, and shard.py reads each from its place.
Shards have the bytes that `folder` would make of the tars, each unpacked into a folder of its own name.
"""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from clip4vla.config import DataConfig
from clip4vla.errors import UserError, one_line
from clip4vla.io.walk import is_hidden
from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import ManifestRow, Skipped, inside
from data_prep.packed import fields
from data_prep.packed.listing import list_archives, open_archive

TEXTS = ("txt", "json", "cls")
LONGEST_TEXT = 1 << 24  # bytes of such a member
READERS = 8  # tars at a URL whose headers are read at once, since each header is a request
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass
class _Tar:
    """Holds what the headers of a tar say."""

    name: str
    samples: dict[str, "_Sample"] = field(default_factory=dict)  # by key
    skipped: list[Skipped] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # suffixes of members that are not read


@dataclass
class _Sample:
    """Holds the members of one key."""

    media: fields.Media = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)  # by what follows the key


def webdataset(cfg: DataConfig) -> RowsOrSkipped:
    """KEY.mp4, KEY.flac, KEY.jpg, .. with KEY.txt, KEY.json and KEY.cls beside; KEY ends before the first dot of a name."""
    base, names, compressed = list_archives("webdataset", cfg.media_root)
    skipped: list[Skipped] = []
    if compressed:
        counted = (
            f"{len(compressed)} compressed tars are not read, the first: {compressed[0]}: unpack them to plain ones"
        )
        skipped.append(Skipped("unusable", base, counted))

    def lines() -> Iterator[Line]:
        others: Counter[str] = Counter()
        with ThreadPoolExecutor(READERS if "://" in base else 1) as pool:
            for tar in pool.map(lambda name: _read(base, name), names):
                skipped.extend(tar.skipped)
                others += tar.others
                yield from _lines(cfg, tar, skipped)
        if others:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
            skipped.append(Skipped("unusable", base, f"members that are not read: {counts[:300]}"))

    yield from annotation_io.rows(lines(), lambda archive, line: _row(cfg, archive, *line))
    yield from skipped


def _lines(cfg: DataConfig, tar: _Tar, skipped: list[Skipped]) -> Iterator[Line]:
    """Yield a line for each clip of each sample; what has no media goes to `skipped`."""
    for key, sample in tar.samples.items():
        where = f"{tar.name}/{key}"
        try:
            tree = annotation_io.parse_foreign(sample.texts["json"]) if "json" in sample.texts else {}
            if not isinstance(tree, dict):
                raise ValueError("its .json is no JSON object")
            if not sample.media:
                why = tree.get("error_message") or tree.get("status") or "texts alone"
                skipped.append(Skipped("missing", where, f"no media beside it: {' '.join(str(why).split())[:150]}"))
                continue
            for span in fields.spans(tree, posixpath.basename(key), cfg.clips_already_cut):
                yield where, tar.name, (sample, tree, span)
        except annotation_io.MISTAKES as error:
            yield where, tar.name, ValueError(annotation_io.reason(error))


def _row(
    cfg: DataConfig, archive: str, sample: _Sample, tree: dict[str, Any], span: tuple[float | None, float | None]
) -> ManifestRow:
    texts = {name: data.decode() for name, data in sample.texts.items() if name != "json"}
    named = tree | ({"txt": texts["txt"]} if "txt" in texts else {})
    captions = named["txt"] if "txt" in named and not cfg.captions_from else fields.captions(named, cfg.captions_from)
    label = fields.lookup(tree, cfg.label_from) if cfg.label_from else texts.get("cls", tree.get(fields.LABEL))
    return fields.row(cfg, archive, sample.media, captions if isinstance(captions, list) else [captions], label, span)


def _read(base: str, name: str) -> _Tar:
    """Read the headers and texts of a tar; damage ends it, is listed, and leaves what came before."""
    tar = _Tar(name)
    try:
        with open_archive(base, name) as file:
            for member in _members(file):
                _add(tar, file, member)
    except UserError:
        raise
    except FileNotFoundError:
        tar.skipped.append(Skipped("missing", name, "no such tar"))
    except OSError as error:
        tar.skipped.append(Skipped("malformed", name, f"cannot be read: {error.strerror or one_line(error)}"))
    except DAMAGE as error:
        tar.skipped.append(Skipped("malformed", name, f"damaged after {len(tar.samples)} samples: {one_line(error)}"))
    return tar


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, as tarfile parses their headers; one of DAMAGE where it breaks off or is no tar."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    tar, at = tarfile.TarFile(fileobj=file), 0
    while True:
        file.seek(at)
        if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
            return
        file.seek(at)
        member = tar.tarinfo.fromtarfile(tar)
        if tar.offset <= at:
            raise ValueError("a member of negative size")
        if member.isreg() and member.offset_data + member.size > end:
            raise ValueError(f"{member.name} is cut off")
        at = tar.offset
        yield member


def _add(tar: _Tar, file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Add a member to its sample, or say why it is none."""
    path = posixpath.normpath(member.name)
    folder, name = posixpath.split(path)
    key, _, rest = name.lower().partition(".")
    suffix = posixpath.splitext(name)[1].lower()
    if member.isdir() or any(is_hidden(part) for part in path.split("/") if part != ".."):
        return
    if suffix not in fields.KINDS and rest not in TEXTS:
        tar.others[f".{rest[:20]}"] += 1
        return
    try:
        inside(path)
        if not member.isreg() or member.issparse():
            raise ValueError("a link, a device or a sparse file")
        sample = tar.samples.setdefault(posixpath.join(folder, name[: len(key)]), _Sample())
        place = posixpath.join(tar.name, path)
        if place in sample.media or rest in sample.texts:
            raise ValueError("two members of one name")
        if rest in TEXTS:
            sample.texts[rest] = _text(file, member)
        else:
            sample.media[place] = [tar.name, member.offset_data, member.size]
    except ValueError as error:
        tar.skipped.append(Skipped("malformed", f"{tar.name}/{member.name}", one_line(error)))


def _text(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > LONGEST_TEXT:
        raise ValueError(f"a text of {member.size} bytes")
    file.seek(member.offset_data)
    return file.read(member.size)
