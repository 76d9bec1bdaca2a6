"""Cache remote byte ranges on a node: files in one folder, bounded, shared by all processes without a daemon.

Entries are the very ranges that were read, not blocks or whole shards: a node of many reads a few samples of every shard in
an epoch, so larger units would fetch many times what is used.
"""

import fcntl
import functools
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)
BLOCK = 4096  # what a file takes is counted in these
SLACK = 60.0  # s that clocks of one folder's users may differ
WAIT = 5.0  # s for other writers; then the entries are not kept, for a writer may hang


class Cache:
    """Keeps at most `bound` bytes of entries (files rounded up to 4 KiB; folders not counted) in FOLDER/ranges.

    What was used before this process started makes room, least recently used first; what this run has used stays. For an
    epoch reads every sample once, in another order: evicting those would mostly evict what is read next (a cache for half
    of the samples then answers 1 read in 7 instead of 1 in 2).
    One lock serialises writers, so the bound holds at any time and with any number of processes.
    """

    def __init__(self, folder: Path, bound: int):
        self.folder, self.bound = folder / "ranges", bound
        self.started = time.time()
        self.closed = False  # full, or not writable

    def get(self, name: str) -> bytes | None:
        """Read the bytes of an entry, or return None."""
        path, now = self._path(name), time.time()
        try:
            data = path.read_bytes()
            os.utime(path, (now, now))
        except OSError:
            return None
        return data

    def drop(self, name: str) -> None:
        """Remove an entry."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            self._close(error)

    def put(self, entries: dict[str, bytes]) -> None:
        """Keep what there is room for. A full or read-only disk closes the cache and is logged: it never ends a run."""
        if self.closed or not entries:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+b") as lock:
                for name in self._admit(entries, lock) if _is_ours(lock) else []:
                    self._write(name, entries[name])
        except OSError as error:
            self._close(error)

    def _admit(self, entries: dict[str, bytes], lock: BinaryIO) -> list[str]:
        """Choose the names of entries that there is room for; the lock's file says how much is taken, these included."""
        lock.seek(0)
        text = lock.read()
        taken = int(text) if text.isdigit() else sum(room for _, room, _ in self._entries())
        need = sum(_room(len(data)) for data in entries.values())
        if taken + need > self.bound:
            taken = self._evict(need)
        admitted = []
        for name, data in entries.items():
            if taken + _room(len(data)) > self.bound:
                self.closed = True
                break
            taken += _room(len(data))
            admitted.append(name)
        lock.truncate(0)  # counted before they are written: a kill leaves too large a number, which a scan corrects
        lock.write(b"%d" % taken)
        lock.flush()
        return admitted

    def _write(self, name: str, data: bytes) -> None:
        """Write an entry, complete or not at all; not by io.atomic: a cache that syncs is slow, and its lock is held already."""
        path, aside = self._path(name), self.folder / "partial"  # one name: the lock is ours
        path.parent.mkdir(exist_ok=True)
        aside.write_bytes(data)
        now = time.time()
        os.utime(aside, (now, now))
        aside.replace(path)

    def _evict(self, need: int) -> int:
        """Make room for `need` bytes, and a tenth of all so that not every call has to; returns the bytes still taken."""
        entries = sorted(self._entries())
        taken = sum(room for _, room, _ in entries)
        for used, room, path in entries:
            if taken <= min(0.9 * self.bound, self.bound - need) or used >= self.started:
                break
            Path(path).unlink(missing_ok=True)  # another process may have dropped it
            taken -= room
        return taken

    def _entries(self) -> list[tuple[float, int, str]]:
        """List (last use, bytes taken, path) of every entry."""
        folders = [entry.path for entry in os.scandir(self.folder) if entry.is_dir()]
        files = [file for folder in folders for file in os.scandir(folder)]
        entries, now = [], time.time() + SLACK
        for file in files:
            try:
                stat = file.stat()
            except FileNotFoundError:  # another process dropped it
                continue
            used = stat.st_mtime if stat.st_mtime <= now else 0.0  # of the future: the oldest, else never evicted
            entries.append((used, _room(stat.st_size), file.path))
        return entries

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    def _close(self, error: OSError) -> None:
        self.closed = True
        log.warning("data.cache: %s cannot be written (%s); going on without", self.folder, error.strerror)


@functools.cache
def node_cache(folder: str, gigabytes: float) -> Cache:
    """Return this process's one Cache of a folder."""
    return Cache(Path(folder), int(gigabytes * 1e9))


def _is_ours(lock: BinaryIO) -> bool:
    """Take the lock, if it can be had in time; closing the file gives it back."""
    end = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        time.sleep(0.005)


def _room(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
