"""Check shard folders in worker processes, compare their splits for leakage, and repair what is corrupt."""

import itertools
import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from clip4vla.config import SpectrogramConfig
from clip4vla.data.shards import ENTRIES, INDEX, Shard, ShardFolder, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_json, write_text
from clip4vla.io.out_folder import OutFolder, open_out
from data_prep.checks.files import shard_folders, where
from data_prep.checks.page import REPEATS, FolderReport
from data_prep.checks.shard import (
    HASHES,
    ClipStats,
    Finding,
    Rules,
    ShardCheckJob,
    check_shard,
    contents,
    indexed,
    validate_sample,
)

QUARANTINE = "quarantine.jsonl"
COUNTS = "counts"  # how a finding begins that a new index.json repairs


def inspect(places: list[str], decode: int | None, repair_damage: bool) -> list[FolderReport]:
    """Check the shard folders in these trees, and if repair_damage repair them and check again.

    Returns the last reports.
    """
    reports = check(find(places), decode)
    broken = [report for report in reports if any(f.shard or f.reason.startswith(COUNTS) for f in report.findings)]
    if not (repair_damage and broken):
        return reports
    for report in broken:
        repair(report)
    return check(find(places), decode)


def find(places: list[str]) -> list[ShardFolder]:
    """Open the shard folders in these trees, and folders of vectors beside them.

    Raises UserError if one is unreadable.
    """
    paths: dict[str, None] = {}
    for place in places:
        folders = shard_folders(place)
        if not folders:
            raise UserError(f"{place}: no {INDEX} in it or below; run data_prep/shard.py to make it")
        paths |= dict.fromkeys(folders)
    return [ShardFolder.open(path) for path in paths]


def _rules(folder: ShardFolder) -> Rules:
    try:
        if "clip" in folder.fingerprint:
            return Rules(folder.source, folder.split, SpectrogramConfig(), 0, vectors=True)
        spectrogram = SpectrogramConfig(**folder.fingerprint["spectrogram"])
        return Rules(folder.source, folder.split, spectrogram, folder.fingerprint["frames"]["size"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder.url}/{INDEX}: bad fingerprint ({error!r}); run data_prep/shard.py again") from None


def check(folders: list[ShardFolder], decode: int | None) -> list[FolderReport]:
    """Return a report of each folder; pictures of `decode` clips of a folder, or of all, are decoded."""
    tasks = {folder.url: _tasks(folder, decode) for folder in folders}
    results = iter(_run([task for some in tasks.values() for task in some]))
    reports = []
    for folder in folders:
        tallies, lists = zip(*itertools.islice(results, len(tasks[folder.url])), strict=True)
        report = FolderReport(folder, ClipStats.sum(list(tallies)), [f for findings in lists for f in findings])
        if not report.vectors and not report.findings:
            report.findings += _counts(folder, report.tally)
        report.repeats = {kind: _repeated(report, kind) for kind in REPEATS}
        reports.append(report)
    for report in reports:
        if report.vectors:
            report.findings += _pairing(report.folder)
    _leakage([report for report in reports if not report.vectors])
    return reports


def _tasks(folder: ShardFolder, decode: int | None) -> list[ShardCheckJob]:
    rules, chosen, first = _rules(folder), None, 0
    if decode is not None:
        chosen = set(random.Random(0).sample(range(len(folder)), min(decode, len(folder))))
    tasks = []
    for number, shard in enumerate(folder.shards):
        here = None if chosen is None else frozenset(i for i in range(shard.samples) if first + i in chosen)
        tasks.append(ShardCheckJob(where(folder), number, shard, rules, here))
        first += shard.samples
    return tasks


def _run(tasks: list[ShardCheckJob]) -> list[tuple[ClipStats, list[Finding]]]:
    """Run check_shard on every task, in worker processes that hold one shard each."""
    workers = max(1, min(len(os.sched_getaffinity(0)), len(tasks)))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            return list(tqdm(pool.map(check_shard, tasks), total=len(tasks), unit="shard", disable=None))
    except BrokenProcessPool:
        raise UserError("a worker was killed (memory?): give fewer cores, as in `taskset -c 0 python …`") from None


def _totals(tally: ClipStats) -> dict[str, Any]:
    """Return the counts of index.json that follow from the clips."""
    facts, missing = tally.facts, tally.without()
    totals = {"with_audio": len(facts) - missing["sound"], "with_frames": len(facts) - missing["frames"]}
    totals |= {"silent": int(((facts["n_segments"] == 0) & (facts["seconds"] > 0)).sum())}
    return {"samples": len(facts), **totals, "seconds": round(float(facts["seconds"].sum()), 3)}


def _counts(folder: ShardFolder, tally: ClipStats) -> list[Finding]:
    """Return findings for the counts in an intact folder's index that its clips contradict."""
    wrong = []
    for name, value in _totals(tally).items():
        stated = folder.counts.get(name, value) if isinstance(folder.counts, dict) else None
        if not isinstance(stated, int | float) or not value - 0.01 <= stated <= value + 0.01:  # of any size, or NaN
            wrong.append(Finding(folder.url, "", "", f"{COUNTS}: {name} is {stated}, the clips have {value}"))
    return wrong


def _repeated(report: FolderReport, kind: str) -> tuple[int, str]:
    """Count the clips that repeat another's bytes, and name two of the most frequent ones."""
    rows = report.tally.facts[report.tally.facts[kind] > 0]
    values, count = np.unique(rows[kind], return_counts=True)
    if len(values) == len(rows):
        return 0, ""
    same = rows[rows[kind] == values[count.argmax()]]
    return len(rows) - len(values), f"{len(same):,} with that of " + " and ".join(_key(report, row) for row in same[:2])


def _leakage(reports: list[FolderReport]) -> None:
    """Add findings for what two splits of a source share, and for ids that are not unique."""
    for report in reports:
        values, count = np.unique(report.tally.facts["id"], return_counts=True)
        if len(values) < len(report.tally):
            row = report.tally.facts[report.tally.facts["id"] == values[count.argmax()]][0]
            reason = f"{len(report.tally) - len(values):,} clips have another's id, such as {_key(report, row)}"
            report.findings.append(Finding(report.folder.url, "", "", reason))
    for one, two in itertools.combinations(reports, 2):
        if one.folder.source == two.folder.source and one.folder.split != two.folder.split:
            for kind in HASHES:
                one.findings += _shared(one, two, kind)


def _shared(one: FolderReport, two: FolderReport, kind: str) -> list[Finding]:
    shared, here, there = np.intersect1d(one.tally.facts[kind], two.tally.facts[kind], return_indices=True)
    at = np.flatnonzero(shared)
    if not len(at):
        return []
    names = [_key(r, r.tally.facts[i[at[0]]]) for r, i in ((one, here), (two, there))]
    reason = f"leakage: {len(at):,} {kind}(s) also in {two.folder.url}, such as {names[0]} and {names[1]}"
    return [Finding(one.folder.url, "", "", reason)]


def _key(report: FolderReport, row: np.void) -> str:
    return report.folder.entries(int(row["shard"]))[int(row["entry"])][0]


def _pairing(vectors: ShardFolder) -> list[Finding]:
    """Return findings for shards of a folder of vectors that do not fit the shard folder above it."""
    above, below = where(vectors).rpartition("/")[0], where(vectors)
    shards = ShardFolder.open(above).shards
    wanted = {shard.name: (list(indexed(above, shard)[0]), shard.sha256) for shard in shards}
    present = {shard.name: (list(indexed(below, shard)[0]), shard.of) for shard in vectors.shards}
    names = [name for name in sorted(wanted | present) if wanted.get(name) != present.get(name)]
    again = "its keys or sha256 are not those of the shard above; run data_prep/embed.py again"
    return [Finding(vectors.url, name, "", again) for name in names]


def repair(report: FolderReport) -> None:
    """Rewrite a folder's corrupt shards without their corrupt clips, then index.json; print what was dropped.

    Vectors are not repaired but removed where they are corrupt or no longer fit: embed.py makes these again.
    """
    corrupt = {finding.shard for finding in report.findings} - {""}
    with open_out(where(report.folder)) as out:
        if report.vectors:
            _forget(out, corrupt)
        else:
            _repair_shards(report, out, corrupt)
    if corrupt and not report.vectors:
        with open_out(f"{where(report.folder)}/clip") as vectors:
            if (vectors.local / INDEX).exists():
                _forget(vectors, set())


def _repair_shards(report: FolderReport, out: OutFolder, corrupt: set[str]) -> None:
    """Rewrite the corrupt shards of a folder, then its index with right counts."""
    folder, file = report.folder, out.local / INDEX
    lost: list[dict[str, str]] = []
    out.pull([file, out.local / QUARANTINE])
    index = json.loads(file.read_text(encoding="utf-8"))
    same = {name: index[name] for name in ("fingerprint", "media_root", "source", "split", "counts")}
    write_index(out.local, **same, shards=_repaired(report, out, corrupt, lost))
    for name in (ENTRIES, INDEX):
        out.publish(out.local / name)
    if lost:
        _quarantine(out, lost)
    index = json.loads(file.read_text(encoding="utf-8"))
    rows = [Shard.of_json(row) for row in index["shards"]]
    tasks = [ShardCheckJob(where(folder), 0, row, _rules(folder), frozenset()) for row in rows]
    totals = _totals(ClipStats.sum([tally for tally, _ in _run(tasks)]))
    index["counts"] = folder.counts | totals | {"quarantined": folder.counts.get("quarantined", 0) + len(lost)}
    write_json(file, index)
    out.publish(file)
    print(f"repaired: {where(folder)}: {len(corrupt)} shard(s) rewritten, {len(lost)} clip(s) dropped", flush=True)


def _repaired(
    report: FolderReport, out: OutFolder, corrupt: set[str], lost: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield what write_shard returns of each shard; corrupt ones are rewritten on the way."""
    for number, shard in enumerate(report.folder.shards):
        if shard.name not in corrupt:
            yield asdict(shard) | {"entries": report.folder.entries(number)}
        elif rewritten := _rewrite(report, out, shard, lost):
            yield rewritten


def _rewrite(report: FolderReport, out: OutFolder, shard: Shard, lost: list[dict[str, str]]) -> dict[str, Any] | None:
    """Write a shard without its corrupt clips, which are added to `lost`.

    Return what write_shard does, None if nothing is left.
    """
    folder, rules = where(report.folder), _rules(report.folder)
    path = out.local / shard.name
    reasons = {finding.key: finding.reason for finding in report.findings if finding.shard == shard.name}
    samples, _ = contents(folder, shard)
    good = [key for key, members in samples.items() if not validate_sample(members, rules, True)[1]]
    for key in dict.fromkeys([*indexed(folder, shard)[0], *samples]):
        if key not in good:
            lost.append({"id": key, "path": shard.name, "reason": reasons[key]})
            print(f"dropped: {out.shown(path)} {key}: {reasons[key]}")
    if not good:
        out.remove(path)
        return None
    entry = write_shard(path, ((key, {ext: bytes(d) for ext, d in samples[key].items()}) for key in good))
    out.publish(path, keep=False)
    return entry


def _quarantine(out: OutFolder, lost: list[dict[str, str]]) -> None:
    """Add lines to quarantine.jsonl."""
    file = out.local / QUARANTINE
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    write_text(file, before + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lost))
    out.publish(file)


def _forget(vectors: OutFolder, names: set[str]) -> None:
    """Remove the index of a folder of vectors, and these shards of it."""
    for name in (INDEX, ENTRIES, *names):
        vectors.remove(vectors.local / name)
    removed = ", ".join((INDEX, *sorted(names)))
    print(f"repaired: {vectors.url}: removed {removed}; run data_prep/embed.py again", flush=True)
