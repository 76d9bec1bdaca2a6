"""Classification: probes that scikit-learn agrees with, folds, cached features, names in words, a trained head."""

import copy
import csv
import json
import runpy
import shutil

import made_batch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from running import ranks, run
from sklearn.linear_model import LogisticRegression

from clip4vla.config import ModelConfig, RunConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.evaluation import classification, features, linear_probe
from clip4vla.evaluation.features import Features
from clip4vla.models.classifier import Classifier, in_words, label_of
from clip4vla.models.fusion import AUDIO, VISION, PaddedSequence
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.training import cross_validation as folds
from clip4vla.training.run_setup import load_eval_model

SCRIPT = "launch/finetune_classification.py"


@pytest.fixture(scope="module")
def probing_words(tiny, sample_shards):
    """A probe on what a fresh tiny model makes of the sample: speech in three languages as three folds."""
    folds = ", ".join(f"{sample_shards}/speech_{lang}/train" for lang in ("en", "es", "fr"))
    return [
        *tiny, "train.max_steps=0", "init_from=[scratch]", f"data.test=[{folds}]", "data.train={}", "eval.task=classification",
        "classify.cross_validate=true", "classify.C=[0.1, 10]", "eval.report_queries=4", "eval.batch_size=16",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def probed(probing_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    done = run(SCRIPT, *probing_words, f"run_dir={folder}", "classify.shots=[1, 2]", "classify.n_draws=2")
    assert done.returncode == 0, done.stderr
    return folder


def kept(folder):
    """{fold: Features} of a run."""
    return {f.name.rpartition("-")[0]: features._read(f, "va", 64) for f in sorted((folder / "features").iterdir())}


def test_probes_are_scikit_learns_on_the_same_features(probed):
    metrics = json.loads((probed / "eval/test/metrics.json").read_text())
    guesses = {row["id"]: row for row in csv.DictReader((probed / "eval/test/predictions.csv").open())}
    found = kept(probed)
    assert (
        len(found) == 3 and sum(len(one.clips) for one in found.values()) == len(guesses) == metrics["label"]["n_clips"]
    )
    for kinds, ending in (("va", ""), ("v", "/v"), ("a", "/a")):
        row, accuracies = metrics[f"label{ending}"], []
        for name, held in found.items():
            others = [one for other, one in found.items() if other != name]
            x, y = (
                np.concatenate([beside(o, kinds) for o in others]),
                sum(([label_of(c) for c in o.clips] for o in others), []),
            )
            strength = row["C"][name.replace("-", "/")]
            judge = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10).fit(x, y)
            said, right = judge.predict(beside(held, kinds)), np.array([label_of(c) for c in held.clips])
            accuracies.append(100 * (said == right).mean())
            if not ending:
                assert [guesses[c["id"]]["guess"] for c in held.clips] == said.tolist()
                p = judge.predict_proba(beside(held, kinds)).max(1)
                assert [float(guesses[c["id"]]["probability"]) for c in held.clips] == pytest.approx(p, abs=3e-4)
        assert row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
        assert [len(values) for values in row["few_shot"].values()] == [6, 6]


def beside(found, kinds):
    return torch.cat([found.vectors[kind] for kind in kinds], 1).double().numpy()


def test_the_confusion_matrix_counts_the_predictions(probed):
    row = json.loads((probed / "eval/test/metrics.json").read_text())["label"]
    guesses = list(csv.DictReader((probed / "eval/test/predictions.csv").open()))
    counts = np.array(row["confusion"])
    assert counts.sum() == len(guesses)
    for guess in guesses:
        counts[row["classes"].index(guess["label"]), row["classes"].index(guess["guess"])] -= 1
        assert (guess["rank"] == "1") == (guess["label"] == guess["guess"])
    assert not counts.any()


def test_the_page_and_the_manifest_say_what_was_done(probed):
    page = (probed / "report.html").read_text()
    for said in ("confusion matrix", "recall of each class", "few-shot curves", "Held-out clips", "classified by"):
        assert said in page
    manifest = json.loads((probed / "eval/test/manifest.json").read_text())
    assert "each folder of data.test held out in turn" in manifest["protocol"] and len(manifest["sources"]) == 3


def test_features_are_computed_once_by_any_number_of_ranks(probed, probing_words):
    before = {f: f.stat().st_mtime_ns for f in (probed / "features").iterdir()}
    metrics = json.loads((probed / "eval/test/metrics.json").read_text())
    done = ranks(2, SCRIPT, *probing_words, f"run_dir={probed}", "eval.report_queries=0")
    assert done.returncode == 0, done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in (probed / "features").iterdir()}
    again = json.loads((probed / "eval/test/metrics.json").read_text())
    assert again["label"]["confusion"] == metrics["label"]["confusion"]
    (probed / "eval/test/metrics.json").write_text(json.dumps(metrics))
    corrupt = next(iter(before))
    old = copy.deepcopy(features._read(corrupt, "va", 64))  # which reads the file on demand
    corrupt.write_bytes(corrupt.read_bytes()[:100])
    done = ranks(2, SCRIPT, *probing_words, f"run_dir={probed}", "eval.report_queries=0", "classify.C=[1]")
    assert done.returncode == 0, done.stderr
    new = features._read(corrupt, "va", 64)
    assert new.number == old.number and all((new.vectors[k] - v).abs().max() < 1e-5 for k, v in old.vectors.items())


def cfg_of(*words):
    return load(RunConfig, None, ["eval.task=classification", *words])


def made(n=120, classes=4, dim=6, seed=0):
    """Features of clips of noisy classes in groups of two, and their folds."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) // 2 % classes
    x = torch.from_numpy(rng.normal(size=(classes, dim))[y] + rng.normal(size=(n, dim))).float()
    clips = [{"id": str(i), "label": "abcdefg"[k], "group": str(i // 2)} for i, k in enumerate(y)]
    some = Features(list(range(n)), clips, {"v": F.normalize(x, dim=1), "a": F.normalize(x[:, :3].repeat(1, 2), dim=1)})
    some.vectors["a"][::6] = 0
    return some, [f"fold{i // 2 % 3}" for i in range(n)]


NONE = Features([], [], {"v": torch.zeros(0, 6), "a": torch.zeros(0, 6)})


def solved(some, turns, kinds, cfg):
    """(scores, its notes) without data.train."""
    return linear_probe.ProbeEvaluation(
        some, turns, NONE, list("abcd"), cfg, torch.device("cpu"), lambda place: None
    ).solved(kinds)


def test_what_is_held_out_decides_nothing():
    """Other labels for a fold change neither its strength nor its scores."""
    some, turns = made()
    cfg = cfg_of("classify.cross_validate=true", "classify.shots=[2]", "classify.n_draws=3")
    scores, notes = solved(some, turns, "va", cfg)
    first = [fold == "fold0" for fold in turns]
    for clip, inside in zip(some.clips, first, strict=True):
        clip["label"] = "dcba"["abcd".index(clip["label"])] if inside else clip["label"]
    again, notes_again = solved(some, turns, "va", cfg)
    assert notes["C"]["fold0"] == notes_again["C"]["fold0"] and len(notes["C"]) == 3
    assert torch.equal(scores[first], again[first]) and not torch.equal(scores, again)


def test_a_medium_alone_is_judged_on_the_clips_that_have_it():
    some, turns = made()
    scores, _ = solved(some, turns, "a", cfg_of("classify.cross_validate=true"))
    assert scores.isnan().any(1).tolist() == [i % 6 == 0 for i in range(120)]


def test_a_medium_that_is_too_rare_is_left_out_and_all_together_remain():
    some, turns = made()
    some.vectors["a"][:] = 0
    some.vectors["a"][:2] = 1
    assert solved(some, turns, "a", cfg_of("classify.cross_validate=true"))[0].isnan().all()
    assert not solved(some, turns, "va", cfg_of("classify.cross_validate=true"))[0].isnan().any()


def test_few_shots_are_few_and_their_strength_is_chosen_by_other_groups():
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 5, 300))
    groups = [str(g) for g in rng.integers(0, 60, 300)]
    few, more = linear_probe.drawn(y, groups, 3, np.random.default_rng(1))
    assert y[few].bincount().tolist() == [3] * 5 and y[more].bincount().tolist() == [3] * 5
    assert not {groups[i] for i in few} & {groups[i] for i in more}
    _, more = linear_probe.drawn(y, groups, 6, np.random.default_rng(1))
    assert max(y[more].bincount()) == linear_probe.MOST
    assert linear_probe.drawn(y, groups, 3, np.random.default_rng(2))[0] != few


def test_more_shots_are_better_and_all_clips_are_best():
    some, turns = made(n=900, seed=3)
    cfg = cfg_of("classify.cross_validate=true", "classify.shots=[1, 16]", "classify.n_draws=4", "classify.C=[1, 10]")
    scores, notes = solved(some, turns, "v", cfg)
    right = torch.tensor(["abcd".index(clip["label"]) for clip in some.clips])
    one, many = (np.mean(notes["few_shot"][n]) for n in ("1", "16"))
    assert one + 5 < many <= 100 * (scores.argmax(1) == right).double().mean() + 3


def test_metrics_by_hand():
    clips = {
        i: {"id": str(i), "label": "ab"[i % 2], "group": str(i), "source": "s", "split": f"fold{i // 4}"}
        for i in range(8)
    }
    guesses = [0, 1, 0, 0, 1, 1, 0, 1]  # right are 0 1 0 1 0 1 0 1
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()[guesses]
    found = classification.ClassificationOutputs(["a", "b"], clips, {}, {"av": scores})
    row = classification.compute_metrics(found, cfg_of("classify.cross_validate=true"))["both"]["label"]
    assert (row["accuracy"], row["accuracy_std"], row["top5"], row["majority_baseline"]) == (75, 0, 100, 50)
    assert row["confusion"] == [[3, 1], [1, 3]] and row["folds"]["s/fold1"]["accuracy"] == 75 and "ci" not in row
    row = classification.compute_metrics(found, cfg_of())["both"]["label"]
    assert (
        row["accuracy"] == 75 and row["ci"]["accuracy"][0] < 75 < row["ci"]["accuracy"][1] and "accuracy_std" not in row
    )


def test_with_very_many_classes_each_is_counted_and_no_square_of_them_is():
    """A confusion matrix takes memory, and metrics.json, with the square; all else is what a smaller task has."""
    clips = {i: {"id": str(i), "label": f"c{i % 3}", "group": str(i), "source": "s", "split": "x"} for i in range(8)}
    guesses, rows = torch.tensor([0, 1, 0, 0, 1, 1, 2, 1]), []  # right are 0 1 2 0 1 2 0 1
    for size in (3, classification.CONFUSED + 1):
        scores = torch.full((8, size), -torch.inf)
        scores[range(8), guesses] = 0
        found = classification.ClassificationOutputs([f"c{i}" for i in range(size)], clips, {}, {"av": scores})
        rows.append(classification.compute_metrics(found, cfg_of("eval.bootstrap=0"))["both"]["label"])
    few, many = rows
    assert few["confusion"] == [[2, 0, 1], [0, 3, 0], [1, 1, 0]] and "confusion" not in many
    assert many["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 3) and many["majority_baseline"] == 37.5
    assert all(few[name] == many[name] for name in ("accuracy", "mean_class_accuracy", "majority_baseline", "n_clips"))


def test_clips_that_were_damaged_are_read_again(probing_words, sample_shards, tmp_path):
    shutil.copytree(sample_shards / "speech_fr/train", tmp_path / "shards")
    tar = min((tmp_path / "shards").glob("*.tar"))
    good = tar.read_bytes()
    place = good.index(b"\xff\xd8") + 100
    tar.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
    words = [
        *probing_words,
        "classify.method=zero_shot",
        "classify.cross_validate=false",
        f"data.test={tmp_path}/shards",
    ]
    found = []
    for data in (None, good):
        if data:
            tar.write_bytes(data)
        done = run(SCRIPT, *words, f"run_dir={tmp_path}/run")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "run/eval/test/metrics.json").read_text())["label"]["n_clips"])
    assert found == [17, 18]


def test_runs_of_folds_share_no_place(tmp_path):
    words = [
        "classify.cross_validate=true",
        "data.test=[x/f1, x/f2]",
        "data.train=x/more",
        "train.mirror=s3://b/m/",
        f"run_dir={tmp_path}",
    ]
    one, two = folds.runs(cfg_of(*words))
    assert (one.train.mirror, two.train.mirror) == ("s3://b/m/x-f1", "s3://b/m/x-f2") and one.run_dir != two.run_dir
    assert (set(one.data.train), set(one.data.test)) == ({"x/f2", "x/more"}, {"x/f1"})
    for wrong, said in (
        (["data.train=[x/more, x/../x/f1]"], "x/f1 is in data.train"),
        (["data.test=[a/e/f1, b/e/f1]"], "each with its own name"),
        (["data.test=[x/f1]"], "two folders at least"),
    ):
        with pytest.raises(UserError, match=said):
            folds.runs(cfg_of(*words, *wrong))


def test_names_in_words_and_label_lists(tmp_path):
    names = {
        "door_wood_knock": "door wood knock",
        "ApplyEyeMakeup": "apply eye makeup",
        "YoYo": "yo yo",
        "a dog": "a dog",
    }
    assert {name: in_words(name) for name in names} == names
    (tmp_path / "names.txt").write_text("\ufeffcat\n\n dog \n")
    (tmp_path / "latin1.txt").write_bytes("cat\nKäfer\n".encode("latin-1"))
    assert classification.class_names(cfg_of(f"classify.labels={tmp_path}/names.txt")) == ["cat", "dog"]
    for wrong, said in (
        ("[a, a, b]", "3 classes, 2 of them different"),
        ("[one]", "1 classes"),
        ("[no.txt]", "cannot read no.txt"),
        (f"{tmp_path}/latin1.txt", r"latin1.txt \(line 2 is not UTF-8 text; convert the file: iconv "),
    ):
        with pytest.raises(UserError, match=said):
            classification.class_names(cfg_of(f"classify.labels={wrong}"))
    with pytest.raises(UserError, match="several classes"):
        label_of({"id": "x", "label": "Dog;Bark"})
    assert label_of({"id": "x", "label": None}) == label_of({"id": "x"}) == ""


def test_zero_shot_is_the_nearest_mean_of_sentences(probing_words, sample_shards, tmp_path):
    """Against the towers by hand."""
    words = [
        *probing_words,
        "classify.method=zero_shot",
        "classify.cross_validate=false",
        "classify.templates=['{}', 'a picture of a {}']",
    ]
    words += [
        f"data.test={sample_shards}/speech_fr/train",
        "classify.labels=[animals, food, household]",
        f"run_dir={tmp_path}",
    ]
    done = run(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    cfg = load(RunConfig, words[0], words[1:])
    model, found = load_eval_model(cfg)[0], kept(tmp_path)["speech_fr-train"]
    tokenize = tokenizer(cfg.model.clip, cfg.model.max_tokens)
    with torch.no_grad():
        sentences = [[tokenize([t.replace("{}", n)]) for t in cfg.classify.templates] for n in cfg.classify.labels]
        names = torch.stack([sum(F.normalize(model.encode_tokens(t)[0], dim=1)[0] for t in some) for some in sentences])
    media = F.normalize(found.vectors["v"] + found.vectors["a"], dim=1)
    guess = (media @ F.normalize(names, dim=1).T).argmax(1).tolist()
    expected = {
        c["id"]: cfg.classify.labels[k]
        for c, k in zip(found.clips, guess, strict=True)
        if c["label"] in cfg.classify.labels
    }
    said = {row["id"]: row["guess"] for row in csv.DictReader((tmp_path / "eval/test/predictions.csv").open())}
    assert said == expected and len(said) > 3
    left = json.loads((tmp_path / "eval/test/manifest.json").read_text())["excluded"]["another label"]
    assert len(left) == len(found.clips) - len(said)


def test_the_head_reads_media_beside_each_other_and_the_loss_ignores_what_it_cannot_know():
    torch.manual_seed(0)
    head = Classifier(ModelConfig(labels=["a", "b", "c"]), 4)
    v, a = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    there = torch.tensor([[True, True, False], [False] * 3]), torch.tensor([[True, False], [True, True]])
    logits = head([PaddedSequence(VISION, v, there[0]), PaddedSequence(AUDIO, a, there[1])])
    y = F.normalize(F.normalize(v[0, :2], dim=1).sum(0), dim=0)
    z = F.normalize(a[0, 0], dim=0)
    assert torch.allclose(logits[0], head.linear(2 * torch.cat([y, z])), atol=1e-6)
    assert torch.allclose(
        logits[1, :],
        head.linear(2 * torch.cat([torch.zeros(4), F.normalize(F.normalize(a[1], dim=1).sum(0), dim=0)])),
        atol=1e-6,
    )
    head = Classifier(ModelConfig(labels=["a", "b"], modalities="a"), 4)
    batch = made_batch.batch(clips=4)
    batch.has_audio = torch.tensor([True, True, False, True])
    batch.meta = [{"id": "1", "label": "b"}, {"id": "2", "label": "z"}, {"id": "3", "label": "a"}, {"id": "4"}]
    assert head.targets(batch, batch.meta).tolist() == [[False, True], *[[False, False]] * 3]
    batch.share, batch.others = torch.tensor([0.3, 1, 1, 1]), [{"id": "5", "label": "a"}] * 4
    logits = torch.randn(4, 2, dtype=torch.float64)
    expected = -(logits[0].log_softmax(0) * torch.tensor([0.7, 0.3])).sum()
    assert head.nll(logits, batch, 0.0)[0].item() == pytest.approx(expected.item())
    batch.share = None
    assert head.nll(logits, batch, 0.0)[0].item() == pytest.approx(-logits[0].log_softmax(0)[1].item())


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["eval.task=retrieval"], "evaluated by eval.task=classification"),
        (["loss.label=1"], "fine-tuning needs classifier"),
        (["train.max_steps=5"], "neither weight nor steps"),
        (["classify.method=classifier"], "classifier goes with classifier"),
        (["classify.templates=[a dog]"], "each needs a {} for the class"),
        (["classify.C=[0]"], "classify.C must be positive"),
        (["data.test={}"], "data.test has 0 folders"),
        (["classify.cross_validate=false"], "data.train names no shard folder to fit a probe on"),
        (["eval.every_steps=5"], "probe looks at frozen features, after training"),
        (["classify.labels=[x, y]", "classify.method=zero_shot", "classify.cross_validate=false"], "none of"),
    ],
)
def test_mistakes_are_one_line(probing_words, wrong, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, probing_words), f"run_dir={tmp_path}", *wrong])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and said in line
