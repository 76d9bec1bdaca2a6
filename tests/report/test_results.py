"""launch/results.py: a plan's rows run by seeds and once, what is not there is named, and the page has the metrics' figures."""

import json
import statistics

import pytest
import yaml
from forks import ROOT
from running import run

from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.report import results


@pytest.fixture
def forked(monkeypatch):
    """The plan's commands as forks: (script, words) of each."""
    calls = []

    def call(script, *words, ranks=1):
        calls.append((script, words))
        done = run(script, *map(str, words))
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(results, "_call", call)
    return calls


def plan_file(tmp_path, tiny, shards):
    words = [
        *tiny[1:],
        f"data.test={shards}/speech_fr/train",
        "train.max_steps=2",
        "eval.bootstrap=50",
        "eval.permutations=50",
        "eval.report_queries=0",
    ]
    row = {"name": "spoken", "title": "Spoken names", "script": "pretrain", "config": tiny[0], "words": words}
    row |= {"seeds": [0, 1], "figures": {"name to sound R@10": "text_to_audio/R@10", "p": "text_to_audio/p_value"}}
    gone = row | {"name": "gone", "words": [*words, "data.val=nowhere"]}
    more = row | {"name": "more", "start": "spoken", "words": [*words, "train.max_steps=3"], "seeds": [1]}
    tree = {"sets": {"none": {"config": "configs/data/grid.yaml", "folders": ["no_such"]}}, "rows": [row, gone, more]}
    tree["rows"].append(row | {"name": "orphan", "start": "gone"})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "plan.yaml"


def test_rows_run_once_and_the_page_has_their_figures(tmp_path, tiny, sample_shards, forked, capsys):
    plan = results.read_plan(plan_file(tmp_path, tiny, sample_shards), [])
    for _ in range(2):
        results.run(plan, [], [str(tmp_path)], tmp_path / "runs")
    said = capsys.readouterr().out
    assert "none: not below" in said and "configs/data/grid.yaml says where" in said
    assert "gone: left out: no shards nowhere" in said and "orphan: left out: it goes on from gone" in said
    assert [script for script, _ in forked] == ["launch/pretrain.py", "launch/evaluate.py"] * 3
    assert f"init_from=[{tmp_path}/runs/spoken/seed-1]" in forked[4][1]
    results.write_page(plan, tmp_path / "runs", tmp_path / "page.md")
    files = [tmp_path / f"runs/spoken/seed-{seed}/eval/test/metrics.json" for seed in (0, 1)]
    rows = [json.loads(file.read_text())["text_to_audio"] for file in files]
    mean, spread = (of([row["R@10"] for row in rows]) for of in (statistics.mean, statistics.stdev))
    low, high = rows[0]["ci"]["R@10"]
    page = (tmp_path / "page.md").read_text()
    assert (
        f"| Spoken names | name to sound R@10 |  | {mean:.1f} ± {spread:.1f} [{low:.1f}, {high:.1f}] | 0, 1 |" in page
    )
    assert f"| Spoken names | p |  | {max(row['p_value'] for row in rows):.2g} | 0, 1 |" in page
    assert "python launch/pretrain.py configs/pretrain/sample.yaml seed=0" in page


def test_the_shipped_plan_names_what_is_there():
    plan = results.read_plan(ROOT / "configs/results.yaml", [])
    assert {(ROOT / each.config).is_file() for each in plan.sets.values()} == {True}
    for row in plan.rows:
        assert (ROOT / f"launch/{row.script}.py").is_file() and load(RunConfig, ROOT / row.config, row.words)
        assert not row.start or row.start in [other.name for other in plan.rows]


def test_a_file_that_is_no_plan_is_one_line(tmp_path):
    (tmp_path / "plan.yaml").write_text("rows: [{name: a, colour: red}]\nsets: {}\n")
    with pytest.raises(UserError, match=r"plan.yaml: not a plan of results: .*colour"):
        results.read_plan(tmp_path / "plan.yaml", [])
    with pytest.raises(UserError, match=r"--only grids: no such row; there are grid, "):
        results.run(results.read_plan(ROOT / "configs/results.yaml", []), ["grids"], [], tmp_path)
