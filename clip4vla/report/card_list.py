"""Build the lists of a report page: cards with pictures and sound, a search, orders and a pager.

A page holds thousands of cards: their data lie in it as JSON, each picture and sound once, and a script builds the few
cards that are looked at. Text from data becomes text nodes, never markup.
"""

import json
import math
from html import escape
from typing import Any

from clip4vla.report.preview import ClipPreview, data_uri


def section(
    heading: str, exhibits: list[ClipPreview], things: list[dict[str, Any]], *, filters: str, note: str, style: str, script: str,
    **more: Any,
) -> str:  # fmt: skip
    """Return HTML of a list of things, a card each, as JSON with "exhibit": a number among the exhibits.

    filters: HTML of the form's fields, "sort" among them; note: HTML below the cards; `more` is data for the script.
    The script follows SCRIPT, gives it card, searched, wanted and value, and ends with start().
    """
    media: dict[str, int] = {}  # URI to number
    data = {"exhibits": [_exhibit(exhibit, media) for exhibit in exhibits], "things": things} | more
    held = "".join(f'<script type="text/plain" id="medium{number}">{uri}</script>' for uri, number in media.items())
    form = f'<form class="filters" autocomplete="off">{filters}<output id="shown"></output></form>'
    pager = f'{PAGER}<span class="note">{note}</span></nav>'
    return (
        f'<style>{STYLE}{style}</style><section id="top"><h2>{escape(heading)}</h2>{form}<div id="cards"></div>{pager}'
        f'</section><script type="application/json" id="data">{_json(data)}</script>'
        f"<script>{SCRIPT}{script}</script>{held}"
    )


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Replace values that are not finite by None: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _exhibit(exhibit: ClipPreview, media: dict[str, int]) -> dict[str, Any]:
    """Return an exhibit's data, media by number; media not met before are added to `media`."""
    parts = {"picture": (exhibit.picture, "image/jpeg"), "spectrogram": (exhibit.spectrogram, "image/jpeg")}
    parts["audio"] = (exhibit.audio, escape(exhibit.audio_mime))
    there = {name: media.setdefault(data_uri(data, mime), len(media)) for name, (data, mime) in parts.items() if data}
    return {"title": exhibit.title, "captions": exhibit.captions, **there}


def _json(tree: Any) -> str:
    """Return JSON in which nothing can end a script element."""
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


SEARCH = '<input type="search" id="search" placeholder="search text" aria-label="search text">'

PAGER = """<nav class="filters"><button id="previous">‹ previous</button><output id="page"></output>
<button id="next">next ›</button>"""

STYLE = """
.filters { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; margin-bottom: 14px; }
.filters :is(select, button, [type="search"]) { font: inherit; padding: 4px 8px; max-width: 100%; }
output { color: var(--soft); font-variant-numeric: tabular-nums; }
.chip { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.card .media { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.card .media > * { margin: 0; }
.card .picture { width: auto; max-width: 100%; max-height: 112px; background: #eef1f5; }
.card .spectrogram { flex: 1 1 150px; width: 0; height: 84px; }
@media (min-width: 900px) {
  form.filters { position: sticky; top: 0; z-index: 2; background: #f4f6f9; padding: 8px 0; }
}
"""

SCRIPT = """
"use strict";
const PAGE = 20, item = id => document.getElementById(id);
const { exhibits, things, ...given } = JSON.parse(item("data").textContent);
let page = 0, chosen = things;

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  element.className = name;
  element.append(...children);
  return element;
}
const place = rank => rank === null ? "–" : rank.toLocaleString("en");
const label = text => make("div", "id", text);
function captions(texts, few) {
  const lines = texts.map(text => make("p", "caption", text)), rest = lines.slice(few);
  const list = make("div", "", ...lines.slice(0, few));
  if (rest.length) list.append(make("details", "", make("summary", "", `${rest.length} more`), ...rest));
  return list;
}
/* Pictures and sounds come after this script: until the page is read to its end there may be none. */
function media(exhibit, audioOnly) {
  if (document.readyState === "loading") return "";
  const parts = [], data = kind => item(`medium${exhibit[kind]}`).textContent;
  for (const kind of audioOnly ? ["spectrogram"] : ["picture", "spectrogram"])
    if (kind in exhibit) parts.push(Object.assign(make("img", kind), { alt: kind, src: data(kind) }));
  if ("audio" in exhibit)  // preload: browsers refuse pages with hundreds of loaded players
    parts.push(Object.assign(make("audio", ""), { controls: true, preload: "none", src: data("audio") }));
  return make("div", "media", ...parts);
}

/* An order is "what", then "up" or "down" or what else value() takes; null comes last. */
function sorted(some, order) {
  const [what, ...more] = order.split(" "), sign = more[0] === "down" ? -1 : 1;
  const keyed = some.map(thing => [what === "text" ? thing.searchText : value(thing, what, ...more), thing]);
  const compare = what === "text" ? new Intl.Collator().compare : (a, b) => a - b;
  keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
  return keyed.map(([, thing]) => thing);
}
function choose() {
  const words = item("search").value.toLowerCase(), order = item("sort").value;
  chosen = things.filter(thing => thing.searchText.includes(words) && wanted(thing));
  chosen = order ? sorted(chosen, order) : chosen;
  item("shown").textContent = `${place(chosen.length)} of ${place(things.length)}`;
  turn(0);
}
function turn(to) {
  const last = Math.max(0, Math.ceil(chosen.length / PAGE) - 1);
  page = Math.min(last, Math.max(0, to));
  item("page").textContent = `page ${place(page + 1)} of ${place(last + 1)}`;
  item("previous").disabled = page === 0;
  item("next").disabled = page === last;
  item("cards").replaceChildren(...chosen.slice(page * PAGE, (page + 1) * PAGE).map(card));
}
function start() {
  const form = document.querySelector("form.filters");
  for (const thing of things) thing.searchText = searched(thing, exhibits[thing.exhibit]).join("\\n").toLowerCase();
  for (const control of form.elements) control[control.type === "search" ? "oninput" : "onchange"] = choose;
  form.onsubmit = () => false;
  for (const [id, step] of [["previous", -1], ["next", 1]])
    item(id).onclick = () => { turn(page + step); item("top").scrollIntoView(); };
  choose();
  document.addEventListener("DOMContentLoaded", () => turn(page));
}
"""
