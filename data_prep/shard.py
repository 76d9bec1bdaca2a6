"""Media and annotations to tar shards.

    python data_prep/shard.py [CONFIG.yaml] [KEY=VALUE ...] [--dry-run | --plan | --part I/N | --merge]

Without a config: configs/data/stamps.yaml. Makes OUT/SOURCE/SPLIT/{SOURCE-SPLIT-000000.tar, ..., index.json,
quarantine.jsonl}, and in OUT manifest.jsonl (what goes where) and skipped.jsonl (missing media, malformed lines). May be
killed at any moment and started again: finished shards are kept, and the result has the bytes of an uninterrupted run. Media
that are added later go into new shards. On SLURM: launch/slurm/shard.sbatch.

    --dry-run   say what is found, what is missing, how big the result will be and how long it takes; write nothing
    --plan      only write the manifest
    --part I/N  only make every N-th shard, the I-th first (0 <= I < N); makes the manifest if there is none
    --merge     only join what the parts made into index.json
"""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import cli, help_text  # noqa: E402
from clip4vla.config import DataConfig, UserError  # noqa: E402
from clip4vla.settings import load  # noqa: E402

DEFAULT = "configs/data/stamps.yaml"


def _command_line() -> tuple[DataConfig, argparse.Namespace]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(DataConfig), formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|KEY=VALUE")
    only = parser.add_mutually_exclusive_group()
    for flag in ("--dry-run", "--plan", "--merge"):
        only.add_argument(flag, action="store_true")
    only.add_argument("--part", type=_part, metavar="I/N")
    args = parser.parse_intermixed_args()
    words = args.words
    config = words.pop(0) if words and "=" not in words[0] else str(Path(__file__).resolve().parents[1] / DEFAULT)
    cfg = load(DataConfig, config, words)
    for key in ("media_root", "out"):
        if not getattr(cfg, key):
            raise UserError(f"{config}: {key} is empty: set it there or as {key}=FOLDER")
    return cfg, args


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--part {text}: give I/N with 0 <= I < N, for SLURM $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return int(match[1]), int(match[2])


if __name__ == "__main__":  # before the imports that take seconds: --help and a mistake are answered at once
    cli(_command_line)()

import numpy as np  # noqa: E402

from clip4vla import files  # noqa: E402
from clip4vla.files import write_json, write_text  # noqa: E402
from clip4vla.media import Clip, read_clip  # noqa: E402
from clip4vla.pictures import jpeg, png, read_picture  # noqa: E402
from clip4vla.pool import NO_ITEM, At, work  # noqa: E402
from clip4vla.shards import INDEX, fingerprint, write_index, write_shard  # noqa: E402
from clip4vla.spectrogram import crop, encode, log_mel  # noqa: E402
from data_prep.annotations import read  # noqa: E402
from data_prep.manifest import Row, inside  # noqa: E402
from data_prep.plan import Unit, make_plan, read_plan  # noqa: E402
from data_prep.progress import Progress, estimate  # noqa: E402

VERSION = 3  # raise it when the same media and settings give other bytes: shards are then made again


@cli
def main() -> None:
    """Read the command line, do what it says."""
    cfg, args = _command_line()
    try:
        if args.dry_run:
            dry_run(cfg)
        else:
            shard(cfg, args.part, args.plan, args.merge)
    except OSError as error:
        where = error.filename or cfg.out
        raise UserError(f"{where}: {error.strerror}; mend that, or choose another out=FOLDER ({cfg.out} now)") from None


def shard(cfg: DataConfig, part: tuple[int, int] | None = None, plan: bool = False, merge: bool = False) -> None:
    """Everything that cfg asks for; raises UserError for what the user can mend, OSError if `out` cannot be written."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, shared=part is not None):
        known = read_plan(out) if part or merge else None
        if merge and not known:
            raise UserError(f"--merge: no manifest in {out}: make the parts first (--part I/N)")
        if part and not known:
            with lock(out, name=".plan.lock", wait=True):
                known = read_plan(out)
                units = known[1] if known else _plan(cfg)
        else:
            units = known[1] if known else _plan(cfg)
        if plan:
            return
        if not merge:
            build(cfg, units[part[0] :: part[1]] if part else units)
        if not part:
            finish(cfg, units)


def lock(out: Path, name: str = ".lock", shared: bool = False, wait: bool = False) -> TextIO:
    """The open lock file of `out`; workers inherit it, so it is free once the last of them is gone."""
    file = (out / name).open("w", encoding="utf-8")
    if not files.lock(file, shared, wait):
        file.close()
        raise UserError(f"out={out}: another run is writing there; wait for it, or choose another out=FOLDER")
    return file


def _plan(cfg: DataConfig) -> list[Unit]:
    """Read the annotations, look for the media, write manifest.jsonl and skipped.jsonl, say what was found."""
    rows, skipped = read(cfg)
    lines = [json.dumps(asdict(item)) + "\n" for item in skipped]
    write_text(Path(cfg.out, "skipped.jsonl"), "".join(lines))
    _say_found(rows, skipped)
    malformed = [item for item in skipped if item.why == "malformed"]
    if len(malformed) > cfg.max_damage * (len(rows) + len(skipped)):
        raise UserError(
            f"{len(malformed)} of {len(rows) + len(skipped)} annotations are malformed, more than "
            f"max_damage={cfg.max_damage:g} allows; the first: {malformed[0].where}: {malformed[0].reason}; all are in "
            f"{cfg.out}/skipped.jsonl: mend them, or raise max_damage, and start again"
        )
    return make_plan(Path(cfg.out), rows, skipped, cfg.samples_per_shard)


def _say_found(rows: list[Row], skipped: list) -> None:
    for (source, split), count in sorted(Counter((row.source, row.split) for row in rows).items()):
        print(f"{source}/{split}: {count} clips found", flush=True)
    for why in ("missing", "unusable", "malformed"):
        items = [item for item in skipped if item.why == why]
        if items:
            print(f"{len(items)} {why}, the first: {items[0].where}: {items[0].reason}", flush=True)


def dry_run(cfg: DataConfig) -> None:
    """Say what is found and missing, and how big the result will be, by making some samples; writes nothing."""
    rows, skipped = read(cfg)
    _say_found(rows, skipped)
    print(estimate(rows, functools.partial(sample, cfg), cfg.samples_per_shard, cfg.time_limit), flush=True)


def build(cfg: DataConfig, units: list[Unit]) -> None:
    """Make every unit that is not finished, in worker processes."""
    for folder in {unit.folder for unit in units}:
        (folder / ".parts").mkdir(parents=True, exist_ok=True)
    workers = cfg.workers or len(os.sched_getaffinity(0))
    with Progress(sum(unit.rows for unit in units)) as progress:
        do = functools.partial(build_unit, cfg)
        for unit, note in work(units, do, workers, cfg.time_limit, progress.tick):
            progress.add(unit.rows, note)


def build_unit(cfg: DataConfig, unit: Unit, blamed: dict[int, str], at: At) -> dict[str, Any]:
    """The note of one shard, which is made unless it is there; blamed: rows not to be touched, and why."""
    text = unit.text()
    rows = unit.read()
    key = _key(cfg, unit, text)
    note = _finished(unit, key)
    if (
        note
        and not _given_up(note, cfg.time_limit)
        and all(now in (then, []) for now, then in zip((_stat(cfg, row) for row in rows), note["media"], strict=True))
    ):
        return note | {"kept": True}  # media that are gone by now do not count as changed
    if unit.tar.exists():
        (unit.folder / INDEX).unlink(missing_ok=True)  # it may describe the tar that is about to go
    unit.note.unlink(missing_ok=True)
    counts = {"with_audio": 0, "with_frames": 0, "silent": 0, "seconds": 0.0}
    note = {"key": key, "media": [_stat(cfg, row) for row in rows], "quarantined": []} | counts
    note["shard"] = write_shard(unit.tar, _samples(cfg, unit, rows, note, blamed, at))
    write_json(unit.note, note)
    return note


def _key(cfg: DataConfig, unit: Unit, text: bytes) -> str:
    """Hash of what shapes a shard beside the media."""
    settings = {name: value for name, value in fingerprint(cfg).items() if name != "versions"}
    state = json.dumps([VERSION, unit.first, settings], sort_keys=True).encode()
    return hashlib.sha256(state + text).hexdigest()


def _finished(unit: Unit, key: str) -> dict[str, Any] | None:
    """The unit's note, if its shard is there and was made of these rows with these settings."""
    try:
        note = json.loads(unit.note.read_text(encoding="utf-8"))
        return note if note["key"] == key and unit.tar.stat().st_size == note["shard"]["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _given_up(note: dict[str, Any], limit: float) -> bool:
    """Whether an item was given up after less time than it has now."""
    words = [item["reason"].split() for item in note["quarantined"]]
    return any(w[:3] == ["gave", "up", "after"] and float(w[3]) < limit for w in words)


def _stat(cfg: DataConfig, row: Row) -> list[int]:
    """Sizes and times of a row's files; nothing if none is there."""
    found = []
    for path in filter(None, (row.picture, row.media)):
        try:
            stat = Path(cfg.media_root, path).stat()
        except OSError:
            continue
        found += [stat.st_size, stat.st_mtime_ns]
    return found


def _samples(cfg: DataConfig, unit: Unit, rows: list[Row], note: dict[str, Any], blamed: dict[int, str], at: At):
    """(key, members) of each good row; counts go into `note`, bad rows into its quarantine."""
    for i, row in enumerate(rows):
        at.start(i)
        try:
            if i in blamed:
                raise ValueError(blamed[i])
            meta, members = sample(cfg, row)
        except ValueError as error:
            bad = {"id": row.id, "path": row.media or row.picture or row.item, "reason": str(error)[:200]}
            note["quarantined"].append(bad)
            at.done(0, True)
            continue
        for name in ("with_audio", "with_frames"):
            note[name] += meta["has_" + name[5:]]
        note["silent"] += bool(row.media) and not meta["has_audio"]
        note["seconds"] += meta["duration"]
        at.done(meta["duration"], False)
        key = f"{unit.first + i:07d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', row.id)[-60:]}"
        yield key, {"json": json.dumps(meta, ensure_ascii=False).encode()} | members
    at.start(NO_ITEM)


def sample(cfg: DataConfig, row: Row) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Metadata and the other members of one row; raises ValueError for damaged media.

    A clip without sound, or with digital silence, keeps its frames: has_audio is false.
    """
    root, spec = Path(cfg.media_root), cfg.spectrogram
    longest = spec.max_segments * spec.segment_rows * spec.hop_length / spec.sample_rate
    frames = None if row.picture else cfg.frames
    clip = read_clip(root / inside(row.media), row.start, row.end, frames, longest) if row.media else Clip(0.0)
    counts, members = fbank(cfg, clip)
    if row.picture:
        members["frames.jpg"] = film_strip(root / inside(row.picture), cfg.frames.size, cfg.frames.quality)
    elif clip.frames:
        members["frames.jpg"] = jpeg(np.concatenate(clip.frames), cfg.frames.quality)
    if not members:
        raise ValueError("digital silence, and no picture")
    meta = asdict(row) | {"duration": round(clip.seconds, 6)} | counts
    picture, media = meta.pop("picture"), meta.pop("media")
    n_frames = 1 if picture else len(clip.frames)
    paths = {"audio": media if meta["has_audio"] else None, "frames": (picture or media) if n_frames else None}
    return meta | {"n_frames": n_frames, "has_frames": bool(n_frames), "media": paths}, members


def fbank(cfg: DataConfig, clip: Clip) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Counts of the spectrogram and, unless there is no sound or digital silence, its picture."""
    if clip.wave is None or not clip.wave.any():
        return {"n_rows": 0, "n_segments": 0, "has_audio": False}, {}
    spec = cfg.spectrogram
    decibels = crop(log_mel(clip.wave, clip.rate, spec), spec)
    picture = encode(decibels, spec)
    data = png(picture) if spec.codec == "png" else jpeg(picture, spec.quality, "4:4:4")
    counts = {"n_rows": decibels.shape[1], "n_segments": len(picture) // spec.segment_rows, "has_audio": True}
    return counts, {f"fbank.{spec.codec}": data}


@functools.lru_cache(4096)
def film_strip(path: Path, size: int, quality: int) -> bytes:
    """JPEG of one frame: the picture (cached, since many recordings share one)."""
    return jpeg(read_picture(path, size), quality)


def finish(cfg: DataConfig, units: list[Unit]) -> None:
    """quarantine.jsonl and index.json of every folder; raises UserError if shards are missing or too much failed."""
    notes = [_small(_note(cfg, unit)) for unit in units]
    bad = [item for note in notes for item in note["quarantined"]]
    folders: dict[Path, list[int]] = {}
    for i, unit in enumerate(units):
        folders.setdefault(unit.folder, []).append(i)
    for place, members in folders.items():
        lines = [json.dumps(item, ensure_ascii=False) for i in members for item in notes[i]["quarantined"]]
        write_text(place / "quarantine.jsonl", "".join(line + "\n" for line in lines))
    total = sum(unit.rows for unit in units)
    if len(bad) > cfg.max_damage * total:
        first = f"{bad[0]['path']}: {bad[0]['reason']}"
        raise UserError(
            f"{len(bad)} of {total} items failed, more than max_damage={cfg.max_damage:g} allows; the first: {first}; "
            f"all are in {cfg.out}/*/*/quarantine.jsonl: mend them, or raise max_damage, and start again"
        )
    for place, members in folders.items():
        counts = _write_index(cfg, place, [units[i] for i in members], [notes[i] for i in members])
        _remove_stale(place, {units[i].tar.stem for i in members})
        print(place, counts, flush=True)
    for index in sorted(Path(cfg.out).glob(f"*/*/{INDEX}")):
        if index.parent not in folders:
            print(
                f"{index.parent}: the annotations have nothing of it any more: delete it if its clips moved", flush=True
            )


def _note(cfg: DataConfig, unit: Unit) -> dict[str, Any]:
    note = _finished(unit, _key(cfg, unit, unit.text()))
    if note is None:
        raise UserError(f"{unit.tar} is not finished, or made with other settings: run the parts again, then --merge")
    return note


def _small(note: dict[str, Any]) -> dict[str, Any]:
    """Without what grows with the samples: those of all shards would fill the memory."""
    return note | {"media": [], "shard": note["shard"] | {"entries": []}}


def _write_index(cfg: DataConfig, place: Path, units: list[Unit], notes: list[dict[str, Any]]) -> dict[str, Any]:
    """index.json and entries.jsonl of one folder; returns its counts. notes: small ones of these units."""
    counts = {"samples": sum(note["shard"]["samples"] for note in notes)}
    counts |= {name: sum(note[name] for note in notes) for name in ("with_audio", "with_frames", "silent")}
    counts |= {"seconds": round(sum(note["seconds"] for note in notes), 3)}
    counts |= {"quarantined": sum(len(note["quarantined"]) for note in notes)}
    media = os.path.relpath(Path(cfg.media_root).resolve(), place.resolve())
    there = [unit for unit, note in zip(units, notes, strict=True) if note["shard"]["samples"]]
    shards = (_note(cfg, unit)["shard"] for unit in there)
    names = {"source": units[0].source, "split": units[0].split}
    write_index(place, fingerprint=fingerprint(cfg), media_root=media, **names, counts=counts, shards=shards)
    return counts


def _remove_stale(place: Path, kept: set[str]) -> None:
    """Shards of an earlier plan that this one does not have."""
    for path in [*place.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar*"), *(place / ".parts").glob("*.json*")]:
        if path.name.partition(".")[0] not in kept:
            path.unlink()


if __name__ == "__main__":
    main()
