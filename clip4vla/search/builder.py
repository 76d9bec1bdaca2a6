"""Build a search index, and keep it up with its sources.

At any moment a build may be killed: what was embedded stays, and the same command goes on where it was.
"""

import contextlib
import functools
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from clip4vla.api import CLIP4VLA
from clip4vla.config_io import to_dict
from clip4vla.data import preprocessing
from clip4vla.data.preprocessing import ClipInput
from clip4vla.errors import UserError
from clip4vla.io import atomic
from clip4vla.io.atomic import write_text
from clip4vla.media.worker_pool import IsolatedIterator
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.search import faiss_index
from clip4vla.search.faiss_index import IndexType
from clip4vla.search.index import Index, index_sha256, must_be_of
from clip4vla.search.sources import Source, SourceClip, find, media
from clip4vla.search.store import ITEMS, NewItem, Store

TOGETHER = 32  # clips that are embedded and stored in one go; the same number is read meanwhile
PAUSE = 10.0  # s between lines of progress
DYING = 5.0  # s that workers outlive a build that was killed


class Counts(NamedTuple):
    """Count the sources of a build by what became of them."""

    new: int
    changed: int
    continued: int
    unchanged: int
    gone: int


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """Open the store of an index to write to; UserError if another process writes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        if not _locked(lock):
            raise UserError(f"{folder}: another build writes to it; wait for it")
        try:
            with contextlib.closing(Store(folder, write=True)) as store:
                yield store
        except sqlite3.OperationalError as error:
            raise UserError(f"{folder}: cannot be written ({error}): make room and run the build again") from None


def _locked(lock: TextIO) -> bool:
    """Tell whether the lock could be taken; the workers of a build that was killed hold it for a moment longer."""
    end = time.monotonic() + DYING
    while True:
        if atomic.lock(lock):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def build(
    model: CLIP4VLA, name: str, places: Sequence[str], folder: Path, types: Sequence[str] = (), budget: float = 4e9,
    retry: bool = False, decode_timeout: float = 120,
) -> Counts:  # fmt: skip
    """Bring the index in a folder up to what there is at these places now; what it has from elsewhere stays.

    name: of the model, where a query finds it; types: tokens that sounds are stored under, by default vb, nb and the model's
    own; budget: bytes of memory for the faiss index; retry: read the files and shards again that had damage; decode_timeout:
    seconds after which a file that gives no further clip is given up, as one that crashes its decoder is.
    """
    faiss_index.faiss()  # better known now than after hours
    for audio_type in {*types} - {"data"}:
        type_token_weights(audio_type, key="--audio-types")
    roots = [find(where, model) for where in places]
    for where, (root, sources) in zip(places, roots, strict=True):
        if not sources:
            _must_be_new(where, root, folder)
    with opened(folder) as store:
        _describe(store, folder, model, name, types)
        if retry:
            store.change({damage["place"] for damage in store.damage()}, [])
        counts = _compare(store, roots)
        by_place = {source.place: source for _, sources in roots for source in sources}
        known = {place: row for root, _ in roots for place, row in store.sources(root).items()}
        todo = [(by_place[p], number, following) for p, (number, _, following, done) in known.items() if not done]
        with contextlib.closing(IsolatedIterator(functools.partial(media, model), decode_timeout)) as apart:
            _embed(store, model, todo, apart)
        finish(store, folder, budget)
    return counts


def _must_be_new(where: str, root: str, folder: Path) -> None:
    """Raise UserError, as nothing is there to index; if the index has clips from there, it may be an unmounted disk."""
    if (folder / ITEMS).is_file() and Store(folder).sources(root):
        raise UserError(
            f"{where}: nothing in it now, and clips of it in {folder}: is a disk missing? "
            "python -m clip4vla.search remove takes them out"
        )
    raise UserError(f"{where}: neither videos, sounds, pictures nor shards in it")


def drop(places: Sequence[str], folder: Path, budget: float) -> int:
    """Take what lies at these places (files, folders, URLs) out of an index; return the number of sources removed."""
    Index(folder)  # there must be one
    with opened(folder) as store:
        roots = [where.rstrip("/") if "://" in where else str(Path(where).resolve()) for where in places]
        gone = {place for root in roots for place in store.sources(root)}
        store.change(gone, [])
        finish(store, folder, budget)
    return len(gone)


def _describe(store: Store, folder: Path, model: CLIP4VLA, name: str, types: Sequence[str]) -> None:
    """Write into a new index which model it is of; UserError if an old one is of another model, or of other types."""
    ours, own = index_sha256(model), model.cfg.audio_type
    if store.get("identity") is None:
        parts = ["v", *(dict.fromkeys(types or ["vb", "nb", own]))]
        store.set(
            identity=ours, model=name, parts=parts, dim=model.clip_config["embed_dim"], audio_type=own,
            spectrogram=to_dict(model.spectrogram), frames=to_dict(model.frames),
        )  # fmt: skip
    must_be_of(store, folder, ours, name)
    stored = store.get("parts")[1:]
    if types and set(types) != set(stored):
        raise UserError(f"--audio-types: {folder} has {' '.join(stored)}: leave it out, or build another index")
    store.set(model=name)


def _compare(store: Store, roots: list[tuple[str, list[Source]]]) -> Counts:
    """Remove sources that are gone or changed, and begin those that are new or changed."""
    known = {place: row for root, _ in roots for place, row in store.sources(root).items()}
    states = {source.place: source.state for _, sources in roots for source in sources}
    changed = {place for place in known.keys() & states.keys() if known[place][1] != states[place]}
    new, gone = states.keys() - known.keys(), known.keys() - states.keys()
    store.change(gone | changed, [(place, state) for place, state in states.items() if place in new | changed])
    continued = sum(not known[place][3] for place in states.keys() & known.keys() - changed)
    return Counts(len(new), len(changed), continued, len(states) - len(new) - len(changed) - continued, len(gone))


def _embed(store: Store, model: CLIP4VLA, todo: list[tuple[Source, int, int]], apart: IsolatedIterator) -> None:
    """Embed and store the clips of sources (source, its number, first clip that is wanted)."""
    parts, begun, shown, done = store.get("parts"), time.monotonic(), time.monotonic(), 0
    clips = ((number, *clip) for source, number, first in todo for clip in source.clips(first, model, apart))
    reader = preprocessing.prefetch(clips, TOGETHER)
    while some := list(itertools.islice(reader, TOGETHER)):
        with apart.fork_lock:
            rows = _rows(model, parts, [(number, clip.shown, clip.input) for number, clip, _ in some if clip.input])
        corrupt = [(number, clip.shown["name"], why) for number, clip, last in some if (why := _fault(clip, last))]
        store.add(rows, corrupt, {number: (clip.number + 1, last) for number, clip, last in some})
        done += len(some)
        if time.monotonic() > shown + PAUSE:
            shown = time.monotonic()
            print(f"{done} clips, {done / (shown - begun):.1f} a second", flush=True)


def _fault(clip: SourceClip, last: bool) -> str:
    """Say why a clip is not in the index; a silent part of a longer sound is no fault."""
    if clip.input and clip.input.frames is None and clip.input.segments is None:
        return "neither pictures nor sound: digital silence" if clip.shown["key"] or (last and not clip.number) else ""
    return clip.reason


def _rows(model: CLIP4VLA, parts: list[str], clips: list[tuple[int, dict, ClipInput]]) -> list[NewItem]:
    """Encode clips; return the items to store, vectors (P D,) float16, of those that have pictures or sound."""
    by_part = model.encode((clip for *_, clip in clips), parts[1:])
    vectors = np.stack([by_part[part].numpy() for part in parts], 1)  # n P D
    if not np.isfinite(vectors).all():
        raise UserError("the model gives vectors that are not finite: take other weights")
    visual, audio = (vectors[:, :1] != 0).any((1, 2)), (vectors[:, 1:] != 0).any((1, 2))
    media = ["v" * bool(v) + "a" * bool(a) for v, a in zip(visual, audio, strict=True)]
    rows = zip(clips, media, vectors.astype(np.float16), strict=True)
    return [NewItem(number, kinds, shown, vector.ravel()) for (number, shown, _), kinds, vector in rows if kinds]


def finish(store: Store, folder: Path, budget: float) -> None:
    """Write corrupt.jsonl, and a faiss index of the items: the last one updated, or a new one if it does not fit any more."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in store.damage())
    write_text(folder / "corrupt.jsonl", "".join(lines))
    items, width = store.counts()["items"], len(store.get("parts")) * store.get("dim")
    wanted, known = faiss_index.plan(items, width, budget), store.get("faiss")
    made = IndexType(**known["kind"]) if known else None
    index = _changed(store, folder, known) if made and faiss_index.still_serves(made, wanted) else None
    if index is not None and known["newest"] == store.newest() and not len(store.gone()):
        return
    if index is None:
        made, index = wanted, faiss_index.make(wanted, lambda share: store.vectors(0, _block(width), share))
    number = known["number"] + 1 if known else 1
    file = f"index-{number:06}.faiss"
    faiss_index.save(index, folder / file)
    store.made({"file": file, "number": number, "kind": vars(made), "items": items, "newest": store.newest()})
    for old in folder.glob("index-*.faiss*"):
        if old.name != file:
            old.unlink()


def _changed(store: Store, folder: Path, known: dict[str, Any]) -> Any:
    """Return the faiss index without what is gone, and with what is new; None if it cannot be read."""
    try:
        index = faiss_index.load(folder / known["file"])
    except RuntimeError:
        return None
    index.remove_ids(store.gone())
    for numbers, block in store.vectors(known["newest"], _block(index.d)):
        index.add_with_ids(block, numbers)
    return index


def _block(width: int) -> int:
    return max(1, faiss_index.BLOCK // width)
