"""The index itself, on random vectors: scores as by brute force in float64, memory as faiss has it, recall, threads."""

import argparse
import dataclasses
import functools
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.config_io import to_dict
from clip4vla.errors import UserError
from clip4vla.search import faiss_index
from clip4vla.search.builder import finish
from clip4vla.search.faiss_index import IndexType, kinds, plan
from clip4vla.search.index import Index
from clip4vla.search.store import ITEMS, NewItem, Store
from launch.bench.models import search as bench_search

PARTS, DIM = ["v", "vb", "nb", "both"], 24


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fill(store, count, seed=0, media=("va", "v", "a"), place="/media/a"):
    """Items of random unit vectors, zero where they lack a medium; returns their vectors (n, P, D) in float64."""
    vectors = unit(np.random.default_rng(seed).standard_normal((count, len(PARTS), DIM)))
    kinds_of = [media[i % len(media)] for i in range(count)]
    for vector, kind in zip(vectors, kinds_of, strict=True):
        vector[0] *= "v" in kind
        vector[1:] *= "a" in kind
    vectors = vectors.astype(np.float16)
    store.change([], [(place, "1")])
    number = store.sources(place)[place][0]
    shown = [{"name": f"{place} {i}", "captions": [str(i)], "start": i, "end": i + 1, "key": ""} for i in range(count)]
    rows = [NewItem(number, k, s, v.ravel()) for k, s, v in zip(kinds_of, shown, vectors, strict=True)]
    store.add(rows, [], {number: (count, True)})
    return vectors.astype(np.float64)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, write=True)
    settings = {"spectrogram": to_dict(SpectrogramConfig()), "frames": to_dict(FramesConfig())}
    store.set(identity="x" * 64, model="m", parts=PARTS, dim=DIM, audio_type="both", **settings)
    yield store
    store.close()


def brute(vectors, query, weights):
    return (vectors @ query) @ np.asarray(weights)


@pytest.mark.parametrize("sound, ratio, weights", [
    (0.5, None, [0.5, 0, 0, 0.5]), (0.3, 0.25, [0.7, 0.225, 0.075, 0]), (0, None, [1, 0, 0, 0]),
    (0, 0.5, [1, 0, 0, 0]), (1, 0, [0, 1, 0, 0]), (1, 1, [0, 0, 1, 0]), (1, None, [0, 0, 0, 1]),
])  # fmt: skip
def test_scores_are_the_weighted_sums_of_cosines(store, tmp_path, sound, ratio, weights):
    vectors = fill(store, 300)
    finish(store, tmp_path, 4e9)
    index, query = Index.open(tmp_path), np.random.default_rng(1).standard_normal(DIM)
    truth = brute(vectors, unit(query), weights)
    allowed = [i for i in range(300) if (weights[0] and i % 3 != 2) or (any(weights[1:]) and i % 3 != 1)]
    best = sorted(allowed, key=lambda i: -truth[i])
    for k in (7, 300):
        hits = index.search(query, k, sound, ratio)
        assert [hit.start for hit in hits] == best[:k]
        assert [hit.score for hit in hits] == pytest.approx([truth[i] for i in best[:k]], abs=1e-6)
    for hit in hits:
        i = hit.start
        there = {p: vectors[i, j] @ unit(query) for j, p in enumerate(PARTS) if vectors[i, j].any()}
        assert hit.scores == pytest.approx(there, abs=1e-6)
        assert (hit.name, hit.captions, hit.end, hit.place, hit.key) == (
            f"/media/a {i}",
            [str(i)],
            i + 1,
            "/media/a",
            "",
        )


def test_what_is_asked_wrongly_is_one_line(store, tmp_path):
    fill(store, 5)
    with pytest.raises(UserError, match="first build was interrupted"):
        Index.open(tmp_path)
    finish(store, tmp_path, 4e9)
    index = Index.open(tmp_path)
    for vector, words, said in (
        (np.ones(DIM), {"sound_weight": 1.5}, "within 0..1"),
        (np.ones(DIM), {"ratio": -0.1}, "within 0..1"),
        (np.ones(DIM + 1), {}, "vectors of 24 numbers, the query has 25"),
        (np.zeros(DIM), {}, "nothing to search with"),
    ):
        with pytest.raises(UserError, match=said):
            index.search(vector, **words)
    store.set(parts=["v", "vb", "0.5", "none"])
    only = Index.open(tmp_path)
    assert only.weights(0.5, None) == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])  # the model's own token is not there
    assert only.weights(1, 0) == pytest.approx([0, 1, 0, 0])
    with pytest.raises(UserError, match="no vectors under the token nb"):
        only.search(np.ones(DIM), ratio=0.5)


def test_no_index_and_a_broken_one_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no index there"):
        Index.open(tmp_path)
    (tmp_path / ITEMS).write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="not a readable index"):
        Index.open(tmp_path)


def test_what_is_noted_of_the_faiss_file_must_be_whole(store, tmp_path):
    fill(store, 5)
    finish(store, tmp_path, 4e9)
    noted, index = store.get("faiss"), Index(tmp_path)
    assert index.known() == noted
    for corrupt in ([1], {**noted, "file": "../x"}, {**noted, "items": "5"}, {"file": noted["file"]}):
        store.set(faiss=corrupt)
        with pytest.raises(UserError, match="not a readable index"):
            index.known()


def test_a_lost_or_damaged_faiss_file_is_said_and_made_anew(store, tmp_path):
    vectors = fill(store, 40)
    finish(store, tmp_path, 4e9)
    for harm in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:500])):
        harm(next(tmp_path.glob("index-*.faiss")))
        with pytest.raises(UserError, match="run the build again"):
            Index.open(tmp_path)
        finish(store, tmp_path, 4e9)
        hits = Index.open(tmp_path).search(vectors[7, 0] + vectors[7, 3], 1)
        assert hits[0].start == 7 or vectors[7, 0].any() != vectors[7, 3].any()


def test_changes_keep_it_equal_to_brute_force(store, tmp_path):
    """Added, dropped and added again, while one reader stays open; the faiss file follows, old ones go."""
    every = {place: fill(store, 60, seed, place=place) for seed, place in enumerate(("/m/a", "/m/b", "/n/c"))}
    finish(store, tmp_path, 4e9)
    index, query = Index.open(tmp_path), unit(np.random.default_rng(9).standard_normal(DIM))

    def must_hold():
        truth = {f"{p} {i}": s for p, v in every.items() for i, s in enumerate(brute(v, query, [0.5, 0, 0, 0.5]))}
        hits = index.search(query, 10**4)
        assert {hit.name: hit.score for hit in hits} == pytest.approx(truth, abs=1e-6)
        assert len(list(tmp_path.glob("index-*"))) == 1

    must_hold()
    store.change(["/m/b"], [])
    gone = [hit.name for hit in index.search(query, 10**4)]  # not finished, yet nothing that is gone is shown
    assert len(gone) == 120 and not any(name.startswith("/m/b") for name in gone)
    every.pop("/m/b")
    finish(store, tmp_path, 4e9)
    must_hold()
    every["/n/d"] = fill(store, 60, 5, place="/n/d")
    finish(store, tmp_path, 4e9)
    must_hold()
    before = sorted(tmp_path.glob("index-*"))
    finish(store, tmp_path, 4e9)
    assert sorted(tmp_path.glob("index-*")) == before  # nothing new: nothing is written
    store.change(list(every), [])
    every.clear()
    finish(store, tmp_path, 4e9)
    must_hold()


def test_many_threads_search_while_items_come(store, tmp_path):
    """Each hit is right at any moment, in every thread."""
    vectors = {p: fill(store, 50, s, place=p) for s, p in enumerate("ab")}
    finish(store, tmp_path, 4e9)
    index, query = Index.open(tmp_path), unit(np.random.default_rng(3).standard_normal(DIM))
    truth = {f"{p} {i}": s for p, v in vectors.items() for i, s in enumerate(brute(v, query, [0.5, 0, 0, 0.5]))}
    stop, seen = threading.Event(), set()

    def ask():
        while not stop.is_set():
            hits = index.search(query, 1000)
            assert {h.name: h.score for h in hits if h.name in truth} == pytest.approx(truth, abs=1e-6)
            seen.add(len(hits))
        return True

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for seed in range(5):
            vectors[f"c{seed}"] = fill(store, 30, seed, place=f"c{seed}")
            finish(store, tmp_path, 4e9)
        stop.set()
        assert all(future.result() for future in asking)
    assert len(seen) > 1 and len(index.search(query, 1000)) == 100 + 5 * 30


def test_queries_can_write_nothing(store, tmp_path):
    fill(store, 3)
    finish(store, tmp_path, 4e9)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        Index.open(tmp_path).store.set(model="other")


def blocks_of(vectors, share):
    chosen = np.flatnonzero(np.arange(len(vectors)) * 2654435761 % 2**32 < share * 2**32)
    for i in range(0, len(chosen), 1500):
        yield chosen[i : i + 1500], vectors[chosen[i : i + 1500]].astype(np.float32)


@functools.cache
def clustered(count=9000, parts=3, dim=16, topics=90):
    """Items (n, P D) whose parts lie about their topic and their modality, and texts (30, D) about the same topics."""
    draw = np.random.default_rng(0)
    topic = draw.standard_normal((topics, dim))
    own = topic[draw.integers(topics, size=count)][:, None] + draw.standard_normal((parts, dim))
    items = unit(own + 0.7 * draw.standard_normal((count, parts, dim))).reshape(count, -1).astype(np.float16)
    texts = topic[draw.integers(topics, size=30)] + draw.standard_normal(dim)
    return items, unit(texts + 0.7 * draw.standard_normal(texts.shape))


@pytest.mark.parametrize("name, least", [("flat", 1), ("fp16", 0.93), ("8bit", 0.93), ("pq12", 0.9), ("pq6", 0.85)])
def test_recall_and_size_of_every_kind(name, least):
    """recall@10 against brute force, whatever the weights; bytes of the faiss file against the formula."""
    items, texts = clustered()
    kind = next(kind for kind in kinds(*items.shape, 4e9) if kind.name == name)
    index = faiss_index.make(kind, functools.partial(blocks_of, items))
    stored = len(faiss_index.faiss().serialize_index(index))
    assert kind.bytes == pytest.approx(stored, rel=0.05)
    for weights in ([0.5, 0.25, 0.25], [1, 0, 0], [0, 0, 1]):
        found = 0
        for text in texts:
            query = np.outer(weights, text).ravel()
            exact = items.astype(np.float64) @ query
            numbers = faiss_index.candidates(index, kind, query, 10)
            best = numbers[np.argsort(-exact[numbers])[:10]]
            found += len(set(best) & set(np.argsort(-exact)[:10]))
        assert found / 10 / len(texts) >= least
    if kind.lists:  # what is found does not come of looking everywhere
        assert 8 <= kind.lists // faiss_index.PROBED <= kind.lists // 8
        assert len(faiss_index.candidates(index, kind, query, 10)) == 200


def test_an_inexact_index_takes_changes_and_scores_exactly(store, tmp_path, monkeypatch):
    monkeypatch.setattr(faiss_index, "SCANNED", 0)
    monkeypatch.setattr(faiss_index, "FEW", 0)
    vectors = fill(store, 900, media=("va",))
    finish(store, tmp_path, 4e9)
    index, query = Index.open(tmp_path), unit(np.random.default_rng(1).standard_normal(DIM))
    first = store.get("faiss")
    assert first["kind"]["name"] == "fp16" and first["kind"]["lists"] > 1
    more = fill(store, 300, 7, media=("va",), place="/media/b")
    finish(store, tmp_path, 4e9)
    assert store.get("faiss")["kind"] == first["kind"]  # not learnt again
    truth = np.concatenate([brute(v, query, [0.5, 0, 0, 0.5]) for v in (vectors, more)])
    hits = index.search(query, 10)
    number = {f"/media/a {i}": i for i in range(900)} | {f"/media/b {i}": 900 + i for i in range(300)}
    assert [hit.score for hit in hits] == pytest.approx([truth[number[hit.name]] for hit in hits], abs=1e-6)
    fill(store, 1500, 8, place="/media/c")
    finish(store, tmp_path, 4e9)
    assert store.get("faiss")["kind"]["items"] == 2700  # too many for its lists
    silent = [hit.name for hit in index.search(query, 200, 0)]
    assert len(silent) == 200 and all(int(name.split()[1]) % 3 != 2 for name in silent if name.startswith("/media/c"))


def test_the_first_kind_that_fits_is_taken():
    width = 4 * 512
    chosen = {items: plan(items, width, 4e9) for items in (1, 10**5, 10**6, 10**7)}
    assert [kind.name for kind in chosen.values()] == ["flat", "flat", "8bit", "pq256"]
    assert all(kind.bytes <= 4e9 for kind in chosen.values())
    assert plan(9000, width, 0).name == "flat"  # too few to learn from
    assert plan(10**7, width, 1e12).name == "fp16"  # it would fit, yet a query would read 41 GB
    assert chosen[10**5].bytes == 10**5 * (2 * width + 8)
    for kind in kinds(10**8, width, 4e9):  # learning stays within the memory too
        assert kind.lists * faiss_index.LEARN * 4 * width <= 2e9
    with pytest.raises(UserError, match="100000000 items of 2048 numbers take .* GB at least"):
        plan(10**8, width, 4e9)


def test_lists_that_were_learnt_from_too_few_are_learnt_anew():
    made = IndexType("8bit", 512, 10_000, 64)
    for items, serves in ((10_000, True), (19_000, True), (21_000, False), (4_000, False)):
        assert faiss_index.still_serves(made, dataclasses.replace(made, items=items)) is serves
    assert not faiss_index.still_serves(made, dataclasses.replace(made, name="pq8"))
    assert faiss_index.still_serves(IndexType("flat", 0, 10, 64), IndexType("flat", 0, 10**6, 64))


def test_the_benchmark_compares_the_same_answers():
    parser = argparse.ArgumentParser()
    bench_search.add_arguments(parser)
    done = bench_search.main(parser.parse_args("--items 12000 --dim 8 --queries 6 --rounds 1".split()))
    assert [done[name]["kind"]["name"] for name in ("flat", "8bit", "pq3")] == ["flat", "8bit", "pq3"]
    assert done["flat"]["recall"] == 1 and 0.5 < done["8bit"]["recall"] <= 1
    times = done["flat"]["seconds_a_query"]
    assert (
        done["time_ratio_flat"] == pytest.approx(times["ours"] / times["numpy"]) and done["flat"]["bytes"] > 12000 * 48
    )


def test_without_faiss_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"faiss is not installed: pip install 'clip4vla\[web\]'"):
        faiss_index.faiss()
