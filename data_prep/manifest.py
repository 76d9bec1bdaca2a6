"""Define the manifest: one row is one sample to be. Annotations that cannot become rows are Skipped."""

import functools
import os
import re
import sys
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clip4vla.errors import UserError
from clip4vla.io.walk import walk
from clip4vla.media.source import PICTURES, SOUNDS, VIDEOS, stem_of, suffix_of
from data_prep.media_names import LISTED, Form, ReadName, holds_sound_alone, plain_id, read_listed, read_name

OWN_NAME = ReadName("")
NO_PLACES: dict[str, list[Any]] = {}  # one for millions of rows, whose media are files
KINDS = {suffix: number for number, suffix in enumerate(VIDEOS + SOUNDS + PICTURES)}


@dataclass(slots=True)
class ManifestRow:
    """Describe one sample to be.

    Paths are relative to the media root, start and end in seconds within `media` (None: its ends).
    Frames come from `picture` if there is one, a still or a video, else from `media`; sound comes from `media`.
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
    picture_start: float | None = None  # s within a video that is `picture`; None: start
    # where the bytes of `picture` and `media` lie that are no files: [TAR, offset, size] or [TABLE, row group, row, column]
    places: Mapping[str, list[Any]] = field(default_factory=lambda: NO_PLACES)

    def archives(self) -> set[str]:
        """Return the tars and tables that its bytes lie in."""
        return {place[0] for place in self.places.values()}

    def block(self) -> str:
        """Return what is read from its beginning to get at this row alone: a row group of a table, else the row itself."""
        tables = [place for place in self.places.values() if isinstance(place[-1], str)]
        return f"{tables[0][0]}#{tables[0][1]}" if tables else self.id

    def as_json(self) -> dict[str, Any]:
        """Return the fields; labels, picture_start and places only where there are some.

        So other rows keep the bytes of earlier versions, whose shards need not be made again.
        """
        values = {name: getattr(self, name) for name in NAMES}  # dataclasses.asdict copies lists: slow for millions
        if not self.labels:
            del values["labels"]
        if self.picture_start is None:
            del values["picture_start"]
        if not self.places:
            del values["places"]
        return values


NAMES = tuple(item.name for item in fields(ManifestRow))


@dataclass(slots=True)
class Skipped:
    """Say why an annotation cannot become a sample.

    malformed: a line that breaks its format (where = FILE:LINE); unusable: one that keeps it, and says too little or too
    much (the same); missing: there are no media (where = the row's id).
    """

    why: Literal["malformed", "unusable", "missing"]
    where: str
    reason: str


class Located(NamedTuple):
    """Say where a clip's media are: paths relative to the media root, seconds within them (None: their ends).

    picture: a video that has the frames, where `media` is a file of sound; the clip begins at picture_start (None: at start).
    """

    media: str
    start: float | None = None
    end: float | None = None
    picture: str | None = None
    picture_start: float | None = None


class AmbiguousError(ValueError):
    """Reports that a clip may be in either of two files."""


class Candidate(NamedTuple):
    """A file that may be a clip's, in the order of preference."""

    is_unmerged: bool
    form: Form
    kind: int  # number of its suffix among all
    path: str
    is_sure: bool


class MediaFolder:
    """Find media files below a root by the names that people's downloads give them. The root is walked once, when first asked."""

    def __init__(self, root: Path, cut: bool = False):
        """cut: files named after a whole video hold the annotated interval alone."""
        self.root, self.cut = root, cut

    @functools.cached_property
    def paths(self) -> list[str]:
        """Paths of all videos and sounds, relative to the root."""
        return self._files[0]

    @functools.cached_property
    def _files(self) -> tuple[list[str], list[str]]:
        """Paths of all videos and sounds, and of all pictures."""
        files: tuple[list[str], list[str]] = [], []
        for path in _walk(self.root):
            if (suffix := suffix_of(path)) in KINDS:
                files[suffix in PICTURES].append(path)
        return files

    def describe(self, taken: Container[str] = ()) -> str:
        """Say how many files there are, and name one: of those that are not taken, if there are any."""
        if not self.paths:
            return "no video and no sound there"
        example = next((path for path in self.paths if path not in taken), self.paths[0])
        return f"{len(self.paths)} media files there, for example {example}"

    def find(self, name: str) -> Located | None:
        """Return the file of that name, with whatever suffix of a video or sound and in whatever folder.

        Where there are a video and a sound of it, the frames are the video's and the sound is the sound's. Raises
        AmbiguousError for two of a kind.
        """
        return self._best([(path, Form.OWN_NAME, OWN_NAME) for path in self._called(name)], None, None)

    def find_sound(self, path: str) -> Located | None:
        """Return the sound or video at a path below the root; else the one of that name, as `find` does."""
        there = on_disk(self.root, path)
        return Located(there) if there else self.find(_without(path, VIDEOS + SOUNDS))

    def find_picture(self, path: str) -> str | None:
        """Return the picture at a path below the root; else the one of that name, with whatever suffix and folder.

        Raises AmbiguousError for two of that name.
        """
        if there := on_disk(self.root, path):
            return there
        named = _several(self._pictures.get(_key(_without(path, PICTURES)), ()))
        place = self._best([(path, Form.OWN_NAME, OWN_NAME) for path in named], None, None)
        return place.media if place else None

    def find_video(self, video: str) -> Located | None:
        """Return the whole video with that id, by any of the names in media_names.py; as `find` otherwise."""
        named = self._named(video)
        return self._best(
            [(path, name.form, name) for path, name in named if not name.start and name.form >= Form.WHOLE], None, None
        )

    def find_any(self, video: str) -> Located | None:
        """Return the file of a video or of a clip of it, of whatever interval, all of it; as `find` otherwise."""
        named = self._named(video)
        return self._best([(path, Form.START if name.start else name.form, name) for path, name in named], None, None)

    def find_clip(
        self, video: str, start: float, end: float, own_name: str = "", by_start: bool = True
    ) -> Located | None:
        """Return where an interval in seconds is: in the whole video, or in a clip cut from it; as `find` otherwise.

        own_name: what a file of this clip alone may be called instead; by_start: whether ID_3 may begin at 3 s.
        """
        path = self.by_video.get(video)
        if isinstance(path, str) and not own_name:  # what most of millions of files are called needs no second reading
            stem = stem_of(path)
            if stem in (video, f"Y{video}"):
                return self._place(path, Form.WHOLE if stem == video else Form.YID, start, end)
        named = [
            (path, form, name)
            for path, name in self._named(video)
            if (form := name.form_for(start, end)) is not None and (by_start or name.number is None)
        ]
        if own_name:
            own = (path for path in self._called(own_name) if path not in self.listed)
            named += [(path, Form.OWN_NAME, OWN_NAME) for path in own]
        return self._best(named, start, end)

    def numbers(self, video: str) -> set[int]:
        """Return the numbers N of files that are named VIDEO_N."""
        return {name.number for _, name in self._named(video) if name.number is not None}

    @functools.cached_property
    def by_stem(self) -> dict[str, str | list[str]]:
        """Paths by their names without suffix; a list where there are several."""
        index: dict[str, str | list[str]] = {}
        for path in self._some_paths():
            _add(index, _key(stem_of(path)), path)
        return index

    @functools.cached_property
    def _pictures(self) -> dict[str, str | list[str]]:
        """Paths of pictures, as by_stem."""
        index: dict[str, str | list[str]] = {}
        for path in self._files[1]:
            _add(index, _key(stem_of(path)), path)
        return index

    @functools.cached_property
    def by_video(self) -> dict[str, str | list[str]]:
        """Paths by the ids of the videos that they may be of."""
        index: dict[str, str | list[str]] = {}
        listed = self.listed
        for path in self._some_paths():
            if (video := plain_id(_key(stem_of(path)))) and path not in listed:
                _add(index, sys.intern(video), path)  # 0.6 of the time that reading all names takes
                continue
            for name in self._read(path):
                _add(index, sys.intern(name.video), path)
        return index

    @functools.cached_property
    def listed(self) -> dict[str, ReadName]:
        """What stands beside files that are named by a number."""
        numbered = (path for path in self.paths if LISTED.fullmatch(stem_of(path)))
        read = ((path, read_listed(self.root / path)) for path in numbered)
        return {path: name for path, name in read if name}

    def _some_paths(self) -> list[str]:
        if not self.paths:
            raise UserError(
                f"media_root={self.root}: no video and no sound there; the config's header says where the media come from"
            )
        return self.paths

    def _read(self, path: str) -> list[ReadName]:
        return [self.listed[path]] if path in self.listed else read_name(_key(stem_of(path)))

    def _named(self, video: str) -> list[tuple[str, ReadName]]:
        """Return the files that may be of a video, as their names say."""
        video = composed(video)
        paths = _several(self.by_video.get(video, ()))
        return [(path, name) for path in paths for name in self._read(path) if name.video == video]

    def _called(self, name: str) -> Sequence[str]:
        """Return the files of that name."""
        return _several(self.by_stem.get(_key(name), ()))

    def _best(self, named: list[tuple[str, Form, ReadName]], start: float | None, end: float | None) -> Located | None:
        """Join the best video and the best sound for an interval."""
        if not named:
            return None
        if len(named) == 1 and named[0][2].is_sure:
            return self._place(named[0][0], named[0][1], start, end)
        candidates = [
            Candidate(name.is_unmerged, form, KINDS[suffix_of(path)], path, name.is_sure) for path, form, name in named
        ]
        sounds = [one for one in candidates if holds_sound(one.path)]
        videos = [one for one in candidates if one not in sounds]
        sound, video = self._only(sounds, start, end), self._only(videos, start, end)
        if not sound or not video:
            return sound or video
        picture_start = None if video.start == sound.start else video.start or 0.0
        return sound._replace(picture=video.media, picture_start=picture_start)

    def _place(self, path: str, form: Form, start: float | None, end: float | None) -> Located:
        """Return the interval (s) within a file, or all of it if it was cut."""
        return Located(path) if self.cut or form < Form.WHOLE else Located(path, start, end)

    def _only(self, candidates: list[Candidate], start: float | None, end: float | None) -> Located | None:
        """Return the best of the candidates; AmbiguousError if another one may be it as well."""
        if not candidates:
            return None
        best = min(candidates)
        equal = [one for one in candidates if one[:2] == best[:2] and one != best]
        other = next((one for one in equal if not self._is_copy(one.path, best.path)), None)
        if other or not best.is_sure:
            others = f" or {other.path}" if other else ""
            raise AmbiguousError(f"it may be {best.path}{others}, and that may be another clip: rename or remove one")
        return self._place(best.path, best.form, start, end)

    def _is_copy(self, path: str, of: str) -> bool:
        """Tell whether files have one name: with different suffixes, or as large as each other."""
        stems, kinds = zip(*(os.path.splitext(os.path.basename(one)) for one in (path, of)), strict=True)
        if stems[0] != stems[1] or kinds[0] != kinds[1]:
            return stems[0] == stems[1]
        return os.path.getsize(self.root / path) == os.path.getsize(self.root / of)


def holds_sound(path: str) -> bool:
    """Tell by its name whether a file holds sound alone."""
    return suffix_of(path) in SOUNDS or holds_sound_alone(stem_of(path))


def _add(index: dict[str, str | list[str]], key: str, path: str) -> None:
    """Add a path; one of its key alone stands for itself, since millions of lists would take much memory."""
    held = index.setdefault(key, path)
    if held is not path:
        index[key] = [*_several(held), path]


def _several(paths: str | Sequence[str]) -> Sequence[str]:
    return (paths,) if isinstance(paths, str) else paths


def _without(path: str, suffixes: tuple[str, ...]) -> str:
    """Return the name of a file, without its suffix if that is one of these."""
    return stem_of(path) if suffix_of(path) in suffixes else os.path.basename(path)


def _key(name: str) -> str:
    """Return the name as it is compared: Clotho has three that begin with a space, which few tables and disks keep."""
    return composed(name).strip()


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
        below = os.path.relpath(folder, root)
        yield from files if below == "." else (f"{below}/{name}" for name in files)


def _name_unreadable(error: OSError) -> None:
    print(f"left out, cannot be read: {error.filename} ({error.strerror})", file=sys.stderr)


def inside(path: str) -> str:
    """Return the path, if it stays inside the media root; raises ValueError otherwise."""
    if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
        raise ValueError(f"{path}: leaves the media root")
    return path


def composed(name: str) -> str:
    """Return the name with its accents composed: a table and a disk may have é as one character or as two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def on_disk(root: Path, path: str) -> str | None:
    """Return the path of a file below root as the disk has each part of it; None if it is not there.

    Parts may be composed or not, and begin with a space, which tables lose.
    """
    if (root / path).is_file():
        return path
    here = ""
    for part in path.split("/"):
        spelt = [part, composed(part), unicodedata.normalize("NFD", part)]
        forms = [os.path.join(here, form) for form in (*spelt, *(f" {form}" for form in spelt))]
        here = next((form for form in forms if (root / form).exists()), "")
        if not here:
            return None
    return here if (root / here).is_file() else None


def slug(text: str) -> str:
    """Return the text as a name fit for a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "data"
