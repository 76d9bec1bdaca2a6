"""What data folders hold as text: index.json and entries.jsonl, each sample's json, the manifest; and kept features."""

import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clip4vla.config import DataConfig, DataSources, MaskConfig
from clip4vla.data.loader import Loader
from clip4vla.data.sampler import EvalSampler
from clip4vla.data.shards import ENTRIES, INDEX, CorruptSample, ShardFolder, fingerprint, write_index, write_shard
from clip4vla.evaluation import features
from clip4vla.io.safe_load import save_tensors
from clip4vla.media.images import jpeg
from clip4vla.towers.tokenizer import tokenizer
from data_prep.checks.folders import check
from data_prep.manifest import ManifestRow
from data_prep.plan import MANIFEST, make_plan, read_plan
from faults._trees import Damage
from faults._watch import Target

SIDE, ROWS = 224, 300
META = {
    "id": "sounds/dog", "item": "dog", "group": "dog", "source": "sounds", "split": "train", "captions": ["A dog.", "Un chien."],
    "caption_langs": ["en", "fr"], "lang": "en", "audio_type": "nb", "label": "animals", "start": None, "end": 2.5,
    "duration": 2.4, "n_frames": 2, "n_segments": 2, "n_rows": ROWS, "has_audio": True, "has_frames": True,
    "media": {"audio": "dog.ogg", "frames": "dog.png"},
}  # fmt: skip
ROW = ManifestRow("dog", "dog", "dog", "sounds", "train", ["A dog."], ["en"], media="dog.ogg", start=0.0, end=2.5)


def members(meta: bytes) -> dict[str, bytes]:
    """Of one sample."""
    noise = np.random.default_rng(0).integers(0, 255, (2 * SIDE, SIDE, 3), dtype=np.uint8)
    return {"json": meta, "fbank.jpg": jpeg(noise[..., :1], 80, "4:4:4"), "frames.jpg": jpeg(noise, 80)}


def folder_of(place: Path, metas: list[bytes]) -> Path:
    """A shard folder of samples with these json."""
    place.mkdir(parents=True, exist_ok=True)
    made = write_shard(
        place / "sounds-train-000000.tar", ((f"{i:07d}-dog", members(meta)) for i, meta in enumerate(metas))
    )
    counts = dict.fromkeys(("samples", "with_audio", "with_frames"), len(metas)) | {"seconds": 2.4, "quarantined": 0}
    names = {"media_root": "../media", "source": "sounds", "split": "train"}
    write_index(place, fingerprint=fingerprint(DataConfig()), **names, counts=counts, shards=[made])
    return place


class Undamaged(NamedTuple):
    """A shard folder and its two texts."""

    place: Path
    index: bytes
    entries: bytes


def shard_folder(root: Path) -> Undamaged:
    place = folder_of(root / "sounds/train", [json.dumps(META).encode()] * 3)
    (place / "link.tar").symlink_to("../../../canary/secret.txt")
    return Undamaged(place, (place / INDEX).read_bytes(), (place / ENTRIES).read_bytes())


def index(state: Undamaged, damage: Damage) -> str:
    """Samples by a corrupt index.json or entries.jsonl, half of the latter with the CRC-32 that index.json then expects."""
    place, head, lines = state
    if damage.rng.random() < 0.5:
        head = damage.json(head)
    else:
        lines = damage.jsonl(lines)
        if damage.rng.random() < 0.7:
            tree = json.loads(head)
            tree["shards"][0] |= {"entries": [0, len(lines), zlib.crc32(lines)], "samples": len(lines.splitlines())}
            head = json.dumps(tree).encode()
    (place / INDEX).write_bytes(head)
    (place / ENTRIES).write_bytes(lines)
    folder = ShardFolder.open(str(place))
    wanted = [(i, n) for i, shard in enumerate(folder.shards) for n in range(min(shard.samples, 5))]
    found = [sample for batch in range(0, len(wanted), 2) for sample in folder.read(wanted[batch : batch + 2])]
    if damage.rng.random() < 0.05:
        check([folder], 0)
    counted = any(isinstance(sample, CorruptSample) for sample in found)
    return "counted damage" if counted else "samples"


def loader(root: Path) -> tuple[Path, Loader]:
    """Where a folder of one sample goes, and a loader of such folders."""
    cfg = DataSources(max_corrupt_fraction=1e9, decode_threads=1)
    folder = ShardFolder.open(str(folder_of(root / "first", [json.dumps(META).encode()])))
    made = Loader(
        [folder], EvalSampler([[1]], 1), cfg, tokenize=tokenizer("ViT-B-32-quickgelu/openai", 77), mask=MaskConfig(), seed=0,
        needs=("frames", "fbank"), device=torch.device("cpu"), damage_log=root / "corrupt.jsonl",
    )  # fmt: skip
    made.batch(0)  # its decoders are made once
    return root / "sample", made


def sample(state: tuple[Path, Loader], damage: Damage) -> str:
    """A batch of one sample whose json was corrupt before its CRC-32 was taken."""
    place, some = state
    some.folders = [ShardFolder.open(str(folder_of(place, [damage.json(json.dumps(META).encode())])))]
    before = some.corrupt
    batch = some.batch(0)
    assert batch.ids == [""] or some.corrupt == before, batch.ids
    assert all(isinstance(name, str) for name in batch.ids)
    return "counted damage" if some.corrupt > before else "batch"


def plan(root: Path) -> tuple[Path, list[ManifestRow], bytes]:
    """A manifest of two shards, and its rows."""
    (root / "link").symlink_to("../canary")
    rows = [ManifestRow(**{name: getattr(ROW, name) for name in ROW.__slots__} | {"id": f"dog{i}"}) for i in range(6)]
    make_plan(root, rows, [], 3)
    return root, rows, (root / MANIFEST).read_bytes()


def planned(state: tuple[Path, list[ManifestRow], bytes], damage: Damage) -> str:
    """The units of a corrupt manifest, whose shards lie in their folder; and the plan made again from it."""
    out, rows, data = state
    head, *lines = data.splitlines(keepends=True)
    if damage.rng.random() < 0.5:  # the sizes go with the lines
        rows_at = damage.rng.randrange(len(lines))
        lines[rows_at] = damage.json(lines[rows_at]).replace(b"\n", b"") + b"\n"
        tree = json.loads(head)
        tree["units"][0][-1], tree["units"][1][-1] = (len(b"".join(some)) for some in (lines[:3], lines[3:]))
        (out / MANIFEST).write_bytes(json.dumps(tree).encode() + b"\n" + b"".join(lines))
    else:
        (out / MANIFEST).write_bytes(damage.jsonl(data))
    found = read_plan(out)
    for unit in found[1] if found else []:
        assert out in unit.tar.resolve().parents, unit
        for row in unit.read():
            assert isinstance(row.id, str) and isinstance(row.captions, list), row
    make_plan(out, rows, [], 3)
    return "units" if found else "no manifest"


def kept(root: Path) -> tuple[Path, dict[str, torch.Tensor], bytes]:
    """Features of a folder as they are kept."""
    root.mkdir(exist_ok=True)
    clips_json = torch.frombuffer(bytearray(json.dumps([META, META]).encode()), dtype=torch.uint8)
    tensors = {"clips": clips_json, "number": torch.arange(2), "v": torch.ones(2, 4), "a": torch.ones(2, 4)}
    save_tensors(tensors, root / "x.safetensors")
    return root / "x.safetensors", tensors, (root / "x.safetensors").read_bytes()


def feature(state: tuple[Path, dict[str, torch.Tensor], bytes], damage: Damage) -> str:
    """Features from a corrupt file: none, or as many vectors as clips."""
    path, tensors, data = state
    if damage.rng.random() < 0.5:
        path.write_bytes(damage.file(data))
    else:
        clips_json = torch.frombuffer(bytearray(damage.json(bytes(tensors["clips"])) or b" "), dtype=torch.uint8)
        changed = tensors | {"clips": clips_json, damage.rng.choice(list(tensors)): _other(damage.rng)}
        save_tensors(changed if damage.rng.random() < 0.5 else tensors | {"clips": clips_json}, path)
    found = features._read(path, "va", 4)
    if found is None:
        return "made again"
    assert len(found.clips) == len(found.number) == len(found.having("va")) and isinstance(found.clips[0]["id"], str)
    return "features"


def _other(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice((0, 1, 2, 3, 1000)) for _ in range(rng.randrange(4))]
    return torch.zeros(shape, dtype=rng.choice((torch.uint8, torch.int64, torch.float32, torch.bool)))


TARGETS = [
    Target("index.json and entries", shard_folder, index, may=("os.fork",)),
    Target("json of samples", loader, sample),
    Target("manifest", plan, planned),
    Target("kept features", kept, feature),
]
