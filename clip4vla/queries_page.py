"""The part of a report page that shows queries: what was asked, what was found, and where the right answer landed.

A page holds thousands of queries: their data lie in it as JSON, each picture and sound once, and a script builds the few
cards that are looked at. Text from data becomes text nodes, never markup.
"""

import json
import math
from dataclasses import dataclass, field
from html import escape
from typing import Any

from clip4vla.exhibits import Exhibit, data_uri


@dataclass
class Hit:
    """A gallery item that a query found."""

    exhibit: int  # its number among the page's exhibits
    scores: dict[str, float]  # by modality ("av", "v", "a", or "" alone); the first ranks, others may be NaN
    right: bool
    text: str = ""  # the caption that was found, if the gallery is of captions


@dataclass
class Query:
    """What was asked, and what was found.

    hits: the first five, best first; then, if it is not among them, the right one.
    """

    direction: str  # such as text_to_audio/nb
    exhibit: int
    text: str  # the caption that was asked; "" if a picture or sound was
    rank: float  # of the right one; NaN if there is none
    ranks: dict[str, float] = field(default_factory=dict)  # by modality
    hits: list[Hit] = field(default_factory=list)


def arrow(direction: str) -> str:
    """text → audio · nb"""
    return direction.replace("_to_", " → ").replace("/", " · ")


def section(exhibits: list[Exhibit], queries: list[Query], galleries: dict[str, int]) -> str:
    """HTML of the queries; galleries: items that were ranked in a direction, where that is known."""
    names = dict.fromkeys(query.direction for query in queries)
    options = "".join(f'<option value="{escape(name)}">{escape(arrow(name))}</option>' for name in names)
    media: dict[str, int] = {}  # URI to number
    data = {
        "directions": {name: {"label": arrow(name), "gallery": galleries.get(name)} for name in names},
        "exhibits": [_exhibit(exhibit, media) for exhibit in exhibits],
        "queries": [_query(query) for query in queries],
    }
    held = "".join(f'<script type="text/plain" id="medium{number}">{uri}</script>' for uri, number in media.items())
    return (
        f'{STYLE}<section id="top"><h2>Queries</h2>{FILTERS.replace("OPTIONS", options)}<div id="cards"></div>{PAGER}'
        f'</section><script type="application/json" id="data">{_json(data)}</script><script>{SCRIPT}</script>{held}'
    )


def _exhibit(exhibit: Exhibit, media: dict[str, int]) -> dict[str, Any]:
    """Its data; media not met before are added to `media`."""
    parts = {"picture": (exhibit.picture, "image/jpeg"), "spectrogram": (exhibit.spectrogram, "image/jpeg")}
    parts["audio"] = (exhibit.audio, escape(exhibit.audio_mime))
    there = {name: media.setdefault(data_uri(*part), len(media)) for name, part in parts.items() if part[0]}
    return {"title": exhibit.title, "captions": exhibit.captions, **there}


def _query(query: Query) -> dict[str, Any]:
    hits = [vars(hit) | {"scores": _finite(hit.scores)} for hit in query.hits]
    return vars(query) | {"hits": hits, "ranks": _finite(query.ranks), "rank": _finite({"": query.rank})[""]}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _json(tree: Any) -> str:
    """JSON in which nothing can end a script element."""
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


FILTERS = """<form class="filters" autocomplete="off">
<label>Direction <select id="direction"><option value="">all</option>OPTIONS</select></label>
<label>Sort <select id="sort"><option value="">as asked</option>
<option value="rank down">rank, worst first</option><option value="rank up">rank, best first</option>
<option value="text up">text, A–Z</option>
<option value="margin up">margin, smallest first</option><option value="margin down">margin, largest first</option>
</select></label>
<input type="search" id="search" placeholder="search text" aria-label="search text">
<label><input type="checkbox" id="failures"> failures only (right answer not first)</label>
<output id="shown"></output></form>
"""

PAGER = """<nav class="filters"><button id="previous">‹ previous</button><output id="page"></output>
<button id="next">next ›</button>
<span class="note">margin: score of the best right answer less that of the best wrong one</span></nav>"""

STYLE = """<style>
.filters { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; margin-bottom: 14px; }
.filters :is(select, button, [type="search"]) { font: inherit; padding: 4px 8px; max-width: 100%; }
output { color: var(--soft); font-variant-numeric: tabular-nums; }
.chip { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.mark { color: var(--right); font-weight: 700; }
.asked { display: flex; flex-wrap: wrap; gap: 8px 14px; background: #f4f6f9; border-radius: 8px; padding: 10px; }
.asked .media { flex: 0 1 420px; }
.asked .media + div { flex: 1 1 240px; min-width: 0; }
.words { font-weight: 600; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 10px; margin-top: 10px; }
.hit { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0; }
.right { border: 3px solid var(--right); padding: 6px; }
.score { margin-left: auto; color: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
:is(.hit, .asked) .media { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
:is(.hit, .asked) .media > * { margin: 0; }
:is(.hit, .asked) .picture { width: auto; max-width: 100%; max-height: 112px; background: #eef1f5; }
:is(.hit, .asked) .spectrogram { flex: 1 1 150px; width: 0; height: 84px; }
@media (min-width: 900px) {
  .hits { grid-template-columns: repeat(3, 1fr); }
  form.filters { position: sticky; top: 0; z-index: 2; background: #f4f6f9; padding: 8px 0; }
}
</style>
"""

SCRIPT = """
"use strict";
const PAGE = 20, HITS = 5, item = id => document.getElementById(id);
const { directions, exhibits, queries } = JSON.parse(item("data").textContent);
const modalities = [...new Set(queries.flatMap(query => Object.keys(query.ranks)))];
let page = 0, chosen = queries;

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  element.className = name;
  element.append(...children);
  return element;
}
const rounded = (value, digits) => value === null ? "–" : value.toFixed(digits);
const isFirst = query => query.rank !== null && query.rank <= 1;
const place = rank => rank === null ? "–" : rank.toLocaleString("en");

function margin(query) {
  const score = hit => Object.values(hit.scores)[0];
  const best = right => Math.max(...query.hits.filter(hit => hit.right === right).map(score));
  const value = best(true) - best(false);
  return Number.isFinite(value) ? value : null;
}
for (const query of queries) {
  const { title, captions } = exhibits[query.exhibit];
  query.margin = margin(query);
  query.found = [query.text || captions.join("\\n"), title].join("\\n").toLowerCase();
}

/* What to sort by; null comes last. "gain 0 2": first those that the first modality ranks better than the third. */
function value(query, what, one, other) {
  if (what === "text") return query.found;
  if (what !== "gain") return query[what];
  const [a, b] = [one, other].map(number => query.ranks[modalities[number]] ?? null);
  return a === null || b === null ? null : a - b;
}
function sorted(some, order) {
  const [what, ...more] = order.split(" "), sign = more[0] === "down" ? -1 : 1;
  const keyed = some.map(query => [value(query, what, ...more), query]);
  const compare = what === "text" ? new Intl.Collator().compare : (a, b) => a - b;
  keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
  return keyed.map(([, query]) => query);
}

function choose() {
  const words = item("search").value.toLowerCase(), way = item("direction").value, order = item("sort").value;
  chosen = queries.filter(query => (!way || query.direction === way) && query.found.includes(words)
    && !(item("failures").checked && isFirst(query)));
  chosen = order ? sorted(chosen, order) : chosen;
  item("shown").textContent = `${place(chosen.length)} of ${place(queries.length)}`;
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

function card(query) {
  const way = directions[query.direction], exhibit = exhibits[query.exhibit], first = isFirst(query);
  const of = way.gallery === null ? "" : ` of ${place(way.gallery)}`;
  const landed = query.rank === null ? "no right answer in the gallery" : `right answer at rank ${place(query.rank)}${of}`;
  const head = make("div", "head", make("b", "", way.label),
    make("span", first ? "badge ok" : "badge miss", `${first ? "✓" : "✗"} ${landed}`));
  for (const [name, rank] of Object.entries(query.ranks)) head.append(make("span", "chip", `${name}: ${place(rank)}`));
  if (query.margin !== null) head.append(make("span", "chip", `margin ${rounded(query.margin, 3)}`));
  const asked = query.text
    ? [make("div", "", make("p", "caption words", query.text), label(`${exhibit.title}: asked with this caption`))]
    : [media(exhibit, query.direction.startsWith("audio")),
       make("div", "", label(`${exhibit.title}: its captions were not asked`), captions(exhibit.captions, 3))];
  const hits = query.hits.map((hit, i) => i < HITS ? [hit, i + 1] : [hit, query.rank]);
  return make("article", "card", head, make("div", "asked", ...asked), make("div", "hits", ...hits.map(hitCard)));
}
function hitCard([hit, rank]) {
  const exhibit = exhibits[hit.exhibit], scores = Object.entries(hit.scores);
  const head = make("div", "head", make("b", "", place(rank)), ...(hit.right ? [make("span", "mark", "✓ right")] : []),
    make("span", "score", scores.map(([name, score]) => `${name} ${rounded(score, 3)}`.trim()).join(" · ")));
  return make("div", hit.right ? "hit right" : "hit", head, media(exhibit), label(exhibit.title),
    captions(hit.text ? [hit.text] : exhibit.captions, 1));
}
const label = text => make("div", "id", text);
function captions(texts, few) {
  const lines = texts.map(text => make("p", "caption", text)), rest = lines.slice(few);
  const list = make("div", "", ...lines.slice(0, few));
  if (rest.length) list.append(make("details", "", make("summary", "", `${rest.length} more`), ...rest));
  return list;
}
/* Pictures and sounds stand behind this script: until the page is read to its end there may be none. */
function media(exhibit, heardAlone) {
  if (document.readyState === "loading") return "";
  const parts = [], data = kind => item(`medium${exhibit[kind]}`).textContent;
  for (const kind of heardAlone ? ["spectrogram"] : ["picture", "spectrogram"])
    if (kind in exhibit) parts.push(Object.assign(make("img", kind), { alt: kind, src: data(kind) }));
  if ("audio" in exhibit)  // preload: browsers refuse pages with hundreds of loaded players
    parts.push(Object.assign(make("audio", ""), { controls: true, preload: "none", src: data("audio") }));
  return make("div", "media", ...parts);
}

modalities.forEach((one, i) => modalities.forEach((other, j) => { if (i !== j)
  item("sort").append(new Option(`gain of ${one} over ${other}`, `gain ${i} ${j}`)); }));
item("direction").onchange = item("sort").onchange = item("failures").onchange = item("search").oninput = choose;
document.querySelector("form.filters").onsubmit = () => false;
for (const [id, step] of [["previous", -1], ["next", 1]])
  item(id).onclick = () => { turn(page + step); item("top").scrollIntoView(); };
choose();
document.addEventListener("DOMContentLoaded", () => turn(page));
"""
