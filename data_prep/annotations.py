"""Annotations of each data set, in the files that its authors publish, as rows: one row is one sample to be.

One generator per data set yields a Row, or says what it Skipped, in file order. Video sets keep the audio type "both":
the paper fine-tunes and tests with both tokens, since their sound may be speech or not.
"""

import hashlib
import itertools
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from clip4vla.config import DataConfig, UserError
from clip4vla.media import SOUNDS, VIDEOS
from clip4vla.pictures import PICTURES
from clip4vla.settings import parse_json
from data_prep import tables
from data_prep.manifest import MediaFolder, Row, Skipped, inside, slug
from data_prep.stamps import stamps
from data_prep.tables import Found, Line

MIN_SECONDS, MIN_WORDS = 10, 5  # of a clip of HowTo100M


def read(cfg: DataConfig) -> tuple[list[Row], list[Skipped]]:
    """Rows of the data set and what could not become one, both in file order.

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
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for item in map(tables.as_text, _found(cfg, place, root)):
        if isinstance(item, Row):
            rows.append(item)
        else:
            skipped.append(item)
    if not rows:
        counts = Counter(item.why for item in skipped)
        first = [f"{item.where}: {item.reason}" for item in skipped[:1]]
        why = "; ".join([*(f"{count} {why}" for why, count in counts.items()), *first, "is it the right folder?"])
        raise UserError(f"media_root={cfg.media_root}: nothing in {cfg.dataset}'s layout; {why}")
    if cfg.languages:
        tables.only(rows, cfg.languages)
    return rows, skipped


def _found(cfg: DataConfig, place: Path, root: Path) -> Iterable[Row | Skipped]:
    if cfg.dataset == "stamps":
        return stamps(root)
    if cfg.dataset == "folder":
        return folder(place, root)
    media = MediaFolder(root, cfg.cut)
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
        "ucf101": ucf101,
    }
    return sets[cfg.dataset](place, media)


# HowTo100M


def howto100m(place: Path, media: MediaFolder, clips_per_video: int = 0) -> Found:
    """Narrated videos: clips of >= 10 s and >= 5 words, merged from neighbouring lines of the narration.

    clips_per_video > 0: so many of a video's clips, spread evenly. Split: val if sha256(id) mod 1000 is 0, else train.
    HowTo100M_v1.csv says which videos are wanted; others in caption.json (9 GB, so it is streamed) are passed over.
    """
    table, talks = tables.need(place, "HowTo100M_v1.csv", "caption.json")
    videos: dict[str, tuple[str, str, str]] = {}
    for where, line in tables.read_csv(table, "video_id", "category_1"):
        video = line["video_id"]
        path = media.find(video)
        if not video or video in videos:
            yield Skipped("malformed", where, f"duplicate of {videos[video][0]}" if video else "no video_id")
        elif path:
            videos[video] = where, path, sys.intern(line["category_1"])
        else:
            yield tables.missing(video, video)
    for video, talk in tables.stream_json(talks):
        if video in videos:
            yield from _narrated(f"{talks.name}: {video}", video, talk, *videos.pop(video)[1:], clips_per_video)
    yield from (Skipped("unusable", where, f"no lines in {talks.name}") for where, _, _ in videos.values())


def _narrated(where: str, video: str, talk: Any, path: str, category: str, count: int) -> Found:
    """The clips of one video; talk = {"start": [..], "end": [..], "text": [..]} in seconds."""
    try:
        lines = list(zip(talk["start"], talk["end"], talk["text"], strict=True))
        lines = sorted((float(start), float(end), tables.clean(text)) for start, end, text in lines)
        good = [line for line in lines if 0 <= line[0] <= line[1] < math.inf]
        clips = list(enumerate(merge([line for line in good if line[2]])))
    except tables.MISTAKES as error:
        yield Skipped("malformed", where, f"not start, end and text of equal length: {tables.reason(error)}")
        return
    if len(good) < len(lines):
        yield Skipped("malformed", where, f"{len(lines) - len(good)} of {len(lines)} lines end before they start")
    if not clips:
        yield Skipped("unusable", where, f"less than {MIN_SECONDS} s or {MIN_WORDS} words in all")
    if 0 < count < len(clips):
        clips = [clips[(2 * i + 1) * len(clips) // (2 * count)] for i in range(count)]  # middles of equal parts
    split = "train" if int(hashlib.sha256(video.encode()).hexdigest(), 16) % 1000 else "val"
    for number, (start, end, text) in clips:
        more: dict[str, Any] = {"media": path, "audio_type": "vb", "label": category or None}
        name = f"{video}_{number}"
        yield Row(name, video, name, "howto100m", split, [text], ["en"], start=start, end=end, **more)


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
    texts = [tables.bounded(" ".join(text for _, _, text in clip)) for clip in clips]
    return [(clip[0][0], max(end for _, end, _ in clip), text) for clip, text in zip(clips, texts, strict=True)]


# Sounds


def audioset(place: Path, media: MediaFolder) -> Found:
    """10 s of YouTube videos with sound events; caption "The sound of A, B", label "A;B" (the classes' names)."""
    files = {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"}
    (classes,) = tables.need(place, "class_labels_indices.csv")
    names = {line["mid"]: line["display_name"] for _, line in tables.read_csv(classes, "mid", "display_name")}

    def row(split: str, line: dict[str, str]) -> Row:
        mids = [mid.strip() for mid in line["positive_labels"].split(",")]
        if unknown := [mid for mid in mids if mid not in names]:
            raise ValueError(f"label {unknown[0]!r} is not in {classes.name}")
        labels = [names[mid] for mid in mids]
        start, end = float(line["start_seconds"]), float(line["end_seconds"])
        more = {"audio_type": "nb", "label": ";".join(labels)}
        return tables.clip_row(
            media, "audioset", split, line["YTID"], start, end, [f"The sound of {', '.join(labels)}"], **more
        )

    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
    lines = tables.read_csvs(
        place, {f"{name}_segments.csv": split for name, split in files.items()}, *columns, header=False
    )
    return tables.rows((line for line in lines if not line[2]["YTID"].startswith("#")), row)


def audiocaps(place: Path, media: MediaFolder) -> Found:
    """10 s of AudioSet described in words: one caption of a train clip, five of a val or test clip, a line each."""

    def row(split: str, line: dict[str, str]) -> Row:
        start = float(line["start_time"])
        clip = line["youtube_id"], start, start + 10
        return tables.clip_row(media, "audiocaps", split, *clip, [line["caption"]], audio_type="nb")

    files = {"train.csv": "train", "val.csv": "val", "test.csv": "test"}
    return tables.rows(tables.read_csvs(place, files, "youtube_id", "start_time", "caption"), row, join=True)


def clotho(place: Path, media: MediaFolder) -> Found:
    """Sounds of 15 to 30 s with five captions each."""
    columns = [f"caption_{i}" for i in range(1, 6)]
    parts = {"train": "development", "val": "validation", "test": "evaluation"}

    def row(split: str, line: dict[str, str]) -> Row:
        name = line["file_name"]
        usual = inside(f"{parts[split]}/{name}")  # where the archives put it: another part may have the same name
        path = usual if (media.root / usual).is_file() else media.find(os.path.splitext(name)[0])
        return tables.whole_row("clotho", split, name, path, [line[column] for column in columns], audio_type="nb")

    files = {f"clotho_captions_{part}.csv": split for split, part in parts.items()}
    return tables.rows(tables.read_csvs(place, files, "file_name", *columns), row)


def esc50(place: Path, media: MediaFolder) -> Found:
    """5 s of environmental sounds in 50 classes; the folds fold1 to fold5 are the splits, label = category."""

    def row(split: str, line: dict[str, str]) -> Row:
        name, label = line["filename"], line["category"]
        if not re.fullmatch("[1-5]", line["fold"]):
            raise ValueError(f"fold {line['fold']!r} is not 1 to 5")
        more = {"audio_type": "nb", "label": label, "group": line["src_file"]}  # the recording that clips are cut from
        path = media.find(os.path.splitext(name)[0])
        return tables.whole_row("esc50", f"fold{line['fold']}", name, path, [label.replace("_", " ")], **more)

    return tables.rows(tables.read_csvs(place, {"meta/esc50.csv": ""}, "filename", "fold", "category", "src_file"), row)


# Videos


def msrvtt(place: Path, media: MediaFolder) -> Found:
    """10,000 clips with 20 captions each, cut already; the full split."""
    (path,) = tables.need(place, "MSRVTT_data.json")
    data = tables.read_json(path, dict, videos=list, sentences=list)
    told: dict[str, list[str]] = defaultdict(list)
    yield from _sentences(path, data, told)

    def row(_: str, video: dict[str, Any]) -> Row:
        name, split = video["video_id"], {"validate": "val"}.get(video["split"], video["split"])
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r} is not train, validate or test")
        return tables.whole_row("msrvtt", split, name, media.find(name), told.get(name, []))

    yield from tables.rows(_by(path, "", data["videos"], "video_id"), row)


def msrvtt_1ka(place: Path, media: MediaFolder) -> Found:
    """MSR-VTT as text-video retrieval uses it: 9,000 clips to train with, 1,000 to test with one sentence each."""
    path, train, test = tables.need(place, "MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")
    told: dict[str, list[str]] = defaultdict(list)
    yield from _sentences(path, tables.read_json(path, dict, sentences=list), told)

    def row(split: str, line: dict[str, str]) -> Row:
        name = line["video_id"]
        if split == "train" and name not in told:
            raise ValueError(f"{name} has no sentence in {path.name}")
        texts = told[name] if split == "train" else [line["sentence"]]
        return tables.whole_row("msrvtt_1ka", split, name, media.find(name), texts)

    trained = ((where, "train", line) for where, line in tables.read_csv(train, "video_id"))
    tested = ((where, "test", line) for where, line in tables.read_csv(test, "video_id", "sentence"))
    yield from tables.rows(itertools.chain(trained, tested), row)


def _sentences(path: Path, data: dict[str, Any], told: dict[str, list[str]]) -> Iterator[Skipped]:
    """Fills told: sentences by video."""
    for number, sentence in enumerate(data["sentences"]):
        try:
            told[sentence["video_id"]].append(sentence["caption"])
        except (TypeError, KeyError) as error:
            yield Skipped("malformed", f"{path.name}: sentence {number}", tables.reason(error))


def vatex(place: Path, media: MediaFolder) -> Found:
    """10 s of YouTube videos with ten English and ten Chinese captions, or none in the private test."""

    def row(split: str, clip: dict[str, Any]) -> Row:
        name = clip["videoID"]
        if not (parts := re.fullmatch(r"(.+)_(\d+)_(\d+)", name)):  # a YouTube id may hold _ itself
            raise ValueError(f"videoID {name} is not ID_START_END")
        clip_at = parts[1], float(parts[2]), float(parts[3])
        made = tables.clip_row(media, "vatex", split, *clip_at, clip.get("enCap", []))
        chinese = tables.captions(clip.get("chCap", []))
        made.id, made.captions = name, made.captions + chinese
        made.caption_langs += ["zh"] * len(chinese)
        return made

    files = {
        "vatex_training_v1.0.json": "train",
        "vatex_validation_v1.0.json": "val",
        "vatex_public_test_english_v1.1.json": "test",
        "vatex_private_test_without_annotations.json": "private",
    }
    loaded = ((path, split, tables.read_json(path, list)) for path, split in tables.some(place, files))
    lines = (line for path, split, clips in loaded for line in _by(path, split, clips, "videoID"))
    return tables.rows(lines, row)


def _by(path: Path, split: str, items: list[Any], key: str) -> Iterator[Line]:
    """Items of a JSON list by their id, else by their number."""
    for number, item in enumerate(items):
        name = item.get(key, number) if isinstance(item, dict) else number
        yield f"{path.name}: {name}", split, item


def activitynet(place: Path, media: MediaFolder) -> Found:
    """Whole videos, each with its sentences joined to a paragraph. val_1 and val_2 tell the same videos anew."""

    def row(split: str, pair: tuple[str, dict[str, Any]]) -> Row:
        name, told = pair
        video = name.removeprefix("v_")
        path = media.find(name) or media.find(video)
        return tables.whole_row("activitynet", split, video, path, [" ".join(tables.cleaned(told["sentences"]))])

    files = {"train.json": "train", "val_1.json": "val", "val_2.json": "val2"}
    loaded = ((path, split, tables.read_json(path, dict)) for path, split in tables.some(place, files))
    lines = ((f"{path.name}: {pair[0]}", split, pair) for path, split, data in loaded for pair in data.items())
    return tables.rows(lines, row)


def youcook2(place: Path, media: MediaFolder) -> Found:
    """Steps of recipes: one row per annotated segment, label = the recipe's number."""
    (path,) = tables.need(place, "youcookii_annotations_trainval.json")
    splits = {"training": "train", "validation": "val", "testing": "test"}

    def row(_: str, step: tuple[str, dict[str, Any], dict[str, Any]]) -> Row:
        video, told, segment = step
        if told["subset"] not in splits:
            raise ValueError(f"subset {told['subset']!r} is not one of {', '.join(splits)}")
        (start, end), more = segment["segment"], {"label": str(told["recipe_type"])}
        texts = [segment.get("sentence", "")]
        return tables.clip_row(
            media, "youcook2", splits[told["subset"]], video, float(start), float(end), texts, **more
        )

    def lines() -> Iterator[Line]:
        for video, told in tables.read_json(path, dict, database=dict)["database"].items():
            segments = told.get("annotations") if isinstance(told, dict) else None
            for segment in segments if isinstance(segments, list) else [{}]:
                yield f"{path.name}: {video}", "", (video, told, segment)

    return tables.rows(lines(), row)


def ucf101(place: Path, media: MediaFolder) -> Found:
    """Human actions in 101 classes. Official split K: test0K against all others, train holds those never tested."""
    (classes,) = tables.need(place, "classInd.txt")
    numbers: dict[str, str] = {}
    for where, line in tables.read_lines(classes):
        number, *name = line.split()
        if name:
            numbers[name[0]] = number
        else:
            yield Skipped("malformed", where, "not a number and a class")
    seen: dict[str, str] = {}

    def row(split: str, line: str) -> Row:
        path, *number = line.split()
        label, name = path.partition("/")[0], os.path.splitext(os.path.basename(path))[0]
        if seen.setdefault(path, split) != split:
            raise ValueError(f"{name} is in {seen[path]} too")
        if label not in numbers or number not in ([], [numbers[label]]):
            raise ValueError(f"{' '.join([label, *number])} is not a class of {classes.name}")
        caption = re.sub(r"(?<=.)(?=[A-Z])", " ", label).lower()
        more = {"label": label, "group": re.sub(r"_c\d+$", "", name)}  # clips of one g.. are cut from one video
        return tables.whole_row("ucf101", split, name, media.find(name), [caption], **more)

    tests = tables.some(place, {f"testlist0{k}.txt": f"test0{k}" for k in (1, 2, 3)})
    trains = tables.some(place, {f"trainlist0{k}.txt": "train" for k in (1, 2, 3)})
    lines = ((where, split, line) for path, split in tests + trains for where, line in tables.read_lines(path))
    yield from tables.rows((each for each in lines if each[1] != "train" or each[2].split()[0] not in seen), row)


# A folder with captions.csv or captions.jsonl


def folder(place: Path, root: Path) -> Found:
    """captions.csv or .jsonl: path, caption[, start, end, audio_type, label, split, lang].

    Lines with equal path, start, end and split are one sample with several captions.
    """
    file = next((f for f in (place, place / "captions.csv", place / "captions.jsonl") if f.is_file()), None)
    if file is None:
        raise UserError(f"no captions.csv or captions.jsonl in {place}: write one with columns path, caption")
    lines = tables.read_csv(file, "path", "caption") if file.suffix == ".csv" else tables.read_lines(file)
    return tables.rows(((where, "", line) for where, line in lines), lambda _, line: _own_row(root, line), join=True)


def _own_row(root: Path, line: Any) -> Row:
    line = parse_json(line) if isinstance(line, str) else line
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    get: Callable[..., Any] = {key: value for key, value in line.items() if value not in (None, "")}.get
    path, caption, kind, lang = (
        get("path"),
        tables.clean(get("caption", "")),
        get("audio_type", "both"),
        get("lang", "en"),
    )
    if not path or not caption:
        raise ValueError("path or caption is empty")
    if not isinstance(path, str) or not isinstance(lang, str) or isinstance(get("label"), dict | list):
        raise ValueError("path, lang or label is no text")
    suffix = os.path.splitext(inside(path))[1].lower()
    if suffix not in PICTURES + VIDEOS + SOUNDS:
        raise ValueError(f"{path}: unknown kind of file, not one of {' '.join(PICTURES + VIDEOS + SOUNDS)}")
    if kind not in ("vb", "nb", "both"):
        raise ValueError(f"audio_type {kind!r} is not vb, nb or both")
    start, end = (None if get(name) is None else float(get(name)) for name in ("start", "end"))
    tables.check_span(start, end)
    span = "" if start is end is None else f"@{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"
    more: dict[str, Any] = {"picture" if suffix in PICTURES else "media": path if (root / path).is_file() else None}
    label = None if get("label") is None else str(get("label"))
    more |= {"lang": lang, "audio_type": kind, "label": label, "start": start, "end": end}
    split = slug(str(get("split", "train")))
    return Row(path + span, path, path, slug(root.name), split, [caption], [lang], **more)
