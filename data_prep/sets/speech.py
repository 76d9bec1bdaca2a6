"""Read the annotations of sets of speech; see data_prep/annotations.py."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clip4vla.io.walk import walk
from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import Located, ManifestRow, MediaFolder, inside, slug

GRID: list[dict[str, str]] = [  # the words of a sentence by the letters of its file's name; {}: the letter itself
    {word[0]: word for word in words.split()}
    for words in ("bin lay place set", "blue green red white", "at by in with", "", "again now please soon")
]
GRID.insert(4, dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True)))


def grid(_: Path, media: MediaFolder) -> RowsOrSkipped:
    """3 s of people who say six words each, which the file's name spells: bbaf2n, "bin blue at f two now".

    The files of one sentence are in one split, by a hash of its name: 70% train, 10% val, 20% test.
    """

    def row(_: str, path: str) -> ManifestRow:
        speaker, name = os.path.split(os.path.splitext(path)[0])
        words = [spelt.get(letter, "") if spelt else letter for letter, spelt in zip(name, GRID, strict=True)]
        if not all(words):
            raise ValueError(f"{name} spells no sentence of GRID's")
        split, more = _split_by_hash(name), {"audio_type": "vb", "group": name}
        return annotation_io.whole_row(
            "grid", split, f"{slug(speaker)}_{name}", Located(path), [" ".join(words)], **more
        )

    lines = (
        (path, "", path)
        for path in sorted(media.paths)
        if len(os.path.splitext(os.path.basename(path))[0]) == len(GRID)
    )
    return annotation_io.rows(lines, row)


def librispeech(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Read English from audiobooks, a sentence or some a file, with its transcript; splits train-clean-100, dev-other, ..

    The transcripts, SPEAKER-CHAPTER.trans.txt, lie beside the sounds (Panayotov et al. 2015).
    """

    def row(split: str, line: str) -> ManifestRow:
        name, _, text = line.partition(" ")
        return annotation_io.whole_row("librispeech", split, name, media.find(name), [text], audio_type="vb")

    def lines() -> Iterator[Line]:
        for folder, _, names in walk(place):
            splits = re.findall(r"(?:train|dev|test)-(?:clean|other)(?:-\d+)?", folder)
            for name in sorted(names):
                if name.endswith(".trans.txt"):
                    for where, line in annotation_io.read_lines(Path(folder, name)):
                        yield where, splits[-1] if splits else "train", line

    return annotation_io.rows(lines(), row)


def ljspeech(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """13,100 sentences of books, read by one woman; caption = the text with its numbers written out.

    The set has no splits: 70% train, 10% val, 20% test by a hash of the name.
    """

    def row(_: str, line: str) -> ManifestRow:
        name, text, *normalized = line.split("|")
        return annotation_io.whole_row(
            "ljspeech", _split_by_hash(name), name, media.find(name), normalized or [text], audio_type="vb"
        )

    (path,) = annotation_io.require_files(place, "metadata.csv")
    return annotation_io.rows(((where, "", line) for where, line in annotation_io.read_lines(path)), row)


def speech_commands(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """1 s of one of 35 words, WORD/SPEAKER_nohash_TAKE.wav (Warden 2018); label = caption = the word, group = the speaker.

    validation_list.txt and testing_list.txt name the files of val and test, the others train; its background noise is
    left out.
    """
    split_of: dict[str, str] = {}
    lists = annotation_io.require_files(place, "validation_list.txt", "testing_list.txt")
    yield from annotation_io.read_lists(zip(lists, ("val", "test"), strict=True), split_of)

    def row(_: str, path: str) -> ManifestRow:
        name = "/".join(os.path.splitext(path)[0].split("/")[-2:])
        word, _, file = name.partition("/")
        more = {"audio_type": "vb", "label": word, "group": file.partition("_nohash_")[0]}
        return annotation_io.whole_row(
            "speech_commands", split_of.get(f"{name}.wav", "train"), name, Located(path), [word], **more
        )

    yield from annotation_io.rows(((path, "", path) for path in sorted(media.paths) if "_nohash_" in path), row)


def spokencoco(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Pictures of COCO with five captions each, read aloud (Hsu et al. 2021): a sample is a picture and one of its sounds."""

    def row(split: str, pair: tuple[str, dict[str, str]]) -> ManifestRow:
        image, spoken = pair
        sound, texts = media.find_sound(inside(spoken["wav"])), [spoken["text"]]
        made = annotation_io.whole_row("spokencoco", split, spoken["uttid"], sound, texts, image, audio_type="vb")
        made.item, made.picture = image, media.find_picture(inside(image))
        if not (made.picture and made.media):  # a sample is of both; the item is what the list of missing ones names
            made.item, made.picture, made.media = spoken["wav"] if made.picture else image, None, None
        return made

    def lines() -> Iterator[Line]:
        for path, split in annotation_io.existing_files(
            place, {"SpokenCOCO_train.json": "train", "SpokenCOCO_val.json": "val"}
        ):
            for where, _, item in annotation_io.by_key(
                path, "", annotation_io.read_json(path, dict, data=list)["data"], "image"
            ):
                try:
                    yield from ((where, split, (item["image"], spoken)) for spoken in item["captions"])
                except annotation_io.MISTAKES as error:
                    yield where, split, ValueError(annotation_io.reason(error))

    return annotation_io.rows(lines(), row)


def _split_by_hash(name: str) -> str:
    """Return train, val or test (7:1:2) by the hash of a name."""
    place = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
    return "test" if place < 20 else "val" if place < 30 else "train"
