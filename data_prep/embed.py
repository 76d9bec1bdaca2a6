"""Frozen vectors: what a pre-training run's text and vision towers give for the captions and frames of its shards.

    python data_prep/embed.py [CONFIG.yaml] [KEY=VALUE ...]      # the run's own config; without one: configs/pretrain/stamps.yaml
    deepspeed --num_accelerators 8 data_prep/embed.py ...        # each rank takes its shards; also torchrun, or srun

Fills FOLDER/clip/ (clip4vla/vectors.py says with what) for every folder of data.train and data.val; the shards stay as they
are. Pre-training then runs the audio tower alone and reads no frames. May be killed at any moment and started again: finished
shards are kept (.parts/ says which), those of other towers or of rewritten shards are made anew. The bytes depend on the
number of threads of a rank (OMP_NUM_THREADS) and on the device, not on the number of ranks.
"""

import datetime
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import cli, command_line  # noqa: E402  first: it says what is not installed
from clip4vla.config import RunConfig, UserError  # noqa: E402


def _settings() -> RunConfig:
    return command_line(RunConfig, "configs/pretrain/stamps.yaml", __doc__)[0]


if __name__ == "__main__":  # before the imports that take seconds: --help and a mistake are answered at once
    cli(_settings)()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from fsspec.implementations.local import LocalFileSystem  # noqa: E402
from tqdm import tqdm  # noqa: E402

from clip4vla import distributed  # noqa: E402
from clip4vla.batch import Batch  # noqa: E402
from clip4vla.build import build_model  # noqa: E402
from clip4vla.checkpoints import newest_checkpoint  # noqa: E402
from clip4vla.files import write_json  # noqa: E402
from clip4vla.loader import Loader, open_folders  # noqa: E402
from clip4vla.model import Model  # noqa: E402
from clip4vla.order import EvalOrder  # noqa: E402
from clip4vla.shards import INDEX, Shard, ShardFolder, write_index, write_shard  # noqa: E402
from clip4vla.towers import tokenizer  # noqa: E402
from clip4vla.vectors import FOLDER, MEMBER, describe  # noqa: E402

CLIPS = 64  # in a batch; fixed, and batches never mix shards, so that a shard's bytes depend on nothing else
SIGHT = 150  # s until a network file system shows what another node has written
PATIENCE = datetime.timedelta(days=7)  # that a rank which has finished waits for the others


@dataclass
class Unit:
    """One shard whose vectors are wanted: number `number` of the folder, made by towers of this identity."""

    folder: ShardFolder
    number: int
    identity: str

    @property
    def shard(self) -> Shard:
        """The shard itself."""
        return self.folder.shards[self.number]

    def keys(self) -> list[str]:
        """Of its samples."""
        return self.folder.entries(self.number).keys()

    @property
    def tar(self) -> Path:
        """Where its vectors go."""
        return place(self.folder) / self.shard.name

    @property
    def note(self) -> Path:
        """What says that they are finished, with their entry for index.json."""
        return place(self.folder) / ".parts" / f"{self.shard.name}.json"

    def finished(self) -> dict[str, Any] | None:
        """The note, if it and the tar are there, of these towers and of this very shard."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            found = note["identity"], note["shard"]["of"], note["shard"]["bytes"]
            return note if found == (self.identity, self.shard.sha256, self.tar.stat().st_size) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@cli
def main() -> None:
    """Read the run's config, embed what is not embedded yet, say what came out."""
    cfg = _settings()
    device = distributed.setup()
    folders = open_folders(cfg.data.train | cfg.data.val, "data.train")
    for folder in folders:
        if not isinstance(folder.fs, LocalFileSystem):
            raise UserError(f"{folder.url}: vectors are written beside local shards: embed a copy, upload its clip/")
    model = frozen_towers(cfg, folders[0]).to(device)
    fingerprint = describe(model)
    embed(cfg, model, folders, fingerprint)
    if distributed.rank() == 0:
        for folder in folders:
            finish(folder, fingerprint)


def place(folder: ShardFolder) -> Path:
    """Where the vectors of a folder go."""
    return Path(folder.path, FOLDER)


def frozen_towers(cfg: RunConfig, folder: ShardFolder) -> Model:
    """The model that a run of this config starts with; UserError if its towers have no weights or will change."""
    resume = distributed.gather_objects(newest_checkpoint(cfg.run_dir))[0]
    model, origin = build_model(cfg, folder.fingerprint, resume)
    if origin == "scratch":
        raise UserError(f"model.clip={cfg.model.clip}: towers without weights: name weights there or in init_from")
    for tower in ("text", "vision"):
        if tower in model.cfg.train_towers.split("+"):
            raise UserError(f"model.train_towers={model.cfg.train_towers}: {tower} trains: its vectors would not last")
    return model.eval()


def embed(cfg: RunConfig, model: Model, folders: list[ShardFolder], fingerprint: dict[str, Any]) -> None:
    """Make the vectors of every shard that has none yet, this rank its part of them; returns when all ranks are done."""
    identity = fingerprint["clip"]["identity"]
    units = [Unit(folder, i, identity) for folder in folders for i in range(len(folder.shards))]
    missing = [i for i, unit in enumerate(units) if not unit.finished()] if distributed.rank() == 0 else []
    for i in missing:
        (place(units[i].folder) / INDEX).unlink(missing_ok=True)  # no index until the folder is whole
    together = dist.new_group(backend="gloo", timeout=PATIENCE)
    missing = distributed.gather_objects(missing)[0]
    mine = [units[i] for i in missing[distributed.rank() :: distributed.world()]]
    hide = True if distributed.rank() else None
    with tqdm(total=sum(unit.shard.samples for unit in mine), unit="clip", disable=hide) as bar, torch.no_grad():
        for folder in folders:
            loader = make_loader(cfg, folder, next(model.parameters()).device)
            for unit in (unit for unit in mine if unit.folder is folder):
                make(unit, model, loader, bar)
    dist.barrier(together)


def make_loader(cfg: RunConfig, folder: ShardFolder, device: torch.device) -> Loader:
    """What reads captions and decodes frames; every rank for itself, in the order that make() gives it."""
    return Loader(
        [folder], None, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=("frames",), device=device, damage_log=place(folder) / f"damaged-{distributed.rank()}.jsonl", whole=True,
    )  # fmt: skip


def make(unit: Unit, model: Model, loader: Loader, bar: tqdm) -> None:
    """The tar of one shard, then its note."""
    unit.note.parent.mkdir(parents=True, exist_ok=True)
    sizes = [shard.samples if i == unit.number else 0 for i, shard in enumerate(unit.folder.shards)]
    loader.order = EvalOrder([sizes], CLIPS)
    note = {"identity": unit.identity, "captions": 0, "frames": 0, "damaged": []}
    start = time.perf_counter()
    entry = write_shard(unit.tar, _members(unit.keys(), model, loader, note, bar))
    assert [key for key, _ in entry["entries"]] == unit.keys(), unit.tar
    seconds = time.perf_counter() - start
    write_json(unit.note, note | {"shard": entry | {"of": unit.shard.sha256}, "seconds": seconds})


def _members(
    of: list[str], model: Model, loader: Loader, note: dict[str, Any], bar: tqdm
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, its one member) of the samples with these keys; counts go into the note."""
    keys = iter(of)
    for batch in loader.batches(0, len(loader.order)):
        rows = vectors(model, loader, batch.to(loader.device))
        for meta, (texts, frames), key in zip(batch.meta, rows, keys, strict=False):  # keys last: they go on
            if not meta["id"]:
                note["damaged"].append(key)
            note["captions"] += len(texts)
            note["frames"] += len(frames)
            yield key, {MEMBER: torch.cat([texts, frames]).numpy().astype("<f2").tobytes()}
            bar.update(1)


def vectors(model: Model, loader: Loader, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(captions' vectors (n, D), frames' vectors (m, D)), unit length, float16, of each clip; none of a damaged one."""
    captions = [meta["captions"] for meta in batch.meta]
    flat = [text for texts in captions for text in texts]
    texts = model.sentence_vectors(flat, loader.tokenize).half().cpu()
    frames = F.normalize(model.encode_frames(batch.frames).float(), dim=-1).half().cpu()
    counts = torch.bincount(batch.frame_clip, minlength=len(batch)).tolist()
    return list(zip(texts.split([len(t) for t in captions]), frames.split(counts), strict=True))


def finish(folder: ShardFolder, fingerprint: dict[str, Any]) -> None:
    """index.json of a folder's vectors, and a line on them."""
    units = [Unit(folder, i, fingerprint["clip"]["identity"]) for i in range(len(folder.shards))]
    notes = _notes(units)
    counts = {"samples": len(folder), "damaged": sum(len(note["damaged"]) for note in notes)}
    counts |= {name: sum(note[name] for note in notes) for name in ("captions", "frames")}
    size, seconds = sum(note["shard"]["bytes"] for note in notes), sum(note["seconds"] for note in notes)
    shards = (note["shard"] for unit in units if (note := unit.finished()))  # one by one: their entries are large
    names = {"source": folder.source, "split": folder.split, "media_root": ".."}
    write_index(place(folder), fingerprint=fingerprint, counts=counts, shards=shards, **names)
    print(
        f"{place(folder)}: {counts['samples']} clips ({counts['damaged']} damaged), {counts['captions']} captions, "
        f"{counts['frames']} frames, {size / 1e6:.1f} MB, {counts['samples'] / seconds:.0f} clips/s a rank",
        flush=True,
    )


def _notes(units: list[Unit]) -> list[dict[str, Any]]:
    """The notes of all shards without their entries, once they are visible here."""
    deadline = time.monotonic() + SIGHT
    notes: list[dict[str, Any]] = []
    for unit in units:
        while not (note := unit.finished()):
            if time.monotonic() > deadline:
                raise UserError(f"{unit.tar}: finished vectors are gone again (another run?): start embed.py again")
            time.sleep(1)
        notes.append(note | {"shard": note["shard"] | {"entries": []}})
    return notes


if __name__ == "__main__":
    main()
