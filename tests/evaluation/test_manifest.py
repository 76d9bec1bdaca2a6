"""manifest.py: each evaluation of a run has a place of its own, by its data and settings; none takes another's."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from running import run

from clip4vla.config import RunConfig
from clip4vla.config_io import load, to_dict
from clip4vla.data.shards import ShardFolder
from clip4vla.errors import UserError
from clip4vla.evaluation.manifest import check_name, choose_name
from clip4vla.report.evaluations import page_path
from clip4vla.training import pipeline


@pytest.fixture
def named(tmp_path, sample_shards):
    """Words of a run with a config.yaml, whose data.test is the French speech; what a word adds to them is called."""
    own = [
        f"run_dir={tmp_path}/run",
        f"data.test={sample_shards}/speech_fr/train",
        f"data.train={sample_shards}/sounds/train",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("# git 1a\n" + yaml.safe_dump(to_dict(load(RunConfig, None, own))))
    return lambda *words: choose_name(load(RunConfig, None, [*own, *words]))


def evaluated(run_dir, name, *words, urls):
    """What launch/evaluate.py leaves, as far as names go by it."""
    shards = {
        url: {"shards_sha256": {s.name: s.sha256 for s in ShardFolder.open(str(url)).shards}} for url in map(str, urls)
    }
    tree = {
        "sources": shards,
        "settings": to_dict(load(RunConfig, None, words)),
        "checkpoint": {"folder": "c", "step": 1},
    }
    folder = Path(run_dir, "eval", name)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(tree))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_the_runs_own_is_test_and_other_data_have_the_names_of_their_folders(named, sample_shards, tmp_path):
    assert named() == "test"
    assert named(f"data.test={sample_shards}/speech_es/../speech_fr/train/") == "test"  # the same place
    assert named(f"data.test={sample_shards}/speech_es/train") == "speech_es-train"
    both = f"data.test=[{sample_shards}/speech_fr/train, {sample_shards}/speech_es/train]"
    assert named(both) == "speech_es-train+speech_fr-train"
    validation = shutil.copytree(sample_shards / "speech_es/val", tmp_path / "val/00000004")
    assert named(f"data.test={validation}") == "data-val-00000004"  # val-… is training's


def test_of_two_folders_of_one_name_each_has_its_own_and_a_copy_has_that_of_the_first(named, sample_shards, tmp_path):
    one, other, copy = (tmp_path / f"{name}/speech/test" for name in ("one", "other", "copy"))
    for folder, source in ((one, "speech_es"), (other, "speech_en"), (copy, "speech_es")):
        shutil.copytree(sample_shards / source / "train", folder)
    run_dir = tmp_path / "run"
    evaluated(run_dir, named(f"data.test={one}"), urls=[one])
    assert [named(f"data.test={folder}") for folder in (one, other, copy)] == [
        "speech-test", "other-speech-test", "speech-test",
    ]  # fmt: skip
    evaluated(run_dir, "other-speech-test", urls=[other])
    assert named(f"data.test={other}") == "other-speech-test"
    evaluated(run_dir, "test", urls=[sample_shards / "speech_fr/train"])
    moved = shutil.copytree(sample_shards / "speech_fr/train", tmp_path / "moved/x/y")
    assert named(f"data.test={moved}") == "test"  # the shards are the run's own, wherever they lie


def test_settings_that_decide_the_numbers_are_in_the_name(named, sample_shards):
    for words, name in (
        (["eval.captions=first"], "test,eval.captions=first"),
        (["model.audio_type=vb", "data.languages=[en, fr]"], "test,data.languages=en+fr,model.audio_type=vb"),
        (["eval.audio_types=[vb, both]"], "test,eval.audio_types=vb"),
        (["eval.audio_types=[both, vb]"], "test"),  # the main one is the same
        (["eval.batch_size=4", "eval.bootstrap=0", "eval.report_queries=1", "track.project=x", "loss.at=0.5"], "test"),
        (["eval.task=classification", "classify.labels=[a dog, a cat]"],
         "test,classify.labels=a_dog+a_cat,eval.task=classification"),
        (["classify.method=zero_shot"], "test"),  # of another task
        (["eval.task=captioning", "decode.num_beams=1"], "test,decode.num_beams=1,eval.task=captioning"),
        (["train.max_steps=0", "init_from=[runs/a]"], "test,init_from=runs-a"),
        (["init_from=[runs/a]"], "test"),
        (["eval.task=retrieval", f"data.train={sample_shards}/speech_en/train"],
         "test,data.train=speech_en-train,eval.task=retrieval"),
        ([f"data.train={sample_shards}/speech_en/train"], "test"),  # nothing of it is used
        ([f"data.test={sample_shards}/speech_es/train", "seed=1"], "speech_es-train,seed=1"),
    ):  # fmt: skip
        assert named(*words) == name
    labels = [f"class {i}" for i in range(500)]
    long, longer = (
        named("eval.task=classification", f"classify.labels={some}") for some in (labels, [*labels, "more"])
    )
    assert long != longer and max(len(name) for name in (long, longer)) <= 120 and long == long.lstrip(".")


def test_without_a_config_the_first_evaluation_is_the_runs_own(sample_shards, tmp_path):
    words = [f"run_dir={tmp_path}", "train.max_steps=0"]

    def named(source, *more):
        return choose_name(load(RunConfig, None, [*words, f"data.test={sample_shards}/{source}/train", *more]))

    assert named("sounds") == named("speech_es") == "test"
    url = sample_shards / "sounds/train"
    evaluated(tmp_path, "test", *words, f"data.test={url}", urls=[url])
    assert named("sounds") == "test" and named("speech_es") == "speech_es-train"
    assert named("sounds", "init_from=[x]") == "test,init_from=x"


def test_a_name_that_is_given_is_taken_once(named, sample_shards, tmp_path):
    other = f"data.test={sample_shards}/speech_es/train"
    assert named("eval.name=mine") == "mine"
    url = sample_shards / "speech_fr/train"
    folder = evaluated(
        tmp_path / "run", "mine", "eval.captions=first", f"data.train={sample_shards}/sounds/train", urls=[url]
    )
    assert named("eval.name=mine", "eval.captions=first", "eval.bootstrap=5") == "mine"
    for words, why in (
        ([other, "eval.captions=first"], f"of other shards ({url})"),
        ([], "with eval.captions=first, not all"),
    ):
        with pytest.raises(UserError) as caught:
            named("eval.name=mine", *words)
        assert f"eval.name=mine: {folder} has an evaluation {why}; give this one a name" in str(caught.value)
    (folder / "metrics.json").unlink()  # it was killed: there are no numbers to lose
    assert named("eval.name=mine") == "mine"


def test_numbers_of_other_data_that_an_earlier_version_left_in_test_are_not_replaced(named, sample_shards, tmp_path):
    evaluated(tmp_path / "run", "test", urls=[sample_shards / "speech_es/train"])
    with pytest.raises(
        UserError, match=f"eval/test has an evaluation of other shards .*{sample_shards}/speech_es/train"
    ):
        named()


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "val-00000001", "a b", "x" * 201, "=a"])
def test_a_name_is_one_folder(name):
    with pytest.raises(UserError, match="eval.name=.*must be one folder's name"):
        check_name(name)
    check_name("msrvtt_1ka-test,eval.captions=first")
    check_name("тест")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sources": 1}', '{"sources": {"a": 1}, "settings": 2}'])
def test_a_manifest_that_says_nothing_holds_no_name(named, tmp_path, text):
    """--table names it, and evaluating again is the cure."""
    folder = tmp_path / "run/eval/test"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "manifest.json").write_text(text)
    assert named() == "test"


@pytest.mark.parametrize(
    "text", ["x: 1", "data: {test: 3, train: 4}", "data: {test: {1: 2}}", "eval: {audio_types: 3}", "eval: 3"]
)
def test_a_config_of_other_values_costs_no_traceback(named, tmp_path, text):
    (tmp_path / "run/config.yaml").write_text(text)
    assert named()


def test_a_password_in_a_url_is_in_no_name(named, monkeypatch, sample_shards):
    opened = ShardFolder.open(str(sample_shards / "sounds/train"))
    monkeypatch.setattr("clip4vla.evaluation.manifest.open_folders", lambda *_: [opened])
    assert named("data.test=s3://me:secret@bucket/test?X-Amz-Signature=secret") == "bucket-test"


def test_another_test_set_stands_beside_the_runs_own_in_the_table_and_on_the_page(
    tiny, sample_shards, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    words = [
        *tiny,
        f"run_dir={run_dir}",
        "train.max_steps=0",
        "eval.task=retrieval",
        "eval.bootstrap=10",
        "eval.report_queries=2",
    ]
    cfg = load(RunConfig, words[0], [*words[1:], f"data.test={sample_shards}/speech_fr/train"])
    pipeline.test(cfg)
    own = {path: path.read_bytes() for path in (run_dir / "eval/test").iterdir()}
    page = page_path(run_dir, "test").read_text()
    cfg.data.test = {f"{sample_shards}/speech_es/train": 1.0}
    pipeline.test(cfg)
    other = run_dir / "eval/speech_es-train"
    assert {path: path.read_bytes() for path in (run_dir / "eval/test").iterdir()} == own
    assert json.loads((other / "metrics.json").read_text()) != json.loads(own[run_dir / "eval/test/metrics.json"])
    both = page_path(run_dir, "test").read_text()
    start, end = both.index('<section id="evaluations">'), both.index("</section>") + len("</section>")
    assert both[:start] + both[end:] == page and "speech_es-train" in (other / "report.html").read_text()
    for name, source in (("test", "speech_fr"), ("speech_es-train", "speech_es")):
        recall = json.loads((run_dir / f"eval/{name}/metrics.json").read_text())["text_to_video"]["R@10"]
        assert (
            f"<td>{name}</td><td>{source}/train</td>" in both[start:end]
            and f"R@10 <b>{recall:.1f}</b>" in both[start:end]
        )
    done = run("launch/evaluate.py", "--table", run_dir)
    assert done.returncode == 0 and done.stdout.count("###") == 2, done.stderr
    assert f"| {run_dir} (global_global) | av |" in done.stdout and f"| {other} (global_global) | av |" in done.stdout
    tree = json.loads((other / "manifest.json").read_text())
    tree["checkpoint"] = {"folder": "runs/x/checkpoints/step-00000003", "step": 3, "sha256": "0"}
    (other / "manifest.json").write_text(json.dumps(tree))
    (other / "metrics-vb.json").write_text("{}")  # of the other weights too
    for said in (f"{other}: replaces the numbers of runs/x/checkpoints/step-00000003, step 3;", ""):
        capsys.readouterr()
        pipeline.test(cfg)  # the same again replaces itself
        out = capsys.readouterr().out
        assert said in out and ("replaces" in out) == bool(said)
    assert sorted(path.name for path in (run_dir / "eval").iterdir()) == ["speech_es-train", "test"]
    assert sorted(path.name for path in other.iterdir()) == ["manifest.json", "metrics.json", "report.html"]
    assert page_path(run_dir, "test").read_text().count('<section id="evaluations">') == 1


def test_other_classes_in_the_same_file_are_another_evaluation(tiny, sample_shards, tmp_path):
    run_dir, file = tmp_path / "run", tmp_path / "classes.txt"
    words = [
        f"run_dir={run_dir}",
        "train.max_steps=0",
        "eval.task=classification",
        "eval.report_queries=0",
        "eval.bootstrap=0",
    ]
    words += [
        "classify.method=zero_shot",
        "data.train={}",
        f"data.test={sample_shards}/speech_fr/train",
        f"classify.labels={file}",
    ]
    for classes in (["animals", "food"], ["animals", "food", "household"]):
        file.write_text("\n".join(classes))
        pipeline.test(load(RunConfig, tiny[0], [*tiny[1:], *words]))
    names = ["test", "test,classify.labels=animals+food+household"]
    assert sorted(path.name for path in (run_dir / "eval").iterdir()) == names
    rows = [json.loads((run_dir / f"eval/{name}/metrics.json").read_text())["label"]["classes"] for name in names]
    assert rows == [["animals", "food"], ["animals", "food", "household"]]
