"""Make a manifest row of what lies beside media in a tar or table: captions, a label, the interval."""

import os
import re
from typing import Any

from clip4vla.config import DataConfig
from clip4vla.media.source import PICTURES, SOUNDS, VIDEOS, suffix_of
from data_prep import annotation_io
from data_prep.manifest import ManifestRow, composed, slug
from data_prep.media_names import seconds
from data_prep.packed.listing import HUB, base_of, split_of

CAPTIONS = ("caption", "captions", "text", "texts", "raw", "sentence", "sentences")  # the first of them that is there
LABEL = "label"
KINDS = PICTURES + VIDEOS + SOUNDS  # suffixes of media
Place = list[Any]  # TAR, offset, size; or TABLE, row group, row in it, column
Media = dict[str, Place]  # by path


def row(
    cfg: DataConfig,
    archive: str,
    media: Media,
    texts: list[str],
    label: Any,
    span: tuple[float | None, float | None] = (None, None),
) -> ManifestRow:
    """Return the row of one sample: of a video, or a picture, a sound, or both; of a video with separate sound that sound.

    A label that is a list is several. Raises ValueError for two media of a kind, and for labels that are no texts.
    """
    labels = label if isinstance(label, list) else []
    if isinstance(label, dict) or not all(isinstance(one, str) for one in labels):
        raise ValueError("label is no text, and no list of texts")
    annotation_io.check_span(*span)
    video, sound, picture = (_only(media, kinds) for kinds in (VIDEOS, SOUNDS, PICTURES))
    shown = None if video and not sound else video or picture
    name = composed(sound or video or picture or "")
    source = slug(os.path.basename(base_of(cfg.dataset, cfg.media_root)))
    if cfg.dataset == "parquet" and cfg.media_root.startswith(HUB):
        source = slug(os.path.basename(cfg.media_root.removeprefix(HUB)))
    split = cfg.split or split_of(archive)
    captions = annotation_io.captions(texts, split)
    return ManifestRow(
        name + annotation_io.span_suffix(*span), name, name, source, split,
        captions, ["en"] * len(captions), shown, sound or video, audio_type=cfg.audio_type,
        label=None if label is None or labels else str(label).strip(), labels=labels, start=span[0], end=span[1],
        places={path: place for path, place in media.items() if path in (shown, sound or video) and place},
    )  # fmt: skip


def _only(media: Media, kinds: tuple[str, ...]) -> str | None:
    paths = [path for path in media if suffix_of(path) in kinds]
    if len(paths) > 1:
        raise ValueError(
            f"two media of a kind in one sample: {os.path.basename(paths[0])} and {os.path.basename(paths[1])}"
        )
    return paths[0] if paths else None


def captions(tree: dict[str, Any], names: list[str]) -> list[Any]:
    """Return the texts at the names (A.B: B in A) of a tree, or without names at the first of CAPTIONS that is there.

    A text, or a list of texts. Raises ValueError for a name that is not there.
    """
    if not names:
        return next((_texts(tree[name]) for name in CAPTIONS if tree.get(name) is not None), [])
    return [text for name in names for text in _texts(lookup(tree, name))]


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def lookup(tree: Any, name: str) -> Any:
    """Return what is at A.B of a tree: under that very name, or under B in A; ValueError if nothing is."""
    here = tree
    for part in [name] if name in tree else name.split("."):
        if not isinstance(here, dict) or part not in here:
            raise ValueError(f"no {name}")
        here = here[part]
    return here


def spans(tree: dict[str, Any], key: str, cut: bool) -> list[tuple[float | None, float | None]]:
    """Return the intervals in s that video2dataset's `clips` names, [[start, end], ..], of a sample with this key.

    What its ClippingSubsampler cut is the interval already: it has one, and a key that ends in the clip's number, _00000.
    Raises ValueError for what is no list of times.
    """
    clips = tree.get("clips")
    if not clips or cut:
        return [(None, None)]
    if not isinstance(clips, list):
        raise ValueError("clips is no list of [start, end]")
    clips = clips if isinstance(clips[0], list) else [clips]
    if len(clips) == 1 and re.search(r"_\d{5}$", key) and tree.get("key") == key:
        return [(None, None)]
    if not all(isinstance(clip, list) and len(clip) == 2 for clip in clips):
        raise ValueError("clips is no list of [start, end]")
    return [(seconds(start), seconds(end)) for start, end in clips]
