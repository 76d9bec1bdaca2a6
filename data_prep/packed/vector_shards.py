"""Write vectors that another program computed as the precomputed embeddings of shard folders (embed.py --from FILES)."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.data.loader import MIN_READS, open_folders
from clip4vla.data.precomputed_embeddings import MEMBER
from clip4vla.data.sample_metadata import parse
from clip4vla.data.shards import INDEX, CorruptSample
from clip4vla.errors import UserError
from clip4vla.towers.space import is_space
from data_prep.embed_shards import EmbeddingTask, Place, finish, must_be_one_process, open_places, write
from data_prep.packed.vectors import BROKEN, VectorFiles

TOGETHER = 64  # clips whose json is read at once


def run(cfg: RunConfig, files: Sequence[str]) -> None:
    """Write FOLDER/clip/ of every folder of data.train, data.val and data.test; print a line on each, and on the files."""
    if not is_space(cfg.model.clip):
        raise UserError(
            f"--from: model.clip={cfg.model.clip} is computed here: name the space of the files, model.clip=vectors:NAME"
        )
    must_be_one_process()
    folders = open_folders(cfg.data.train | cfg.data.val | cfg.data.test, "data.train")
    with open_places(folders) as places:
        vectors = VectorFiles(files, places[0].out.local / ".parts")
        made = {"identity": vectors.identity, "name": cfg.model.clip, "dim": vectors.width, "kinds": vectors.kinds()}
        print(
            f"{cfg.model.clip}: {vectors.length} vectors of width {vectors.width} ({' and '.join(vectors.kinds())}), "
            f"space {vectors.identity[:8]}", flush=True,
        )  # fmt: skip
        for place in places:
            _write_folder(place, vectors, {"clip": made}, cfg.data.max_corrupt_fraction)


def _write_folder(place: Place, vectors: VectorFiles, fingerprint: dict[str, Any], most: float) -> None:
    """Write the vectors of a folder's clips, and its index; UserError if more than a share `most` of them have none to use."""
    log = place.out.local / "corrupt-0.jsonl"
    for old in (place.out.local / INDEX, log):
        place.out.remove(old)
    lacking: list[CorruptSample] = []
    for task in place.tasks(fingerprint):
        note = {"identity": task.identity, "captions": 0, "frames": 0, "corrupt": []}
        write(task, note, _members(task, vectors, note, lacking))
    if lacking:
        log.write_text("".join(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in lacking), encoding="utf-8")
        place.out.publish(log)
        count = Counter(sample.reason for sample in lacking)
        reasons = ", ".join(f"{n} {reason}" for reason, n in count.most_common())
        if len(lacking) == len(place.folder) or len(lacking) > most * max(len(place.folder), MIN_READS):
            raise UserError(
                f"{place.folder.url}: {len(lacking)} of {len(place.folder)} clips have no vectors to use ({reasons}), more "
                f"than data.max_corrupt_fraction={most}; they are listed in {place.out.shown(log)}"
            )
        print(f"{place.folder.url}: {len(lacking)} clips left out ({reasons}): {place.out.shown(log)}", flush=True)
    finish(place, fingerprint)


def _members(
    task: EmbeddingTask, vectors: VectorFiles, note: dict[str, Any], lacking: list[CorruptSample]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, its one member) of a shard's samples, empty where there is nothing to use; counts go into the note."""
    keys = task.keys()
    for first in range(0, len(keys), TOGETHER):
        some = keys[first : first + TOGETHER]
        samples = task.folder.read([(task.number, first + i) for i in range(len(some))], ("json",))
        for key, sample in zip(some, samples, strict=True):
            data = b""
            try:
                if isinstance(sample, CorruptSample):
                    raise ValueError("corrupt in the shard")
                data, captions, frames = _of_clip(parse(sample.get("json", b"")), vectors)
                note["captions"] += captions
                note["frames"] += frames
            except ValueError as error:
                note["corrupt"].append(key)
                lacking.append(CorruptSample(task.shard.name, key, str(error)))
            yield key, {MEMBER: data}


def _of_clip(clip: dict[str, Any], vectors: VectorFiles) -> tuple[bytes, int, int]:
    """Return a clip's vectors, captions first, and the number of each kind; raises ValueError with the reason if it has none."""
    counts = {kind: vectors.count(kind, clip["id"]) for kind in vectors.kinds()}
    if not any(counts.values()):
        raise ValueError("without vectors")
    if BROKEN in counts.values():
        raise ValueError("with vectors that are zero or not finite")
    if counts.get("text", len(clip["captions"])) != len(clip["captions"]):
        raise ValueError("with another number of text vectors than of captions")
    data = b"".join(vectors.get(kind, clip["id"]) for kind in counts)
    return data, counts.get("text", 0), counts.get("vision", 0)
