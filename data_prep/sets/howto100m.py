"""HowTo100M: clips of ten seconds and five words from lines of narration."""

import hashlib
import math
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from clip4vla.errors import UserError
from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import AmbiguousError, Located, ManifestRow, MediaFolder, Skipped
from data_prep.sets.json_stream import stream_json

MIN_SECONDS, MIN_WORDS = 10, 5  # of a clip of HowTo100M


def howto100m(folder: Path, media: MediaFolder, clips_per_video: int = 0) -> RowsOrSkipped:
    """Narrated videos: clips of >= 10 s and >= 5 words, merged from neighbouring lines of the narration.

    clips_per_video > 0: at most that number of clips a video, spread evenly. Split: val if sha256(id) mod 1000 is 0, else train.
    HowTo100M_v1.csv says which videos are wanted; the narration of others is passed over. See _narrations for its forms.
    """
    (table,) = annotation_io.require_files(folder, "HowTo100M_v1.csv")
    videos: dict[str, tuple[str, Located, str]] = {}
    for where, line in annotation_io.read_csv(table, "video_id", "category_1"):
        if isinstance(line, ValueError):
            yield Skipped("malformed", where, str(line))
            continue
        video = line["video_id"]
        try:
            place = media.find_video(video)
        except AmbiguousError as error:
            yield Skipped("unusable", where, str(error))
            continue
        if not video or video in videos:
            yield Skipped("malformed", where, f"duplicate of {videos[video][0]}" if video else "no video_id")
        elif place:
            videos[video] = where, place, sys.intern(line["category_1"])
        else:
            yield annotation_io.missing(video, video)
    narrated: set[str] = set()
    source = _narration_file(folder, table.parent)
    for where, video, talk in _narrations(source, videos):
        if video in narrated:
            yield Skipped("malformed", where, f"duplicate of {where}")
        elif video in videos:
            narrated.add(video)
            yield from _narrated(where, video, talk, *videos.pop(video)[1:], clips_per_video)
    yield from (Skipped("unusable", where, f"no lines in {source.name}") for where, _, _ in videos.values())


def _narration_file(place: Path, folder: Path) -> Path:
    """Return the JSON file of all narrations, or the folder of one ID.csv a video; UserError for none, or for several files.

    Known are caption.json (without stop words), raw_caption.json, and sentencified_htm_1200k.json and the like (Han et al.
    2022, whole sentences).
    """
    if place.suffix == ".json":
        return place
    names = ("caption.json", "raw_caption*.json", "sentencified_htm_*.json")
    files = [path for name in names for path in sorted(folder.glob(name))]
    if len(files) > 1:
        raise UserError(f"annotations={place}: several narrations; name one, as annotations={files[0]}")
    tables = [path for path in (folder / "howto100m_captions", folder) if any(_tables(path))]
    if not files and not tables:
        raise UserError(
            f"annotations={place}: none of {', '.join(names)}, ID.csv there; the config's header says which go where"
        )
    return (files or tables)[0]


def _tables(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.csv") if path.name != "HowTo100M_v1.csv")


def _narrations(source: Path, wanted: Container[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (FILE: ID, ID, {"start": [..], "end": [..], "text": [..]}) of the JSON file, or of the folder's tables.

    The JSON takes 9 GB, so it is streamed; a table is start, end, text, and a malformed line of it makes its video malformed.
    """
    if source.is_file():
        yield from ((f"{source.name}: {video}", video, talk) for video, talk in stream_json(source))
        return
    for path in sorted(_tables(source)):
        if path.stem in wanted:
            lines = [line for _, line in annotation_io.read_csv(path, "start", "end", "text")]
            broken = next((line for line in lines if isinstance(line, ValueError)), None)
            columns = {
                name: [line[name] for line in lines if isinstance(line, dict)] for name in ("start", "end", "text")
            }
            yield path.name, path.stem, broken or columns


def _narrated(where: str, video: str, talk: Any, place: Located, category: str, count: int) -> RowsOrSkipped:
    """The clips of one video; talk = {"start": [..], "end": [..], "text": [..]} in seconds."""
    try:
        if isinstance(talk, ValueError):
            raise talk
        lines = list(zip(talk["start"], talk["end"], talk["text"], strict=True))
        timed = [(float(s), float(e), annotation_io.clean(text)) for s, e, text in lines if None not in (s, e)]
        good = sorted(line for line in timed if 0 <= line[0] <= line[1] < math.inf)
        clips = list(enumerate(merge([line for line in good if line[2]])))
    except annotation_io.MISTAKES as error:
        yield Skipped("malformed", where, f"not start, end and text of equal length: {annotation_io.reason(error)}")
        return
    if len(good) < len(lines):
        yield Skipped("malformed", where, f"{len(lines) - len(good)} of {len(lines)} lines end before they start")
    if not clips:
        yield Skipped("unusable", where, f"less than {MIN_SECONDS} s or {MIN_WORDS} words in all")
    if 0 < count < len(clips):
        clips = [clips[(2 * i + 1) * len(clips) // (2 * count)] for i in range(count)]  # middles of equal parts
    split = "train" if int(hashlib.sha256(video.encode()).hexdigest(), 16) % 1000 else "val"
    for number, (start, end, text) in clips:
        more: dict[str, Any] = {"audio_type": "vb", "label": category or None}
        name = f"{video}_{number}"
        row = ManifestRow(name, video, name, "howto100m", split, [text], ["en"], **more)
        yield annotation_io.located(row, place._replace(start=start, end=end))


def merge(lines: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Neighbouring (start, end, text) joined until a clip has >= 10 s and >= 5 words.

    A last remainder that is too short is joined to the clip before it, or dropped if there is none. ValueError if the
    text of a clip grows too long for a caption.
    """
    clips: list[list[tuple[float, float, str]]] = []
    rest: list[tuple[float, float, str]] = []
    first, last, words = 0.0, 0.0, 0
    for start, end, text in lines:
        if not rest:
            first, last, words = start, end, 0
        last, words = max(last, end), words + len(text.split())  # lines overlap on YouTube: the last need not end last
        rest.append((start, end, text))
        if last - first >= MIN_SECONDS and words >= MIN_WORDS:
            clips.append(rest)
            rest = []
    if clips:
        clips[-1] += rest
    texts = [annotation_io.bounded(" ".join(text for _, _, text in clip)) for clip in clips]
    return [(clip[0][0], max(end for _, end, _ in clip), text) for clip, text in zip(clips, texts, strict=True)]
