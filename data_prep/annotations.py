"""Read the annotations of each data set, in the files that its authors publish, as manifest rows, one for each sample.

One generator per data set yields ManifestRow, or Skipped with a reason, in file order. Video sets keep the audio type
"both": the paper fine-tunes and tests with both tokens, since their sound may be speech or not.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep import annotation_io
from data_prep.manifest import ManifestRow, MediaFolder, Skipped
from data_prep.sets.folder import folder
from data_prep.sets.howto100m import howto100m
from data_prep.sets.sounds import audiocaps, audioset, clotho, esc10, esc50, urbansound8k
from data_prep.sets.speech import grid
from data_prep.sets.stamps import stamps
from data_prep.sets.videos import activitynet, msrvtt, msrvtt_1ka, ucf101, vatex, youcook2


def read(cfg: DataConfig) -> tuple[list[ManifestRow], list[Skipped]]:
    """Return the rows of the data set, and the annotations that could not become rows, both in file order.

    Raises UserError if a folder, an annotation file or a column is not there, or if no row, or of cfg.languages
    no caption, is left.
    """
    root, place = Path(cfg.media_root), Path(cfg.annotations or cfg.media_root)
    if not root.is_dir():
        raise UserError(
            f"media_root={cfg.media_root}: no such folder; the config's header says where the media come from"
        )
    if not place.exists():
        raise UserError(f"annotations={place}: no such file or folder; the config's header says what lies there")
    rows: list[ManifestRow] = []
    skipped: list[Skipped] = []
    for item in map(annotation_io.as_text, _annotated(cfg, place, root)):
        if isinstance(item, ManifestRow):
            rows.append(item)
        else:
            skipped.append(item)
    if not rows:
        counts = Counter(item.why for item in skipped)
        first = [f"{item.where}: {item.reason}" for item in skipped[:1]]
        why = "; ".join([*(f"{count} {why}" for why, count in counts.items()), *first, "is it the right folder?"])
        raise UserError(f"media_root={cfg.media_root}: nothing in {cfg.dataset}'s layout; {why}")
    if cfg.languages:
        annotation_io.keep_languages(rows, cfg.languages)
    return rows, skipped


def _annotated(cfg: DataConfig, place: Path, root: Path) -> Iterable[ManifestRow | Skipped]:
    if cfg.dataset == "stamps":
        return stamps(root)
    if cfg.dataset == "folder":
        return folder(place, root)
    media = MediaFolder(root, cfg.clips_already_cut)
    if cfg.dataset == "grid":
        return grid(media)
    if cfg.dataset == "howto100m":
        return howto100m(place, media, cfg.clips_per_video)
    sets = {
        "audioset": audioset,
        "msrvtt": msrvtt,
        "msrvtt_1ka": msrvtt_1ka,
        "vatex": vatex,
        "audiocaps": audiocaps,
        "clotho": clotho,
        "activitynet": activitynet,
        "youcook2": youcook2,
        "esc50": esc50,
        "esc10": esc10,
        "urbansound8k": urbansound8k,
        "ucf101": ucf101,
    }
    return sets[cfg.dataset](place, media)
