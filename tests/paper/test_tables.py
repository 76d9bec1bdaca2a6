"""tables.py and the configs of fine-tuning: rows beside the paper's, one-line mistakes, headers that can be followed."""

import copy
import csv
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from forks import ROOT
from running import run

from clip4vla.config import DataConfig, RunConfig
from clip4vla.config_io import load, to_dict
from clip4vla.paper.tables import tables

YAMLS = sorted((ROOT / "configs/finetune").rglob("*.yaml"))
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
CAPTION = {
    "BLEU-1": 80.3,
    "BLEU-2": 66.1,
    "BLEU-3": 52.9,
    "BLEU-4": 41.26,
    "METEOR": 28.44,
    "ROUGE-L": 61.0,
    "CIDEr": 49.96,
    "ci": {"CIDEr": [47.51, 52.0], "ROUGE-L": [60.14, 61.88]},
    "n_clips": 2990,
    "n_references": 59800,
}


def evaluated(
    place: Path,
    source: str = "msrvtt_1ka",
    split: str = "test",
    words: tuple[str, ...] = (),
    name: str = "test",
    **metrics,
) -> str:
    """A run folder as launch/evaluate.py leaves it."""
    settings = to_dict(load(RunConfig, None, ["eval.task=retrieval", *words]))
    manifest = {"sources": {f"data/{source}/{split}": {"source": source, "split": split}}, "settings": settings}
    (place / "eval" / name).mkdir(parents=True)
    (place / "eval" / name / "metrics.json").write_text(json.dumps(metrics))
    (place / "eval" / name / "manifest.json").write_text(json.dumps(manifest))
    return str(place)


def both(ending: str = "", **changes) -> dict:
    return {f"{name}{ending}": copy.deepcopy(SCORE | changes) for name in ("text_to_video", "video_to_text")}


def test_a_row_for_each_modality_with_intervals_below_those_of_the_paper(tmp_path):
    scores = both(ci={"R@1": [43.14, 49.26], "MedR": [2.0, 2.525]}) | both("/v", MedR=2.5) | both("/a", n_queries=7)
    ours = evaluated(tmp_path / "mine", words=("model.head=local_local",), **scores)
    lines = tables([ours]).splitlines()
    assert lines[0] == "### MSR-VTT 1k-A (Table 1), test"
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert head[:7] == ["method", "modalities", "T2V R@1", "T2V R@5", "T2V R@10", "T2V MdR", "V2T R@1"]
    assert rows[2] == ["CLIP4VLA (paper)", "av", "46.2", "73.5", "83.5", "2", *["-"] * 5, "1000"]
    assert rows[0][:6] == ["CLIP (paper)", "v", "31.2", "53.7", "64.2", "4"]
    assert rows[1][:6] == ["CLIP4Clip (paper)", "v", "44.5", "71.4", "81.6", "2"]
    assert [row[:2] for row in rows[3:]] == [[f"{ours} (local_local)", kind] for kind in ("av", "v", "a")]
    assert rows[3][2:7] == ["46.2 [43.1, 49.3]", "73.0", "83.5", "2 [2, 2.5]", "46.2 [43.1, 49.3]"]
    assert rows[4][5] == "2.5" and rows[5][-2:] == ["7", "985"] and {len(row) for row in rows} == {len(head)}


def test_runs_of_one_data_set_share_a_table_and_other_sets_have_their_own(tmp_path):
    runs = [
        evaluated(tmp_path / "clip|1", "audiocaps", words=("model.modalities=a",), **both()),
        evaluated(tmp_path / "full", "msrvtt", **both()),
        evaluated(tmp_path / "clip2", "audiocaps", **both()),
        evaluated(tmp_path / "stamps", "speech_fr", "val", **both()),
        evaluated(tmp_path / "vatex", "vatex", **both()),
    ]
    text = tables(runs)
    parts = [part.split("\n")[0] for part in text.split("### ")[1:]]
    assert parts == ["AudioCaps (Table 2), test", "msrvtt, test", "speech_fr, val", "VATEX (Table 1), test"]
    assert [line[2:].split(" | - |")[0] for line in text.splitlines() if "(paper)" in line] == [
        "CLIP4VLA (paper) | a | 28.4 | 60.9 | 76.2 | 4",
        "CLIP4VLA (paper) | av | 33.6 | 68.1 | 82.3 | 3",
        "CLIP (paper) | v | 39.7 | 72.3 | 82.2",
        "CLIP4Clip (paper) | v | 55.9 | 89.2 | 95.0 | 1",
        "CLIP4VLA (paper) | av | 63.5 | 91.5 | 95.9 | 1",
    ]
    assert "clip\\|1 (global_global) | a |" in text, "a name cannot break the table"
    rows = list(csv.reader(io.StringIO(tables(runs, as_csv=True))))
    assert [row[0] for row in rows[1:]] == ["AudioCaps (Table 2), test"] * 4 + parts[1:3] + parts[3:] * 4
    assert rows[3][1:4] == [f"{runs[0]} (global_global)", "a", "46.2"] and {len(row) for row in rows} == {13}


def captioned(place: Path, source: str, *words: str, without: str = "") -> str:
    score = {name: value for name, value in CAPTION.items() if name != without}
    return evaluated(place, source, words=("eval.task=captioning", *words), caption=score)


def test_captions_stand_below_those_of_tables_3_and_4(tmp_path):
    runs = [
        captioned(tmp_path / "one", "msrvtt"),
        captioned(tmp_path / "two", "vatex", "decode.method=greedy", "model.modalities=v", without="METEOR"),
        captioned(tmp_path / "three", "msrvtt", "decode.method=nucleus", without="ci"),
        captioned(tmp_path / "four", "clotho", "decode.num_beams=3", "model.modalities=a", without="METEOR"),
    ]
    msrvtt, vatex, clotho = (part.splitlines() for part in tables(runs).split("### ")[1:])
    head = "| method | modalities | BLEU-4 | METEOR | ROUGE-L | CIDEr | clips | references |"
    assert msrvtt[2] == vatex[2] == clotho[2] == head
    assert (msrvtt[0], msrvtt[4:6], msrvtt[6:]) == (
        "MSR-VTT captions (Table 3), test",
        [
            "| CLIP4VLA (paper) | av | 46.7 | 31.1 | 64.4 | 58.0 | 2990 | 59800 |",
            f"| {runs[0]} (beam 5) | av | 41.3 | 28.4 | 61.0 [60.1, 61.9] | 50.0 [47.5, 52.0] | 2990 | 59800 |",
        ],
        [f"| {runs[2]} (nucleus) | av | 41.3 | 28.4 | 61.0 | 50.0 | 2990 | 59800 |", ""],
    )
    scores = "41.3 | - | 61.0 [60.1, 61.9] | 50.0 [47.5, 52.0] | 2990 | 59800 |"
    assert (vatex[0], vatex[4:6]) == (
        "VATEX captions (Table 4), test",
        ["| CLIP4VLA (paper) | av | 36.4 | 25.0 | 54.7 | 59.7 | - | - |", f"| {runs[1]} (greedy) | v | {scores}"],
    )
    assert (clotho[0], clotho[4:]) == ("clotho captions, test", [f"| {runs[3]} (beam 3) | a | {scores}"])


def test_labels_stand_below_those_of_table_6(tmp_path):
    row = {
        "accuracy": 80.04,
        "top5": 95.0,
        "mean_class_accuracy": 79.0,
        "n_classes": 50,
        "n_clips": 2000,
        "n_folds": 5,
        "accuracy_std": 1.26,
    }
    split = {name: value for name, value in row.items() if name != "accuracy_std"}
    split |= {"n_folds": 1, "ci": {"accuracy": [78.0, 82.0]}}
    task = "eval.task=classification"
    runs = [
        evaluated(tmp_path / "one", "esc50", "fold1", (task, "model.modalities=a"), label=row),
        evaluated(
            tmp_path / "two", "ucf101", "test01", (task, "classify.method=zero_shot"), label=split, **{"label/v": split}
        ),
    ]
    esc, ucf = (part.splitlines() for part in tables(runs).split("### ")[1:])
    assert (esc[0], esc[4:6]) == (
        "ESC-50 (Table 6), fold1",
        [
            "| CLIP4VLA (paper) | a | 86.8 | - | - | 50 | 2000 |",
            f"| {runs[0]} (linear probe, 5 folds) | a | 80.0 ± 1.3 | 95.0 | 79.0 | 50 | 2000 |",
        ],
    )
    assert ucf[4:7] == [
        "| CLIP4VLA (paper) | av | 91.9 | - | - | 101 | - |",
        f"| {runs[1]} (class names) | av | 80.0 [78.0, 82.0] | 95.0 | 79.0 | 50 | 2000 |",
        f"| {runs[1]} (class names) | v | 80.0 [78.0, 82.0] | 95.0 | 79.0 | 50 | 2000 |",
    ]


def test_both_tasks_in_one_command_have_tables_of_their_own(tmp_path):
    """The Markdown of each is what it is alone; the CSV is one table whose cells of the other task are empty."""
    captions = captioned(tmp_path / "captions", "vatex", "decode.method=nearest", without="METEOR")
    search = evaluated(tmp_path / "search", "vatex", **both())
    assert tables([captions, search]) == "\n".join([tables([captions]), tables([search])])
    text = tables([captions, search], as_csv=True)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {len(row) for row in csv.reader(io.StringIO(text))} == {3 + 6 + 10}
    ours = [{key: cell for key, cell in row.items() if cell} for row in rows if "(paper)" not in row["method"]]
    assert ours[0] == {
        "data set": "VATEX captions (Table 4), test",
        "method": f"{captions} (nearest)",
        "modalities": "av",
        "BLEU-4": "41.3",
        "METEOR": "-",
        "ROUGE-L": "61.0 [60.1, 61.9]",
        "CIDEr": "50.0 [47.5, 52.0]",
        "clips": "2990",
        "references": "59800",
    }
    assert ours[1:] == list(csv.DictReader(io.StringIO(tables([search], as_csv=True))))[-1:]
    paper = [row["CIDEr"] or row["T2V R@1"] for row in rows if "(paper)" in row["method"]]
    assert paper == ["59.7", "39.7", "55.9", "63.5"]


def test_all_evaluations_of_a_run_are_shown(tmp_path, capsys):
    place = tmp_path / "run"
    own = evaluated(place, **both())
    for name, source in (("vatex-test", "vatex"), ("audio", "msrvtt_1ka")):
        evaluated(place, source, name=name, **both())
    evaluated(place, name="six", words=("eval.task=zero_shot",), **both())
    evaluated(place, name="val-00000004", **both())
    rows = list(csv.DictReader(io.StringIO(tables([own], as_csv=True))))
    shown = [(row["data set"], row["method"]) for row in rows if "(paper)" not in row["method"]]
    first, second = "MSR-VTT 1k-A (Table 1), test", "VATEX (Table 1), test"
    assert shown == [
        (first, f"{own} (global_global)"),
        (first, f"{own}/eval/audio (global_global)"),
        (second, f"{own}/eval/vatex-test (global_global)"),
    ]
    assert capsys.readouterr().err == f"left out: {own}/eval/six: there is no table of its eval.task\n"
    only = evaluated(tmp_path / "other", name="vatex-test", **both())
    assert f"{only}/eval/vatex-test (global_global)" in tables([only])


def test_the_command_prints_it_and_mistakes_are_one_line(tmp_path):
    good = evaluated(tmp_path / "good", **both())
    done = run("launch/evaluate.py", "--table", good, "--csv")
    assert done.returncode == 0 and done.stdout == tables([good], as_csv=True), done.stderr
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").touch()
    zero_shot = evaluated(tmp_path / "zero", words=("eval.task=zero_shot",), **both())
    old = evaluated(tmp_path / "old", text_to_audio=SCORE)
    broken = evaluated(tmp_path / "broken", **both())
    (tmp_path / "broken/eval/test/manifest.json").write_text("{")
    for bad, said in (
        (tmp_path / "nowhere", "no such run"),
        (tmp_path / "new", f"python launch/evaluate.py {tmp_path}/new/config.yaml run_dir={tmp_path}/new"),
        (zero_shot, "eval.task=retrieval or captioning or classification"),
        (old, "KeyError('text_to_video')"),
        (broken, "manifest.json: not readable"),
    ):
        done = run("launch/evaluate.py", "--table", good, bad)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert said in done.stderr and str(bad) in done.stderr


def test_a_real_evaluation_gives_the_row_of_its_metrics(tiny, sample_shards, tmp_path):
    words = [f"data.test={sample_shards}/speech_fr/train", f"run_dir={tmp_path}/run", "eval.task=retrieval"]
    done = run("launch/evaluate.py", *tiny, *words, "train.max_steps=0", "eval.bootstrap=10")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/eval/test/metrics.json").read_text())
    text = tables([f"{tmp_path}/run"], as_csv=True)
    _, *rows = csv.reader(io.StringIO(text))
    assert [row[:3] for row in rows] == [
        ["speech_fr, train", f"{tmp_path}/run (global_global)", kind] for kind in ("av", "v", "a")
    ]
    for row, ending in zip(rows, ("", "/v", "/a"), strict=True):
        score = metrics[f"text_to_video{ending}"]
        low, high = score["ci"]["R@5"]
        assert row[4] == f"{score['R@5']:.1f} [{low:.1f}, {high:.1f}]"
        assert row[-2:] == [str(score["n_queries"]), str(score["n_gallery"])]


def commands(path: Path) -> list[list[str]]:
    """The command lines of a config's header, which are those set in by three blanks."""
    found = [shlex.split(line[4:]) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    assert found and all(words[0] in ("python", "deepspeed") for words in found), found
    return found


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_a_header_names_scripts_that_exist_and_its_own_file(path):
    name = str(path.relative_to(ROOT))
    for words in commands(path):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file(), script
        if "--table" in words:
            continue
        assert name in words
        load(RunConfig, path, [word for word in words if "=" in word])


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_its_shards_are_those_that_a_data_config_makes_and_selection_is_on_val(path):
    cfg = load(RunConfig, path)
    data = cfg.data
    made = {load(DataConfig, file).out: file.read_text() for file in (ROOT / "configs/data").glob("*.yaml")}
    for folder in [*data.train, *data.val, *data.test]:
        out, source, split = re.fullmatch(r"(.+)/([^/]+)/([^/]+)", folder).groups()
        assert out in made, folder
        assert f"{source}/{split}" in made[out] or source.split("_")[0] in made[out], folder
    assert not set(data.test) & {*data.train, *data.val}, "what is tested on is neither trained nor selected on"
    assert bool(cfg.eval.best_metric) == bool(cfg.eval.every_steps) == bool(data.val)
    assert cfg.eval.every_steps % cfg.train.save_every == 0, "what is evaluated is there to be kept"


def test_baselines_differ_in_the_model_and_its_training_alone():
    first, *others = (
        load(RunConfig, path)
        for path in (
            ROOT / "configs/finetune/msrvtt_retrieval.yaml",
            *(ROOT / "configs/finetune/baselines").glob("*.yaml"),
        )
    )
    assert len(others) == 5 and len({cfg.run_dir for cfg in [first, *others]}) == 6
    for cfg in others:
        assert cfg.data.test == first.data.test and cfg.eval == first.eval and cfg.model.clip == first.model.clip
        assert (cfg.data.train, cfg.loss) == (first.data.train, first.loss) or not cfg.data.train
