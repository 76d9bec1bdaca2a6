"""Make the shards of a data set: plan them, build them in worker processes, and write their indexes."""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clip4vla.config import DataConfig, FramesConfig
from clip4vla.data.shards import ENTRIES, INDEX, fingerprint, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.io import atomic
from clip4vla.io.atomic import write_json, write_text
from clip4vla.io.out_folder import OutFolder, open_out
from clip4vla.io.walk import is_hidden
from clip4vla.media.av_reader import MediaClip, PastEndError, duration, read_clip
from clip4vla.media.containers import SLACK
from clip4vla.media.images import Fit, jpeg, png, read_picture, stored
from clip4vla.media.source import VIDEOS, Source, suffix_of
from clip4vla.media.spectrogram import crop, encode, is_silent, log_mel
from clip4vla.media.worker_pool import NO_ITEM, WorkerStatus, run_units
from data_prep.annotations import read
from data_prep.manifest import ManifestRow
from data_prep.packed.listing import base_of
from data_prep.packed.media import open_media
from data_prep.plan import MANIFEST, ShardPlan, make_plan, read_plan
from data_prep.progress import Progress, estimate

VERSION = 3  # raise it when the same media and settings give other bytes: shards are then made again


def shard(cfg: DataConfig, part: tuple[int, int] | None = None, plan: bool = False, merge: bool = False) -> None:
    """Make the shards that cfg asks for; cfg.out is a local folder or any fsspec URL.

    Raises UserError for what the user can correct, OSError if `out` cannot be written.
    """
    with open_out(cfg.out, depth=2) as out:
        out.pull([out.local / MANIFEST])
        _shard(replace(cfg, out=str(out.local)), out, part, plan, merge)


def _shard(cfg: DataConfig, out: OutFolder, part: tuple[int, int] | None, plan: bool, merge: bool) -> None:
    """Make the shards in the local folder of `out`, which is cfg.out, and publish each file that is finished."""
    with atomic.removed_if_empty(out.local, ".lock", ".plan.lock"), lock(out.local, shared=part is not None):
        known = read_plan(out.local) if part or merge else None
        if merge and not known:
            raise UserError(f"--merge: no manifest in {cfg.out}: make the parts first (--part I/N)")
        if part and not known:
            with lock(out.local, name=".plan.lock", wait=True):
                known = read_plan(out.local)
                units = known[1] if known else _plan(cfg, out)
        else:
            units = known[1] if known else _plan(cfg, out)
        if plan:
            return
        mine = units[part[0] :: part[1]] if part else units
        out.pull(unit.note for unit in mine)
        if not merge:
            build(cfg, out, mine)
        if not part:
            finish(cfg, out, units)


def lock(out: Path, name: str = ".lock", shared: bool = False, wait: bool = False) -> TextIO:
    """Return the open lock file of `out`, which it makes; workers inherit it, so it is free once the last of them is gone."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / name).open("w", encoding="utf-8")
    if not atomic.lock(file, shared, wait):
        file.close()
        raise UserError(f"out={out}: another run is writing there; wait for it, or choose another out=FOLDER")
    return file


def _plan(cfg: DataConfig, out: OutFolder) -> list[ShardPlan]:
    """Read the annotations, look for the media, write manifest.jsonl and skipped.jsonl, print their counts."""
    rows, skipped = read(cfg)
    lines = [json.dumps(asdict(item)) + "\n" for item in skipped]
    write_text(out.local / "skipped.jsonl", "".join(lines))
    out.publish(out.local / "skipped.jsonl")
    _print_counts(rows, skipped)
    malformed = [item for item in skipped if item.why == "malformed"]
    if len(malformed) > cfg.max_failed_fraction * (len(rows) + len(skipped)):
        raise UserError(
            f"{len(malformed)} of {len(rows) + len(skipped)} annotations are malformed, more than "
            f"max_failed_fraction={cfg.max_failed_fraction:g} allows; the first: "
            f"{malformed[0].where}: {malformed[0].reason}; all are in {cfg.out}/skipped.jsonl: "
            "correct them, or raise max_failed_fraction, and start again"
        )
    units = make_plan(out.local, rows, skipped, cfg.samples_per_shard)
    out.publish(out.local / MANIFEST)
    return units


def _print_counts(rows: list[ManifestRow], skipped: list) -> None:
    for (source, split), count in sorted(Counter((row.source, row.split) for row in rows).items()):
        print(f"{source}/{split}: {count} clips found", flush=True)
    for why in ("missing", "unusable", "malformed"):
        items = [item for item in skipped if item.why == why]
        if items:
            print(f"{len(items)} {why}, the first: {items[0].where}: {items[0].reason}", flush=True)


def dry_run(cfg: DataConfig) -> None:
    """Print how many clips there are and how big the result will be, by making some samples; writes nothing."""
    rows, skipped = read(cfg)
    _print_counts(rows, skipped)
    print(estimate(rows, functools.partial(sample, cfg), cfg.samples_per_shard, cfg.decode_timeout), flush=True)


def build(cfg: DataConfig, out: OutFolder, units: list[ShardPlan]) -> None:
    """Make every unit that is not finished, in worker processes."""
    for folder in {unit.folder for unit in units}:
        (folder / ".parts").mkdir(parents=True, exist_ok=True)
    workers = cfg.workers or len(os.sched_getaffinity(0))
    with Progress(sum(unit.rows for unit in units)) as progress:
        do = functools.partial(build_unit, cfg, out)
        for unit, note in run_units(units, do, workers, cfg.decode_timeout, progress.tick):
            progress.add(unit.rows, note)


def build_unit(
    cfg: DataConfig, out: OutFolder, unit: ShardPlan, failed_items: dict[int, str], status: WorkerStatus
) -> dict[str, Any]:
    """Make one shard unless it is there, and return its note; failed_items: rows not to be touched, and why."""
    text = unit.text()
    rows = unit.read()
    key = _key(cfg, unit, text)
    note = _finished(unit, key)
    if (
        note
        and not _given_up(note, cfg.decode_timeout)
        and all(now in (then, []) for now, then in zip((_stat(cfg, row) for row in rows), note["media"], strict=True))
    ):
        return note | {"kept": True}  # media that are gone by now do not count as changed
    if unit.tar.exists():
        out.remove(unit.folder / INDEX)  # it may describe the tar that is about to go
    out.remove(unit.note)
    counts = {"with_audio": 0, "with_frames": 0, "silent": 0, "seconds": 0.0}
    note = {"key": key, "media": [_stat(cfg, row) for row in rows], "quarantined": []} | counts
    note["shard"] = write_shard(unit.tar, _samples(cfg, unit, rows, note, failed_items, status))
    out.publish(unit.tar, keep=False)
    write_json(unit.note, note)
    out.publish(unit.note)
    return note


def _key(cfg: DataConfig, unit: ShardPlan, text: bytes) -> str:
    """Hash what shapes a shard beside the media."""
    settings = {name: value for name, value in fingerprint(cfg).items() if name != "versions"}
    state = json.dumps([VERSION, unit.first, settings], sort_keys=True).encode()
    return hashlib.sha256(state + text).hexdigest()


def _finished(unit: ShardPlan, key: str) -> dict[str, Any] | None:
    """Return the unit's note, if its shard is there and was made of these rows with these settings."""
    try:
        note = json.loads(unit.note.read_text(encoding="utf-8"))
        return note if note["key"] == key and unit.tar.stat().st_size == note["shard"]["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _given_up(note: dict[str, Any], limit: float) -> bool:
    """Tell whether an item was given up after less time than it has now."""
    words = [item["reason"].split() for item in note["quarantined"]]
    return any(w[:3] == ["gave", "up", "after"] and float(w[3]) < limit for w in words)


def _stat(cfg: DataConfig, row: ManifestRow) -> list[int]:
    """Return sizes and times of a row's files; nothing if none is there."""
    stats = []
    for path in filter(None, (row.picture, row.media)):
        try:
            stat = Path(base_of(cfg.dataset, cfg.media_root), *row.places.get(path, [path])[:1]).stat()
        except OSError:
            continue
        stats += [stat.st_size, stat.st_mtime_ns]
    return stats


def _samples(
    cfg: DataConfig,
    unit: ShardPlan,
    rows: list[ManifestRow],
    note: dict[str, Any],
    failed_items: dict[int, str],
    status: WorkerStatus,
):
    """Yield (key, members) of each good row; counts go into `note`, bad rows into its quarantine."""
    for i, row in enumerate(rows):
        status.start(i)
        try:
            if i in failed_items:
                raise ValueError(failed_items[i])
            meta, members = sample(cfg, row)
        except UserError:  # not this item's fault
            raise
        except ValueError as error:
            bad = {"id": row.id, "path": row.media or row.picture or row.item, "reason": str(error)[:200]}
            note["quarantined"].append(bad)
            status.done(0, True)
            continue
        for name in ("with_audio", "with_frames"):
            note[name] += meta["has_" + name[5:]]
        note["silent"] += bool(row.media) and not meta["has_audio"]
        note["seconds"] += meta["duration"]
        status.done(meta["duration"], False)
        key = f"{unit.first + i:07d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', row.id)[-60:]}"
        yield key, {"json": json.dumps(meta, ensure_ascii=False).encode()} | members
    status.start(NO_ITEM)


def sample(cfg: DataConfig, row: ManifestRow) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make the metadata and the other members of one row; raises ValueError for corrupt media.

    A clip without sound, or with digital silence, keeps its frames: has_audio is false.
    """
    clip, is_still = read_row(cfg, row), row.picture is not None and not is_video(row.picture)
    counts, members = fbank(cfg, clip)
    if row.picture and is_still:
        with open_media(cfg, row, row.picture) as still:
            members["frames.jpg"] = film_strip(still, stored(cfg.frames), cfg.frames.quality)
    elif clip.frames:
        members["frames.jpg"] = jpeg(np.concatenate(clip.frames), cfg.frames.quality)
    if not members:
        raise ValueError("digital silence, and no picture")
    meta = row.as_json() | {"duration": round(clip.seconds, 6)} | counts
    for name in ("places", "picture_start"):
        meta.pop(name, None)
    picture, media = meta.pop("picture"), meta.pop("media")
    n_frames = 1 if is_still else len(clip.frames)
    paths = {"audio": media if meta["has_audio"] else None, "frames": (picture or media) if n_frames else None}
    return meta | {"n_frames": n_frames, "has_frames": bool(n_frames), "media": paths}, members


def read_row(cfg: DataConfig, row: ManifestRow) -> MediaClip:
    """Read the sound of a row, and its frames unless they are a still; ValueError for media that cannot be its own."""
    spec = cfg.spectrogram
    longest = spec.max_segments * spec.segment_rows * spec.hop_length / spec.sample_rate
    if not row.media:
        return MediaClip(0.0)
    try:
        with open_media(cfg, row, row.media) as medium:
            clip = read_clip(medium, row.start, row.end, None if row.picture else cfg.frames, longest)
        check_not_cut(row.start or 0.0, row.end, clip.seconds)
        if row.picture and is_video(row.picture):
            with open_media(cfg, row, row.picture) as video:
                clip = replace(clip, frames=_frames_beside(video, row, clip.seconds, cfg.frames))
    except PastEndError as error:
        raise ValueError(f"{error}: if each file holds the interval alone, set clips_already_cut=true") from None
    return clip


def is_video(path: str) -> bool:
    """Tell by its suffix whether a file is a video, and no still."""
    return suffix_of(path) in VIDEOS


def check_not_cut(start: float, end: float | None, seconds: float) -> None:
    """Raise PastEndError if a file that gave `seconds` of an interval (s) ends where that begins, or is as long as it.

    Such a file was cut already: what it gave is no part of the clip, or the wrong one.
    """
    if not start or end is None or seconds >= end - start - SLACK:
        return
    length = start + seconds
    if seconds < SLACK or abs(length - (end - start)) <= SLACK:
        raise PastEndError(
            f"the interval begins at {start:g} s and has {end - start:g} s, the medium ends at {length:.2f} s"
        )


def _frames_beside(video: Source, row: ManifestRow, seconds: float, frames: FramesConfig) -> list[np.ndarray]:
    """Read the frames of a row whose sound is another file and lasts `seconds`; ValueError if the video is of another length.

    A video whose name says no interval, beside sound that was cut, was cut too if it is as long as the sound.
    """
    length, begin = duration(video), row.start if row.picture_start is None else row.picture_start
    as_long = abs(length - seconds) <= max(1.0, seconds / 10)
    if row.start is None and as_long:
        begin = 0.0
    if begin is None or (row.start is not None and row.picture_start is not None and not as_long):
        raise ValueError(
            f"pictures of {length:.2f} s, sound of {seconds:.2f} s: not the same clip; rename or remove one"
        )
    return read_clip(video, begin, begin + seconds, frames).frames


def fbank(cfg: DataConfig, clip: MediaClip) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return counts of the spectrogram and, unless there is no sound or digital silence, its picture."""
    spec = cfg.spectrogram
    decibels = None if clip.wave is None else crop(log_mel(clip.wave, clip.rate, spec), spec)
    if decibels is None or is_silent(decibels, spec):
        return {"n_rows": 0, "n_segments": 0, "has_audio": False}, {}
    picture = encode(decibels, spec)
    data = png(picture) if spec.codec == "png" else jpeg(picture, spec.quality, "4:4:4")
    counts = {"n_rows": decibels.shape[1], "n_segments": len(picture) // spec.segment_rows, "has_audio": True}
    return counts, {f"fbank.{spec.codec}": data}


@functools.lru_cache(4096)
def film_strip(picture: Source, fit: Fit, quality: int) -> bytes:
    """Return a JPEG of one frame: the picture (cached, since many recordings share one)."""
    return jpeg(read_picture(picture, fit), quality)


def finish(cfg: DataConfig, out: OutFolder, units: list[ShardPlan]) -> None:
    """Write quarantine.jsonl and index.json of every folder.

    Raises UserError if shards are missing or too much failed.
    """
    notes = [_small(_note(cfg, unit)) for unit in units]
    bad = [item for note in notes for item in note["quarantined"]]
    folders: dict[Path, list[int]] = {}
    for i, unit in enumerate(units):
        folders.setdefault(unit.folder, []).append(i)
    for place, members in folders.items():
        lines = [json.dumps(item, ensure_ascii=False) for i in members for item in notes[i]["quarantined"]]
        write_text(place / "quarantine.jsonl", "".join(line + "\n" for line in lines))
        out.publish(place / "quarantine.jsonl")
    total = sum(unit.rows for unit in units)
    if len(bad) > cfg.max_failed_fraction * total:
        first = f"{bad[0]['path']}: {bad[0]['reason']}"
        raise UserError(
            f"{len(bad)} of {total} items failed, more than max_failed_fraction={cfg.max_failed_fraction:g} allows; "
            f"the first: {first}; all are in {cfg.out}/*/*/quarantine.jsonl: "
            "correct them, or raise max_failed_fraction, and start again"
        )
    for place, members in folders.items():
        counts = _write_index(cfg, out, place, [units[i] for i in members], [notes[i] for i in members])
        _remove_stale(out, place, {units[i].tar.stem for i in members})
        print(out.shown(place), counts, flush=True)
    for index in sorted(out.local.glob(f"*/*/{INDEX}")):
        if index.parent not in folders and not any(map(is_hidden, index.parts[-3:-1])):
            gone = out.shown(index.parent)
            print(f"{gone}: the annotations have nothing of it any more: delete it if its clips moved", flush=True)


def _note(cfg: DataConfig, unit: ShardPlan) -> dict[str, Any]:
    note = _finished(unit, _key(cfg, unit, unit.text()))
    if note is None:
        raise UserError(f"{unit.tar} is not finished, or made with other settings: run the parts again, then --merge")
    return note


def _small(note: dict[str, Any]) -> dict[str, Any]:
    """Return the note without what grows with the samples: those of all shards would fill the memory."""
    return note | {"media": [], "shard": note["shard"] | {"entries": []}}


def _write_index(
    cfg: DataConfig, out: OutFolder, place: Path, units: list[ShardPlan], notes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write entries.jsonl and index.json of one folder; return its counts. notes: small ones of these units."""
    counts = {"samples": sum(note["shard"]["samples"] for note in notes)}
    counts |= {name: sum(note[name] for note in notes) for name in ("with_audio", "with_frames", "silent")}
    counts |= {"seconds": round(sum(note["seconds"] for note in notes), 3)}
    counts |= {"quarantined": sum(len(note["quarantined"]) for note in notes)}
    base = base_of(cfg.dataset, cfg.media_root)
    media = base if "://" in base else _media_root(Path(base).resolve(), out, place)
    there = [unit for unit, note in zip(units, notes, strict=True) if note["shard"]["samples"]]
    shards = (_note(cfg, unit)["shard"] for unit in there)
    names = {"source": units[0].source, "split": units[0].split}
    write_index(place, fingerprint=fingerprint(cfg), media_root=media, **names, counts=counts, shards=shards)
    for name in (ENTRIES, INDEX):  # the index last
        out.publish(place / name)
    return counts


def _media_root(base: Path, out: OutFolder, place: Path) -> str:
    """Return where local media are, seen from a folder of shards; no path leads to them from a URL, so there as they are."""
    return str(base) if out.is_remote else os.path.relpath(base, place.resolve())


def _remove_stale(out: OutFolder, place: Path, kept: set[str]) -> None:
    """Remove shards of an earlier plan that this one does not have."""
    for path in [*place.glob("[!.]*-[0-9][0-9][0-9][0-9][0-9][0-9].tar*"), *(place / ".parts").glob("*.json*")]:
        if path.name.partition(".")[0] not in kept:
            out.remove(path)
