"""Show queries on a report page: the query, its hits, and the rank of the right answer."""

from dataclasses import dataclass, field
from html import escape
from typing import Any

from clip4vla.report import card_list
from clip4vla.report.preview import ClipPreview


@dataclass
class Hit:
    """Hold a gallery item that a query found."""

    exhibit: int  # its number among the page's exhibits
    scores: dict[str, float]  # by modality ("av", "v", "a", or "" alone); the first ranks, others may be NaN
    right: bool
    text: str = ""  # the caption that was found, if the gallery is of captions


@dataclass
class Query:
    """Hold a query and its hits.

    hits: the first five, best first; then, if it is not among them, the right one.
    """

    direction: str  # such as text_to_audio/nb
    exhibit: int
    text: str  # the caption that was asked; "" if a picture or sound was
    rank: float  # of the right one; NaN if there is none
    ranks: dict[str, float] = field(default_factory=dict)  # by modality
    hits: list[Hit] = field(default_factory=list)


def arrow(direction: str) -> str:
    """Format a direction as text → audio · nb."""
    return direction.replace("_to_", " → ").replace("/", " · ")


def section(exhibits: list[ClipPreview], queries: list[Query], galleries: dict[str, int]) -> str:
    """Return HTML of the queries; galleries: items that were ranked in a direction, where that is known."""
    names = dict.fromkeys(query.direction for query in queries)
    options = "".join(f'<option value="{escape(name)}">{escape(arrow(name))}</option>' for name in names)
    return card_list.section(
        "Queries",
        exhibits,
        [_query(query) for query in queries],
        filters=FILTERS.replace("OPTIONS", options),
        note="margin: score of the best right answer less that of the best wrong one",
        style=STYLE,
        script=SCRIPT,
        directions={name: {"label": arrow(name), "gallery": galleries.get(name)} for name in names},
    )


def _query(query: Query) -> dict[str, Any]:
    hits = [vars(hit) | {"scores": card_list.finite(hit.scores)} for hit in query.hits]
    return vars(query) | {
        "hits": hits,
        "ranks": card_list.finite(query.ranks),
        "rank": card_list.finite({"": query.rank})[""],
    }


FILTERS = f"""<label>Direction <select id="direction"><option value="">all</option>OPTIONS</select></label>
<label>Sort <select id="sort"><option value="">as asked</option>
<option value="rank down">rank, worst first</option><option value="rank up">rank, best first</option>
<option value="text up">text, A–Z</option>
<option value="margin up">margin, smallest first</option><option value="margin down">margin, largest first</option>
</select></label>
{card_list.SEARCH}
<label><input type="checkbox" id="failures"> failures only (right answer not first)</label>
"""

STYLE = """
.mark { color: var(--right); font-weight: 700; }
.asked { display: flex; flex-wrap: wrap; gap: 8px 14px; background: #f4f6f9; border-radius: 8px; padding: 10px; }
.asked .media { flex: 0 1 420px; }
.asked .media + div { flex: 1 1 240px; min-width: 0; }
.words { font-weight: 600; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 10px; margin-top: 10px; }
.hit { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0; }
.right { border: 3px solid var(--right); padding: 6px; }
.score { margin-left: auto; color: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
@media (min-width: 900px) { .hits { grid-template-columns: repeat(3, 1fr); } }
"""

SCRIPT = """
const HITS = 5, { directions } = given;
const modalities = [...new Set(things.flatMap(query => Object.keys(query.ranks)))];
const rounded = (value, digits) => value === null ? "–" : value.toFixed(digits);
const isFirst = query => query.rank !== null && query.rank <= 1;

function margin(query) {
  const score = hit => Object.values(hit.scores)[0];
  const best = right => Math.max(...query.hits.filter(hit => hit.right === right).map(score));
  const value = best(true) - best(false);
  return Number.isFinite(value) ? value : null;
}
for (const query of things) query.margin = margin(query);

const searched = (query, { title, captions }) => [query.text || captions.join("\\n"), title];
function wanted(query) {
  const way = item("direction").value;
  return (!way || query.direction === way) && !(item("failures").checked && isFirst(query));
}
/* "gain 0 2": first those that the first modality ranks better than the third. */
function value(query, what, one, other) {
  if (what !== "gain") return query[what];
  const [a, b] = [one, other].map(number => query.ranks[modalities[number]] ?? null);
  return a === null || b === null ? null : a - b;
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

modalities.forEach((one, i) => modalities.forEach((other, j) => { if (i !== j)
  item("sort").append(new Option(`gain of ${one} over ${other}`, `gain ${i} ${j}`)); }));
start();
"""
