"""Read the annotations of sets of sounds and speech; see data_prep/annotations.py."""

import functools
import hashlib
import os
import re
from pathlib import Path

from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import Located, ManifestRow, MediaFolder, Skipped, inside, on_disk, slug

GRID: list[dict[str, str]] = [  # the words of a sentence by the letters of its file's name; {}: the letter itself
    {word[0]: word for word in words.split()}
    for words in ("bin lay place set", "blue green red white", "at by in with", "", "again now please soon")
]
GRID.insert(4, dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True)))


def audioset(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of YouTube videos with sound events; caption "The sound of A, B", label "A;B" (the classes' names)."""
    files = {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"}
    (classes,) = annotation_io.require_files(place, "class_labels_indices.csv")
    names: dict[str, str] = {}
    for where, named in annotation_io.read_csv(classes, "mid", "display_name"):
        if isinstance(named, ValueError):
            yield Skipped("malformed", where, str(named))
        else:
            names[named["mid"]] = annotation_io.clean(named["display_name"])

    english = ["en"]  # one list for millions of rows

    @functools.lru_cache(1 << 18)  # most lines have one of these
    def labels(mids: str) -> tuple[str, list[str]]:
        kinds = [names.get(mid) or names.get(mid.strip()) or "" for mid in mids.split(",")]
        if "" in kinds:
            unknown = mids.split(",")[kinds.index("")].strip()
            raise ValueError(f"label {unknown!r} is not in {classes.name}")
        return ";".join(kinds), [f"The sound of {', '.join(kinds)}"]

    def row(split: str, line: dict[str, str]) -> ManifestRow | None:
        if line["YTID"].startswith("#"):
            return None
        label, captions = labels(line["positive_labels"])
        clip = line["YTID"], float(line["start_seconds"]), float(line["end_seconds"])
        made = annotation_io.clip_row(media, "audioset", split, *clip, None, audio_type="nb", label=label)
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
    """5 s of environmental sounds in 50 classes; the folds fold1 to fold5 are the splits, label = category."""

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


def esc10(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """ESC-50's subset of 10 classes, which its table marks."""
    return esc50(place, media, "esc10")


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


def grid(media: MediaFolder) -> RowsOrSkipped:
    """3 s of people who say six words each, which the file's name spells: bbaf2n, "bin blue at f two now".

    The files of one sentence are in one split, by a hash of its name: 70% train, 10% val, 20% test.
    """

    def row(_: str, path: str) -> ManifestRow:
        speaker, name = os.path.split(os.path.splitext(path)[0])
        words = [spelt.get(letter, "") if spelt else letter for letter, spelt in zip(name, GRID, strict=True)]
        if not all(words):
            raise ValueError(f"{name} spells no sentence of GRID's")
        place = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
        split, more = "test" if place < 20 else "val" if place < 30 else "train", {"audio_type": "vb", "group": name}
        return annotation_io.whole_row(
            "grid", split, f"{slug(speaker)}_{name}", Located(path), [" ".join(words)], **more
        )

    lines = (
        (path, "", path)
        for path in sorted(media.paths)
        if len(os.path.splitext(os.path.basename(path))[0]) == len(GRID)
    )
    return annotation_io.rows(lines, row)
