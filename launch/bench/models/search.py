"""Benchmark `search`: queries of an index of --items clips, P x D wide, against numpy's brute force over the same fp16 vectors.

Ours is all of Index.search: faiss, exact scores from items.sqlite, metadata of the 10 hits. The other side has the vectors in
memory, multiplies them by blocks as float32 and takes the 10 best scores: no metadata. Alternated; median of the rounds. Each
kind of index is asked for by the memory that it takes. Vectors lie about their topics and modalities, texts about the topics;
a third of the queries each weighs pictures and sound alike, pictures alone, [NB] alone. recall: of the 10 best by brute force.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clip4vla.cli import path_word
from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.config_io import to_dict
from clip4vla.search import faiss_index
from clip4vla.search.builder import finish
from clip4vla.search.index import Index
from clip4vla.search.store import NewItem, Store
from launch.bench.common import count

PARTS, BLOCK, TOP = ["v", "vb", "nb"], 16384, 10
WEIGHTS = ((0.5, None), (0.0, None), (1.0, 1.0))  # sound weight and ratio of a query


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--items", type=count, default=200_000)
    parser.add_argument("--dim", type=count, default=64)
    parser.add_argument("--queries", type=count, default=60)
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument("--folder", type=path_word, help="where the index is made; default: a temporary one")


def clips(args: argparse.Namespace, draw: np.random.Generator, topics: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks (n, P, D) fp16 of unit vectors."""
    modality = draw.standard_normal((len(PARTS), args.dim))
    for start in range(0, args.items, BLOCK):
        own = topics[draw.integers(len(topics), size=min(BLOCK, args.items - start))][:, None]
        vectors = own + modality + 0.7 * draw.standard_normal((len(own), len(PARTS), args.dim))
        yield (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float16)


def fill(store: Store, blocks: Iterator[np.ndarray], dim: int) -> np.ndarray:
    """Store the clips; all vectors (n, P D) of them."""
    settings = {"spectrogram": to_dict(SpectrogramConfig()), "frames": to_dict(FramesConfig())}
    store.set(identity="", model="", parts=PARTS, dim=dim, audio_type="both", **settings)
    store.change([], [("clips", "")])
    number, every = store.sources("clips")["clips"][0], []
    for block in blocks:
        every.append(block.reshape(len(block), -1))
        shown = {"name": "clip", "captions": ["a caption"], "start": None, "end": None, "key": "k"}
        store.add([NewItem(number, "va", shown, vector) for vector in every[-1]], [], {number: (0, True)})
    return np.concatenate(every)


def brute_force(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The rows (TOP,) with the highest scores, best first."""
    scores = np.concatenate([vectors[i : i + BLOCK].astype(np.float32) @ query for i in range(0, len(vectors), BLOCK)])
    best = np.argpartition(-scores, TOP)[:TOP]
    return best[np.argsort(-scores[best])]


def measure(index: Index, vectors: np.ndarray, texts: np.ndarray, rounds: int) -> dict[str, Any]:
    """Seconds a query of both sides, and recall."""
    asked = [(text, *WEIGHTS[i % len(WEIGHTS)]) for i, text in enumerate(texts)]
    spent: dict[str, list[float]] = {"ours": [], "numpy": []}
    for _ in range(rounds):
        start = time.perf_counter()
        hits = [{hit.id - 1 for hit in index.search(text, TOP, *how)} for text, *how in asked]
        middle = time.perf_counter()
        right = [set(brute_force(vectors, np.outer(index.weights(*how), text).ravel())) for text, *how in asked]
        spent["ours"].append((middle - start) / len(asked))
        spent["numpy"].append((time.perf_counter() - middle) / len(asked))
    medians = {side: statistics.median(times) for side, times in spent.items()}
    recall = sum(len(a & b) for a, b in zip(hits, right, strict=True)) / TOP / len(asked)
    return {
        "time_ratio": medians["ours"] / medians["numpy"],
        "recall": recall,
        "seconds_a_query": medians,
        "rounds": spent,
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    draw = np.random.default_rng(0)
    topics = draw.standard_normal((max(1, args.items // 100), args.dim))
    width = len(PARTS) * args.dim
    every = {kind.name: kind for kind in faiss_index.kinds(args.items, width, 1e12)}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Store(folder, write=True)
        start = time.perf_counter()
        vectors = fill(store, clips(args, draw, topics), args.dim)
        stored = time.perf_counter() - start
        texts = topics[draw.integers(len(topics), size=args.queries)] + draw.standard_normal(args.dim)
        texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
        for name in ("flat", "8bit", f"pq{width // 8}"):
            start = time.perf_counter()
            finish(store, Path(folder), every[name].bytes)
            made, known = time.perf_counter() - start, store.get("faiss")
            figures[name] = measure(Index.open(folder), vectors, texts, args.rounds)
            figures[name] |= {
                "kind": known["kind"],
                "build_s": made,
                "bytes": Path(folder, known["file"]).stat().st_size,
            }
        store.close()
    ratios = {f"time_ratio_{name}": figure["time_ratio"] for name, figure in figures.items()}
    return ratios | figures | {"store_s": stored, "settings": vars(args)}
