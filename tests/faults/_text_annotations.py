"""Small annotation files of every format that data_prep/annotations.py reads, as damage starts from them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clip4vla.config import DataConfig
from data_prep.annotations import read
from data_prep.manifest import ManifestRow
from faults._trees import Damage
from faults._watch import Target

IDS = "-_a-b_c-d_e", "abcdefghijk", "v_b-0123456"


def _table(head: str, line: Callable[[int, str], str]) -> str:
    return head + "".join(line(i, name) for i, name in enumerate(IDS))


SPLITS = "train", "validate", "test"
TALK = {"start": [0, 10, 20], "end": [10, 19.5, 32], "text": ["a &amp; b c d", "e f g h i", "j k l m n"]}
TOLD = {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]], "sentences": ["A  man.", " He &lt; she. "]}
STEPS = [{"id": i, "segment": [10 * i, 10 * i + 9], "sentence": f"add oil {i}"} for i in range(2)]
CLIPS = [{"videoID": f"{name}_000122_000132", "enCap": ["A man.", "B."], "chCap": ["一个人。"]} for name in IDS]
MSRVTT = {
    "info": {"contributor": "Microsoft"},
    "videos": [{"video_id": name, "split": split, "start time": 1.0} for name, split in zip(IDS, SPLITS, strict=True)],
    "sentences": [{"caption": "a man &amp; a car", "video_id": name, "sen_id": i} for i, name in enumerate(IDS)],
}  # fmt: skip
CLASSES = 'index,mid,display_name\n0,/m/09x0r,Speech\n1,/t/dd00125,"Inside, small room"\n'
SEGMENTS = "# created\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(
    f'{name}, 30.000, 40.000, "/m/09x0r,/t/dd00125"\n' for name in IDS
)
CAPTIONED = _table("audiocap_id,youtube_id,start_time,caption\n", lambda i, name: f'{i},{name},130,"Water, {i}"\n')
CLOTHO = _table(
    "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n", lambda i, name: f"{name}.mp4,a,b,c,d,e\n"
)
ESC50 = _table(
    "filename,fold,target,category,esc10,src_file,take\n", lambda i, name: f"{name}.wav,1,19,dog_bark,True,{name},A\n"
)
OWN = _table(
    "path,caption,start,end,audio_type,label,split,lang\n",
    lambda i, name: f'{name}.mp4,"Water, {name}",1,5,vb,x,val,fr\n',
)
LINES = [
    {"path": f"{name}.mp4", "caption": "Water", "start": 0, "end": 5.5, "label": "x", "lang": "fr"} for name in IDS
]
STAMP = "A chick.\nfr.utf8=Un poussin.\nel.utf8=Ένα κοτόπουλο.\n"
FORMATS: dict[str, dict[str, Any]] = {
    "howto100m": {
        "HowTo100M_v1.csv": _table(
            "video_id,category_1,category_2,rank,task_id\n", lambda i, name: f"{name},Food,Recipes,3,77\n"
        ),
        "caption.json": dict.fromkeys(IDS, TALK),
    },
    "audioset": {"class_labels_indices.csv": CLASSES, "balanced_train_segments.csv": SEGMENTS},
    "msrvtt": {"MSRVTT_data.json": MSRVTT},
    "msrvtt_1ka": {
        "MSRVTT_data.json": MSRVTT,
        "MSRVTT_train.9k.csv": "video_id\n" + "".join(f"{name}\n" for name in IDS[:2]),
        "MSRVTT_JSFUSION_test.csv": f'key,vid_key,video_id,sentence\nret0,msr0,{IDS[2]},"a person, connecting"\n',
    },
    "vatex": {"vatex_training_v1.0.json": CLIPS},
    "audiocaps": {"val.csv": CAPTIONED},
    "clotho": {"clotho_captions_development.csv": CLOTHO},
    "activitynet": {"train.json": dict.fromkeys(IDS, TOLD)},
    "youcook2": {
        "youcookii_annotations_trainval.json": {
            "database": {name: {"subset": "training", "recipe_type": "113", "annotations": STEPS} for name in IDS}
        }
    },
    "esc50": {"meta/esc50.csv": ESC50},
    "ucf101": {
        "classInd.txt": "1 ApplyEyeMakeup\n2 BoxingPunchingBag\n",
        "testlist01.txt": f"ApplyEyeMakeup/{IDS[0]}.avi\n",
        "trainlist01.txt": f"ApplyEyeMakeup/{IDS[1]}.avi 1\nBoxingPunchingBag/{IDS[2]}.avi 2\n",
    },
    "folder csv": {"captions.csv": OWN},
    "folder jsonl": {"captions.jsonl": "".join(json.dumps(line) + "\n" for line in LINES)},
    "stamps": {"animals/chick.txt": STAMP, "animals/dog.txt": "A dog.\nfr.utf8=Un chien.\n"},
}


def corrupt(name: str, data: bytes, damage: Damage) -> bytes:
    """By what the name says is in the file."""
    kinds = {"json": damage.json, "jsonl": damage.jsonl, "csv": damage.csv, "txt": damage.lines}
    return kinds[name.rpartition(".")[2]](data)


def prepare(form: str, root: Path) -> tuple[DataConfig, dict[Path, bytes]]:
    """Settings, and the intact files."""
    media, place = root / "media", root / "annotations"
    media.mkdir()
    place.mkdir()
    (media / "link").symlink_to("../../canary")
    (media / "loop").symlink_to(".")
    (media / "again").symlink_to("../media")
    for name in IDS:
        (media / f"{name}.mp4").touch()
    dataset, place = form.split()[0], media if form == "stamps" else place
    files = {}
    for name, tree in FORMATS[form].items():
        (place / name).parent.mkdir(exist_ok=True)
        files[place / name] = tree.encode() if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False).encode()
        (place / name).write_bytes(files[place / name])
        if form == "stamps":
            (place / name).with_suffix(".png").write_bytes(name.encode())
            (place / name).with_suffix(".ogg").touch()
    return DataConfig(dataset=dataset, media_root=str(media), annotations=str(place)), files  # type: ignore[arg-type]


def case(state: tuple[DataConfig, dict[Path, bytes]], damage: Damage) -> str:
    """The rows of what one corrupt file leaves; each is fit to be written, and lies below the media root."""
    cfg, files = state
    path = damage.rng.choice(list(files))
    path.write_bytes(corrupt(path.name, files[path], damage))
    try:
        rows, skipped = read(cfg)
    finally:
        path.write_bytes(files[path])
    for row in rows:
        _sound(row)
    for item in skipped:
        json.dumps(vars_of(item), ensure_ascii=False).encode()
        assert isinstance(item.where, str) and isinstance(item.reason, str), item
    return "rows and counted skips" if skipped else "rows"


def vars_of(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


def _sound(row: ManifestRow) -> None:
    tree = vars_of(row)
    json.dumps(tree, ensure_ascii=False).encode()
    texts = [
        row.id,
        row.item,
        row.group,
        row.source,
        row.split,
        row.lang,
        row.audio_type,
        *row.captions,
        *row.caption_langs,
    ]
    texts += [text for text in (row.media, row.picture, row.label) if text is not None]
    assert all(isinstance(text, str) for text in texts), tree
    assert not {"/", "..", "."} & {*row.split, *row.source}, tree
    for path in (row.media, row.picture):
        assert path is None or not path.startswith("/") and ".." not in path.split("/"), tree
    assert all(isinstance(x, float | int | None) for x in (row.start, row.end)), tree


TARGETS = [
    Target(f"annotations of {form}", partial(prepare, form), case, may=("os.fork",)) for form in FORMATS
]  # fmt: skip
