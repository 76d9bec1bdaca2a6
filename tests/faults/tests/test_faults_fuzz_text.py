"""A slice of the fuzzing of texts, and the hostile ones that must never come through again."""

import csv
import io
import json
import os
import sqlite3
from contextlib import closing

import pytest
from annotation_files import IDS
from faults import _text_judge
from faults._text_data import plan
from faults._text_runs import LOG, built, runs
from faults._watch import run
from faults.fuzz_text import TARGETS

from clip4vla.config import DataConfig, RunConfig
from clip4vla.config_io import load, parse_json, parse_yaml
from clip4vla.errors import UserError
from clip4vla.paper.tables import tables
from clip4vla.report.compare_runs import read as read_runs
from clip4vla.report.compare_runs import training
from clip4vla.report.tracking import read_rows
from clip4vla.search.index import Index
from clip4vla.search.store import ITEMS
from clip4vla.training import engine
from data_prep.annotation_io import clean
from data_prep.annotations import read
from data_prep.manifest import MediaFolder
from data_prep.plan import MANIFEST, read_plan
from data_prep.sets.json_stream import stream_json

SLOW = {"configs and words": 12, "annotations of stamps": 3, "run folders": 10, "json of samples": 20}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_damaged_text_ends_in_a_result_a_counted_skip_or_one_line(target, tmp_path):
    figures = run(target, tmp_path, seed=1, cases=SLOW.get(target.name, 40))
    assert sum(figures["outcomes"].values()) == figures["cases"] and "failure" not in figures["outcomes"]


def test_strangers_at_the_judges_port_end_no_job():
    assert _text_judge.storm(30, 1)["peak_mib"] < 64


def test_an_error_is_one_printable_line_whatever_a_file_put_into_it():
    said = str(UserError("a\nb\x1b[2J\x07\u202e\ud800 é 一" + "x" * 10**7 + " end"))
    assert said.startswith("a b\\x1b[2J\\x07\\u202e\\ud800 é 一xx") and said.endswith("x end")
    assert said.isprintable() and len(said) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {}/ran']", "[" * 20_000, "a: &a [*a]", "a: 2001-99-99", 'a: "\\uD800"',
        "x0: &x0 {a: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
        "x0: &x0 [a]\n" + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "a: " + "x" * 10**7,
    ],
    ids="code deep cycle date half merges aliases long".split(),
)  # fmt: skip
def test_yaml_is_data_alone_and_of_a_bounded_size(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text.replace("{}", str(tmp_path)))
    with pytest.raises(UserError, match="a.yaml: not valid YAML: "):
        load(RunConfig, tmp_path / "a.yaml")
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_merge_keys_and_aliases_are_understood():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


def test_json_is_bounded_and_can_be_written_again():
    for text in ("[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '"\\ud800"', b"\xff", "9" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json("\ufeff[1]".encode()) == [1] and parse_json("[" * 100 + "]" * 100)


def test_no_setting_is_a_nan(tmp_path):
    for word in ("train.lr=.nan", "train.lr=" + "9" * 400, "spectrogram.f_min=nan"):
        with pytest.raises(UserError, match="must be float, not"):
            load(DataConfig if "spec" in word else RunConfig, None, [word])


def test_deepspeed_sections_must_be_objects(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": 3}')
    cfg = load(RunConfig, None, ["train.compile=inductor"])
    with pytest.raises(UserError, match="zero_optimization must be a JSON object, not 3"):
        engine.merge_ds_config(*engine.read_ds_config(str(tmp_path / "ds.json")), cfg)


def test_links_in_a_circle_are_walked_once(tmp_path):
    (tmp_path / "a.mp4").touch()
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(".")
    assert MediaFolder(tmp_path).by_stem == {"a": "a.mp4"}


def prepared(tmp_path, dataset, files):
    for name, tree in files.items():
        (tmp_path / name).write_text(tree if isinstance(tree, str) else json.dumps(tree))
    (tmp_path / f"{IDS[1]}.mp4").touch()
    return read(DataConfig(dataset=dataset, media_root=str(tmp_path)))


def test_a_text_in_place_of_a_list_is_no_list_of_letters(tmp_path):
    clips = [
        {"videoID": f"{IDS[1]}_000000_000010", "enCap": "A man."},
        {"videoID": f"{IDS[1]}_000010_000020", "enCap": ["B."]},
    ]
    rows, skipped = prepared(tmp_path, "vatex", {"vatex_training_v1.0.json": clips})
    assert [row.captions for row in rows] == [["B."]] and "captions are a list of texts, not str" in skipped[0].reason


def test_names_that_are_no_text_are_malformed(tmp_path):
    videos = [{"video_id": name, "split": "train"} for name in (5, 1e305, IDS[1])]
    rows, skipped = prepared(tmp_path, "msrvtt", {"MSRVTT_data.json": {"videos": videos, "sentences": []}})
    assert [row.id for row in rows] == [IDS[1]] and [item.why for item in skipped] == ["malformed"] * 2
    with pytest.raises(UserError, match="JSON, but not a dict with videos and sentences"):
        prepared(tmp_path, "msrvtt", {"MSRVTT_data.json": {"videos": 5, "sentences": []}})


def test_paths_of_annotations_stay_in_the_media_root(tmp_path):
    paths = ["../a.mp4", "/etc/a.mp4", "a/../../a.mp4", "..\\a.mp4", "x" * 300 + ".mp4", f"{IDS[1]}.mp4"]
    lines = "".join(json.dumps({"path": path, "caption": "x", "split": "../../up"}) + "\n" for path in paths)
    rows, skipped = prepared(tmp_path, "folder", {"captions.jsonl": lines})
    assert [(row.media, row.split) for row in rows] == [(f"{IDS[1]}.mp4", "up")]
    assert [item.why for item in skipped] == ["malformed"] * 5


def test_captions_are_texts_of_a_sane_length():
    for text in ({"a": 1}, ["a"], True, "x" * 10**6):
        with pytest.raises(ValueError):
            clean(text)
    assert clean("a &amp;  b") == "a & b" and clean(5) == "5" and clean(None) == ""


def test_a_large_json_file_is_read_in_pieces_and_is_deep_or_cut_without_harm(tmp_path):
    tree = {f"v{i}": {"start": [i / 3] * 50, "text": ['é, }" {[:'] * 50} for i in range(4000)} | {"a": 12}
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(tree, indent=indent))
        assert (tmp_path / "a.json").stat().st_size > 2 << 20 and dict(stream_json(tmp_path / "a.json")) == tree
    for text in ("{", '{"a": 1', '{"a": 12 "b": 1}', "[1]", '{"a": ' + "[" * 100_000, "", "{1: 2}", '{"a": 1,}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match="not valid JSON"):
            list(stream_json(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(" { } ")
    assert list(stream_json(tmp_path / "a.json")) == []


def test_a_manifest_names_no_folder_outside(tmp_path):
    _, _, data = plan(tmp_path)
    for old, new in (
        (b'"sounds","train"', b'"..","../up"'),
        (b'"sounds","train"', b'"/tmp","x"'),
        (b"[[", b"[[1],["),
        (b"}\n", b"}"),
    ):
        (tmp_path / MANIFEST).write_bytes(data.replace(old, new, 1))
        with pytest.raises(UserError, match="not a manifest of shard.py"):
            read_plan(tmp_path)


def test_a_log_with_a_line_that_is_no_row_is_named(tmp_path):
    for line in ("[]}", '{"loss": 1}', '{"step": "a"}', '{"step": ' + "[" * 2000 + "}"):
        (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(LOG[0])}\n{line}\n")
        with pytest.raises(UserError, match="metrics.jsonl: not readable"):
            read_rows(tmp_path)


def test_a_page_survives_numbers_that_cannot_be_drawn(tmp_path):
    one = runs(tmp_path)["retrieval"].folder
    odd = [
        {"step": 9, "loss": 10**400, "lr": "x", "grad_norm": [1], "tflops": 1e308},
        {"step": 10, "loss": float("nan"), "lr": True},
    ]
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*LOG, *odd]))
    assert len([title for title, _ in training(read_runs([str(one)]))]) > 5


def test_csv_for_people_holds_no_formulas(tmp_path):
    one = runs(tmp_path)["retrieval"].folder
    manifest = json.loads((one / "eval/test/manifest.json").read_text())
    manifest["sources"]["data/x"]["source"] = "=HYPERLINK(0)\n| x"
    (one / "eval/test/manifest.json").write_text(json.dumps(manifest))
    (row, *_) = csv.DictReader(io.StringIO(tables([str(one)], as_csv=True)))
    assert row["data set"].startswith("'=HYPERLINK(0)")
    assert tables([str(one)]).splitlines()[0] == "### =HYPERLINK(0) | x, test"


def test_a_search_index_names_its_faiss_file_in_its_own_folder(tmp_path):
    state = built(tmp_path / "index")
    (tmp_path / "index" / state.faiss).rename(tmp_path / "elsewhere.faiss")
    with closing(sqlite3.connect(state.folder / ITEMS)) as db, db:
        (known,) = db.execute("SELECT value FROM meta WHERE key = 'faiss'").fetchone()
        known = json.dumps(json.loads(known) | {"file": "../elsewhere.faiss"})
        db.execute("UPDATE meta SET value = ? WHERE key = 'faiss'", (known,))
    with pytest.raises(UserError, match="not a readable index"):
        Index.open(state.folder)
