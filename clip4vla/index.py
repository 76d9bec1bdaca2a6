"""An index of clips for search: items.sqlite is the truth, the faiss index beside it is derived from it.

The vector of an item has P parts of D numbers, fp16, of unit length each: "v" is y^g, every other one z^g under the type token
that names it; zero where the item lacks the medium. One faiss index holds the parts side by side, so that its inner product
with [w_1 q, ..., w_P q] is the weighted sum of P cosines: weights are free at query time.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from clip4vla.config import FramesConfig, SpectrogramConfig, UserError
from clip4vla.settings import parse_json, to_dict
from clip4vla.vector_index import Kind, candidates, load, memory, selector

if TYPE_CHECKING:
    from torch import Tensor

    from clip4vla.exhibits import Exhibit
    from clip4vla.model import Model

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
def readable(where: str | Path) -> Iterator[None]:
    """UserError for what only a damaged index raises inside."""
    try:
        yield
    except UserError:
        raise
    except (sqlite3.Error, ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 255 in DISK:
            raise
        raise UserError(f"{where}: not a readable index ({error}): remove it and build it anew") from None


@dataclass
class Hit:
    """An item that was found. scores: cosine by part, of the media that it has; score: their weighted sum."""

    id: int
    score: float
    scores: dict[str, float]
    name: str
    captions: list[str]
    start: float | None  # s in the medium; None: all of it
    end: float | None
    place: str  # the media file, or FOLDER/SHARD.tar
    key: str  # in the shard; empty for a file


@dataclass
class Row:
    """An item as it is added; source: its number; media: v, a or va, what it has; shown: what a Hit tells of it."""

    source: int
    media: str
    shown: dict[str, Any]
    vector: np.ndarray  # (P D,) float16


class Store:
    """items.sqlite, with a connection for each thread. Every change is a transaction: what is killed loses none before it."""

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
                    f"{folder}: index of format {self.get('format')}, this version reads {FORMAT}: build it anew"
                )
        except sqlite3.DatabaseError as error:
            if write and isinstance(error, sqlite3.OperationalError):  # the disk's fault, not the file's
                raise
            raise UserError(f"{self.path}: not a readable index ({error}): remove it and build it anew") from None

    @property
    def db(self) -> sqlite3.Connection:
        """This thread's connection."""
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
        """What is known of the index by this name; None if nothing is."""
        with readable(self.path):
            found = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return found and parse_json(found[0])

    def set(self, **values: Any) -> None:
        """Know this of the index."""
        with self.db:
            self.db.executemany("REPLACE INTO meta VALUES (?, ?)", [(key, json.dumps(v)) for key, v in values.items()])

    def sources(self, root: str) -> dict[str, tuple[int, str, int, bool]]:
        """(number, state, next, done) by place of all that lies in a root, or is it."""
        rows = self.db.execute(
            "SELECT place, id, state, next, done FROM sources WHERE place = ? OR substr(place, 1, ?) = ?",
            (root, len(root) + 1, root + "/"),
        )
        return {place: (number, state, following, bool(done)) for place, number, state, following, done in rows}

    def change(self, gone: Iterable[str], begun: Iterable[tuple[str, str]]) -> None:
        """Without the sources at these places and their items; then with those that are begun (place, state), empty."""
        with self.db:
            self.db.executemany("DELETE FROM sources WHERE place = ?", [(place,) for place in gone])
            self.db.executemany("INSERT INTO sources (place, state) VALUES (?, ?)", begun)

    def add(
        self, rows: Sequence[Row], damaged: Sequence[tuple[int, str, str]], reached: dict[int, tuple[int, bool]]
    ) -> None:
        """Items, damage (source, name, reason), and how far sources were read (next, done), in one transaction."""
        items = [(r.source, r.media, json.dumps(r.shown), r.vector.astype("<f2").tobytes()) for r in rows]
        with self.db:
            self.db.executemany("INSERT INTO items (source, media, shown, vector) VALUES (?, ?, ?, ?)", items)
            self.db.executemany("INSERT INTO damaged VALUES (?, ?, ?)", damaged)
            ends = [(following, done, source) for source, (following, done) in reached.items()]
            self.db.executemany("UPDATE sources SET next = ?, done = ? WHERE id = ?", ends)

    def vectors(self, after: int, block: int, share: float = 1.0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers (n,), vectors (n, P D) float32) of items behind number `after`, in blocks; share: of them, spread evenly."""
        picked = "SELECT id, vector FROM items WHERE id > ? AND ((id * 2654435761) & 4294967295) < ? ORDER BY id"
        with closing(self.db.execute(picked, (after, round(share * 2**32)))) as cursor:
            while rows := cursor.fetchmany(block):
                numbers, blobs = zip(*rows, strict=True)
                vectors = np.frombuffer(b"".join(blobs), "<f2").reshape(len(rows), -1)
                yield np.array(numbers, np.int64), vectors.astype(np.float32)

    def gone(self) -> np.ndarray:
        """Numbers (n,) of removed items that may still be in the faiss index."""
        return np.fromiter((number for (number,) in self.db.execute("SELECT id FROM gone")), np.int64)

    def newest(self) -> int:
        """The highest number of an item, 0 if there is none."""
        return self.db.execute("SELECT max(id) FROM items").fetchone()[0] or 0

    def made(self, known: dict[str, Any]) -> None:
        """A faiss index of all items, as they are now, is in the folder: this is known of it."""
        with self.db:
            self.db.execute("REPLACE INTO meta VALUES ('faiss', ?)", (json.dumps(known),))
            self.db.execute("DELETE FROM gone")

    def damage(self) -> Iterator[dict[str, str]]:
        """What could not be read: place of the source, name, reason."""
        rows = self.db.execute(
            "SELECT place, name, reason FROM damaged JOIN sources ON sources.id = source ORDER BY place"
        )
        return (dict(zip(("place", "name", "reason"), row, strict=True)) for row in rows)

    def without(self, media: str) -> np.ndarray:
        """Numbers (n,) of the items that have none of these media (v, a or va)."""
        lacking = {"v": "a", "a": "v"}.get(media, "")
        rows = self.db.execute("SELECT id FROM items WHERE media = ?", (lacking,))
        return np.fromiter((number for (number,) in rows), np.int64)

    def counts(self) -> dict[str, int]:
        """Items, those with pictures, with sound, sources, and damaged files or samples."""
        one = {
            "items": "items",
            "with_pictures": "items WHERE media IN ('v', 'va')",
            "with_sound": "items WHERE media IN ('a', 'va')",
            "sources": "sources",
            "unfinished": "sources WHERE NOT done",
            "damaged": "damaged",
        }
        with readable(self.path):
            return {name: self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for name, table in one.items()}


class Index:
    """An index to query, from any number of threads, also while a build goes on: what that has finished is seen at once.

    parts: "v" and the type tokens, in the order of a vector; dim: D; model: the folder or hub id that it was built with.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.store = Path(folder), Store(folder)
        if self.store.get("identity") is None:
            raise UserError(
                f"{folder}: nothing in it: its first build did not begin; run python -m clip4vla.search build"
            )
        self.parts: list[str] = self.store.get("parts")
        self.dim: int = self.store.get("dim")
        self.model: str = self.store.get("model")
        self.own_type: str = self.store.get("audio_type")  # the model's
        with readable(self.store.path):
            self.spectrogram = SpectrogramConfig(**self.store.get("spectrogram"))
            self.frames = FramesConfig(**self.store.get("frames"))
            named = isinstance(self.parts, list) and all(isinstance(name, str) for name in [self.model, *self.parts])
            if not named or not self.parts or type(self.dim) is not int or self.dim < 1:
                raise ValueError((self.model, self.parts, self.dim))
        self._lock, self._loaded = threading.Lock(), ("", None)
        self._selectors: dict[tuple[str, str], Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """The index in a folder; UserError if there is none, or if its first build was interrupted."""
        index = cls(folder)
        index._faiss()
        return index

    def __len__(self) -> int:
        """Items that a query can find."""
        return self.known()["items"]

    def known(self) -> dict[str, Any]:
        """What is noted of the faiss index: a file in the folder; UserError if there is none yet."""
        known = self.store.get("faiss")
        if not known:
            raise UserError(f"{self.folder}: its first build was interrupted: run the same build again")
        with readable(self.store.path):
            kind = Kind(**known["kind"])
            if Path(known["file"]).name != known["file"] or type(known["items"]) is not int or memory(kind, 1) < 0:
                raise ValueError(known)
        return known

    def must_fit(self, model: "Model", name: str) -> None:
        """UserError unless the index was built with this model; name: what it is called."""
        must_be_of(self.store, self.folder, identity(model), name)

    def search(
        self, vector: "np.ndarray | Tensor", k: int = 10, sound_weight: float = 0.5, ratio: float | None = None
    ) -> list[Hit]:
        """The k items with the highest scores, of those that have one of the media asked for; best first.

        vector (D,): of a text, a sound or a picture. score = (1 - sound_weight) cos(q, y) + sound_weight cos(q, z), a medium
        that an item lacks counts 0. ratio: share of [NB], cos(q, z) = (1 - ratio) cos(q, z_vb) + ratio cos(q, z_nb); None: the
        token that the model was trained with. Scores are exact in the stored vectors, whatever the kind of the index.
        """
        on_cpu = vector if isinstance(vector, np.ndarray) else vector.detach().float().cpu()
        query = np.asarray(on_cpu, np.float32).reshape(-1)
        if len(query) != self.dim:
            raise UserError(f"{self.folder}: vectors of {self.dim} numbers, the query has {len(query)}")
        length = np.linalg.norm(query)
        if not length > 0:
            raise UserError("nothing to search with: silence, or no such medium in the file")
        query, weights = query / length, self.weights(sound_weight, ratio)
        file, faiss, kind = self._faiss()
        asked = "v" * bool(weights[0] > 0) + "a" * bool((weights[1:] > 0).any())
        with readable(self.store.path):
            found = candidates(faiss, kind, np.outer(weights, query).ravel(), k, self._selector(asked, file))
            return self._hits(found, query, weights, k)

    def weights(self, sound_weight: float, ratio: float | None) -> np.ndarray:
        """(P,) in the order of `parts`; UserError for what is out of range, or for a type token that is not stored."""
        if not 0 <= sound_weight <= 1 or not 0 <= (ratio or 0) <= 1:
            raise UserError(f"sound weight and ratio lie within 0..1, not {sound_weight:g} and {ratio}")
        types = self.parts[1:]
        shares = {self.own_type: 1.0} if self.own_type in types else {name: 1 / len(types) for name in types}
        if ratio is not None:
            shares = {"vb": 1 - ratio, "nb": ratio}
        missing = [name for name, share in shares.items() if share and name not in types]
        if missing and sound_weight:
            raise UserError(f"{self.folder}: no vectors under the token {missing[0]}: build another with --types vb nb")
        return np.array([1 - sound_weight, *(sound_weight * shares.get(name, 0.0) for name in types)], np.float32)

    def exhibit(self, hit: Hit) -> "Exhibit":
        """Picture and spectrogram (JPEG) and sound (Ogg) of a hit, from its shard or file; captions alone if that changed."""
        from clip4vla.exhibits import Exhibit
        from clip4vla.showing import of_file, of_shard

        with readable(self.store.path):
            found = self.store.db.execute(
                "SELECT place, state, shown FROM items JOIN sources ON sources.id = source WHERE items.id = ?",
                (hit.id,),
            ).fetchone()  # nothing is opened but what the index itself names
            if not found:
                return Exhibit(hit.name, hit.captions)
            place, state, shown = str(found[0]), str(found[1]), told(found[2])
        if shown["key"]:
            return of_shard(place, state, shown)
        return of_file(Path(place), state, shown, self.spectrogram, self.frames)

    def _hits(self, numbers: np.ndarray, query: np.ndarray, weights: np.ndarray, k: int) -> list[Hit]:
        """The k best of these items, of those that there still are, best first."""
        chosen = "WHERE items.id IN (SELECT value FROM json_each(?))"
        rows = self.store.db.execute(
            f"SELECT id, vector FROM items {chosen}", (json.dumps(numbers.tolist()),)
        ).fetchall()
        blobs = b"".join(vector for _, vector in rows)
        vectors = np.frombuffer(blobs, "<f2").reshape(-1, len(self.parts), self.dim)
        cosines = vectors.astype(np.float64) @ query  # n P
        scored = zip((number for number, _ in rows), cosines @ weights, cosines, strict=True)
        best = sorted(scored, key=lambda row: (-row[1], row[0]))[:k]
        shown = self.store.db.execute(
            f"SELECT items.id, media, place, shown FROM items JOIN sources ON sources.id = source {chosen}",
            (json.dumps([number for number, *_ in best]),),
        )
        known = {number: told for number, *told in shown}
        return [self._hit(number, score, each, *known[number]) for number, score, each in best if number in known]

    def _hit(self, number: int, score: float, cosines: np.ndarray, media: str, place: str, shown: str) -> Hit:
        there = (("v" if part == "v" else "a") in media for part in self.parts)
        scores = {p: float(c) for p, c, has in zip(self.parts, cosines, there, strict=True) if has}
        return Hit(number, float(score), scores, place=str(place), **told(shown))

    def _faiss(self) -> tuple[str, Any, Kind]:
        """(file, faiss index, its kind), the newest."""
        with self._lock:
            for last in (False, False, True):  # a build may replace it between the two lines
                known = self.known()
                if self._loaded[0] == known["file"]:
                    break
                try:
                    self._loaded = (known["file"], load(self.folder / known["file"]))
                except RuntimeError as error:
                    if last:
                        raise UserError(f"{self.folder}/{known['file']}: {error}: run the build again") from None
            loaded: Any = self._loaded[1]
            with readable(self.store.path):
                if (width := loaded.d) != len(self.parts) * self.dim:
                    raise ValueError((self._loaded[0], width))
                return *self._loaded, Kind(**known["kind"])

    def _selector(self, asked: str, file: str) -> Any:
        """For faiss, the items of this file that have one of the media asked for; None: all."""
        with self._lock:
            if (asked, file) not in self._selectors:
                self._selectors = {key: value for key, value in self._selectors.items() if key[1] == file}
                self._selectors[asked, file] = selector(self.store.without(asked))
            return self._selectors[asked, file]


def told(text: str) -> dict[str, Any]:
    """What an item's row says of it; ValueError, TypeError or KeyError if it is not what an index holds."""
    shown = parse_json(text)
    texts = [shown["name"], shown["key"], *shown["captions"]]
    ends = all(type(shown[end]) in (int, float, type(None)) for end in ("start", "end"))
    if not ends or not all(isinstance(text, str) for text in texts) or set(shown) != SHOWN:
        raise ValueError(shown)
    return shown


def identity(model: "Model") -> str:
    """sha256 over all that decides the vectors: weights (as fp32) and structure of the towers, and how media are read."""
    from clip4vla import vectors  # torch takes seconds

    media = [to_dict(model.spectrogram), to_dict(model.frames), model.cfg.normalise]
    digest = hashlib.sha256((vectors.identity(model) + json.dumps(media, sort_keys=True)).encode())
    for name, value in model.audio.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def must_be_of(store: Store, folder: Path, ours: str, name: str) -> None:
    """UserError unless the index was built with the model of this identity."""
    theirs = store.get("identity")
    if theirs != ours:
        raise UserError(
            f"{folder}: an index of another model: {theirs[:8]} ({store.get('model')}), this is {ours[:8]} ({name}): "
            "take that one, or build another index"
        )
