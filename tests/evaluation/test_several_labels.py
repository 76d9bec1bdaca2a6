"""Clips of several classes, as AudioSet's: figures and probes against scikit-learn's, and what evaluation makes of them."""

import csv
import math
from types import SimpleNamespace

import made_batch
import numpy as np
import pytest
import torch
from forks import ROOT
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from clip4vla.config import ModelConfig, RunConfig
from clip4vla.config_io import load
from clip4vla.data.sample_metadata import labels_of
from clip4vla.errors import UserError
from clip4vla.evaluation import classification, features, linear_probe
from clip4vla.evaluation.features import Features
from clip4vla.evaluation.retrieval_metrics import d_prime, rank_classes
from clip4vla.models.classifier import Classifier, known_labels, label_of
from clip4vla.report.page import classification as page
from clip4vla.report.sections.classification import Predicted

CLASSES = ["Bark", "Dog", "Rain", "Speech"]


def cfg_of(*words):
    return load(RunConfig, ROOT / "configs/finetune/esc50_classification.yaml", list(words))


@pytest.mark.parametrize("kinds", [1000, 4], ids=["no ties", "ties"])
def test_figures_are_scikit_learns(kinds):
    rng = np.random.default_rng(0)
    scores, target = rng.integers(0, kinds, (80, 6)) / 7, rng.random((80, 6)) < [0.5, 0.1, 0.9, 0.02, 0.3, 0.3]
    target[0] = [True, True, False, True, True, False]
    figures = rank_classes(torch.from_numpy(scores), torch.from_numpy(target))
    for k, (precision, area) in enumerate(figures):
        assert precision == pytest.approx(average_precision_score(target[:, k], scores[:, k]), abs=1e-12)
        assert area == pytest.approx(roc_auc_score(target[:, k], scores[:, k]), abs=1e-12)
        assert d_prime(area) == pytest.approx(2**0.5 * norm.ppf(area), abs=1e-9)
    assert d_prime(0.5) == 0 and 8 < d_prime(1.0) < 9


def test_a_class_of_no_clip_and_one_of_all_have_no_area():
    (none, every) = rank_classes(torch.rand(5, 2), torch.tensor([[False, True]] * 5))
    assert all(map(math.isnan, none)) and every[0] == 1 and math.isnan(every[1])


def made(n=120, seed=0, groups=1):
    """Features and labels that follow from them, with noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8))
    marks = x @ np.random.default_rng(9).normal(size=(8, 4)) + rng.normal(size=(n, 4)) > [0, 0.5, 1, 3]
    marks[~marks.any(1), 0] = True
    clips = [
        {"id": str(i), "group": str(i // groups), "source": "s", "split": "x", "label": None, "labels": labels}
        for i, labels in enumerate([[CLASSES[k] for k in np.flatnonzero(row)] for row in marks])
    ]
    return Features(list(range(n)), clips, {"a": torch.from_numpy(x).float()}), marks


def test_a_probe_of_each_class_against_the_rest_is_scikit_learns():
    some, marks = made()
    x, y = some.vectors["a"].double(), torch.from_numpy(marks).double()
    probe = linear_probe.fit(x, y, 4, 0.5, tolerance=1e-9)
    for k in range(4):
        judge = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-12).fit(x.numpy(), marks[:, k])
        p = judge.predict_proba(x.numpy())[:, 1]
        assert probe.log_probabilities(x)[:, k].exp().numpy() == pytest.approx(p, abs=1e-6)


def test_the_strength_is_that_of_the_best_mean_average_precision():
    some, marks = made(200)
    x, y, held = some.vectors["a"], torch.from_numpy(marks).double(), torch.arange(200) < 60
    strengths = [1e-5, 1e-3, 1e-1, 10.0]
    best = linear_probe.fit_select_C(x, y, 4, strengths, held, again=False)
    quality = {c: linear_probe.fit(x[~held], y[~held], 4, c).quality(x[held], y[held]) for c in strengths}
    assert quality[best.strength] == pytest.approx(max(quality.values()), abs=1e-3)
    scores = best.log_probabilities(x[held]).numpy()
    assert best.quality(x[held], y[held]) == pytest.approx(average_precision_score(marks[:60], scores))


def test_strengths_are_chosen_by_groups_of_the_rarest_class_of_each_clip():
    y = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1.0]])
    known = linear_probe.LabeledFeatures([], torch.zeros(4, 1), y, list("abcd"))
    assert known.home.tolist() == [0, 1, 1, 2]  # of equally rare ones the first


@pytest.mark.parametrize("shots", [1, 3, 16])
def test_few_shots_have_so_many_clips_of_each_class_and_few_more(shots):
    _, marks = made(300, groups=3)
    y, groups = torch.from_numpy(marks).double(), [str(i // 3) for i in range(300)]
    few, more = linear_probe.drawn(y, groups, shots, np.random.default_rng(0))
    sizes = marks.sum(0)
    assert len(set(few)) == len(few) <= 4 * shots and (marks[few].sum(0) >= np.minimum(shots, sizes)).all()
    assert marks[few][:, sizes.argmin()].sum() == min(shots, sizes.min())  # the rarest is drawn first
    assert not {groups[row] for row in few} & {groups[row] for row in more} and (marks[more].sum(0) > 0).all()
    assert linear_probe.drawn(y, groups, shots, np.random.default_rng(1))[0] != few


def test_few_shot_curves_are_of_the_mean_average_precision():
    training, _ = made(400)
    test, marks = made(60, seed=1)
    cfg = cfg_of("model.modalities=a", "classify.C=[1]", "classify.shots=[1, 32]", "classify.n_draws=3")
    judge = linear_probe.ProbeEvaluation(
        test, ["all"] * 60, training, CLASSES, cfg, torch.device("cpu"), lambda _: None, several=True
    )
    curves = judge.solved("a")[1]["few_shot"]
    one, many = (np.mean(curves[shots]) for shots in ("1", "32"))
    assert [len(curve) for curve in curves.values()] == [3, 3] and 100 * marks.mean() < one < many - 5 < 100
    fit, known = judge.known(training, "a", range(400)), judge.known(test, "a", range(60))
    few, _ = linear_probe.drawn(fit.y, fit.groups, 32, np.random.default_rng((cfg.seed, 32, 0)))
    x, y = fit.x[few].double().numpy(), fit.y[few].numpy()
    scores = [
        LogisticRegression(C=1, solver="newton-cholesky", tol=1e-12).fit(x, y[:, k]).decision_function(known.x.double())
        for k in range(4)
    ]
    assert curves["32"][0] == pytest.approx(100 * average_precision_score(marks, np.stack(scores, 1)), abs=0.2)


# A trained head


def head_and_batch(**settings):
    head = Classifier(ModelConfig(labels=CLASSES, several_labels=True, modalities="a"), 8)
    batch = made_batch.batch(clips=4)
    batch.has_audio = torch.tensor([True, True, False, True])
    labels = ["Dog", "Bark"], ["Speech", "Cat"], ["Dog"], ["Cat"]
    batch.meta = [{"id": str(i), "labels": some} for i, some in enumerate(labels)]
    return head, batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_head_is_the_mean_of_binary_cross_entropies(smoothing):
    head, batch = head_and_batch()
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = head.nll(logits, batch, smoothing)
    wanted = np.array([[1, 1, 0, 0], [0, 0, 0, 1]]) * (1 - smoothing) + smoothing / 2
    p = 1 / (1 + np.exp(-logits[:2].numpy()))
    assert found[:2].numpy() == pytest.approx(-(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).mean(1), rel=1e-12)
    assert found[2:].tolist() == [0, 0]  # nothing to classify; none of the classes
    if not smoothing:
        judge = [log_loss(wanted[0], q, labels=[0, 1]) for q in p[:1]]
        assert found[0].item() == pytest.approx(judge[0], rel=1e-12)
    own, batch.others = batch.meta, [{"id": "5", "labels": ["Rain"]}] * 4
    batch.meta = batch.others
    other = head.nll(logits, batch, smoothing)
    batch.meta, batch.share = own, torch.tensor([0.3, 1, 1, 1])
    assert head.nll(logits, batch, smoothing)[0].item() == pytest.approx((0.3 * found[0] + 0.7 * other[0]).item())


def test_clips_of_several_classes_want_the_setting():
    assert known_labels({"id": "x", "labels": ["Dog", "Cat"]}, ModelConfig(labels=CLASSES, several_labels=True)) == [
        "Dog"
    ]
    with pytest.raises(UserError, match="a trained head takes several with model.several_labels=true"):
        known_labels({"id": "x", "labels": ["Dog", "Cat"]}, ModelConfig(labels=CLASSES))


def evaluated(cfg):
    training, _ = made()
    test, marks = made(60, seed=1)
    evaluation = linear_probe.ProbeEvaluation(
        test, ["all"] * 60, training, CLASSES, cfg, torch.device("cpu"), lambda _: None, several=True
    )
    scores, notes = evaluation.solved("a")
    clips = dict(enumerate(test.clips))
    outputs = classification.ClassificationOutputs(
        CLASSES, clips, {}, {"a": scores}, probe_notes={"a": notes}, several=True
    )
    return outputs, marks


def test_an_evaluation_gives_map_auc_and_d_prime(tmp_path):
    cfg = cfg_of("model.modalities=a", "classify.C=[0.1, 1]", "classify.shots=[1]", "classify.cross_validate=false")
    outputs, marks = evaluated(cfg)
    metrics = classification.compute_metrics(outputs, cfg)[cfg.model.audio_type]
    row, scores = metrics["label"], outputs.scores["a"].numpy()
    assert row["mAP"] == pytest.approx(100 * average_precision_score(marks, scores)) and row["mAP"] > 80
    assert row["AUC"] == pytest.approx(100 * roc_auc_score(marks, scores))
    assert row["d_prime"] == pytest.approx(2**0.5 * norm.ppf(row["AUC"] / 100))
    assert row["chance_mAP"] == pytest.approx(100 * marks.mean()) and row["clips"] == marks.sum(0).tolist()
    assert row["labels_per_clip"] == pytest.approx(marks.sum(1).mean()) and "accuracy" not in row
    text = classification.table(metrics)
    assert "d'" in text and f"{row['d_prime']:.2f}" in text
    assert "each class against the rest" in classification.protocol(outputs, cfg)["protocol"]
    classification.write_results(tmp_path, outputs)
    lines = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [line["label"].split(";") for line in lines] == [labels_of(clip) for clip in outputs.clips.values()]
    for line, score, own in zip(lines, scores, marks, strict=True):
        assert line["guess"] == CLASSES[score.argmax()] and int(line["rank"]) == 1 + (score > score[own].max()).sum()
    assert len(row["few_shot"]["1"]) == cfg.classify.n_draws
    shown = page(metrics, [], [Predicted(0, ["Dog", "Bark"], [("Dog", 0.5)], "")])
    assert (
        f"<td>{row['d_prime']:.2f}" in shown
        and "average precision of each class" in shown
        and "confusion" not in shown
        and "few-shot curves" in shown
    )


def test_clips_without_any_of_the_classes_are_left_out():
    clips = {0: {"id": "a", "labels": ["Cat", "Dog"]}, 1: {"id": "b", "labels": ["Cat"]}, 2: {"id": "c", "label": None}}
    kept, gone = classification._split_eligible(clips, dict.fromkeys(clips, True), ["Dog"])
    assert list(kept) == [0] and gone == {"no label": ["c"], "another label": ["b"], "no media": []}
    outputs = classification.ClassificationOutputs(["Bark", "Dog"], kept, gone, {}, several=True)
    assert outputs.target.tolist() == [[False, True]]


def test_labels_of_older_shards_and_what_takes_one_class_alone():
    assert labels_of({"label": "Speech;Inside, small room"}) == ["Speech", "Inside, small room"]
    assert labels_of({"label": "Dog"}) == ["Dog"] and labels_of({"label": None}) == labels_of({}) == []
    with pytest.raises(UserError, match="x: its labels 'Dog; Bark' are several classes"):
        label_of({"id": "x", "label": None, "labels": ["Dog", "Bark"]})


@pytest.fixture
def embedded(monkeypatch):
    """classification.embed() on made features in two folds, with names at fixed vectors."""
    held, marks = made(80, groups=2)
    for clip in held.clips:
        clip["split"] = f"fold{int(clip['id']) // 2 % 2}"
    parts = iter([held, held._rows([])] * 2)
    monkeypatch.setattr(features, "of_folders", lambda *_: next(parts))
    names = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(class_vectors=lambda *_: names, logit_scale=torch.tensor(3.0))
    loader = SimpleNamespace(folders=[], tokenize=None, device=torch.device("cpu"))

    def call(*words):
        cfg = cfg_of("model.modalities=a", "classify.C=[0.1, 1]", "data.train={}", *words)
        return classification.embed(model, loader, cfg), cfg

    return call, held, marks, names


def test_folds_are_held_out(embedded):
    call, held, marks, _ = embedded
    outputs, cfg = call("classify.cross_validate=true", "classify.shots=[]")
    assert outputs.several and outputs.classes == CLASSES
    row = classification.compute_metrics(outputs, cfg)[cfg.model.audio_type]["label"]
    assert row["n_folds"] == 2 and set(row["C"]) == {"s/fold0", "s/fold1"}
    inside = np.array([clip["split"] == "fold0" for clip in held.clips])
    x, scores = held.vectors["a"].numpy(), outputs.scores["a"].exp().numpy()
    for k in range(4):
        judge = LogisticRegression(C=row["C"]["s/fold0"], solver="newton-cholesky", tol=1e-12)
        judge.fit(x[~inside].astype(float), marks[~inside, k])
        assert scores[inside, k] == pytest.approx(judge.predict_proba(x[inside].astype(float))[:, 1], abs=1e-4)


def test_names_rank_clips_by_their_cosine(embedded):
    call, held, marks, names = embedded
    outputs, cfg = call("classify.method=zero_shot", "classify.cross_validate=false", "model.media_mean=raw")
    row = classification.compute_metrics(outputs, cfg)[cfg.model.audio_type]["label"]
    cosines = (held.vectors["a"] @ names.T).numpy()
    assert row["mAP"] == pytest.approx(100 * average_precision_score(marks, cosines))
    assert float(outputs.scores["a"].max()) == 0
