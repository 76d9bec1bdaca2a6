"""Store an index in items.sqlite: its clips, their vectors and sources, and what could not be read."""

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError

ITEMS = "items.sqlite"
FORMAT = 1
SHOWN = {"name", "key", "captions", "start", "end"}
DISK = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip
WAIT = 60.0  # s for another process's transaction
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
-- a media file or a shard; state: what tells whether it changed; next: the first of its clips that is not here yet
CREATE TABLE sources (id INTEGER PRIMARY KEY, place TEXT UNIQUE, state TEXT, next INTEGER DEFAULT 0, done INTEGER DEFAULT 0);
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER REFERENCES sources ON DELETE CASCADE,
    media TEXT, shown TEXT, vector BLOB
);
CREATE INDEX items_source ON items (source);
CREATE INDEX items_media ON items (media);
CREATE TABLE damaged (source INTEGER REFERENCES sources ON DELETE CASCADE, name TEXT, reason TEXT);
CREATE INDEX damaged_source ON damaged (source);
CREATE TABLE gone (id INTEGER PRIMARY KEY); -- removed, and still in the faiss index
CREATE TRIGGER removed AFTER DELETE ON items BEGIN INSERT INTO gone VALUES (OLD.id); END;
"""


@contextlib.contextmanager
def index_errors(where: str | Path) -> Iterator[None]:
    """Raise UserError for what only a corrupt index raises inside."""
    try:
        yield
    except UserError:
        raise
    except (sqlite3.Error, ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 255 in DISK:
            raise
        raise UserError(f"{where}: not a readable index ({error}): remove it and build it again") from None


@dataclass
class NewItem:
    """Hold an item to add; source: its number; media: v, a or va, what it has; shown: what a Hit shows of it."""

    source: int
    media: str
    shown: dict[str, Any]
    vector: np.ndarray  # (P D,) float16


class Store:
    """Read and write items.sqlite, with a connection for each thread.

    Every change is a transaction: what is killed loses none before it.
    """

    def __init__(self, folder: str | Path, write: bool = False):
        self.path, self.write = Path(folder) / ITEMS, write
        self._local = threading.local()
        if not write and not self.path.is_file():
            raise UserError(f"{folder}: no index there (no {ITEMS}); python -m clip4vla.search build makes one")
        try:
            if write and not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
                self.db.executescript(f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ('format', '{FORMAT}'); COMMIT;")
            if self.get("format") != FORMAT:
                raise UserError(
                    f"{folder}: index of format {self.get('format')}, this version reads {FORMAT}: build it again"
                )
        except sqlite3.DatabaseError as error:
            if write and isinstance(error, sqlite3.OperationalError):  # the disk's fault, not the file's
                raise
            raise UserError(f"{self.path}: not a readable index ({error}): remove it and build it again") from None

    @property
    def db(self) -> sqlite3.Connection:
        """Return this thread's connection."""
        if not hasattr(self._local, "db"):
            mode = "rwc" if self.write else "ro"
            db = sqlite3.connect(f"file:{quote(str(self.path))}?mode={mode}", uri=True, timeout=WAIT)
            if self.write:
                db.execute("PRAGMA journal_mode=WAL")  # readers go on while it is written to
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("PRAGMA foreign_keys=ON")
            self._local.db = db
        return self._local.db

    def close(self) -> None:
        """Close this thread's connection; what nobody else reads is one file then, which a read-only disk may hold too."""
        if self.write:
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            try:
                self.db.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.OperationalError:
                pass  # somebody does
        self.db.close()
        del self._local.db

    def get(self, key: str) -> Any:
        """Return the value stored in the index under `key`; None if there is none."""
        with index_errors(self.path):
            row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return row and parse_json(row[0])

    def set(self, **values: Any) -> None:
        """Store values in the index, each under its keyword."""
        with self.db:
            self.db.executemany("REPLACE INTO meta VALUES (?, ?)", [(key, json.dumps(v)) for key, v in values.items()])

    def sources(self, root: str) -> dict[str, tuple[int, str, int, bool]]:
        """Return (number, state, next, done) by place of all that lies in a root, or is it."""
        rows = self.db.execute(
            "SELECT place, id, state, next, done FROM sources WHERE place = ? OR substr(place, 1, ?) = ?",
            (root, len(root) + 1, root + "/"),
        )
        return {place: (number, state, following, bool(done)) for place, number, state, following, done in rows}

    def change(self, gone: Iterable[str], begun: Iterable[tuple[str, str]]) -> None:
        """Remove the sources at the places `gone` with their items.

        Then add those that are begun, (place, state), empty.
        """
        with self.db:
            self.db.executemany("DELETE FROM sources WHERE place = ?", [(place,) for place in gone])
            self.db.executemany("INSERT INTO sources (place, state) VALUES (?, ?)", begun)

    def add(
        self, rows: Sequence[NewItem], corrupt: Sequence[tuple[int, str, str]], reached: dict[int, tuple[int, bool]]
    ) -> None:
        """Add items, damage (source, name, reason), and how far sources were read (next, done), in one transaction."""
        items = [(r.source, r.media, json.dumps(r.shown), r.vector.astype("<f2").tobytes()) for r in rows]
        with self.db:
            self.db.executemany("INSERT INTO items (source, media, shown, vector) VALUES (?, ?, ?, ?)", items)
            self.db.executemany("INSERT INTO damaged VALUES (?, ?, ?)", corrupt)
            ends = [(following, done, source) for source, (following, done) in reached.items()]
            self.db.executemany("UPDATE sources SET next = ?, done = ? WHERE id = ?", ends)

    def vectors(self, after: int, block: int, share: float = 1.0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (numbers (n,), vectors (n, P D) float32) of items after number `after`, in blocks.

        share: of them, spread evenly.
        """
        picked = "SELECT id, vector FROM items WHERE id > ? AND ((id * 2654435761) & 4294967295) < ? ORDER BY id"
        with closing(self.db.execute(picked, (after, round(share * 2**32)))) as cursor:
            while rows := cursor.fetchmany(block):
                numbers, blobs = zip(*rows, strict=True)
                vectors = np.frombuffer(b"".join(blobs), "<f2").reshape(len(rows), -1)
                yield np.array(numbers, np.int64), vectors.astype(np.float32)

    def gone(self) -> np.ndarray:
        """Return the numbers (n,) of removed items that may still be in the faiss index."""
        return np.fromiter((number for (number,) in self.db.execute("SELECT id FROM gone")), np.int64)

    def newest(self) -> int:
        """Return the highest number of an item, 0 if there is none."""
        return self.db.execute("SELECT max(id) FROM items").fetchone()[0] or 0

    def made(self, known: dict[str, Any]) -> None:
        """Store the notes on a faiss index of all items, as they are now, that is in the folder."""
        with self.db:
            self.db.execute("REPLACE INTO meta VALUES ('faiss', ?)", (json.dumps(known),))
            self.db.execute("DELETE FROM gone")

    def damage(self) -> Iterator[dict[str, str]]:
        """Yield what could not be read: place of the source, name, reason."""
        rows = self.db.execute(
            "SELECT place, name, reason FROM damaged JOIN sources ON sources.id = source ORDER BY place"
        )
        return (dict(zip(("place", "name", "reason"), row, strict=True)) for row in rows)

    def without(self, media: str) -> np.ndarray:
        """Return the numbers (n,) of the items that have none of these media (v, a or va)."""
        lacking = {"v": "a", "a": "v"}.get(media, "")
        rows = self.db.execute("SELECT id FROM items WHERE media = ?", (lacking,))
        return np.fromiter((number for (number,) in rows), np.int64)

    def counts(self) -> dict[str, int]:
        """Count items, those with pictures, with sound, sources, and corrupt files or samples."""
        one = {
            "items": "items",
            "with_pictures": "items WHERE media IN ('v', 'va')",
            "with_sound": "items WHERE media IN ('a', 'va')",
            "sources": "sources",
            "unfinished": "sources WHERE NOT done",
            "corrupt": "damaged",
        }
        with index_errors(self.path):
            return {name: self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for name, table in one.items()}


def parse_item(text: str) -> dict[str, Any]:
    """Parse what an item's row says of it; ValueError, TypeError or KeyError if it is not what an index holds."""
    shown = parse_json(text)
    texts = [shown["name"], shown["key"], *shown["captions"]]
    ends = all(type(shown[end]) in (int, float, type(None)) for end in ("start", "end"))
    if not ends or not all(isinstance(text, str) for text in texts) or set(shown) != SHOWN:
        raise ValueError(shown)
    return shown
