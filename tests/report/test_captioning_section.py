"""Written captions as a browser sees them: beside their clip, above its references, searched and sorted."""

import dataclasses
import math
import re
import statistics

import pytest
from browser import EVIL, browse, chromium, exhibit

from clip4vla.report.page import HEAD
from clip4vla.report.preview import ClipPreview
from clip4vla.report.sections.captioning import CaptionCard, section

PROBE = """<script>addEventListener("load", () => {
  const some = name => [...document.querySelectorAll(name)], item = id => document.getElementById(id);
  const texts = name => some(name).map(element => element.textContent), titles = () => texts(".head b");
  const box = element => element.getBoundingClientRect();
  const found = {
    images: some("img").length, loaded: some("img").filter(image => image.naturalWidth).length, cards: some(".card").length,
    players: some("audio").length, scripts: some("script:not([type])").length, titles: titles(), written: texts(".written"),
    marked: some(".written").map(words => [...words.querySelectorAll(".new")].map(word => word.textContent)),
    badges: texts(".badge"), chips: some(".head").map(head => [...head.querySelectorAll(".chip")].map(c => c.textContent)),
    references: some(".references").map(list => [list.querySelectorAll("div > .caption").length,
      list.querySelectorAll("details > .caption").length, list.querySelector(".id").textContent]),
    captions: texts(".references .caption"), wide: document.documentElement.scrollWidth > innerWidth,
    beside: box(some(".media")[0]).right <= box(some(".written")[0]).left,
    above: box(some(".media")[0]).bottom <= box(some(".written")[0]).top };
  const set = (id, value) => {
    item(id).value = value; item(id).dispatchEvent(new Event(item(id).oninput ? "input" : "change")); };
  item("next").click(); found.second = [titles(), item("page").textContent, item("next").disabled];
  found.sorted = Object.fromEntries([...item("sort").options].map(option => {
    set("sort", option.value); return [option.textContent, titles()]; }));
  set("sort", "");
  found.searched = ["WRITTEN 11", "numéro 12", "thing_3", "nowhere"].map(words => {
    set("search", words); return [titles(), item("shown").textContent]; });
  top.postMessage(found, "*"); });</script>"""


def written(i):
    """The i-th of 25 captions; the third has scores of its own, the fifth one that is not a number."""
    scores = {"CIDEr": (i * 7 % 25) * 10.126, "log-probability": -7.1 - i}
    changed = {3: {"BLEU-4": 12.0}, 5: {"CIDEr": math.nan, "log-probability": 0.0}}
    texts = {0: "A strange THING, number twelve", 1: EVIL, 2: ""}
    return CaptionCard(i, texts.get(i, f"written {i}"), changed.get(i, scores))


EXHIBITS = [*map(exhibit, range(23)), exhibit(23, [f"reference {i}" for i in range(20)]), ClipPreview("alone", [])]
EXHIBITS[1] = dataclasses.replace(EXHIBITS[1], title=EVIL, captions=[EVIL])
WRITTEN = [written(i) for i in (23, 24, *range(23))]
TITLES = [EXHIBITS[one.exhibit].title for one in WRITTEN]


def page(path, exhibits, some):
    path.write_text(f"{HEAD}<title>Captions</title><main>{section(exhibits, some)}</main></html>\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    return page(folder / "report.html", EXHIBITS, WRITTEN), folder


@pytest.fixture(scope="module")
def seen(site):
    return browse(*site, probe=PROBE)


def test_a_card_has_its_media_the_caption_and_the_references(site, seen):
    for (found, console), wide in ((seen, True), (browse(*site, 390, PROBE), False)):
        assert console == [] and not found["wide"] and found["cards"] == 20
        assert found["images"] == found["loaded"] == 2 * 19 and found["players"] == 19  # one clip has none
        assert (found["beside"], found["above"]) == (wide, not wide)
    assert found["titles"] == TITLES[:20] and found["written"] == [one.text or "–" for one in WRITTEN[:20]]
    assert found["references"][:3] == [[3, 17, "20 references"], [0, 0, "no references"], [2, 0, "2 references"]]
    assert found["captions"] == [text for one in WRITTEN[:20] for text in EXHIBITS[one.exhibit].captions]
    assert found["badges"][:3] == ["CIDEr 111.4", "CIDEr 182.3", "CIDEr 0"]
    assert found["badges"][5] == "BLEU-4 12" and found["badges"][7] == "CIDEr –"
    assert found["chips"][2:8:3] == [["log-probability -7.1"], []]


def test_words_of_no_reference_are_marked(seen):
    """In any case and beside any punctuation; nothing is where there are no references."""
    found, _ = seen
    assert found["marked"][:5] == [["written", "23"], [], ["strange", "twelve"], [], []]


def test_markup_in_captions_references_and_titles_stays_text(site, seen):
    found, console = seen
    assert found["titles"][3] == EVIL and found["written"][3] == EVIL and EVIL in found["captions"]
    assert found["scripts"] == 2 and console == []  # the page's own and the probe
    assert "<script>alert" not in site[0].read_text(encoding="utf-8")


def test_each_picture_and_sound_is_in_the_page_once(site):
    uris = re.findall(r"data:(?:image/jpeg|audio/ogg);base64,[^<\"]+", site[0].read_text(encoding="utf-8"))
    assert len(uris) == len(set(uris)) == 3 * 24


def test_searching_finds_captions_references_and_titles(seen):
    found, _ = seen
    assert found["searched"] == [
        [["animals/thing_11"], "1 of 25"],
        [["animals/thing_12"], "1 of 25"],
        [["animals/thing_3"], "1 of 25"],
        [[], "0 of 25"],
    ]


def test_pages_and_orders(seen):
    found, _ = seen
    assert found["second"] == [TITLES[20:], "page 2 of 2", True]
    expected = {"as asked": TITLES[:20]}
    for name in ("CIDEr", "log-probability", "BLEU-4"):
        known = [one for one in WRITTEN if not math.isnan(one.scores.get(name, math.nan))]
        rest = [one for one in WRITTEN if one not in known]  # a score that is not there comes last
        known.sort(key=lambda one, name=name: one.scores[name])  # all differ
        for words, some in (("lowest first", known), ("highest first", known[::-1])):
            expected[f"{name}, {words}"] = [EXHIBITS[one.exhibit].title for one in some + rest][:20]
    by_text = found["sorted"].pop("caption, A–Z")
    assert by_text[:5] == ["animals/thing_2", EVIL, "animals/thing_0", "animals/thing_10", "animals/thing_11"]
    assert found["sorted"] == expected


def test_a_thousand_captions_stay_fast(tmp_path):
    """Both bounds are some twenty times what an idle machine takes."""
    exhibits = [ClipPreview(f"video {i}", [f"reference {j} of {i}" for j in range(20)], *[bytes([i % 256, i // 256]) * 500] * 3)
                for i in range(1000)]  # fmt: skip
    some = [CaptionCard(i, f"words {i}", {"CIDEr": i * 37 % 1000, "log-probability": -float(i)}) for i in range(1000)]
    path = page(tmp_path / "many.html", exhibits, some)
    probe = """<script>const ready = performance.now(); addEventListener("load", () => {
      const sort = document.getElementById("sort"), times = [...sort.options].map(option => {
        const begin = performance.now();
        sort.value = option.value; sort.dispatchEvent(new Event("change"));
        document.body.getBoundingClientRect();  // lays it out
        return performance.now() - begin; });
      document.title = JSON.stringify({ ready, times, shown: document.getElementById("shown").textContent,
        cards: document.querySelectorAll(".card").length, page: document.getElementById("page").textContent }); });</script>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", f"</main>{probe}"), encoding="utf-8")
    found, _ = chromium(path, tmp_path)
    assert (found["cards"], found["shown"], found["page"]) == (20, "1,000 of 1,000", "page 1 of 50")
    assert len(found["times"]) == 6 and found["ready"] < 10_000 and statistics.median(found["times"]) < 2000
