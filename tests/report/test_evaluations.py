"""report/evaluations.py: all evaluations of a run on its page and beside other runs'; names and files that are not ours."""

import json

from browser import EVIL, browse
from test_compare_runs import SETTINGS, SIZES, a_run, tables

from clip4vla.report import evaluations, page
from clip4vla.report.compare_runs import compare, read

SCORE = {
    "R@1": 46.24,
    "R@5": 73.0,
    "MedR": 2.0,
    "p_value": 0.01,
    "ci": {"R@1": [43.1, 49.26]},
    "chance": {"R@1": 1},
} | SIZES


def evaluated(run, name, recall, source, **settings):
    """An evaluation as evaluate.py leaves it."""
    folder = run / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {key: SCORE | {"R@1": recall} for key in ("text_to_video", "text_to_video/v")}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    sources = {f"data/{source}": {"source": source, "split": "test"}}
    tree = {"sources": sources, "n_ids": 90, "checkpoint": {"step": 7}, "settings": SETTINGS | settings}
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_a_page_lists_all_evaluations_once_and_one_alone_is_no_list(tmp_path):
    run = tmp_path / "run"
    evaluated(run, "test", 10.0, "a")
    evaluated(run, "val-00000004", 99.0, "a")
    (run / "eval/begun").mkdir()  # no metrics yet
    page.write(run / "report.html", "run", {}, {}, "<section>the body</section>")
    alone = (run / "report.html").read_text()
    evaluations.show(run)
    assert (run / "report.html").read_text() == alone
    evaluated(run, EVIL.replace("/", ""), 30.0, EVIL)
    evaluated(run, "broken", 1.0, "c")
    (run / "eval/broken/manifest.json").write_text('{"sources": 3}')
    for _ in range(2):
        evaluations.show(run)
    text = (run / "report.html").read_text()
    assert evaluations.SHOWN.sub("", text) == alone and len(evaluations.SHOWN.findall(text)) == 1
    assert "<td>test</td><td>a/test</td><td>90</td><td>7</td>" in text and "val-0" not in text and "begun" not in text
    assert "R@1 <b>10.0</b> <i>[43.1, 49.3]</i>" in text and text.count("R@1 <b>") == 2  # no subsets
    assert '<td>broken</td><td colspan="5">not readable' in text
    found, console = browse(run / "report.html", tmp_path)
    assert console == [] and EVIL in found["text"] and found["outside"] == 0


def test_runs_are_compared_on_each_of_their_evaluations(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run, recalls in ((one, (10.0, 30.0)), (two, (20.0, None))):
        a_run(run, data={"test": {"own": 1.0}})
        for name, recall in zip(("test", "other-test"), recalls, strict=True):
            if recall:
                evaluated(run, name, recall, name, data={"test": {name: 1.0}} if name != "test" else SETTINGS["data"])
    path = compare([str(one), str(two)])
    html = path.read_text()
    assert html.index("<h2>Results</h2>") < html.index("<h2>Results: other-test</h2>")
    own, other = html.split("<h2>Results: other-test</h2>")
    assert "<td>10.0 <i>" in own and "<td><b>20.0</b> <i>" in own and "<td>30.0 <i>" in other and "10.0" not in other
    assert tables(path)["data.test (other-test)"] == ["other-test: 1.0", "–"] and "(NAME): what eval/NAME" in html
    assert [list(run.results) for run in read([str(one), str(two)])] == [["test", "other-test"], ["test"]]
