"""Read the annotations of each data set, in the files that its authors publish, as manifest rows, one for each sample.

SETS names the generator of each data set, in data_prep/sets/: it yields ManifestRow, or Skipped with a reason, in file
order. Video sets keep the audio type "both": the paper fine-tunes and tests with both tokens, since their sound may be
speech or not.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep import annotation_io
from data_prep.manifest import ManifestRow, MediaFolder, Skipped
from data_prep.sets import sounds, speech, videos
from data_prep.sets.folder import folder
from data_prep.sets.howto100m import howto100m
from data_prep.sets.parquet import parquet
from data_prep.sets.webdataset import webdataset
from data_prep.sets.youcook2 import youcook2


def _stamps(_: Path, media: MediaFolder) -> Iterable[ManifestRow | Skipped]:
    from data_prep.sets.stamps import stamps  # it decodes, with torch, which takes half a gigabyte

    return stamps(media.root)


# the annotations' folder or file, and the media; howto100m takes its number of clips too
SETS: dict[str, Callable[[Path, MediaFolder], Iterable[ManifestRow | Skipped]]] = {
    "folder": folder,
    "stamps": _stamps,
    "howto100m": howto100m,
    "audioset": sounds.audioset,
    "audiocaps": sounds.audiocaps,
    "auto_acd": sounds.auto_acd,
    "clotho": sounds.clotho,
    "esc50": sounds.esc50,
    "esc10": partial(sounds.esc50, source="esc10"),
    "fsd50k": sounds.fsd50k,
    "musiccaps": sounds.musiccaps,
    "urbansound8k": sounds.urbansound8k,
    "vggsound": sounds.vggsound,
    "wavcaps": sounds.wavcaps,
    "grid": speech.grid,
    "librispeech": speech.librispeech,
    "ljspeech": speech.ljspeech,
    "speech_commands": speech.speech_commands,
    "spokencoco": speech.spokencoco,
    "activitynet": videos.activitynet,
    "didemo": videos.didemo,
    "kinetics400": partial(videos.kinetics, source="kinetics400"),
    "kinetics600": partial(videos.kinetics, source="kinetics600"),
    "lsmdc": videos.lsmdc,
    "msrvtt": videos.msrvtt,
    "msrvtt_1ka": videos.msrvtt_1ka,
    "msvd": videos.msvd,
    "ucf101": videos.ucf101,
    "valor32k": videos.valor32k,
    "vatex": videos.vatex,
    "youcook2": youcook2,
}
PACKED = {"webdataset": webdataset, "parquet": parquet}  # media that lie in tars and tables


def read(cfg: DataConfig) -> tuple[list[ManifestRow], list[Skipped]]:
    """Return the rows of the data set, and the annotations that could not become rows, both in file order.

    Raises UserError if a folder, an annotation file or a column is not there, or if no row, or of cfg.languages
    no caption, is left.
    """
    root, place = Path(cfg.media_root), Path(cfg.annotations or cfg.media_root)
    packed = cfg.dataset in PACKED
    if not packed and not root.is_dir():
        raise UserError(
            f"media_root={cfg.media_root}: no such folder; the config's header says where the media come from"
        )
    if not packed and not place.exists():
        raise UserError(f"annotations={place}: no such file or folder; the config's header says what lies there")
    rows: list[ManifestRow] = []
    skipped: list[Skipped] = []
    media = MediaFolder(root, cfg.clips_already_cut)
    with _collector_off():
        for item in map(annotation_io.as_text, _annotated(cfg, place, media)):
            if isinstance(item, ManifestRow):
                rows.append(item)
            else:
                skipped.append(item)
    if not rows:
        counts = Counter(item.why for item in skipped)
        first = [f"{item.where}: {item.reason}" for item in skipped[:1]]
        why = "; ".join([*(f"{count} {why}" for why, count in counts.items()), *first, "is it the right folder?"])
        there = "no sample there" if packed else media.describe()
        raise UserError(f"media_root={cfg.media_root}: nothing in {cfg.dataset}'s layout: {there}; {why}")
    if not packed and sum(item.why == "missing" for item in skipped) > len(rows):
        taken = {path for row in rows for path in (row.media, row.picture) if path}
        skipped.append(Skipped("unusable", cfg.media_root, f"{media.describe(taken)}: are the others named otherwise?"))
    if cfg.languages:
        annotation_io.keep_languages(rows, cfg.languages)
    return rows, skipped


@contextmanager
def _collector_off() -> Iterator[None]:
    """Switch Python's garbage collector off: a third of the time of millions of rows, of which none refers to itself."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _annotated(cfg: DataConfig, place: Path, media: MediaFolder) -> Iterable[ManifestRow | Skipped]:
    if cfg.dataset in PACKED:
        return PACKED[cfg.dataset](cfg)
    if cfg.dataset == "howto100m":
        return howto100m(place, media, cfg.clips_per_video)
    return SETS[cfg.dataset](place, media)
