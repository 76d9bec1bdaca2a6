"""Define the manifest: one row is one sample to be. Annotations that cannot become rows are Skipped."""

import functools
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from clip4vla.io.walk import walk
from clip4vla.media.av_reader import SOUNDS, VIDEOS
from clip4vla.media.images import PICTURES


@dataclass(slots=True)
class ManifestRow:
    """Describe one sample to be.

    Paths are relative to the media root, start and end in seconds within `media` (None: its ends).
    Frames come from `picture` if there is one, else from `media`; sound comes from `media`.
    """

    id: str
    item: str  # the thing or video shown: stays in one split
    group: str  # what answers the same queries: stays in one split
    source: str
    split: str
    captions: list[str] = field(default_factory=list)
    caption_langs: list[str] = field(default_factory=list)
    picture: str | None = None
    media: str | None = None
    lang: str = "en"  # spoken in the sound
    audio_type: str = "both"  # vb, nb, both
    label: str | None = None
    labels: list[str] = field(default_factory=list)  # several classes at once, in place of label
    start: float | None = None
    end: float | None = None
    # where the bytes of `picture` and `media` lie that are no files: [TAR, offset, size] or [TABLE, row group, row, column]
    places: dict[str, list[Any]] = field(default_factory=dict)

    def archives(self) -> set[str]:
        """Return the tars and tables that its bytes lie in."""
        return {place[0] for place in self.places.values()}

    def block(self) -> str:
        """Return what is read from its beginning to get at this row alone: a row group of a table, else the row itself."""
        tables = [place for place in self.places.values() if isinstance(place[-1], str)]
        return f"{tables[0][0]}#{tables[0][1]}" if tables else self.id

    def as_json(self) -> dict[str, Any]:
        """Return the fields; labels and places only where there are some: other rows keep the bytes of earlier versions."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("labels", "places")}


@dataclass(slots=True)
class Skipped:
    """Say why an annotation cannot become a sample.

    malformed: a line that breaks its format (where = FILE:LINE); unusable: one that keeps it, and says too little or too
    much (the same); missing: there are no media (where = the row's id).
    """

    why: Literal["malformed", "unusable", "missing"]
    where: str
    reason: str


class MediaFolder:
    """Find media files below a root by the names that people's downloads give them. The root is walked once, when first asked."""

    def __init__(self, root: Path, cut: bool = False):
        """cut: files named after a whole video hold the annotated interval alone."""
        self.root, self.cut = root, cut

    @functools.cached_property
    def paths(self) -> list[str]:
        """List the videos and sounds."""
        return [path for path in self._files if os.path.splitext(path)[1].lower() in VIDEOS + SOUNDS]

    @functools.cached_property
    def by_stem(self) -> dict[str, str]:
        """Map names without suffix to the videos and sounds; of several the best by _rank, the same on any file system."""
        return _by_stem(self.paths)

    @functools.cached_property
    def _pictures(self) -> dict[str, str]:
        return _by_stem([path for path in self._files if os.path.splitext(path)[1].lower() in PICTURES])

    @functools.cached_property
    def _files(self) -> list[str]:
        return list(_walk(self.root))

    def find_picture(self, path: str) -> str | None:
        """Return the picture at a path below the root; else the one of that name, with whatever suffix and folder."""
        name = os.path.basename(path)
        stem, suffix = os.path.splitext(name)
        return on_disk(self.root, path) or self._pictures.get(composed(stem if suffix.lower() in PICTURES else name))

    def find_sound(self, path: str) -> str | None:
        """Return the sound or video at a path below the root; else the one of that name, with whatever suffix and folder."""
        name = os.path.basename(path)
        stem, suffix = os.path.splitext(name)
        return on_disk(self.root, path) or self.find(stem if suffix.lower() in VIDEOS + SOUNDS else name)

    def find(self, name: str) -> str | None:
        """Return the file of that name, with whatever suffix of a video or sound and in whatever folder."""
        return self.by_stem.get(composed(name))

    def find_clip(self, video: str, start: float, end: float) -> tuple[str, float | None, float | None] | None:
        """Return (path, start, end in the file) of an interval in seconds: of the whole video, or of a clip cut from it.

        Cut clips are known by their names: ID_START_END in seconds (plain, with decimals, or six digits) or in
        milliseconds, ID_START, and AudioSet's YID.
        """
        whole = [f"{s:g}" for s in (start, end)]
        digits = [f"{int(s):06d}" for s in (start, end)]
        decimals = [f"{s:.3f}" for s in (start, end)]
        thousandths = [f"{round(s * 1000)}" for s in (start, end)]
        names = ["_".join([video, *times]) for times in (whole, digits, decimals, thousandths)]
        names += [f"{video}_{time}" for time in (whole[0], digits[0], decimals[0], thousandths[0])]
        for name in [*names, *(f"Y{name}" for name in names), f"Y{video}"]:
            if path := self.find(name):
                return path, None, None
        path = self.find(video) or self.find(f"v_{video}")
        if not path or self.cut:
            return (path, None, None) if path else None
        return path, start, end


def _walk(root: Path) -> Iterator[str]:
    """Yield the paths of all files below root, relative to it; links to folders are followed, what is hidden is left out.

    A folder that several names lead to is walked once: two links to the one above them would never come to an end. One that
    cannot be read is named.
    """
    walked: set[tuple[int, int]] = set()
    for folder, folders, files in walk(root, follow_links=True, on_error=_name_unreadable):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in walked:
            folders.clear()
            continue
        walked.add((here.st_dev, here.st_ino))
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in files)


def _name_unreadable(error: OSError) -> None:
    print(f"left out, cannot be read: {error.filename} ({error.strerror})", file=sys.stderr)


def _by_stem(paths: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for path in paths:
        stem = composed(os.path.splitext(os.path.basename(path))[0])
        if _rank(path) < _rank(named.setdefault(stem, path)):
            named[stem] = path
    return named


def _rank(path: str) -> tuple[int, str]:
    """Return the sort key of a path: videos before sounds, since they hold both; then by name."""
    return (VIDEOS + SOUNDS + PICTURES).index(os.path.splitext(path)[1].lower()), path


def inside(path: str) -> str:
    """Return the path, if it stays inside the media root; raises ValueError otherwise."""
    if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
        raise ValueError(f"{path}: leaves the media root")
    return path


def composed(name: str) -> str:
    """Return the name with its accents composed: a table and a disk may have é as one character or as two."""
    return unicodedata.normalize("NFC", name)


def on_disk(root: Path, path: str) -> str | None:
    """Return the path of a file below root, composed or not as the disk has each part of it; None if it is not there."""
    if (root / path).is_file():
        return path
    here = ""
    for part in path.split("/"):
        forms = [os.path.join(here, form) for form in (part, composed(part), unicodedata.normalize("NFD", part))]
        here = next((form for form in forms if (root / form).exists()), "")
        if not here:
            return None
    return here if (root / here).is_file() else None


def slug(text: str) -> str:
    """Return the text as a name fit for a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "data"
