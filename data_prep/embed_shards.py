"""Embed the shards of folders with frozen towers, each rank its part, and write the folders' indexes of vectors."""

import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.precomputed_embeddings import FOLDER, MEMBER
from clip4vla.data.sampler import EvalSampler
from clip4vla.data.shards import INDEX, Shard, ShardFolder, write_index, write_shard
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_json
from clip4vla.models.model import Model
from clip4vla.models.towers import tokenizer
from clip4vla.models.towers_fingerprint import embeddings_fingerprint
from clip4vla.training.run_setup import build_model

CLIPS = 64  # in a batch; fixed, and batches never mix shards, so that a shard's bytes depend on nothing else
SIGHT = 150  # s until a network file system shows what another node has written
PATIENCE = datetime.timedelta(days=7)  # that a rank which has finished waits for the others


@dataclass
class EmbeddingTask:
    """Name one shard whose vectors are wanted: number `number` of the folder, made by towers of this identity."""

    folder: ShardFolder
    number: int
    identity: str

    @property
    def shard(self) -> Shard:
        """Return the shard."""
        return self.folder.shards[self.number]

    def keys(self) -> list[str]:
        """Return the keys of the shard's samples."""
        return self.folder.entries(self.number).keys()

    @property
    def tar(self) -> Path:
        """Return the path of the tar that its vectors go to."""
        return place(self.folder) / self.shard.name

    @property
    def note(self) -> Path:
        """Return the path of the note that says that they are finished, with their entry for index.json."""
        return place(self.folder) / ".parts" / f"{self.shard.name}.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the note, if it and the tar are there, of these towers and of this very shard."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            noted = note["identity"], note["shard"]["of"], note["shard"]["bytes"]
            return note if noted == (self.identity, self.shard.sha256, self.tar.stat().st_size) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def run(cfg: RunConfig) -> None:
    """Embed what is not embedded yet of the folders of data.train and data.val; rank 0 prints counts of each folder."""
    device = collectives.setup()
    torch.backends.cuda.matmul.allow_tf32 = True  # its 11 bits are those of float16, in which vectors are kept
    folders = open_folders(cfg.data.train | cfg.data.val, "data.train")
    for folder in folders:
        if not isinstance(folder.fs, LocalFileSystem):
            raise UserError(f"{folder.url}: vectors are written beside local shards: embed a copy, upload its clip/")
    model = frozen_towers(cfg, folders[0]).to(device)
    fingerprint = embeddings_fingerprint(model)
    embed(cfg, model, folders, fingerprint)
    if collectives.rank() == 0:
        for folder in folders:
            finish(folder, fingerprint)


def place(folder: ShardFolder) -> Path:
    """Return where the vectors of a folder go."""
    return Path(folder.path, FOLDER)


def frozen_towers(cfg: RunConfig, folder: ShardFolder) -> Model:
    """Build the model that a run of this config starts with; UserError if its towers have no weights or will change."""
    resume = collectives.all_gather_objects(newest_checkpoint(cfg.run_dir))[0]
    model, origin = build_model(cfg, folder.fingerprint, resume)
    if origin == "scratch":
        raise UserError(f"model.clip={cfg.model.clip}: towers without weights: name weights there or in init_from")
    for tower in ("text", "vision"):
        if tower in model.cfg.trainable_towers.split("+"):
            raise UserError(
                f"model.trainable_towers={model.cfg.trainable_towers}: {tower} trains: its vectors would not last"
            )
    return model.eval()


def embed(cfg: RunConfig, model: Model, folders: list[ShardFolder], fingerprint: dict[str, Any]) -> None:
    """Make the vectors of every shard that has none yet, this rank its part of them; returns when all ranks are done."""
    identity = fingerprint["clip"]["identity"]
    units = [EmbeddingTask(folder, i, identity) for folder in folders for i in range(len(folder.shards))]
    missing = [i for i, unit in enumerate(units) if not unit.finished()] if collectives.rank() == 0 else []
    for i in missing:
        (place(units[i].folder) / INDEX).unlink(missing_ok=True)  # no index until the folder is whole
    together = dist.new_group(backend="gloo", timeout=PATIENCE)
    missing = collectives.all_gather_objects(missing)[0]
    mine = [units[i] for i in missing[collectives.rank() :: collectives.world_size()]]
    hide = True if collectives.rank() else None
    with tqdm(total=sum(unit.shard.samples for unit in mine), unit="clip", disable=hide) as bar, torch.no_grad():
        for folder in folders:
            loader = make_loader(cfg, folder, next(model.parameters()).device)
            for unit in (unit for unit in mine if unit.folder is folder):
                make(unit, model, loader, bar)
    dist.barrier(together)


def make_loader(cfg: RunConfig, folder: ShardFolder, device: torch.device) -> Loader:
    """Make the loader of captions and frames; every rank for itself, in the order that make() gives it."""
    return Loader(
        [folder], None, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=("frames",), device=device, damage_log=place(folder) / f"corrupt-{collectives.rank()}.jsonl", whole=True,
    )  # fmt: skip


def make(unit: EmbeddingTask, model: Model, loader: Loader, bar: tqdm) -> None:
    """Write the tar of one shard, then its note."""
    unit.note.parent.mkdir(parents=True, exist_ok=True)
    sizes = [shard.samples if i == unit.number else 0 for i, shard in enumerate(unit.folder.shards)]
    loader.order = EvalSampler([sizes], CLIPS)
    note = {"identity": unit.identity, "captions": 0, "frames": 0, "corrupt": []}
    start = time.perf_counter()
    entry = write_shard(unit.tar, _members(unit.keys(), model, loader, note, bar))
    assert [key for key, _ in entry["entries"]] == unit.keys(), unit.tar
    seconds = time.perf_counter() - start
    write_json(unit.note, note | {"shard": entry | {"of": unit.shard.sha256}, "seconds": seconds})


def _members(
    of: list[str], model: Model, loader: Loader, note: dict[str, Any], bar: tqdm
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, its one member) of the samples with these keys; counts go into the note."""
    keys = iter(of)
    for batch in loader.batches(0, len(loader.order)):
        rows = vectors(model, loader, batch.to(loader.device))
        for meta, (texts, frames), key in zip(batch.meta, rows, keys, strict=False):  # keys last: they go on
            if not meta["id"]:
                note["corrupt"].append(key)
            note["captions"] += len(texts)
            note["frames"] += len(frames)
            yield key, {MEMBER: torch.cat([texts, frames]).numpy().astype("<f2").tobytes()}
            bar.update(1)


def vectors(model: Model, loader: Loader, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (caption vectors (n, D), frame vectors (m, D)), unit length, float16, of each clip.

    A corrupt clip has none: n = m = 0.
    """
    captions = [meta["captions"] for meta in batch.meta]
    flat = [text for texts in captions for text in texts]
    texts = model.encode_texts(flat, loader.tokenize).half().cpu()
    frames = F.normalize(model.encode_frames(batch.frames).float(), dim=-1).half().cpu()
    counts = batch.frame_counts.tolist()
    return list(zip(texts.split([len(t) for t in captions]), frames.split(counts), strict=True))


def finish(folder: ShardFolder, fingerprint: dict[str, Any]) -> None:
    """Write index.json of a folder's vectors, and print a line on them."""
    units = [EmbeddingTask(folder, i, fingerprint["clip"]["identity"]) for i in range(len(folder.shards))]
    notes = _notes(units)
    counts = {"samples": len(folder), "corrupt": sum(len(note["corrupt"]) for note in notes)}
    counts |= {name: sum(note[name] for note in notes) for name in ("captions", "frames")}
    size, seconds = sum(note["shard"]["bytes"] for note in notes), sum(note["seconds"] for note in notes)
    shards = (note["shard"] for unit in units if (note := unit.finished()))  # one by one: their entries are large
    names = {"source": folder.source, "split": folder.split, "media_root": ".."}
    write_index(place(folder), fingerprint=fingerprint, counts=counts, shards=shards, **names)
    print(
        f"{place(folder)}: {counts['samples']} clips ({counts['corrupt']} corrupt), {counts['captions']} captions, "
        f"{counts['frames']} frames, {size / 1e6:.1f} MB, {counts['samples'] / seconds:.0f} clips/s a rank",
        flush=True,
    )


def _notes(units: list[EmbeddingTask]) -> list[dict[str, Any]]:
    """Return the notes of all shards without their entries, once they are visible here."""
    deadline = time.monotonic() + SIGHT
    notes: list[dict[str, Any]] = []
    for unit in units:
        while not (note := unit.finished()):
            if time.monotonic() > deadline:
                raise UserError(f"{unit.tar}: finished vectors are gone again (another run?): start embed.py again")
            time.sleep(1)
        notes.append(note | {"shard": note["shard"] | {"entries": []}})
    return notes
