"""Predictions as a browser sees them: filtered, sorted, with bars; and what the plots of classes hold."""

import dataclasses
import io
import math
import statistics

import numpy as np
import pytest
from browser import EVIL, browse, exhibit
from matplotlib.colors import to_rgb
from PIL import Image

from clip4vla.report import class_plots
from clip4vla.report.page import HEAD, classification
from clip4vla.report.preview import ClipPreview
from clip4vla.report.sections.classification import Predicted, section

PROBE = """<script>addEventListener("load", () => {
  const some = name => [...document.querySelectorAll(name)], item = id => document.getElementById(id);
  const texts = name => some(name).map(element => element.textContent), titles = () => texts(".head b");
  const found = {
    images: some("img").length, loaded: some("img").filter(image => image.naturalWidth).length, cards: some(".card").length,
    scripts: some("script:not([type])").length, titles: titles(), badges: texts(".badge"), chips: texts(".chip"),
    classes: texts(".class"), wide: document.documentElement.scrollWidth > innerWidth, folds: !item("fold").parentElement.hidden,
    guesses: some(".card").map(card => [...card.querySelectorAll(".guess")].map(line =>
      [line.firstChild.textContent, line.lastChild.textContent, line.style.getPropertyValue("--w"),
       line.classList.contains("true")])),
    options: ["class", "guessed", "fold"].map(id => [...item(id).options].map(option => option.textContent)) };
  const set = (id, value) => {
    item(id).value = value; item(id).dispatchEvent(new Event(item(id).oninput ? "input" : "change")); };
  found.sorted = [...item("sort").options].map(option => { set("sort", option.value); return titles(); });
  set("sort", "");
  found.chosen = CHOICES.map(choice => {
    for (const [id, value] of Object.entries(choice)) set(id, value);
    const shown = titles();
    for (const id of Object.keys(choice)) set(id, "");
    return shown; });
  set("which", "right");
  const button = some(".guess button").find(one => one.textContent === "cat");
  if (button) { button.click(); found.clicked = [titles(), item("which").value, item("class").value, item("guessed").value]; }
  top.postMessage(found, "*"); });</script>"""
CHOICES = """[{ which: "right" }, { which: "wrong" }, { class: "dog" }, { guessed: "cat" }, { class: "dog", guessed: "cat" },
  { fold: "10" }, { fold: "2", which: "wrong" }, { search: "COW" }, { search: "numéro 3" }, { search: "thing_4" },
  { search: "nowhere" }]"""
EXHIBITS = [*map(exhibit, range(7)), ClipPreview("alone", [])]
EXHIBITS[6] = dataclasses.replace(EXHIBITS[6], title=EVIL, captions=[EVIL])
PREDICTED = [
    Predicted(0, ["dog"], [("dog", 0.625), ("cat", 0.25), ("cow", 0.125)], "1"),
    Predicted(1, ["dog"], [("cat", 0.5), ("dog", 0.375)], "2"),
    Predicted(2, ["cat"], [("cat", 1.0)], "2"),
    Predicted(3, ["cat"], [("dog", 0.75), ("cow", 0.125)], "10"),  # the right one is not among them
    Predicted(4, ["Cow"], [("cat", 0.875), ("7", 0.0625)], "1"),  # neither: the surer another, the less sure
    Predicted(5, ["dog"], [("dog", math.nan), ("cat", math.nan)], "1"),
    Predicted(6, [EVIL], [(EVIL, 0.5), ("cow", 0.25)], "1"),
    Predicted(7, ["cat"], [], "1"),
]
TITLES = [one.title for one in EXHIBITS]


def see(folder, predicted, width=1400):
    path = folder / "report.html"
    text = f"{HEAD}<title>Predictions</title><main>{section(EXHIBITS, predicted)}</main></html>\n"
    path.write_text(text, encoding="utf-8")
    return browse(path, folder, width, PROBE.replace("CHOICES", CHOICES))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    found, console = see(tmp_path_factory.mktemp("predictions"), PREDICTED)
    assert console == []
    return found


def test_a_card_has_its_media_its_class_and_a_bar_for_each_guess(seen):
    assert seen["cards"] == 8 and seen["titles"] == TITLES and seen["images"] == seen["loaded"] == 14
    assert seen["badges"] == [f"✓ {word}" if word == "right" else f"✗ {word}" for word in
                              ("right", "wrong", "right", "wrong", "wrong", "right", "right", "wrong")]  # fmt: skip
    assert seen["chips"] == [f"fold: {one.fold}" for one in PREDICTED]
    assert seen["classes"][1] == "class: dog" and seen["classes"][3] == "class: cat, which is not among the guesses"
    first = [["✓ dog", "62.5%", "62.5%", True], ["cat", "25.0%", "25%", False], ["cow", "12.5%", "12.5%", False]]
    assert seen["guesses"][0] == first
    assert seen["guesses"][4][1] == ["7", "6.3%", "6.25%", False]  # a name that is a number stays where it is
    assert seen["guesses"][5][0] == ["✓ dog", "–", "0%", True] and seen["guesses"][7] == []


def test_markup_in_names_stays_text(seen):
    assert seen["guesses"][6][0][0] == f"✓ {EVIL}" and seen["classes"][6] == f"class: {EVIL}"
    assert EVIL in seen["options"][0] and EVIL in seen["options"][1]
    assert seen["scripts"] == 2  # the page's own and the probe


def test_filters_and_a_click_on_a_guess(seen):
    classes, guessed, folds = seen["options"]
    assert classes[:1] + classes[2:] == ["any", "cat", "Cow", "dog"] and guessed[2:] == ["cat", "dog"]
    assert folds == ["any", "1", "2", "10"]
    wanted = [[0, 2, 5, 6], [1, 3, 4, 7], [0, 1, 5], [1, 2, 4], [1], [3], [1], [4], [3], [4], []]
    assert seen["chosen"] == [[TITLES[i] for i in some] for some in wanted]
    assert seen["clicked"] == [[TITLES[1]], "", "dog", "cat"]  # from the right ones to dogs taken for cats


def test_orders(seen):
    orders = [range(8), [4, 3, 1, 6, 0, 2, 5, 7], [4, 3, 1, 0, 2, 5, 6, 7]]  # what has no number comes last
    assert seen["sorted"] == [[TITLES[i] for i in order] for order in orders]


def test_a_phone_has_room_and_without_folds_there_is_no_choice_of_them(tmp_path):
    long = [("a_class_with_a_name_that_is_longer_than_a_phone_is_wide_" * 2, 0.5)]
    found, console = see(tmp_path, [dataclasses.replace(one, guesses=long, fold="") for one in PREDICTED], 390)
    assert console == [] and not found["wide"] and not found["folds"] and found["chips"] == []


@pytest.mark.parametrize("n", [2, 16, 101])
def test_plots_of_classes_hold_what_was_given(n):
    rng = np.random.default_rng(n)
    names = [EVIL, "cost $5 or $x^", *(f"{i} " + "name" * (i % 12) for i in range(2, n))]
    counts = rng.integers(0, 5, (n, n)) + np.eye(n, dtype=int)
    counts[1] = 0
    clips = counts.sum(1)
    recall = np.array([100 * counts[i, i] / clips[i] if clips[i] else np.nan for i in range(n)])

    axes = class_plots.confusion_figure(names, counts).axes[0]
    shares = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.allclose(shares.sum(1)[clips > 0], 1) and np.allclose(
        shares[clips > 0] * clips[clips > 0, None], counts[clips > 0]
    )
    assert np.isnan(shares[1]).all() and to_rgb(axes.images[0].cmap(0.0)) == (1, 1, 1)
    numbers = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in axes.texts}
    assert numbers == ({tuple(cell): counts[tuple(cell)] for cell in np.argwhere(counts)} if n <= 20 else {})

    axes = class_plots.per_class_figure(names, recall, clips, 100 / n).axes[0]
    assert [bar.get_width() for bar in axes.patches[:-1]] == sorted(recall[recall == recall], reverse=True)
    order = sorted((i for i in range(n) if clips[i]), key=lambda i: -recall[i]) + [1]
    shown = [label.get_text().rstrip("…") for label in axes.get_yticklabels()]  # a long name is cut
    assert all(names[i].startswith(name) for i, name in zip(order, shown, strict=True))
    beside = [f"{recall[i]:.0f}% of {clips[i]} clip{'' if clips[i] == 1 else 's'}" for i in order[:-1]] + ["no clips"]
    assert [text.get_text() for text in axes.texts] == beside
    assert [line.get_xdata()[0] for line in axes.lines] == [pytest.approx(np.nanmean(recall)), 100 / n]

    for png in (class_plots.confusion(names, counts), class_plots.per_class(names, recall, clips, 100 / n)):
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG" and image.height > (8 * n if n > 20 else 100)


def test_curves_of_few_shots_have_means_deviations_and_the_accuracy_with_all_clips():
    curves = {"a": {4: [50.0, 60.0, 64.0], 1: [20.0, 30.0, 25.0]}, "av": {1: [40.0], 16: [70.0, 80.0]}}
    axes = class_plots.few_shot_figure(curves, {"a": 77.0, "av": 91.5}).axes[0]
    assert list(axes.get_xticks()) == [1, 4, 16] and axes.get_xscale() == "log"
    for name, drawn in zip(curves, axes.containers, strict=True):
        line, _, (bars,) = drawn
        shots = sorted(curves[name])
        assert list(line.get_xdata()) == shots
        assert list(line.get_ydata()) == pytest.approx([statistics.mean(curves[name][shot]) for shot in shots])
        heights = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        some = [curves[name][shot] for shot in shots]
        assert heights == pytest.approx([2 * np.std(draws, ddof=1) if len(draws) > 1 else 0 for draws in some])
    dotted = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"}
    assert dotted == {"a, all clips: 77.0": 77.0, "av, all clips: 91.5": 91.5}
    with Image.open(io.BytesIO(class_plots.few_shot(curves, {"a": 77.0, "av": 91.5}))) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("classes", [2, 1001])
def test_a_page_of_very_many_classes_has_no_plots_of_them(classes):
    """Their confusion matrix is not among the metrics either."""
    row = dict.fromkeys(("accuracy", "top5", "mean_class_accuracy", "majority_baseline"), 50.0)
    row |= {"n_clips": 4, "n_classes": classes, "n_folds": 1}
    row |= {"classes": [str(i) for i in range(classes)]} | ({"confusion": [[2, 0], [1, 1]]} if classes == 2 else {})
    page = classification({"label": row}, [], [])
    assert ("confusion matrix" in page) == (classes == 2) and "50.0" in page
