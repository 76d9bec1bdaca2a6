"""Read the annotations of each data set, in the files that its authors publish, as manifest rows, one for each sample.

One generator per data set yields ManifestRow, or Skipped with a reason, in file order. Video sets keep the audio type
"both": the paper fine-tunes and tests with both tokens, since their sound may be speech or not.
"""

import gc
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import ManifestRow, MediaFolder, Skipped
from data_prep.sets.folder import folder
from data_prep.sets.howto100m import howto100m
from data_prep.sets.sounds import audiocaps, audioset, clotho, esc10, esc50, grid, urbansound8k
from data_prep.sets.youcook2 import youcook2


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
        raise UserError(f"media_root={cfg.media_root}: nothing in {cfg.dataset}'s layout: {media.describe()}; {why}")
    if sum(item.why == "missing" for item in skipped) > len(rows):
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
    if cfg.dataset == "stamps":
        from data_prep.sets.stamps import stamps  # it decodes, with torch, which takes half a gigabyte

        return stamps(media.root)
    if cfg.dataset == "folder":
        return folder(place, media.root)
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


# Videos


def msrvtt(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10,000 clips with 20 captions each, cut already; the full split."""
    (path,) = annotation_io.require_files(place, "MSRVTT_data.json")
    data = annotation_io.read_json(path, dict, videos=list, sentences=list)
    sentences: dict[str, list[str]] = defaultdict(list)
    yield from _sentences(path, data, sentences)

    def row(_: str, video: dict[str, Any]) -> ManifestRow:
        name, split = video["video_id"], {"validate": "val"}.get(video["split"], video["split"])
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r} is not train, validate or test")
        return annotation_io.whole_row("msrvtt", split, name, media.find(name), sentences.get(name, []))

    yield from annotation_io.rows(_by(path, "", data["videos"], "video_id"), row)


def msrvtt_1ka(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """MSR-VTT as text-video retrieval uses it: 9,000 clips to train with, 1,000 to test with one sentence each."""
    path, train, test = annotation_io.require_files(
        place, "MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"
    )
    sentences: dict[str, list[str]] = defaultdict(list)
    yield from _sentences(path, annotation_io.read_json(path, dict, sentences=list), sentences)

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        name = line["video_id"]
        if split == "train" and name not in sentences:
            raise ValueError(f"{name} has no sentence in {path.name}")
        texts = sentences[name] if split == "train" else [line["sentence"]]
        return annotation_io.whole_row("msrvtt_1ka", split, name, media.find(name), texts)

    trained = ((where, "train", line) for where, line in annotation_io.read_csv(train, "video_id"))
    tested = ((where, "test", line) for where, line in annotation_io.read_csv(test, "video_id", "sentence"))
    yield from annotation_io.rows(itertools.chain(trained, tested), row)


def _sentences(path: Path, data: dict[str, Any], sentences: dict[str, list[str]]) -> Iterator[Skipped]:
    """Fill `sentences`, a list for each video id, from the "sentences" of an MSR-VTT file; yield the malformed ones."""
    for number, sentence in enumerate(data["sentences"]):
        try:
            sentences[sentence["video_id"]].append(sentence["caption"])
        except (TypeError, KeyError) as error:
            yield Skipped("malformed", f"{path.name}: sentence {number}", annotation_io.reason(error))


def vatex(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of YouTube videos with ten English and ten Chinese captions, or none in the private test."""

    def row(split: str, clip: dict[str, Any]) -> ManifestRow:
        name = clip["videoID"]
        if not (parts := re.fullmatch(r"(.+)_(\d+)_(\d+)", name)):  # a YouTube id may hold _ itself
            raise ValueError(f"videoID {name} is not ID_START_END")
        clip_at = parts[1], float(parts[2]), float(parts[3])
        made = annotation_io.clip_row(media, "vatex", split, *clip_at, clip.get("enCap", []))
        chinese = annotation_io.captions(clip.get("chCap", []), split)
        made.id, made.captions = name, made.captions + chinese
        made.caption_langs += ["zh"] * len(chinese)
        return made

    files = {
        "vatex_training_v1.0.json": "train",
        "vatex_validation_v1.0.json": "val",
        "vatex_public_test_english_v1.1.json": "test",
        "vatex_private_test_without_annotations.json": "private",
    }
    loaded = (
        (path, split, annotation_io.read_json(path, list)) for path, split in annotation_io.existing_files(place, files)
    )
    lines = (line for path, split, clips in loaded for line in _by(path, split, clips, "videoID"))
    return annotation_io.rows(lines, row)


def _by(path: Path, split: str, items: list[Any], key: str) -> Iterator[Line]:
    """Yield the items of a JSON list, named by their id, or by their number where they have none."""
    for number, item in enumerate(items):
        name = item.get(key, number) if isinstance(item, dict) else number
        yield f"{path.name}: {name}", split, item


def activitynet(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Whole videos, each with its sentences joined to a paragraph.

    val_2 is a second annotation of the videos of val_1.
    """

    def row(split: str, pair: tuple[str, dict[str, Any]]) -> ManifestRow:
        name, annotation = pair
        video = name.removeprefix("v_")
        place = media.find(f"v_{video}") or media.find_video(video)
        return annotation_io.whole_row(
            "activitynet", split, video, place, [" ".join(annotation_io.cleaned(annotation["sentences"]))]
        )

    files = {"train.json": "train", "val_1.json": "val", "val_2.json": "val2"}
    loaded = (
        (path, split, annotation_io.read_json(path, dict)) for path, split in annotation_io.existing_files(place, files)
    )
    lines = ((f"{path.name}: {pair[0]}", split, pair) for path, split, data in loaded for pair in data.items())
    return annotation_io.rows(lines, row)


def ucf101(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Human actions in 101 classes. Official split K: test0K against all others, train holds those never tested."""
    (classes,) = annotation_io.require_files(place, "classInd.txt")
    numbers: dict[str, str] = {}
    for where, line in annotation_io.read_lines(classes):
        if isinstance(line, str) and len(words := line.split()) > 1:
            numbers[words[1]] = words[0]
        else:
            why = "not a number and a class" if isinstance(line, str) else str(line)
            yield Skipped("malformed", where, why)
    split_of: dict[str, str] = {}

    def row(split: str, line: str) -> ManifestRow | None:
        path, *number = line.split()
        if split == "train" and path in split_of:
            return None
        label, name = path.partition("/")[0], os.path.splitext(os.path.basename(path))[0]
        if split_of.setdefault(path, split) != split:
            raise ValueError(f"{name} is in {split_of[path]} too")
        if label not in numbers or number not in ([], [numbers[label]]):
            raise ValueError(f"{' '.join([label, *number])} is not a class of {classes.name}")
        caption = re.sub(r"(?<=.)(?=[A-Z])", " ", label).lower()
        more = {"label": label, "group": re.sub(r"_c\d+$", "", name)}  # clips of one g.. are cut from one video
        return annotation_io.whole_row("ucf101", split, name, media.find(name), [caption], **more)

    tests = annotation_io.existing_files(place, {f"testlist0{k}.txt": f"test0{k}" for k in (1, 2, 3)})
    trains = annotation_io.existing_files(place, {f"trainlist0{k}.txt": "train" for k in (1, 2, 3)})
    lines = ((where, split, line) for path, split in tests + trains for where, line in annotation_io.read_lines(path))
    yield from annotation_io.rows(lines, row)
