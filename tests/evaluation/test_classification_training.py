"""Fine-tuning for classification: folds, ranks, ZeRO-3, micro-batches."""

import json

import numpy as np
import pytest
from running import job, run, trace, wait_for
from sample_prep import rows_of
from test_classification import SCRIPT

from clip4vla.data.shards import ShardFolder, write_index, write_shard


@pytest.fixture(scope="module")
def training_words(tiny, sample_shards):
    """All of it fine-tuned, two folds."""
    folds = ", ".join(f"{sample_shards}/speech_{lang}/train" for lang in ("es", "fr"))
    return [
        *tiny, "model.head=classifier", "model.trainable_towers=vision+audio", "loss={at: 0, av: 0, aa: 0, label: 1}",
        "classify.method=classifier", "classify.cross_validate=true", f"data.test=[{folds}]", "data.train={}",
        "eval.task=classification", "train.max_steps=4", "train.lr=3e-3", "eval.report_queries=2", "data.shuffle_window=1",
    ]  # fmt: skip


def test_fine_tuning_runs_fold_by_fold_and_goes_on(training_words, tmp_path):
    done = run(SCRIPT, *training_words, f"run_dir={tmp_path}")
    assert done.returncode == 0 and "over 2 folds" in done.stdout, done.stderr
    names = ["speech_es-train", "speech_fr-train"]
    found = {name: json.loads((tmp_path / name / "eval/test/metrics.json").read_text())["label"] for name in names}
    whole = json.loads((tmp_path / "eval/test/metrics.json").read_text())["label"]
    each = [row["accuracy"] for row in found.values()]
    assert whole["accuracy"] == pytest.approx(np.mean(each)) and whole["accuracy_std"] == pytest.approx(
        np.std(each, ddof=1)
    )
    sources = json.loads((tmp_path / "eval/test/manifest.json").read_text())["sources"]
    assert len(sources) == 2 and "es" in next(
        iter(json.loads((tmp_path / names[0] / "eval/test/manifest.json").read_text())["sources"])
    )
    (tmp_path / names[1] / "report.html").unlink()  # killed in the second fold's evaluation
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("model.safetensors")}
    done = run(SCRIPT, *training_words, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("model.safetensors")}
    assert json.loads((tmp_path / "eval/test/metrics.json").read_text())["label"]["folds"] == whole["folds"]


def test_the_same_on_zero3_ranks_in_micro_batches_and_it_learns(training_words, sample_shards, zero3, tmp_path):
    """One rank = two ranks of ZeRO-3 x two micro-batches; labels learnt by heart."""
    (tmp_path / "again").symlink_to(
        sample_shards / "speech_fr/train"
    )  # what is tested on may not be named for training
    words = [
        *training_words,
        "classify.cross_validate=false",
        f"data.train={tmp_path}/again",
        "train.max_steps=30",
    ]
    words += [f"data.test={sample_shards}/speech_fr/train", "loss.label_smoothing=0.1", "train.save_every=30"]
    assert run(SCRIPT, *words, f"run_dir={tmp_path}/one").returncode == 0
    more = [f"run_dir={tmp_path}/two", "train.gradient_accumulation_steps=2", "--deepspeed_config", zero3]
    with job(2, SCRIPT, *words, *more):  # ended once it has the steps that are compared
        wait_for(tmp_path / "two/metrics.jsonl", 8)
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert [two[step][0] for step in range(1, 9)] == pytest.approx([one[step][0] for step in range(1, 9)], rel=2e-5)
    metrics = json.loads((tmp_path / "one/eval/test/metrics.json").read_text())["label"]
    assert metrics["accuracy"] > 95
    config = json.loads((tmp_path / "one/checkpoints/step-00000030/config.json").read_text())
    assert config["model"]["labels"] == metrics["classes"]


def test_a_head_learns_several_classes_of_each_clip(training_words, sample_shards, tmp_path):
    source = ShardFolder.open(str(sample_shards / "speech_fr/train"))
    keys = source.entries(0).keys()
    members = []
    for sample in source.read([(0, entry) for entry in range(len(keys))]):
        clip = json.loads(sample["json"])
        clip |= {"labels": [clip["label"], f"{len(clip['captions'][0]) % 3} of 3"], "label": None}
        members.append(
            {"json": json.dumps(clip).encode(), "fbank.jpg": sample["fbank"], "frames.jpg": sample["frames"]}
        )
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        shards = [write_shard(tmp_path / name / "a.tar", zip(keys, members, strict=True))]
        names = {"media_root": ".", "source": "s", "split": name, "counts": source.counts}
        write_index(tmp_path / name, fingerprint=source.fingerprint, shards=shards, **names)
    words = [*training_words, "classify.cross_validate=false", "train.max_steps=60", "train.save_every=60"]
    words += [f"data.train={tmp_path}/train", f"data.test={tmp_path}/test", f"run_dir={tmp_path}/run"]
    done = run(SCRIPT, *words)
    assert done.returncode == 2 and "are several classes" in done.stderr and "several_labels=true" in done.stderr
    done = run(SCRIPT, *words, "model.several_labels=true")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run/eval/test/metrics.json").read_text())["label"]
    assert row["mAP"] > 95 > row["chance_mAP"] and row["AUC"] > 95 and row["labels_per_clip"] == 2
    assert set(row["classes"]) == {label for clip in rows_of(tmp_path / "test") for label in clip["labels"]}
    losses = trace(tmp_path / "run")
    assert losses[1][0] == pytest.approx(np.log(2), abs=0.2) and losses[60][0] < 0.3
