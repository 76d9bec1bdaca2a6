"""Check a sample's metadata: its json as shards.py describes it, and whether its pictures agree with it; choose a caption."""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from clip4vla.media.images import jpeg_size
from clip4vla.media.random_integers import integers

TYPES = {"vb": 0, "nb": 1, "both": 2}
CAPTIONS = 1000  # of a clip
LONGEST = 100_000  # characters of a caption, of which CLIP reads 77 tokens
COUNTS = {"frames": "n_frames", "fbank": "n_segments"}  # in a clip's json, of the tiles in its strip
SURROGATE = re.compile(rb"\\u[dD]")
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "item", "group", "source", "split", "lang", "audio_type"), (str,)),
    **dict.fromkeys(("captions", "caption_langs"), (list,)),
    **dict.fromkeys(("start", "end"), (int, float, type(None))),
    **dict.fromkeys(("n_frames", "n_segments", "n_rows"), (int,)),
    **dict.fromkeys(("has_audio", "has_frames"), (bool,)),
    "label": (str, type(None)),
    "duration": (int, float),
    "media": (dict,),
}


def parse(data: bytes) -> dict[str, Any]:
    """Parse a sample's json; raises ValueError with the reason if it is not of the form that it should have."""
    try:
        clip = json.loads(data.decode())
        if SURROGATE.search(data):
            json.dumps(clip, ensure_ascii=False).encode()  # half a pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json is not JSON: {error}") from None
    validate(clip)
    return clip


def validate(clip: Any) -> None:
    """Raise ValueError with the reason for what is no sample's json."""
    if reason := _fields(clip) or _values(clip):
        raise ValueError(reason)


def labels_of(clip: dict[str, Any]) -> list[str]:
    """List the classes that a clip's json names: its `labels`, or its one `label`.

    Shards of AudioSet by earlier versions have no `labels`, but several in `label`, joined by ;.
    """
    return clip.get("labels") or [label for label in (clip.get("label") or "").split(";") if label]


def _fields(clip: Any) -> str:
    if not isinstance(clip, dict) or set(FIELDS) - set(clip):
        lacks = sorted(set(FIELDS) - set(clip)) if isinstance(clip, dict) else "every field"
        return f"json lacks {lacks}"
    for name, kinds in FIELDS.items():
        if type(clip[name]) not in kinds:
            return f"json: {name} is {clip[name]!r:.60}"
    return ""


def _values(clip: dict[str, Any]) -> str:
    texts = [*clip["captions"], *clip["caption_langs"]]
    if not set(map(type, texts)) <= {str} or len(texts) != 2 * len(clip["captions"]):
        return "json: captions and caption_langs are not two equally long lists of text"
    if len(clip["captions"]) > CAPTIONS:
        return f"json: {len(clip['captions'])} captions, {CAPTIONS} at most"
    if (longest := max(map(len, texts), default=0)) > LONGEST:
        return f"json: a caption of {longest} characters, {LONGEST} at most"
    labels = clip.get("labels", [])  # of several classes; shards of one class a clip, and older ones, have none
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        return f"json: labels is {labels!r:.60}"
    if not {type(clip["media"].get(name, 0)) for name in ("audio", "frames")} <= {str, type(None)}:
        return "json: media is not two paths"
    if clip["audio_type"] not in TYPES:
        return f"json: audio_type is {clip['audio_type']!r:.60}"
    if clip["has_frames"] != (clip["n_frames"] > 0) or clip["n_frames"] < 0:
        return f"json: has_frames is {clip['has_frames']}, n_frames {clip['n_frames']}"
    if not 0 <= clip["duration"] < 1e9 or clip["has_audio"] > (clip["duration"] > 0):
        return f"json: has_audio is {clip['has_audio']}, duration {clip['duration']}"
    if (
        min(clip["n_rows"], clip["n_segments"]) < 0
        or len({clip["has_audio"], clip["n_rows"] > 0, clip["n_segments"] > 0}) > 1
    ):
        return f"json: has_audio is {clip['has_audio']}, n_segments {clip['n_segments']}, n_rows {clip['n_rows']}"
    return ""


def check_fit(clip: dict[str, Any], kind: str, strip: bytes | None, tile: tuple[int, int]) -> None:
    """Raise ValueError unless a strip holds the tiles (height, width) that the json counts; only its header is read."""
    count = clip[COUNTS[kind]]
    if (strip is None) != (count == 0):
        raise ValueError(f"{kind}: {'there' if count == 0 else 'not there'}, and {COUNTS[kind]} is {count}")
    if strip is not None and (size := _size(kind, strip)) != (tile[1], count * tile[0]):
        raise ValueError(f"{kind} is {size[0]} x {size[1]}, by its json {tile[1]} x {count * tile[0]}")


def _size(kind: str, strip: bytes) -> tuple[int, int]:
    if size := jpeg_size(strip):
        return size
    try:
        with Image.open(io.BytesIO(strip), formats=["JPEG", "PNG"]) as image:
            return image.size
    except Exception as error:  # Pillow raises whatever its parsers raise
        raise ValueError(f"{kind} cannot be read: {error}") from None


def keep_languages(clip: dict, languages: list[str]) -> dict:
    """Return a clip's json, with captions of these languages alone, if any are named."""
    if not languages:
        return clip
    kept = [j for j, language in enumerate(clip.get("caption_langs", [])) if language in languages]
    return clip | {name: [clip[name][j] for j in kept] for name in ("captions", "caption_langs") if name in clip}


def draw_captions(clips: Sequence[dict], keys: Sequence[tuple[int, int, int]], how: str) -> list[int]:
    """Choose the caption, by number, of this epoch's visit of each clip (B,), by data.caption_sampling; 0 if it has none.

    keys: run, clip and epoch of each.
    """
    drawn, counts = [0] * len(clips), [len(clip["captions"]) for clip in clips]
    several = [] if how == "first" else [i for i, count in enumerate(counts) if count > 1]
    ends = [(keys[i][0], keys[i][1], 4) if how == "cycle" else (*keys[i], 1) for i in several]
    (numbers,) = integers(ends, [([counts[i] for i in several], [1] * len(several))])
    for i, number in zip(several, numbers.tolist(), strict=True):
        drawn[i] = (number + keys[i][2]) % counts[i] if how == "cycle" else number
    return drawn
