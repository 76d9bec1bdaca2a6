"""Embed the shards of folders with frozen towers, each rank its part, and write the folders' indexes of vectors."""

import contextlib
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
from clip4vla.data.shards import ENTRIES, INDEX, Shard, ShardFolder, write_index, write_shard
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_json
from clip4vla.io.out_folder import OutFolder, open_out
from clip4vla.media.images import Fit
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import embeddings_fingerprint
from clip4vla.towers.space import is_space
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.training.run_setup import build_model

CLIPS = 64  # in a batch; fixed, and batches never mix shards, so that a shard's bytes depend on nothing else
SIGHT = 150  # s until a network file system shows what another node has written
PATIENCE = datetime.timedelta(days=7)  # that a rank which has finished waits for the others


@dataclass
class EmbeddingTask:
    """Name one shard whose vectors are wanted in `out`: number `number` of the folder, made by towers of this identity."""

    folder: ShardFolder
    out: OutFolder
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
        return self.out.local / self.shard.name

    @property
    def note(self) -> Path:
        """Return the path of the note that says that they are finished, with their entry for index.json."""
        return self.out.local / ".parts" / f"{self.shard.name}.json"

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
    if is_space(cfg.model.clip):
        raise UserError(
            f"model.clip={cfg.model.clip}: its vectors are computed elsewhere: name their files, --from FILES"
        )
    device = collectives.setup()
    torch.backends.cuda.matmul.allow_tf32 = True  # its 11 bits are those of float16, in which vectors are kept
    folders = open_folders(cfg.data.train | cfg.data.val, "data.train")
    model = frozen_towers(cfg, folders[0]).to(device)
    fingerprint = embeddings_fingerprint(model)
    with open_places(folders) as places:
        embed(cfg, model, places, fingerprint)
        if collectives.rank() == 0:
            for place in places:
                finish(place, fingerprint)


def must_be_one_process() -> None:
    """Raise UserError if a launcher started several ranks: each would copy the same files into the same folders."""
    collectives.setup()
    if (ranks := collectives.world_size()) > 1:
        raise UserError(
            f"--from: {ranks} ranks would copy the same files: start one process, python data_prep/embed.py .."
        )


@dataclass
class Place:
    """Pair a folder of shards with the one that its vectors go to."""

    folder: ShardFolder
    out: OutFolder

    def tasks(self, fingerprint: dict[str, Any]) -> list[EmbeddingTask]:
        """List a task for each shard, made by towers of this fingerprint."""
        identity = fingerprint["clip"]["identity"]
        return [EmbeddingTask(self.folder, self.out, i, identity) for i in range(len(self.folder.shards))]


@contextlib.contextmanager
def open_places(folders: list[ShardFolder]) -> Iterator[list[Place]]:
    """Yield each folder with the one that its vectors go to: FOLDER/clip, local or at a URL."""
    with contextlib.ExitStack() as stack:
        places = []
        for folder in folders:
            where = folder.path if isinstance(folder.fs, LocalFileSystem) else folder.url
            out = stack.enter_context(open_out(f"{where}/{FOLDER}", cfg=folder.cfg))
            places.append(Place(folder, out))
        yield places


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


def embed(cfg: RunConfig, model: Model, places: list[Place], fingerprint: dict[str, Any]) -> None:
    """Make the vectors of every shard that has none yet, this rank its part of them; returns when all ranks are done."""
    units = [unit for place in places for unit in place.tasks(fingerprint)]
    missing = _missing(places, units) if collectives.rank() == 0 else []
    together = dist.new_group(backend="gloo", timeout=PATIENCE)
    missing = collectives.all_gather_objects(missing)[0]
    mine = [units[i] for i in missing[collectives.rank() :: collectives.world_size()]]
    hide = True if collectives.rank() else None
    with tqdm(total=sum(unit.shard.samples for unit in mine), unit="clip", disable=hide) as bar, torch.no_grad():
        for place in places:
            with _damage_log(place.out) as log:
                loader = make_loader(cfg, place.folder, next(model.parameters()).device, log, model.pictures)
                for unit in (unit for unit in mine if unit.folder is place.folder):
                    make(unit, model, loader, bar)
    dist.barrier(together)


def _missing(places: list[Place], units: list[EmbeddingTask]) -> list[int]:
    """List the numbers of the units that are not finished, and remove the indexes of their folders until these are whole."""
    for place in places:
        place.out.pull(unit.note for unit in units if unit.folder is place.folder)
    missing = [i for i, unit in enumerate(units) if not unit.finished()]
    for i in missing:
        units[i].out.remove(units[i].out.local / INDEX)
    return missing


@contextlib.contextmanager
def _damage_log(out: OutFolder) -> Iterator[Path]:
    """Yield this rank's list of corrupt clips, with what it has by now; it is published however the block ends."""
    log = out.local / f"corrupt-{collectives.rank()}.jsonl"
    out.pull([log])
    try:
        yield log
    finally:
        if log.exists():
            out.publish(log)


def make_loader(
    cfg: RunConfig, folder: ShardFolder, device: torch.device, damage_log: Path, fit: Fit | None = None
) -> Loader:
    """Make the loader of captions and frames; every rank for itself, in the order that make() gives it."""
    return Loader(
        [folder], None, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=("frames",), device=device, damage_log=damage_log, whole=True, fit=fit,
    )  # fmt: skip


def make(unit: EmbeddingTask, model: Model, loader: Loader, bar: tqdm) -> None:
    """Write the tar of one shard, then its note."""
    sizes = [shard.samples if i == unit.number else 0 for i, shard in enumerate(unit.folder.shards)]
    loader.order = EvalSampler([sizes], CLIPS)
    note = {"identity": unit.identity, "captions": 0, "frames": 0, "corrupt": []}
    write(unit, note, _members(unit.keys(), model, loader, note, bar))


def write(unit: EmbeddingTask, note: dict[str, Any], members: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    """Write the tar of one shard from (key, its one member) of all its samples, then its note, in which members has counted."""
    unit.note.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    entry = write_shard(unit.tar, members)
    assert [key for key, _ in entry["entries"]] == unit.keys(), unit.tar
    unit.out.publish(unit.tar, keep=False)
    seconds = time.perf_counter() - start
    write_json(unit.note, note | {"shard": entry | {"of": unit.shard.sha256}, "seconds": seconds})
    unit.out.publish(unit.note)


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


def finish(place: Place, fingerprint: dict[str, Any]) -> None:
    """Write index.json of a folder's vectors, and print a line on them."""
    folder, out, units = place.folder, place.out, place.tasks(fingerprint)
    out.refresh()  # other ranks have written there
    out.pull(unit.note for unit in units)
    notes = _notes(units)
    counts = {"samples": len(folder), "corrupt": sum(len(note["corrupt"]) for note in notes)}
    counts |= {name: sum(note[name] for note in notes) for name in ("captions", "frames")}
    size, seconds = sum(note["shard"]["bytes"] for note in notes), sum(note["seconds"] for note in notes)
    shards = (note["shard"] for unit in units if (note := unit.finished()))  # one by one: their entries are large
    names = {"source": folder.source, "split": folder.split, "media_root": ".."}
    write_index(out.local, fingerprint=fingerprint, counts=counts, shards=shards, **names)
    for name in (ENTRIES, INDEX):  # the index last
        out.publish(out.local / name)
    print(
        f"{out.url}: {counts['samples']} clips ({counts['corrupt']} corrupt), {counts['captions']} captions, "
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
