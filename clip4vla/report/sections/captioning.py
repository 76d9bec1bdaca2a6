"""Show generated captions on a report page: the caption of a clip, beside it and above its references."""

from dataclasses import dataclass

from clip4vla.report import card_list
from clip4vla.report.preview import ClipPreview


@dataclass
class CaptionCard:
    """Hold a caption that was generated for a clip."""

    exhibit: int  # its number among the page's exhibits, whose captions are the references
    text: str
    scores: dict[str, float]  # of this caption, such as {"CIDEr": 123.4, "log-probability": -7.1}; may be NaN


def section(exhibits: list[ClipPreview], written: list[CaptionCard]) -> str:
    """Return HTML of the written captions, with their scores in the order given."""
    return card_list.section(
        "Written captions",
        exhibits,
        [vars(one) | {"scores": card_list.finite(one.scores)} for one in written],
        filters=FILTERS,
        note="underlined: words that occur in no reference",
        style=STYLE,
        script=SCRIPT,
    )


FILTERS = f"""<label>Sort <select id="sort"><option value="">as asked</option>
<option value="text up">caption, A–Z</option></select></label>
{card_list.SEARCH}
"""

STYLE = """
.score { background: #dbeafe; color: #1e3a8a; font-variant-numeric: tabular-nums; }
.head b { overflow-wrap: anywhere; }
.pair { display: grid; gap: 10px 20px; grid-template-columns: minmax(0, 1fr); }
.pair .media { align-content: start; }
.pair .picture { max-height: 180px; }
.pair .spectrogram { height: 96px; min-width: min(100%, 240px); }
.pair audio { flex: 1 1 100%; }
.written { margin: 0 0 10px; padding: 8px 12px; border-left: 4px solid #2563eb; border-radius: 0 8px 8px 0; background: #f4f6f9;
  font-size: 18px; font-weight: 600; overflow-wrap: anywhere; }
.new { text-decoration: underline dotted #b45309 2px; text-underline-offset: 4px; }
.references { padding-left: 16px; }
@media (min-width: 900px) { .pair { grid-template-columns: min(50%, 576px) minmax(0, 1fr); } }
"""

SCRIPT = """
const names = [...new Set(things.flatMap(({ scores }) => Object.keys(scores)))];
const searched = ({ text }, { title, captions }) => [text, ...captions, title];
const wanted = () => true;
const value = ({ scores }, what, way, number) => scores[names[number]] ?? null;
const shown = score => score === null ? "–" : score.toLocaleString("en", { maximumSignificantDigits: 4 });

const segmenter = new Intl.Segmenter([], { granularity: "word" });
const segments = text => [...segmenter.segment(text)].map(({ segment }) => segment);
function marked(text, references) {
  const known = new Set(segments(references.join("\\n").toLowerCase()));
  const isNew = part => /[\\p{L}\\p{N}]/u.test(part) && !known.has(part.toLowerCase());
  return segments(text).map(part => isNew(part) ? make("span", "new", part) : part);
}

function card({ exhibit, text, scores }) {
  const { title, captions: references } = exhibits[exhibit], n = references.length;
  const chips = Object.entries(scores).map(([name, score], i) =>
    make("span", i ? "chip" : "badge score", `${name} ${shown(score)}`));
  const words = make("p", "written", ...(!text ? ["–"] : n ? marked(text, references) : [text]));
  const list = make("div", "references", label(n === 1 ? "1 reference" : `${n || "no"} references`), captions(references, 3));
  return make("article", "card", make("div", "head", make("b", "", title), ...chips),
    make("div", "pair", media(exhibits[exhibit]), make("div", "", words, list)));
}

names.forEach((name, i) => item("sort").append(
  new Option(`${name}, lowest first`, `score up ${i}`), new Option(`${name}, highest first`, `score down ${i}`)));
start();
"""
