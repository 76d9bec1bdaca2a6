"""Read the annotations of sets of sounds; see data_prep/annotations.py."""

import functools
import os
import re
from pathlib import Path
from typing import Any

from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import Located, ManifestRow, MediaFolder, Skipped, inside, on_disk


def audioset(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of YouTube videos with sound events; caption "The sound of A, B", labels = the classes' names."""
    files = {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"}
    (classes,) = annotation_io.require_files(place, "class_labels_indices.csv")
    names: dict[str, str] = {}
    for where, named in annotation_io.read_csv(classes, "mid", "display_name"):
        if isinstance(named, ValueError):
            yield Skipped("malformed", where, str(named))
        else:
            names[named["mid"]] = annotation_io.clean(named["display_name"])

    english = ["en"]  # one list for millions of rows
    seconds = functools.lru_cache(1 << 12)(float)  # and one number for those that begin alike

    @functools.lru_cache(1 << 15)  # most lines have one of these
    def labels(mids: str) -> tuple[list[str], list[str]]:
        kinds = [names.get(mid) or names.get(mid.strip()) or "" for mid in mids.split(",")]
        if "" in kinds:
            unknown = mids.split(",")[kinds.index("")].strip()
            raise ValueError(f"label {unknown!r} is not in {classes.name}")
        return kinds, [f"The sound of {', '.join(kinds)}"]

    def row(split: str, line: dict[str, str]) -> ManifestRow | None:
        if line["YTID"].startswith("#"):
            return None
        kinds, captions = labels(line["positive_labels"])
        clip = line["YTID"], seconds(line["start_seconds"]), seconds(line["end_seconds"])
        made = annotation_io.clip_row(media, "audioset", split, *clip, None, audio_type="nb", labels=kinds)
        made.captions, made.caption_langs = captions, english
        return made

    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
    lines = annotation_io.read_csvs(
        place, {f"{name}_segments.csv": split for name, split in files.items()}, *columns, header=False
    )
    yield from annotation_io.rows(lines, row)


def audiocaps(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of AudioSet described in words: one caption of a train clip, five of a val or test clip, a line each."""

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        start = float(line["start_time"])
        clip = line["youtube_id"], start, start + 10
        naming = {"own_name": line.get("audiocap_id", "")}  # audiocaps-download's
        return annotation_io.clip_row(
            media, "audiocaps", split, *clip, [line["caption"]], naming=naming, audio_type="nb"
        )

    files = {"train.csv": "train", "val.csv": "val", "test.csv": "test"}
    return annotation_io.rows(
        annotation_io.read_csvs(place, files, "youtube_id", "start_time", "caption"), row, join=True
    )


def clotho(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Sounds of 15 to 30 s with five captions each."""
    columns = [f"caption_{i}" for i in range(1, 6)]
    parts = {"train": "development", "val": "validation", "test": "evaluation"}

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        name = line["file_name"]
        usual = inside(f"{parts[split]}/{name}")  # where the archives put it: another part may have the same name
        path = on_disk(media.root, usual)
        place = Located(path) if path else media.find(os.path.splitext(name)[0])
        return annotation_io.whole_row(
            "clotho", split, name, place, [line[column] for column in columns], audio_type="nb"
        )

    files = {f"clotho_captions_{part}.csv": split for split, part in parts.items()}
    return annotation_io.rows(annotation_io.read_csvs(place, files, "file_name", *columns), row)


def esc50(place: Path, media: MediaFolder, source: str = "esc50") -> RowsOrSkipped:
    """5 s of environmental sounds in 50 classes; the folds fold1 to fold5 are the splits, label = category.

    source: esc10 takes the subset of 10 classes, which the table marks.
    """

    def row(split: str, line: dict[str, str]) -> ManifestRow | None:
        if source == "esc10" and line["esc10"] != "True":
            return None
        name, label = line["filename"], line["category"]
        if not re.fullmatch("[1-5]", line["fold"]):
            raise ValueError(f"fold {line['fold']!r} is not 1 to 5")
        more = {"audio_type": "nb", "label": label, "group": line["src_file"]}  # the recording that clips are cut from
        place = media.find(os.path.splitext(name)[0])
        return annotation_io.whole_row(source, f"fold{line['fold']}", name, place, [label.replace("_", " ")], **more)

    columns = ["filename", "fold", "category", "src_file", *(["esc10"] if source == "esc10" else [])]
    return annotation_io.rows(annotation_io.read_csvs(place, {"meta/esc50.csv": ""}, *columns), row)


def urbansound8k(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Sounds of streets of up to 4 s in 10 classes; the folds fold1 to fold10 are the splits, label = class."""

    def row(_: str, line: dict[str, str]) -> ManifestRow:
        name, label = os.path.splitext(line["slice_file_name"])[0], line["class"]
        if not re.fullmatch("[1-9]|10", line["fold"]):
            raise ValueError(f"fold {line['fold']!r} is not 1 to 10")
        more = {"audio_type": "nb", "label": label, "group": line["fsID"]}  # the recording that clips are cut from
        caption = label.replace("_", " ")
        return annotation_io.whole_row("urbansound8k", f"fold{line['fold']}", name, media.find(name), [caption], **more)

    columns = ("slice_file_name", "fsID", "fold", "class")
    return annotation_io.rows(annotation_io.read_csvs(place, {"metadata/UrbanSound8K.csv": ""}, *columns), row)


def vggsound(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of YouTube videos in 309 classes, whose source of sound is visible; label = class (Chen et al. 2020)."""

    def row(_: str, line: dict[str, str]) -> ManifestRow:
        if line["split"] not in ("train", "test"):
            raise ValueError(f"split {line['split']!r} is not train or test")
        start, label = float(line["start"]), line["label"]
        clip = line["id"], start, start + 10
        texts = [f"The sound of {label}"]
        return annotation_io.clip_row(media, "vggsound", line["split"], *clip, texts, audio_type="nb", label=label)

    columns = ("id", "start", "label", "split")
    return annotation_io.rows(annotation_io.read_csvs(place, {"vggsound.csv": ""}, *columns, header=False), row)


def fsd50k(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Sounds of Freesound of 0.3 to 30 s, each with all of its classes of AudioSet's ontology (Fonseca et al. 2022).

    dev.csv says which of its sounds are for validation; eval.csv is the test.
    """

    def row(part: str, line: dict[str, str]) -> ManifestRow:
        split = line["split"] if part == "dev" else "test"
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r} is not train or val")
        labels = [label.replace("_", " ") for label in line["labels"].split(",")]
        name, caption = line["fname"], f"The sound of {', '.join(labels)}"
        return annotation_io.whole_row(
            "fsd50k", split, name, media.find(name), [caption], audio_type="nb", labels=labels
        )

    files = {f"FSD50K.ground_truth/{part}.csv": part for part in ("dev", "eval")}
    return annotation_io.rows(annotation_io.read_csvs(place, files, "fname", "labels"), row)


def musiccaps(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of music from AudioSet, described by musicians; the clips of AudioSet's evaluation set are the test."""

    def row(_: str, line: dict[str, str]) -> ManifestRow:
        split = {"True": "test", "False": "train"}.get(line["is_audioset_eval"])
        if not split:
            raise ValueError(f"is_audioset_eval {line['is_audioset_eval']!r} is not True or False")
        clip = line["ytid"], float(line["start_s"]), float(line["end_s"])
        return annotation_io.clip_row(media, "musiccaps", split, *clip, [line["caption"]], audio_type="nb")

    (path,) = annotation_io.require_files(place, "musiccaps-public.csv")
    columns = ("ytid", "start_s", "end_s", "caption", "is_audioset_eval")
    lines = annotation_io.read_csv(path, *columns, cells_span_lines=True)
    return annotation_io.rows(((where, "", line) for where, line in lines), row)


def auto_acd(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of AudioSet and VGGSound, described by a language model (Sun et al. 2024), cut already.

    The tables give a YouTube id without times, of some clips with a suffix that its authors do not explain: a file of that
    very name comes first, then a clip that is cut from the video, as YID or ID_START.
    """

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        name = line["youtube_id"]
        place = media.find(name) or media.find_any(name[:11])
        return annotation_io.whole_row("auto_acd", split, name, place, [line["caption"]], audio_type="nb")

    files = {"train.csv": "train", "test.csv": "test"}
    return annotation_io.rows(annotation_io.read_csvs(place, files, "youtube_id", "caption"), row, join=True)


def wavcaps(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Sounds of four sources, each with a caption that a language model wrote from its description (Mei et al. 2024).

    FreeSound and SoundBible number their sounds alike, so that a sound is looked for in folders that are called after its
    source, as the archives do; of a single source anywhere. What a blacklist_*.json beside the four folders names by its
    source is left out: the authors' lists of sounds that tests of other sets hold.
    """
    left_out = _blacklisted(place if place.is_dir() else place.parent)
    parts = {"AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "FreeSound": "fsd", "SoundBible": "sb"}
    files = annotation_io.existing_files(place, {f"{part}/{name}_final.json": part for part, name in parts.items()})
    paths = {
        (part, os.path.splitext(os.path.basename(path))[0]): Located(path)
        for path in media.paths
        for part in parts
        if part in os.path.dirname(path)
    }

    def row(part: str, sound: dict[str, Any]) -> ManifestRow | None:
        if sound["id"] in left_out.get(part.removesuffix("_SL"), ()):
            return None
        name = os.path.splitext(sound["id"])[0] if part == "AudioSet_SL" else sound["id"]
        place = paths.get((part, name)) or (media.find(name) if len(files) == 1 else None)
        return annotation_io.whole_row("wavcaps", "train", f"{part}/{name}", place, [sound["caption"]], audio_type="nb")

    lines = (
        line
        for path, part in files
        for line in annotation_io.by_key(path, part, annotation_io.read_json(path, dict, data=list)["data"], "id")
    )
    return annotation_io.rows(lines, row)


def _blacklisted(folder: Path) -> dict[str, set[Any]]:
    """Read the ids that all blacklist_*.json of a folder name, by source: AudioSet, FreeSound; UserError for what is no list."""
    ids: dict[str, set[Any]] = {}
    for path in sorted(folder.glob("blacklist_*.json")):
        data = annotation_io.read_json(path, dict)
        for source in data:
            listed = annotation_io.read_json(path, dict, **{source: list})[source]
            ids.setdefault(source, set()).update(one for one in listed if isinstance(one, str))
    return ids
