"""What run folders hold as text, as pages and tables read it; and the SQLite file of a search index."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from clip4vla.checkpoints import best
from clip4vla.checkpoints.lookup import read_metadata
from clip4vla.config import FramesConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import load, to_dict
from clip4vla.errors import UserError
from clip4vla.paper import cost
from clip4vla.paper.tables import tables
from clip4vla.report.compare_runs import compare, read, results, settings, training, validation
from clip4vla.search.__main__ import describe, line
from clip4vla.search.builder import finish
from clip4vla.search.index import Index
from clip4vla.search.store import ITEMS, NewItem, Store
from faults._trees import Damage
from faults._watch import Target

SCORE = {
    "R@1": 46.24,
    "R@5": 73.0,
    "R@10": 83.5,
    "MedR": 2.0,
    "MeanR": 14.1,
    "n_queries": 990,
    "n_gallery": 985,
    "p_value": None,
}
DIRECTIONS = ("text_to_video", "video_to_text", "text_to_video/v", "video_to_text/v")
SCORES = {name: SCORE | {"ci": {"R@1": [43.1, 49.2]}} for name in DIRECTIONS}
CAPTION = {"BLEU-4": 41.2, "METEOR": 28.4, "ROUGE-L": 61.0, "CIDEr": 49.9, "n_clips": 2990, "n_references": 59800}
LABEL = {
    "accuracy": 86.1,
    "top5": 98.0,
    "mean_class_accuracy": 85.0,
    "accuracy_std": 1.5,
    "n_clips": 400,
    "n_classes": 50,
    "n_folds": 5,
}
TASKS = {"retrieval": SCORES, "captioning": {"caption": CAPTION}, "classification": {"label": LABEL, "label/a": LABEL}}
PLACES = ["meta value", "items shown"] * 2 + [
    "items vector", "items media", "sources place", "sources state", "meta key", "items source", "damaged name",
]  # fmt: skip
LOG = [
    {"step": i, "samples": 12 * i, "loss": 2.0 / i, "loss/at": 1.0, "lr": 1e-4, "grad_norm": 3.0, "clips_per_s": 50.0,
     "data_wait_fraction": 0.1, "tflops": 0.01, "memory_gib": 1.5, "cores": 2, "ranks": 1, "alignment": 0.3, "uniformity": -1.0}
    for i in range(1, 8)
]  # fmt: skip


class Run(NamedTuple):
    """A run folder as it should be; trees: of its YAML file."""

    folder: Path
    files: dict[str, bytes]
    tree: dict[str, Any]


def runs(root: Path) -> dict[str, Run]:
    """A run folder of each task."""
    found = {}
    for task, scores in TASKS.items():
        tree = to_dict(load(RunConfig, None, [f"eval.task={task}", "eval.best_metric=text_to_video/R@1"]))
        sources = {"data/x": {"source": "msrvtt_1ka", "split": "test"}}
        files = {
            "config.yaml": "# git 1a\n# torch 2.0\n" + yaml.safe_dump(tree, sort_keys=False),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in LOG),
            "eval/test/metrics.json": json.dumps(scores),
            "eval/test/manifest.json": json.dumps({"sources": sources, "settings": tree, "versions": {"git": "9f"}}),
            "eval/val-00000002/metrics.json": json.dumps(scores),
            "eval/val-00000004/metrics.json": json.dumps(scores),
        }
        for name, text in files.items():
            (root / task / name).parent.mkdir(parents=True, exist_ok=True)
            (root / task / name).write_text(text)
        found[task] = Run(root / task, {name: text.encode() for name, text in files.items()}, tree)
    return found


def run_folder(state: dict[str, Run], damage: Damage) -> str:
    """Pages, tables, costs and the best checkpoint of two runs, of which one has a corrupt file."""
    one = state[damage.rng.choice(list(state))]
    name = damage.rng.choice(list(one.files))
    data = one.files[name]
    if name.endswith("yaml"):
        made = damage.yaml(data, one.tree)
    else:
        made = damage.jsonl(data) if name.endswith("jsonl") else damage.json(data)
    (one.folder / name).write_bytes(made)
    try:
        outcomes = [_tried(look) for look in _looks(one.folder, state["retrieval"].folder, damage)]
    finally:
        (one.folder / name).write_bytes(data)
    return "one-line error" if "" in outcomes else "pages and tables"


def _tried(look: Any) -> str:
    """What it gives as text; nothing for a one-line error, which is one."""
    try:
        return look().encode().decode()
    except UserError as error:
        assert str(error).isprintable(), str(error)
        return ""


def _looks(folder: Path, other: Path, damage: Damage) -> Iterator[Any]:
    both = list(dict.fromkeys([str(folder), str(other)]))
    cfg = RunConfig(run_dir=str(folder))
    cfg.eval.best_metric = "text_to_video/R@1"
    yield lambda: tables([str(folder)], damage.rng.random() < 0.5)
    yield lambda: _page(read(both), damage)
    yield lambda: str(cost.of_log(str(folder), cost.read_rows(folder)))
    yield lambda: best.best(cfg) + str(best.kept(cfg))
    if damage.rng.random() < 0.01:
        yield lambda: str(compare(both, str(folder / "page.html")))


def _page(runs: list[Any], damage: Damage) -> str:
    """Tables, and in one of ten cases titles of plots that were drawn."""
    drawn = (training, validation) if damage.rng.random() < 0.1 else ()
    return settings(runs) + results(runs) + " ".join(title for plots in drawn for title, _ in plots(runs))


def checkpoint(root: Path) -> Path:
    """Its folder, with the config.json alone."""
    (place := root / "step-00000500").mkdir(parents=True)
    return place


def place_of_a_run(place: Path, damage: Damage) -> str:
    """Where a run goes on from a checkpoint by its corrupt config.json: where it was, or not at all."""
    metadata = {"clip": {"embed_dim": 64}, "step": 500, "ranks": 2, "zero_stage": 1, "sample order": "0123456789ab"}
    (place / "config.json").write_bytes(damage.json(json.dumps(metadata).encode()))
    assert read_metadata(place)["step"] == 500
    return "the step"


class Built(NamedTuple):
    """A search index as it should be."""

    folder: Path
    data: bytes
    faiss: str


def built(root: Path) -> Built:
    """Of six items with three parts of eight numbers."""
    root.mkdir(exist_ok=True)
    store = Store(root, write=True)
    sets = {"spectrogram": to_dict(SpectrogramConfig()), "frames": to_dict(FramesConfig())}
    store.set(identity="00", model="x", parts=["v", "vb", "nb"], dim=8, audio_type="both", **sets)
    store.change([], [(str(root / f"{i}.png"), "1 2") for i in range(2)])
    vectors = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float16)
    shown = {"name": "a.png", "captions": ["A dog."], "start": None, "end": 2.5, "key": ""}
    rows = [
        NewItem(1 + i % 2, ("v", "a", "va")[i % 3], shown | {"key": "k" * (i == 5)}, vector)
        for i, vector in enumerate(vectors)
    ]
    store.add(rows, [(1, "bad.png", "no picture")], {1: (3, True), 2: (3, True)})
    finish(store, root, 1e9)
    store.close()
    return Built(root, (root / ITEMS).read_bytes(), next(root.glob("*.faiss")).name)


def search(state: Built, damage: Damage) -> str:
    """Opened, asked, described and shown: an index whose bytes, or the values in it, are corrupt."""
    for path in state.folder.glob(f"{ITEMS}*"):
        path.unlink()
    (state.folder / ITEMS).write_bytes(damage.file(state.data) if damage.rng.random() < 0.4 else state.data)
    if (state.folder / ITEMS).read_bytes() == state.data:
        _change(state.folder / ITEMS, damage)
    index = Index.open(state.folder)
    hits = [hit for weight in (0.0, 0.5, 1.0) for hit in index.search(np.ones(8, np.float32), 4, weight)]
    for hit in hits:
        line(1, hit).encode()
        if "://" not in hit.place:  # shards that an index was built from may be at any URL
            index.exhibit(hit)
    describe(state.folder)
    return "hits" if hits else "no hits"


def _change(path: Path, damage: Damage) -> None:
    """One to three values of any table are something else; JSON is corrupt as JSON."""
    with closing(sqlite3.connect(path)) as db, db:
        for _ in range(damage.rng.choice((1, 1, 2, 3))):
            table, column = damage.rng.choice(PLACES).split()
            row, value = damage.rng.choice(db.execute(f"SELECT rowid, {column} FROM {table}").fetchall())
            value = damage.again(str(value).encode()) if column in ("value", "shown") else damage.value()
            value = (
                value.decode("utf-8", "replace") if isinstance(value, bytes) and damage.rng.random() < 0.9 else value
            )
            db.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE rowid = ?", (_storable(value), row))


def _storable(value: Any) -> Any:
    """What SQLite can hold, else its text."""
    if isinstance(value, float | bytes | None) or isinstance(value, int) and abs(value) < 2**63:
        return value
    return str(value).encode("utf-8", "replace").decode()


TARGETS = [
    Target("run folders", runs, run_folder),
    Target("checkpoint's config.json", checkpoint, place_of_a_run),
    Target("search index", built, search),
]
