"""Every HTML page of the repository with hostile texts wherever it takes text, looked at in one chromium."""

import html
import json
import os
import shutil
from pathlib import Path

import yaml
from browser import rows, summary_row
from gradio_page import Browser
from running import run

from clip4vla.report import compare_runs, page
from clip4vla.report.preview import ClipPreview
from clip4vla.report.sections.captioning import CaptionCard
from clip4vla.report.sections.classification import Predicted
from clip4vla.report.sections.retrieval import Hit, Query
from clip4vla.web.app import LONGEST
from faults._web import APPLE, HOSTILE, SHORT, Server

CLEAN = {" ".join(html.unescape(text).split()) for text in HOSTILE}  # as shard.py stores them
CANARY = "window.ran = 0; window.alert = window.confirm = window.prompt = () => { window.ran = 2; };"
LOOK = """(() => { const all = [...document.querySelectorAll("*")];
  for (const one of document.querySelectorAll("main *, #results *"))
    for (const kind of ["mouseover", "focus", "error", "load"]) one.dispatchEvent(new Event(kind));
  const bare = all.filter(one => !one.matches("script, style, script *") && !one.querySelector("script, style"));
  const texts = [...new Set(bare.map(one => one.textContent))], asked = %s;
  return { ran: window.ran, elements: all.length,
    handlers: all.filter(one => [...one.attributes].some(({ name }) => name.startsWith("on"))).length,
    links: [...document.links].filter(one => one.protocol === "javascript:").length,
    strangers: (document.querySelector("#results") ?? document)
      .querySelectorAll("iframe, base, object, embed, [http-equiv=refresh], textarea[srcdoc], animate").length,
    missing: asked.filter(text => !texts.some(shown => shown.includes(text))) }; })()"""


def write(folder: Path) -> dict[str, Path]:
    """The pages by name; each is written once, with all the texts."""
    pages = {name: folder / f"pages/{name}.html" for name in ("retrieval", "captions", "classification")}
    exhibits = [ClipPreview(text, HOSTILE) for text in SHORT]
    hits = [Hit(i, {SHORT[i]: 1.0}, True, SHORT[i]) for i in range(5)]
    asked = [Query(f"text_to_video/{text}", i, text, 1.0, {text: 1.0}, hits) for i, text in enumerate(SHORT)]
    scores = {f"text_to_video/{text}": summary_row(3.0) for text in SHORT}
    settings = {text: {text: text} for text in HOSTILE}
    curves = {text: rows(3) for text in SHORT[:4]}
    page.write(pages["retrieval"], SHORT[1], settings, curves, page.retrieval(scores, exhibits, asked))
    row = {"caption": {"CIDEr": 1.0, "n_clips": 1, "n_references": 1, "excluded": SHORT[2]}}
    some = [CaptionCard(i, text, {text: 1.0}) for i, text in enumerate(SHORT)]
    page.write(pages["captions"], SHORT[10], settings, {}, page.captions(row, exhibits, some))
    numbers = {
        "accuracy": 1.0,
        "top5": 1.0,
        "mean_class_accuracy": 1.0,
        "majority_baseline": 1.0,
        "n_clips": 9,
        "n_classes": 9,
        "n_folds": 1,
    }
    count = len(HOSTILE)
    matrix = [[int(i == j) for i in range(count)] for j in range(count)]
    label = {"label": numbers | {"classes": HOSTILE, "confusion": matrix}}
    guessed = [Predicted(i, [text], [(other, 0.5) for other in HOSTILE[:4]], text) for i, text in enumerate(SHORT)]
    page.write(pages["classification"], SHORT[11], settings, {}, page.classification(label, exhibits, guessed))
    pages["comparison"] = compare_runs.compare([str(_run(folder / "runs", text)) for text in SHORT[:3]])
    done = run("data_prep/check.py", folder / "out", "--decode", "0")
    assert done.returncode == 0, done.stderr
    return pages | {"check": folder / "out/check.html"}


def _run(folder: Path, text: str) -> Path:
    """A run that was trained and tested, all named by a text."""
    place = folder / text.replace("/", "\u2215")
    (place / "eval/test").mkdir(parents=True)
    config = {"seed": text, "data": {key: f"{text} {key}" for key in SHORT}}
    (place / "config.yaml").write_text(f"# torch {text}\n" + yaml.safe_dump(config, allow_unicode=True))
    scores = {f"text_to_video/{key}": summary_row(3.0) for key in SHORT}
    (place / "eval/test/metrics.json").write_text(json.dumps(scores))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    return place


def chromium(folder: Path, server: Server, queries: int = len(SHORT)) -> dict:
    """Figures of the pages, the search page last, which is asked with that many of the texts and with a file named by one."""
    pages, expected = write(folder), {"check": [text[:99] for text in SHORT]}
    browser = Browser(folder / "chromium")
    found = {}
    try:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=CANARY)
        for name, path in pages.items():
            browser.call("Page.navigate", url=path.as_uri())
            browser.until(f"document.readyState == 'complete' && location.href == {json.dumps(path.as_uri())}")
            found[name] = look(browser, name, expected.get(name, SHORT if name == "comparison" else HOSTILE))
        found["search"] = search(browser, server, folder, queries)
        sent = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        known = (server.address + "/", folder.as_uri() + "/", "data:", "blob:")
        assert [url for url in sent if not url.startswith(known)] == [], "another host was asked"
        assert not [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    finally:
        browser.process.terminate()
        browser.process.wait()
    return found | {"texts": len(HOSTILE), "scripts that ran": 0, "requests to others": 0}


def look(browser: Browser, name: str, texts: list[str]) -> dict:
    """Assert that the texts are text; how many there are, among how many elements."""
    seen = browser.js(LOOK % json.dumps(texts))
    wrong = {key: seen[key] for key in ("ran", "handlers", "links", "strangers", "missing") if seen[key]}
    assert not wrong, f"{name}: {str(wrong)[:2000]}"
    return {"texts": len(texts), "elements": seen["elements"]}


def search(browser: Browser, server: Server, folder: Path, queries: int) -> dict:
    """The page of the server: the texts as queries; what is found are captions, letter for letter."""
    browser.go(server.address)
    asked = [" ".join(text.split()) for text in SHORT if len(text) <= LONGEST][:queries]
    for text in asked:
        browser.write(text)
        browser.key("Enter", 13)
        cards = browser.found(f"“{' '.join(text.split())}”")
        wrong = {line for card in cards for line in card["captions"]} - CLEAN
        assert len(cards) == 12 and not wrong, f"captions that are no longer what they were: {wrong}"
        look(browser, f"search for {text!r}", [text])
    name = SHORT[2].replace("/", "\u2215") + ".png"
    shutil.copy(APPLE, folder / name)
    browser.drop(folder / name)
    browser.until("document.querySelector('.asked img')?.complete")
    os.unlink(folder / name)
    return look(browser, "search by a file", []) | {"queries": len(asked)}
