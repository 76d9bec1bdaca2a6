"""Several runs in one page: what differs, who is best, a line for each run, and one line for every mistake."""

import html
import json
import math
import re

import pytest
from browser import EVIL, browse
from running import run

from clip4vla.errors import UserError
from clip4vla.report.compare_runs import compare, overlay, read, training, validation

SETTINGS = {
    "run_dir": "x",
    "seed": 0,
    "model": {"head": "global_global"},
    "data": {"train": {"data/a": 1.0, "data/b": 0.5}},
}
SIZES = {"n_queries": 100, "n_gallery": 90}


def rows(n, first=1, **values):
    """Rows of metrics.jsonl: what is given, or the step, as total loss."""
    return [{"step": i, "loss": float(i), "lr": 1e-4} | values for i in range(first, first + n)]


def a_run(place, lines=(), test=None, val=None, header="# git 1a\n# torch 2.0\n", **settings):
    """A run folder as training and evaluation leave it; settings: sections to change. JSON is YAML."""
    place.mkdir(parents=True)
    tree = {k: v | settings.get(k, {}) if isinstance(v, dict) else settings.get(k, v) for k, v in SETTINGS.items()}
    (place / "config.yaml").write_text(header + json.dumps(tree), encoding="utf-8")
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, metrics in {"test": test, **(val or {})}.items():
        if metrics:
            (place / "eval" / name).mkdir(parents=True)
            (place / "eval" / name / "metrics.json").write_text(json.dumps(metrics))
    return str(place)


def tables(page):
    """The cells of each table row of a page by the text of the first one; markup inside cells is kept."""
    lines = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page.read_text(encoding="utf-8"), re.DOTALL)
    return {html.unescape(key): re.findall(r"<td>(.*?)</td>", rest, re.DOTALL) for key, rest in lines}


def test_only_what_differs_is_listed_and_a_missing_key_is_a_dash(tmp_path):
    a = a_run(tmp_path / "a", model={"text_tokens": True}, data={"train": {"data/a": 1}})
    b = a_run(
        tmp_path / "b",
        header="# git 2b-dirty\n# torch 2.0\n",
        model={"head": "local_local", "layers": []},
        run_dir="y",
    )
    c = a_run(tmp_path / "c", seed=10)
    rows = tables(compare([a, b, c]))
    both = "data/a: 1.0\ndata/b: 0.5"
    assert rows == {
        "seed": ["0", "0", "10"],
        "model.head": ["global_global", "local_local", "global_global"],
        "model.text_tokens": ["true", "–", "–"],
        "model.layers": ["–", "[]", "–"],
        "data.train": ["data/a: 1", both, both],
        "git": ["1a", "2b-dirty", "1a"],
    }
    same = compare([c, a_run(tmp_path / "d", seed=10, data={"train": {"data/b": 0.5, "data/a": 1}})])
    assert same == tmp_path / "comparison.html" and "No setting differs" in same.read_text() and tables(same) == {}


def test_a_run_that_was_only_evaluated_shows_the_settings_of_its_manifest(tmp_path):
    only = tmp_path / "only"
    a_run(only, test={"label": {"accuracy": 5.0}})
    (only / "config.yaml").unlink()
    (only / "eval/test/manifest.json").write_text(
        json.dumps({"settings": SETTINGS | {"seed": 3}, "versions": {"git": "9f"}})
    )
    rows = tables(compare([a_run(tmp_path / "trained"), str(only)]))
    assert (
        rows["seed"] == ["0", "3"]
        and "seed (test)" not in rows
        and rows["git"] == ["1a", "9f"]
        and rows["accuracy"] == ["–", "5.0"]
    )


def test_a_setting_that_only_the_evaluation_changed_is_listed(tmp_path):
    folders = [a_run(tmp_path / name, test={"label": {"accuracy": 5.0}}) for name in "ab"]
    changed = SETTINGS | {"run_dir": "y", "new": 1, "model": {"head": "local_local"}}
    (tmp_path / "b/eval/test/manifest.json").write_text(json.dumps({"settings": changed, "versions": {}}))
    rows = tables(compare(folders))
    assert rows == {"model.head (test)": ["–", "local_local"], "accuracy": ["<b>5.0</b>", "<b>5.0</b>"]}


def test_the_best_of_a_row_is_bold_the_highest_or_the_lowest(tmp_path):
    one = {"R@1": 41.26, "MedR": 4.0, "p_value": 0.0005, "ci": {"R@1": [30.04, 52.0]}, "chance": {"R@1": 9.0}} | SIZES
    two = {"R@1": 41.31, "MedR": 3.5, "p_value": None, "MeanR": math.nan} | SIZES
    three = {"R@1": 41.34, "MedR": 12.0, "p_value": 0.2} | SIZES
    metrics = [{"text_to_video": row, "label": {"accuracy": 50.0 + i}} for i, row in enumerate((one, two, three))]
    metrics[0] |= {"protocol": "words"}
    folders = [a_run(tmp_path / name, test=row) for name, row in zip("abc", metrics, strict=True)] + [
        a_run(tmp_path / "none")
    ]
    page = compare(folders)
    assert tables(page) == {
        "R@1": ["<b>41.3</b> <i>[30.0, 52.0]</i>", "<b>41.3</b>", "<b>41.3</b>", "–"],  # the same to the digits shown
        "MedR": ["4.0", "<b>3.5</b>", "12.0", "–"],
        "p_value": ["0.0005", "–", "0.2", "–"],
        "accuracy": ["50.0", "51.0", "<b>52.0</b>", "–"],
    }
    assert "different sizes" not in page.read_text()
    assert "Results" not in compare([folders[3]]).read_text()


def test_nothing_is_bold_where_the_test_sets_had_other_sizes(tmp_path):
    tests = [{"text_to_video": {"R@1": n} | SIZES, "video_to_text": {"R@5": n / 2, "n_gallery": n}} for n in (10, 1000)]
    folders = [a_run(tmp_path / name, test=test) for name, test in zip("ab", tests, strict=True)]
    page = compare(folders)
    assert tables(page) == {"R@1": ["10.0", "<b>1000.0</b>"], "R@5": ["5.0", "500.0"]}
    assert page.read_text().count("different sizes") == 1


def test_a_panel_has_a_line_for_each_run_that_has_the_key(tmp_path):
    """Of a repeated step the last counts; one row is a point; no row is no line; NaN leaves a gap."""
    resumed = rows(50) + rows(10, 41, loss=7.0)
    broken = rows(3) + [
        {"step": 4, "loss": math.nan},
        {"step": 5, "loss/at": 1.0, "loss": 2.0, "data_wait_fraction": 0.25},
    ]
    lines = {"a": resumed, "b": rows(1), "c": [], "d": broken, "e": [{"step": 3, "eval/R@1": 1.0}]}
    runs = read([a_run(tmp_path / name, some) for name, some in lines.items()])
    figures = dict(training(runs))
    assert list(figures) == ["loss (nats): total", "loss (nats): text–audio", "learning rate", "waiting for data (%)"]
    drawn = {
        line.get_label(): line for line in figures["loss (nats): total"].axes[0].lines if line.get_label() in lines
    }
    assert list(drawn) == ["a", "b", "d"]
    assert [line.get_color() for line in drawn.values()] == [run.colour for run in runs if run.name in drawn]
    assert drawn["a"].get_xdata().tolist() == list(range(1, 51)) and drawn["a"].get_ydata()[-3:].tolist() == [7, 7, 7]
    assert drawn["a"].get_ydata()[20:30] == pytest.approx(
        range(21, 31)
    )  # a moving average of a straight line is that line
    assert drawn["a"].get_ydata()[39] == pytest.approx((39 + 40 + 7) / 3)
    assert drawn["b"].get_marker() == "." and drawn["b"].get_ydata().tolist() == [1]
    assert math.isnan(drawn["d"].get_ydata()[3]) and drawn["d"].get_ydata()[4] == 2
    assert figures["waiting for data (%)"].axes[0].lines[-1].get_ydata().tolist() == [25]


def test_validation_shows_at_most_six_main_metrics_over_steps(tmp_path):
    row = {name: 1.0 for name in ("R@1", "R@5", "R@10", "MedR", "MeanR")} | SIZES
    ways = ("text_to_video", "video_to_text", "text_to_video/v", "text_to_audio", "audio_to_text")
    val = {f"val-{step:08d}": {way: row | {"R@1": step / 10} for way in ways} for step in (200, 1000)}
    a = a_run(tmp_path / "a", val=val | {"val-old": {"text_to_video": row}})
    b = a_run(tmp_path / "b", val={"val-00000300": {"caption": {"CIDEr": 40.0, "BLEU-1": 9.0, "n_clips": 3}}})
    figures = dict(validation(read([a, b])))
    ways = ("audio → text", "text → audio", "text → video", "video → text")
    assert list(figures) == [*(f"{way}, R@1" for way in ways), "CIDEr", "audio → text, R@10"]
    line = figures["text → video, R@1"].axes[0].lines[-1]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([200, 1000], [20, 100])
    assert [line.get_label() for line in figures["CIDEr"].axes[0].lines[1:]] == ["b"]


def test_runs_are_named_by_the_shortest_endings_that_tell_them_apart_and_look_unlike_each_other(tmp_path):
    folders = [a_run(tmp_path / name) for name in ("x/seed0", "y/seed0", "seed1", *(f"more{i}" for i in range(9)))]
    runs = read([folders[0] + "/", *folders[1:]])
    assert [run.name for run in runs[:4]] == ["x/seed0", "y/seed0", "seed1", "more0"]
    assert len({(run.colour, run.line) for run in runs}) == 12


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (None, "", "gone: no such folder"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [1,\nb: 2", "config.yaml: not valid YAML"),
        ("config.yaml", "words", "config.yaml: expected names with values, found str"),
        ("eval/test/metrics.json", '{"a":\n', "eval/test/metrics.json: not readable"),
        (
            "eval/val-00000100/metrics.json",
            "[]",
            "eval/val-00000100/metrics.json: expected names with values, found list",
        ),
        ("metrics.jsonl", '{"step" 1}\n', "metrics.jsonl: not readable"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, file, text, said):
    good, bad = a_run(tmp_path / "good"), tmp_path / "gone"
    if file:
        a_run(bad)
        (bad / file).parent.mkdir(parents=True, exist_ok=True)
        (bad / file).unlink(missing_ok=True) if text is None else (bad / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        compare([good, str(bad)])
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "comparison.html").exists()


def test_the_same_run_twice_and_a_page_that_cannot_be_written_are_one_line(tmp_path):
    a = a_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(UserError, match="link: named twice"):
        compare([a, str(tmp_path / "link")])
    with pytest.raises(UserError, match="cannot be written .* --out"):
        compare([a], str(tmp_path))


def test_markup_in_names_settings_and_metrics_stays_text_at_phone_width(tmp_path):
    """Twelve runs, as a browser sees them."""
    name = "<script>nowhere()<$\\x$"
    test = {EVIL: {EVIL: 1.0, "R@1": 2.0}, "caption": {"CIDEr": 3.0}}
    val = {"val-00000010": {f'{name}">': {"R@1": 2.0}}}
    folders = [a_run(tmp_path / f"{name} {i}", rows(3), test, val, seed=f"{EVIL} {i}") for i in range(12)]
    page = compare(folders, str(tmp_path / "new" / "page.html"))
    found, console = browse(page, tmp_path, 390)
    assert console == [] and found["scripts"] == 1 and found["outside"] == 0 and not found["wide"]  # the probe
    assert found["images"] == found["loaded"] == 3
    assert f"{EVIL} 11" in found["text"] and "<script>nowhere()<$\\x$ 11" in found["text"]


def test_the_script_as_a_user_runs_it(tmp_path):
    a, b = (a_run(tmp_path / name, rows(30)) for name in "ab")
    done = run("launch/report.py", a, b)
    assert done.returncode == 0 and done.stdout == f"comparison: {tmp_path}/comparison.html\n", done.stderr
    assert (tmp_path / "comparison.html").read_text(encoding="utf-8").count("data:image/png") == 2


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")  # numpy's and matplotlib's
def test_a_panel_of_no_finite_value_is_drawn(tmp_path):
    (one,) = read([a_run(tmp_path / "a", rows(2, loss=math.nan))])
    overlay("a", "loss", [(one, one.rows)]).savefig(tmp_path / "a.png")
    overlay("lr", "lr", [(one, [{"step": 1, "lr": math.inf}])]).savefig(tmp_path / "b.png")
