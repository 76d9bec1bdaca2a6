"""Query an index of clips: items.sqlite is the truth, the faiss index beside it is derived from it.

The vector of an item has P parts of D numbers, fp16, of unit length each: "v" is y^g, every other one z^g under the type token
that names it; zero where the item lacks the medium. One faiss index holds the parts side by side, so that its inner product
with [w_1 q, ..., w_P q] is the weighted sum of P cosines: weights are free at query time.
"""

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.config_io import to_dict
from clip4vla.errors import UserError
from clip4vla.search.faiss_index import IndexType, candidates, load, memory, selector
from clip4vla.search.store import Store, index_errors, parse_item

if TYPE_CHECKING:
    from torch import Tensor

    from clip4vla.api import CLIP4VLA

if TYPE_CHECKING:
    from torch import Tensor

    from clip4vla.models.model import Model
    from clip4vla.report.preview import ClipPreview


@dataclass
class Hit:
    """Describe an item that a query found.

    scores: cosine by part, of the media that it has; score: their weighted sum.
    """

    id: int
    score: float
    scores: dict[str, float]
    name: str
    captions: list[str]
    start: float | None  # s in the medium; None: all of it
    end: float | None
    place: str  # the media file, or FOLDER/SHARD.tar
    key: str  # in the shard; empty for a file


class Index:
    """Query an index from any number of threads, also while a build goes on: what that has finished is used at once.

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
        with index_errors(self.store.path):
            self.spectrogram = SpectrogramConfig(**self.store.get("spectrogram"))
            self.frames = FramesConfig(**self.store.get("frames"))
            named = isinstance(self.parts, list) and all(isinstance(name, str) for name in [self.model, *self.parts])
            if not named or not self.parts or type(self.dim) is not int or self.dim < 1:
                raise ValueError((self.model, self.parts, self.dim))
        self._lock, self._loaded = threading.Lock(), ("", None)
        self._selectors: dict[tuple[str, str], Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open the index in a folder; UserError if there is none, or if its first build was interrupted."""
        index = cls(folder)
        index._faiss()
        return index

    def __len__(self) -> int:
        """Return the number of items that a query can find."""
        return self.known()["items"]

    def known(self) -> dict[str, Any]:
        """Return the notes on the faiss index: file in the folder, kind, items; UserError if there is none yet."""
        known = self.store.get("faiss")
        if not known:
            raise UserError(f"{self.folder}: its first build was interrupted: run the same build again")
        with index_errors(self.store.path):
            kind = IndexType(**known["kind"])
            if Path(known["file"]).name != known["file"] or type(known["items"]) is not int or memory(kind, 1) < 0:
                raise ValueError(known)
        return known

    def must_fit(self, model: "Model", name: str) -> None:
        """Raise UserError unless the index was built with this model; name: what it is called."""
        must_be_of(self.store, self.folder, index_sha256(model), name)

    def search(
        self, vector: "np.ndarray | Tensor", k: int = 10, sound_weight: float = 0.5, ratio: float | None = None
    ) -> list[Hit]:
        """Return the k items with the highest scores, of those that have one of the media asked for; best first.

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
        with index_errors(self.store.path):
            numbers = candidates(faiss, kind, np.outer(weights, query).ravel(), k, self._selector(asked, file))
            return self._hits(numbers, query, weights, k)

    def weights(self, sound_weight: float, ratio: float | None) -> np.ndarray:
        """Return weights (P,) in the order of `parts`.

        UserError for what is out of range, or for a type token that is not stored.
        """
        if not 0 <= sound_weight <= 1 or not 0 <= (ratio or 0) <= 1:
            raise UserError(f"sound weight and ratio lie within 0..1, not {sound_weight:g} and {ratio}")
        types = self.parts[1:]
        shares = {self.own_type: 1.0} if self.own_type in types else {name: 1 / len(types) for name in types}
        if ratio is not None:
            shares = {"vb": 1 - ratio, "nb": ratio}
        missing = [name for name, share in shares.items() if share and name not in types]
        if missing and sound_weight:
            raise UserError(
                f"{self.folder}: no vectors under the token {missing[0]}: build another with --audio-types vb nb"
            )
        return np.array([1 - sound_weight, *(sound_weight * shares.get(name, 0.0) for name in types)], np.float32)

    def exhibit(self, hit: Hit) -> "ClipPreview":
        """Preview a hit, picture and spectrogram (JPEG) and sound (Ogg), from its shard or file.

        It has captions alone if that changed.
        """
        from clip4vla.report.preview import ClipPreview
        from clip4vla.search.hit_preview import of_file, of_shard

        with index_errors(self.store.path):
            row = self.store.db.execute(
                "SELECT place, state, shown FROM items JOIN sources ON sources.id = source WHERE items.id = ?",
                (hit.id,),
            ).fetchone()  # nothing is opened but what the index itself names
            if not row:
                return ClipPreview(hit.name, hit.captions)
            place, state, shown = str(row[0]), str(row[1]), parse_item(row[2])
        if shown["key"]:
            return of_shard(place, state, shown)
        return of_file(Path(place), state, shown, self.spectrogram, self.frames)

    def _hits(self, numbers: np.ndarray, query: np.ndarray, weights: np.ndarray, k: int) -> list[Hit]:
        """Return the k best of these items, of those that there still are, best first."""
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
        known = {number: columns for number, *columns in shown}
        return [self._hit(number, score, each, *known[number]) for number, score, each in best if number in known]

    def _hit(self, number: int, score: float, cosines: np.ndarray, media: str, place: str, shown: str) -> Hit:
        there = (("v" if part == "v" else "a") in media for part in self.parts)
        scores = {p: float(c) for p, c, has in zip(self.parts, cosines, there, strict=True) if has}
        return Hit(number, float(score), scores, place=str(place), **parse_item(shown))

    def _faiss(self) -> tuple[str, Any, IndexType]:
        """Return (file, faiss index, its kind), the newest."""
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
            with index_errors(self.store.path):
                if (width := loaded.d) != len(self.parts) * self.dim:
                    raise ValueError((self._loaded[0], width))
                return *self._loaded, IndexType(**known["kind"])

    def _selector(self, asked: str, file: str) -> Any:
        """Return faiss's selector of the items of this file that have one of the media asked for; None: all."""
        with self._lock:
            if (asked, file) not in self._selectors:
                self._selectors = {key: value for key, value in self._selectors.items() if key[1] == file}
                self._selectors[asked, file] = selector(self.store.without(asked))
            return self._selectors[asked, file]


def index_sha256(model: "Model") -> str:
    """Return the sha256 over all that decides the vectors: weights (as fp32), structure, and how media are read."""
    from clip4vla.data.shards import frames_settings  # torch takes seconds
    from clip4vla.models.audio_encoder import audio_reading
    from clip4vla.models.towers_fingerprint import towers_sha256

    media: list[Any] = [to_dict(model.spectrogram), frames_settings(model.frames), model.cfg.spectrogram_norm]
    media += [model.pictures.resize_mode] * (model.pictures.resize_mode != "shortest")  # how files are read
    media += audio_reading(model.cfg, model.audio_config)
    digest = hashlib.sha256((towers_sha256(model) + json.dumps(media, sort_keys=True)).encode())
    for name, value in model.audio.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def must_be_of(store: Store, folder: Path, ours: str, name: str) -> None:
    """Raise UserError unless the index was built with the model of this identity."""
    theirs = store.get("identity")
    if theirs != ours:
        raise UserError(
            f"{folder}: an index of another model: {theirs[:8]} ({store.get('model')}), this is {ours[:8]} ({name}): "
            "take that one, or build another index"
        )


def load_model(name: str, device: str | None) -> "CLIP4VLA":
    """Load the model onto `device`, by default cuda if there is one."""
    import torch

    from clip4vla import CLIP4VLA

    return CLIP4VLA.from_pretrained(name, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def absolute_name(model: str) -> str:
    """Return a folder's absolute path, of a run that of its checkpoint: queries may come from another folder."""
    from clip4vla.api import resolve_model_dir

    folder = resolve_model_dir(model)
    return str(folder.resolve()) if folder else model
