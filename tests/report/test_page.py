"""The page as a browser sees it: headless chromium loads it, and a script in a copy of it reports what it finds."""

import dataclasses
import io
import itertools
import math
import re
import statistics

import numpy as np
import pytest
from browser import EVIL, browse, chromium, exhibit, rows, summary_row
from PIL import Image

from clip4vla.report.page import retrieval, run_plot, write
from clip4vla.report.preview import ClipPreview
from clip4vla.report.sections.retrieval import Hit, Query


def query(direction, asked, rank, text="", ranks=None):
    """The first five exhibits are found, the right one at its rank: behind them as the sixth hit if that is below."""
    hits = [
        Hit(i, {"av": 0.9 - i / 10, "v": 0.3 + rank / 1000, "a": float("nan")}, i + 1 == rank, EVIL if i == 2 else "")
        for i in range(5)
    ]
    hits += [Hit(asked, {"av": 0.4 - rank / 100, "v": 0.1, "a": 0.2}, True)] if rank > 5 else []
    return Query(direction, asked, text, rank, ranks or {}, hits)


EXHIBITS = [*map(exhibit, range(23)), exhibit(23, [f"caption {i}" for i in range(20)])]
EXHIBITS += [dataclasses.replace(EXHIBITS[0], title="animals/thing_24", captions=[EVIL])]
QUERIES = [
    query("text_to_audio/nb", 7, 1, EXHIBITS[7].captions[0], {"av": 1, "v": 2, "a": 900}),
    query("text_to_audio/nb", 24, 17.5, EVIL, {"av": 17.5, "v": 3, "a": float("nan")}),
    query("audio_to_text/vb", 8, 2, "", {"av": 2, "v": 2, "a": 1}),
    query("audio_to_text/vb", 23, 1, "", {"av": 1, "v": 40, "a": 5}),
    query("vision_to_audio/nb", 9, float("nan")),
    *(query("video_to_text", i, 100.0 - i, "", {"av": 100.0 - i, "v": 2.0 * i, "a": 50.0}) for i in range(10, 23)),
    *(query("text_to_video", i, 1, f"A {99 - i}", {"av": 1.0, "v": 1.0, "a": 60.0 - i}) for i in range(5)),
]


def page(path):
    directions = [
        f"{a}_to_{b}/{s}" for a in ("text", "audio") for b in ("audio", "text", "vision") if a != b for s in "ab"
    ]
    metrics = {"text_to_audio/nb": summary_row(45.0), **{name: summary_row(8.0, None) for name in directions}}
    metrics["text_to_audio/nb"]["ci"] = {"R@1": [41.26, 48.74], "MedR": [4.0, 5.5]}
    config = {"run_dir": "runs/<b>", "model": {"clip": "ViT-B-32", "head": "global_global"}, "seed": 0, "steps": 4000}
    runs = {"pretrain/stamps": rows(), "clip": rows(3), "empty": []}
    write(path, f"Retrieval {EVIL}", config, runs, retrieval(metrics, EXHIBITS, QUERIES))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page(folder / "new" / "report.html")
    return folder / "new" / "report.html", folder


@pytest.fixture(scope="module")
def seen(site):
    return browse(*site)


def test_everything_loads_and_fits_without_console_errors(site, seen):
    first, asked = QUERIES[:20], {"text": 0, "audio": 1, "vision": 2, "video": 2}  # pictures of what was asked
    for found, console in (seen, browse(*site, 390)):
        assert console == [] and found["outside"] == 0 and not found["wide"]
        images = sum(2 * len(query.hits) + asked[query.direction.split("_")[0]] for query in first)
        assert found["images"] == found["loaded"] == 3 + images  # and the curves
        assert found["players"] == sum(len(query.hits) + bool(asked[query.direction.split("_")[0]]) for query in first)
        assert found["right"] == 19 and found["cards"] == 20
        assert found["landed"] == [f"{query.rank:g}" for query in first if query.rank == query.rank]
        assert (
            "no right answer in the gallery" in found["text"] and "✗ right answer at rank 17.5 of 87" in found["text"]
        )
        assert "av 0.225 · v 0.100 · a 0.200" in found["text"] and "v: 3" in found["text"] and "a –" in found["text"]
        assert "45.0 [41.3, 48.7]" in found["text"] and "4.5 [4.0, 5.5]" in found["text"]
        assert "0.0005" in found["text"] and "model.head" in found["text"]


def test_each_picture_and_sound_is_in_the_page_once(site):
    uris = re.findall(r"data:(?:image/jpeg|audio/ogg);base64,[^<\"]+", site[0].read_text(encoding="utf-8"))
    assert len(uris) == len(set(uris)) == 3 * (len(EXHIBITS) - 1)  # the last is like the first


def test_captions_stay_text(seen):
    found, console = seen
    assert (
        found["captions"].count(EVIL) == 2 + 20 and EVIL in found["text"]
    )  # asked, its right answer, and found by each query
    assert found["scripts"] == 2  # the page's own and the probe
    assert console == []


def test_filters_by_direction_failure_and_text(seen):
    found, _ = seen
    assert found["failed"] == "16 of 23"
    assert found["direction"] == ["animals/thing_8", "animals/thing_23"] and found["both"] == ["animals/thing_8"]
    assert found["searched"] == ["animals/thing_11"]


def test_pages_and_orders(seen):
    found, _ = seen
    titles = [EXHIBITS[query.exhibit].title for query in QUERIES]
    assert found["second"] == [titles[20:], "page 2 of 2", True]

    def order(key):
        known = [query for query in QUERIES if key(query) == key(query)]
        rest = [query for query in QUERIES if key(query) != key(query)]
        return [EXHIBITS[query.exhibit].title for query in sorted(known, key=key) + rest][:20]

    def margin(query):
        right, wrong = ([hit.scores["av"] for hit in query.hits if hit.right is which] for which in (True, False))
        return max(right) - max(wrong) if right else math.nan

    def gain(one, other):
        return lambda query: query.ranks.get(one, math.nan) - query.ranks.get(other, math.nan)

    expected = {"as asked": titles[:20]}
    expected |= {"rank, worst first": order(lambda q: -q.rank), "rank, best first": order(lambda q: q.rank)}
    expected |= {"margin, smallest first": order(margin), "margin, largest first": order(lambda q: -margin(q))}
    for one, other in itertools.permutations(("av", "v", "a"), 2):
        expected[f"gain of {one} over {other}"] = order(gain(one, other))
    by_text = found["sorted"].pop("text, A–Z")
    assert by_text[:6] == ["animals/thing_24", *titles[:-6:-1]]  # "<script>", "A 95", "A 96", ...
    assert found["sorted"] == expected


def test_a_thousand_queries_stay_fast(tmp_path):
    """Both bounds are some twenty times what an idle machine takes; all cards at once would take longer."""
    exhibits = [ClipPreview(f"video {i}", [f"caption {j} of {i}" for j in range(20)], *[bytes([i % 256, i // 256]) * 500] * 3)
                for i in range(1000)]  # fmt: skip
    ranks = np.random.default_rng(0).integers(1, 6, 1000).tolist()
    queries = [query("text_to_video", i, rank, f"words {i}", {"av": rank, "v": 1}) for i, rank in enumerate(ranks)]
    write(tmp_path / "many.html", "Many", {}, {}, retrieval({}, exhibits, queries))
    probe = """<script>const ready = performance.now(); addEventListener("load", () => {
      const times = [...document.getElementById("sort").options].map(option => {
        const begin = performance.now(), sort = document.getElementById("sort");
        sort.value = option.value; sort.dispatchEvent(new Event("change"));
        document.body.getBoundingClientRect();  // lays it out
        return performance.now() - begin; });
      document.title = JSON.stringify({ ready, times, shown: document.getElementById("shown").textContent,
        cards: document.querySelectorAll(".card").length }); });</script>"""
    text = (tmp_path / "many.html").read_text(encoding="utf-8")
    (tmp_path / "timed.html").write_text(text.replace("</main>", f"</main>{probe}"), encoding="utf-8")
    found, _ = chromium(tmp_path / "timed.html", tmp_path)
    assert found["cards"] == 20 and found["shown"] == "1,000 of 1,000" and len(found["times"]) == 8
    assert found["ready"] < 10_000 and statistics.median(found["times"]) < 2000


def test_the_probe_notices_what_it_is_to_notice(site, tmp_path):
    broken = tmp_path / "broken.html"
    extra = (
        '<img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/x.png"><script>nowhere()</script></main>'
    )
    broken.write_text(site[0].read_text(encoding="utf-8").replace("</main>", extra), encoding="utf-8")
    found, console = browse(broken, tmp_path)
    assert found["images"] - found["loaded"] == 2 and found["outside"] == 1 and found["scripts"] == 3
    assert any("nowhere is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_a_page_with_nothing_but_a_title_loads(tmp_path):
    write(tmp_path / "report.html", "Nothing yet", {}, {}, retrieval({}, [], []))
    found, console = browse(tmp_path / "report.html", tmp_path)
    assert found["text"].strip() == "Nothing yet" and console == []


def test_a_plot_has_a_panel_for_what_the_rows_have():
    """Three to a line, below the losses: here lr and grad_norm; then five more; then, without rows, none."""
    more = ("clips_per_s", "data_wait_fraction", "alignment", "tflops", "memory_gib")
    plots = [run_plot("a", some) for some in ([], rows(), [row | dict.fromkeys(more, 1.0) for row in rows()])]
    heights = []
    for plot in plots:
        with Image.open(io.BytesIO(plot)) as image:
            heights.append(image.height)
            assert image.width == 1140
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0]) > 0
