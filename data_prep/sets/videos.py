"""Read the annotations of sets of videos with captions, steps or classes; see data_prep/annotations.py."""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import ManifestRow, MediaFolder, Skipped

MSRVTT = (  # its annotations as copies of the set have them, as Microsoft ships them, and in COCO's form
    ("MSRVTT_data.json",),
    ("train_val_videodatainfo.json", "test_videodatainfo.json"),
    ("annotation/MSR_VTT.json",),
)


def msrvtt(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10,000 clips with 20 captions each, cut already; the full split."""
    sentences: dict[str, list[str]] = defaultdict(list)
    videos: list[Line] = []
    yield from _read_msrvtt(place, sentences, videos)

    def row(_: str, video: dict[str, Any]) -> ManifestRow:
        name, split = video["video_id"], {"validate": "val"}.get(video["split"], video["split"])
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r} is not train, validate or test")
        return annotation_io.whole_row("msrvtt", split, name, media.find(name), sentences.get(name, []))

    yield from annotation_io.rows(videos, row)


def msrvtt_1ka(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """MSR-VTT as text-video retrieval uses it: 9,000 clips to train with, 1,000 to test with one sentence each."""
    train, test = annotation_io.require_files(place, "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")
    sentences: dict[str, list[str]] = defaultdict(list)
    yield from _read_msrvtt(train.parent, sentences, [])

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        name = line["video_id"]
        if split == "train" and name not in sentences:
            raise ValueError(f"{name} has no sentence")
        texts = sentences[name] if split == "train" else [line["sentence"]]
        return annotation_io.whole_row("msrvtt_1ka", split, name, media.find(name), texts)

    trained = ((where, "train", line) for where, line in annotation_io.read_csv(train, "video_id"))
    tested = ((where, "test", line) for where, line in annotation_io.read_csv(test, "video_id", "sentence"))
    yield from annotation_io.rows(itertools.chain(trained, tested), row)


def _read_msrvtt(place: Path, sentences: dict[str, list[str]], videos: list[Line]) -> Iterator[Skipped]:
    """Fill `sentences`, a list for each video id, and `videos` from the first form that is there; yield malformed sentences."""
    there = annotation_io.existing_files(place, {name: form[0] for form in MSRVTT for name in form})
    for path in (path for path, form in there if form == there[0][1]):
        if path.name == "MSR_VTT.json":
            data = annotation_io.read_json(path, dict, images=list, annotations=list)
            written, of = data["annotations"], "image_id"
            videos += annotation_io.by_key(path, "", [_numbered(image) for image in data["images"]], "video_id")
        else:
            data = annotation_io.read_json(path, dict, videos=list, sentences=list)
            written, of = data["sentences"], "video_id"
            videos += annotation_io.by_key(path, "", data["videos"], "video_id")
        for number, sentence in enumerate(written):
            try:
                sentences[sentence[of]].append(sentence["caption"])
            except (TypeError, KeyError) as error:
                yield Skipped("malformed", f"{path.name}: sentence {number}", annotation_io.reason(error))


def _numbered(image: Any) -> Any:
    """Return a video of MSR_VTT.json in the others' form: its number gives its split, by Microsoft's own files."""
    if not isinstance(image, dict) or not (number := re.fullmatch(r"video(\d+)", str(image.get("id")))):
        return image
    split = "train" if int(number[1]) < 6513 else "validate" if int(number[1]) < 7010 else "test"
    return {"video_id": image["id"], "split": split}


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
    lines = (line for path, split, clips in loaded for line in annotation_io.by_key(path, split, clips, "videoID"))
    return annotation_io.rows(lines, row)


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


def msvd(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Short clips of YouTube with about 40 captions each (Chen and Dolan 2011).

    train_list.txt, val_list.txt and test_list.txt (1,200, 100, 670) name the clips of each split, as retrieval uses them;
    clips in none of them are left out.
    """
    (path,) = annotation_io.require_files(place, "AllVideoDescriptions.txt")
    lists = annotation_io.existing_files(place, {f"{split}_list.txt": split for split in ("train", "val", "test")})
    split_of: dict[str, str] = {}
    yield from annotation_io.read_lists(lists, split_of)

    def row(_: str, line: str) -> ManifestRow | None:
        name, _, text = line.partition(" ")
        if not (split := split_of.get(name)):
            return None
        return annotation_io.clip_row(media, "msvd", split, *_clip_of(name), [text])

    lines = ((where, "", line) for where, line in annotation_io.read_lines(path) if not str(line).startswith("#"))
    yield from annotation_io.rows(lines, row, join=True)


def _clip_of(name: str) -> tuple[str, float, float]:
    """Split the name ID_START_END; the id may hold _ itself."""
    if not (parts := re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)", name)):
        raise ValueError(f"{name} is not ID_START_END")
    return parts[1], float(parts[2]), float(parts[3])


def didemo(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """The first 30 s of videos of Flickr, all of its moments' descriptions joined to a paragraph (Hendricks et al. 2017)."""

    def row(split: str, pair: tuple[str, list[dict[str, Any]]]) -> ManifestRow:
        video, moments = pair
        place = media.find(os.path.splitext(video)[0]) or media.find(video)  # ID.mov, or ID.mov.mp4
        place = place and place._replace(start=0.0, end=30.0)
        text = " ".join(annotation_io.cleaned([moment["description"] for moment in moments]))
        return annotation_io.whole_row("didemo", split, video, place, [text])

    def lines() -> Iterator[Line]:
        files = {f"{split}_data.json": split for split in ("train", "val", "test")}
        for path, split in annotation_io.existing_files(place, files):
            moments: dict[str, list[Any]] = defaultdict(list)
            for where, _, moment in annotation_io.by_key(
                path, split, annotation_io.read_json(path, list), "annotation_id"
            ):
                if isinstance(moment, dict) and isinstance(moment.get("video"), str):
                    moments[moment["video"]].append(moment)
                else:
                    yield where, split, ValueError("no video")
            yield from ((f"{path.name}: {pair[0]}", split, pair) for pair in moments.items())

    return annotation_io.rows(lines(), row)


def lsmdc(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Clips of films with what a describer says of them, cut already (Rohrbach et al. 2016); the test is the 1,000 of retrieval.

    Lines: clip, its aligned and its extracted start and end, sentence, with tabs between; several lines may name one clip.
    """

    def row(split: str, line: str) -> ManifestRow:
        cells = line.split("\t")
        if len(cells) != 6:
            raise ValueError(f"{len(cells)} cells between tabs, not 6")
        return annotation_io.whole_row("lsmdc", split, cells[0], media.find(cells[0]), [cells[5]])

    names = {"annos_training": "train", "annos_val": "val", "challenge_1000_publictect": "test"}
    files = annotation_io.existing_files(place, {f"LSMDC16_{name}.csv": split for name, split in names.items()})
    lines = ((where, split, line) for path, split in files for where, line in annotation_io.read_lines(path))
    return annotation_io.rows(lines, row, join=True)


def valor32k(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """10 s of AudioSet, described by people, pictures and sound (Chen et al. 2023)."""

    def row(split: str, clip: dict[str, Any]) -> ManifestRow:
        return annotation_io.clip_row(media, "valor32k", split, *_clip_of(clip["video_id"]), [clip["desc"]])

    files = {f"desc_{split}.json": split for split in ("train", "val", "test")}
    loaded = (
        (path, split, annotation_io.read_json(path, list)) for path, split in annotation_io.existing_files(place, files)
    )
    lines = (line for path, split, clips in loaded for line in annotation_io.by_key(path, split, clips, "video_id"))
    return annotation_io.rows(lines, row)


def kinetics(place: Path, media: MediaFolder, source: str) -> RowsOrSkipped:
    """10 s of YouTube videos of human actions in 400 or 600 classes; label = caption = class, none in tests without labels."""

    def row(split: str, line: dict[str, str]) -> ManifestRow:
        label = line.get("label") or None
        clip = line["youtube_id"], float(line["time_start"]), float(line["time_end"])
        return annotation_io.clip_row(media, source, split, *clip, [label] if label else [], label=label)

    splits = {"train": "train", "val": "val", "validate": "val", "test": "test"}
    prefixes = ("", f"kinetics_{source.removeprefix('kinetics')}_")
    files = {f"{prefix}{name}.csv": split for prefix in prefixes for name, split in splits.items()}
    return annotation_io.rows(annotation_io.read_csvs(place, files, "youtube_id", "time_start", "time_end"), row)
