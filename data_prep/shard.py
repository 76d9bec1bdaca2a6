"""Media and annotations to tar shards.

    python data_prep/shard.py [CONFIG.yaml] [KEY=VALUE ...]      # without a config: configs/data/stamps.yaml

Makes OUT/SOURCE/SPLIT/{SOURCE-SPLIT-000000.tar, ..., index.json, quarantine.jsonl}. May be killed at any moment and
started again: finished shards are kept (.parts/ says which), and the result has the bytes of an uninterrupted run.
"""

import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import threading
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.config import DataConfig, UserError, cli, help_text, load  # noqa: E402
from clip4vla.shards import INDEX, fingerprint, write_index, write_json, write_shard, write_text  # noqa: E402
from clip4vla.spectrogram import crop, encode, log_mel  # noqa: E402
from data_prep.annotations import Row, folder, inside, stamps  # noqa: E402
from data_prep.media import jpeg, png, read_audio, read_picture  # noqa: E402

DEFAULT = "configs/data/stamps.yaml"


@dataclass
class Unit:
    """The rows of one shard, `first` being the number of the first in its folder; what a worker does at a time."""

    folder: Path
    number: int
    first: int
    rows: list[Row]

    @property
    def tar(self) -> Path:
        """Where the shard goes."""
        return self.folder / f"{self.rows[0].source}-{self.rows[0].split}-{self.number:06d}.tar"

    @property
    def part(self) -> Path:
        """The note that says the shard is finished."""
        return self.folder / ".parts" / f"{self.tar.stem}.json"


@cli
def main() -> None:
    """Read the config, make the shards, say what came out."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__ + "\n" + help_text(DataConfig))
        return
    config = words.pop(0) if words and "=" not in words[0] else str(Path(__file__).resolve().parents[1] / DEFAULT)
    cfg = load(DataConfig, config, words)
    for key in ("media_root", "out"):
        if not getattr(cfg, key):
            raise UserError(f"{config}: {key} is empty: set it there or as {key}=FOLDER")
    try:
        shard(cfg)
    except OSError as error:
        where = error.filename or cfg.out
        raise UserError(f"{where}: {error.strerror}; mend that, or choose another out=FOLDER ({cfg.out} now)") from None


def shard(cfg: DataConfig) -> None:
    """Everything that cfg asks for; raises UserError for what the user can mend, OSError if `out` cannot be written."""
    rows = annotations(cfg)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with lock(Path(cfg.out)):
        units = plan(cfg, rows)
        for unit in units:
            unit.part.parent.mkdir(parents=True, exist_ok=True)
            (unit.folder / INDEX).unlink(missing_ok=True)  # no index until the folder is whole
        parts = build(cfg, units)
        finish(cfg, units, parts)


def annotations(cfg: DataConfig) -> list[Row]:
    """Rows of the data set."""
    root = Path(cfg.media_root)
    if not root.is_dir():
        raise UserError(
            f"media_root={cfg.media_root}: no such folder; the config's header says where the media come from"
        )
    rows = stamps(root) if cfg.dataset == "stamps" else folder(root, Path(cfg.annotations) if cfg.annotations else None)
    if not rows:
        raise UserError(f"media_root={cfg.media_root}: nothing in {cfg.dataset}'s layout; is it the right folder?")
    return rows


def lock(out: Path) -> TextIO:
    """The open lock file of `out`; workers inherit it, so it is free once the last of them is gone."""
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"out={out}: another run is writing there; wait for it, or choose another out=FOLDER") from None
    return file


def plan(cfg: DataConfig, rows: list[Row]) -> list[Unit]:
    """Rows of each source and split, in a fixed random order, cut into shards."""
    folders = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.id):
        folders[row.source, row.split].append(row)
    units, size = [], cfg.samples_per_shard
    for (source, split), members in sorted(folders.items()):
        random.Random(0).shuffle(members)
        place = Path(cfg.out, source, split)
        units += [Unit(place, i // size, i, members[i : i + size]) for i in range(0, len(members), size)]
    return units


def build(cfg: DataConfig, units: list[Unit]) -> dict[Path, dict[str, Any]]:
    """Every unit's note by its path, from worker processes; finished units are not done again."""
    workers = min(cfg.workers or len(os.sched_getaffinity(0)), len(units))
    parts, failed = {}, 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_start_worker) as pool:
        futures = {pool.submit(build_unit, cfg, unit): unit for unit in units}
        try:
            with tqdm(total=sum(len(unit.rows) for unit in units), unit="sample", disable=None) as bar:
                for future in as_completed(futures):
                    unit = futures[future]
                    parts[unit.part] = future.result()
                    failed += len(parts[unit.part]["quarantined"])
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update(len(unit.rows))
        except BrokenProcessPool:
            raise UserError("a worker was killed (memory?): start again with workers=1; finished shards stay") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return parts


def _start_worker() -> None:
    """One thread for torch; and never outlive the parent, not even one that was killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_unit(cfg: DataConfig, unit: Unit) -> dict[str, Any]:
    """One shard and its note, from the last run if nothing it depends on has changed since."""
    key = _unit_key(cfg, unit)
    try:
        part = json.loads(unit.part.read_text(encoding="utf-8"))
        if part["key"] == key and unit.tar.stat().st_size == part["shard"]["bytes"]:
            return part
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not finished
    part = {"key": key, "quarantined": [], "with_audio": 0, "with_frames": 0, "seconds": 0.0}
    part["shard"] = write_shard(unit.tar, _samples(cfg, unit, part))
    write_json(unit.part, part)
    return part


def _unit_key(cfg: DataConfig, unit: Unit) -> str:
    """Hash of all that shapes a shard: programs, rows, settings, and size and time of the media."""
    media = [_stat(cfg, path) for row in unit.rows for path in (row.picture, row.audio) if path]
    state = [_code(), unit.first, [asdict(row) for row in unit.rows], fingerprint(cfg), media]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Hash of the programs that make a shard."""
    here = Path(__file__).resolve().parent
    files = [*sorted(here.glob("*.py")), *(here.parent / "clip4vla" / name for name in ("spectrogram.py", "shards.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _stat(cfg: DataConfig, path: str) -> list[int]:
    try:
        stat = Path(cfg.media_root, path).stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _samples(cfg: DataConfig, unit: Unit, part: dict[str, Any]):
    """(key, members) of each good row; counts go into `part`, bad rows into its quarantine."""
    for number, row in enumerate(unit.rows, unit.first):
        try:
            meta, members = sample(cfg, row)
        except ValueError as error:
            bad = {"id": row.id, "path": row.audio or row.picture or row.item, "reason": str(error)[:200]}
            part["quarantined"].append(bad)
            continue
        part["with_audio"] += meta["has_audio"]
        part["with_frames"] += meta["has_frames"]
        part["seconds"] += meta["duration"]
        key = f"{number:07d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', row.id)[-60:]}"
        yield key, {"json": json.dumps(meta, ensure_ascii=False).encode()} | members


def sample(cfg: DataConfig, row: Row) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Metadata and the other members of one row; raises ValueError for damaged media."""
    if row.problem:
        raise ValueError(row.problem)
    root, audio, members = Path(cfg.media_root), {}, {}
    if row.audio:
        audio = fbank(cfg, root / inside(row.audio), row.start, row.end)
        members |= audio.pop("members")
    if row.picture:
        members["frames.jpg"] = film_strip(root / inside(row.picture), cfg.frames.size, cfg.frames.quality)
    if not members:
        raise ValueError("digital silence, and no picture")
    meta = asdict(row) | {"duration": 0.0, "n_segments": 0, "n_rows": 0, "has_audio": False} | audio
    media = {"audio": meta.pop("audio"), "frames": meta.pop("picture")}
    meta.pop("problem")
    return meta | {"n_frames": int(bool(row.picture)), "has_frames": bool(row.picture), "media": media}, members


def fbank(cfg: DataConfig, path: Path, start: float | None, end: float | None) -> dict[str, Any]:
    """The spectrogram's metadata and, unless the audio is digital silence, its picture under "members"."""
    wave, rate = read_audio(path, start, end)
    if not wave.any():
        return {"members": {}}
    spec = cfg.spectrogram
    decibels = crop(log_mel(wave, rate, spec), spec)
    picture = encode(decibels, spec)
    data = png(picture) if spec.codec == "png" else jpeg(picture, spec.quality, "4:4:4")
    counts = {"n_rows": decibels.shape[1], "n_segments": len(picture) // spec.segment_rows}
    return counts | {"has_audio": True, "duration": wave.shape[1] / rate, "members": {f"fbank.{spec.codec}": data}}


@functools.lru_cache(4096)
def film_strip(path: Path, size: int, quality: int) -> bytes:
    """JPEG of one frame: the picture (cached, since many recordings share one)."""
    return jpeg(read_picture(path, size), quality)


def finish(cfg: DataConfig, units: list[Unit], parts: dict[Path, dict[str, Any]]) -> None:
    """quarantine.jsonl and index.json of every folder; raises UserError if too much failed."""
    folders = defaultdict(list)
    for unit in units:
        folders[unit.folder].append(unit)
    bad = [item for unit in units for item in parts[unit.part]["quarantined"]]
    for place, members in folders.items():
        lines = [json.dumps(item, ensure_ascii=False) for unit in members for item in parts[unit.part]["quarantined"]]
        write_text(place / "quarantine.jsonl", "".join(line + "\n" for line in lines))
        _remove_stale(place, members)
    total = sum(len(unit.rows) for unit in units)
    if len(bad) > cfg.max_damage * total:
        first = f"{bad[0]['path']}: {bad[0]['reason']}"
        raise UserError(
            f"{len(bad)} of {total} items failed, more than max_damage={cfg.max_damage:g} allows; the first: {first}; "
            f"all are in {cfg.out}/*/*/quarantine.jsonl: mend them, or raise max_damage, and start again"
        )
    for place, members in folders.items():
        print(place, _write_index(cfg, place, members, [parts[unit.part] for unit in members]), flush=True)


def _write_index(cfg: DataConfig, place: Path, units: list[Unit], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """index.json of one folder; returns its counts."""
    counts = {"samples": sum(part["shard"]["samples"] for part in parts)}
    counts |= {name: sum(part[name] for part in parts) for name in ("with_audio", "with_frames")}
    counts |= {"seconds": round(sum(part["seconds"] for part in parts), 3)}
    counts |= {"quarantined": sum(len(part["quarantined"]) for part in parts)}
    row = units[0].rows[0]
    media = os.path.relpath(Path(cfg.media_root).resolve(), place.resolve())
    shards = [part["shard"] for part in parts if part["shard"]["samples"]]
    names = {"source": row.source, "split": row.split}
    write_index(place, fingerprint=fingerprint(cfg), media_root=media, **names, counts=counts, shards=shards)
    return counts


def _remove_stale(place: Path, units: list[Unit]) -> None:
    """Shards of an earlier run that this one does not have: other settings made more of them."""
    kept = {unit.tar.stem for unit in units}
    for path in [*place.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar*"), *(place / ".parts").glob("*.json*")]:
        if path.name.partition(".")[0] not in kept:
            path.unlink()


if __name__ == "__main__":
    main()
