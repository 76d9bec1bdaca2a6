"""Show predictions on a report page: a held-out clip, its true class, and the predicted classes."""

from dataclasses import dataclass

from clip4vla.report import card_list
from clip4vla.report.preview import ClipPreview


@dataclass
class Predicted:
    """Hold a held-out clip and its predicted classes."""

    exhibit: int  # its number among the page's exhibits
    labels: list[str]  # the true classes, mostly one
    guesses: list[tuple[str, float]]  # the likeliest classes with their probability (0 to 1, may be NaN), best first
    fold: str  # the held-out fold; "" without folds


def section(exhibits: list[ClipPreview], predicted: list[Predicted]) -> str:
    """Return HTML of the predictions, in the order given."""
    return card_list.section(
        "Held-out clips",
        exhibits,
        [vars(one) | {"guesses": list(card_list.finite(dict(one.guesses)).items())} for one in predicted],
        filters=FILTERS,
        note="bars: probability of a class; a click on a name shows the clips of the same class with that first guess",
        style=STYLE,
        script=SCRIPT,
    )


FILTERS = f"""<label>Show <select id="which"><option value="">all clips</option><option>right</option>
<option>wrong</option></select></label>
<label>Class <select id="class"><option value="">any</option></select></label>
<label>Predicted <select id="guessed"><option value="">any</option></select></label>
<label>Fold <select id="fold"><option value="">any</option></select></label>
<label>Sort <select id="sort"><option value="">as given</option>
<option value="right up">least sure of the true class first</option>
<option value="mistake down">surest mistakes first</option></select></label>
{card_list.SEARCH}
"""

STYLE = """
#cards { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.card { margin: 0; min-width: 0; }
.head b, .class { overflow-wrap: anywhere; }
.class { margin: 10px 0 6px; }
.guess { display: flex; gap: 12px; justify-content: space-between; margin: 3px 0; padding: 2px 8px; border-radius: 5px;
  background: linear-gradient(90deg, var(--fill) var(--w), #f4f6f9 0); --fill: #bfdbfe; font-variant-numeric: tabular-nums; }
.guess.true { --fill: #86efac; font-weight: 600; }
.guess > :first-child { min-width: 0; overflow-wrap: anywhere; text-align: left; }
.guess button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-decoration: underline dotted; text-underline-offset: 3px; }
.words { margin-top: 8px; color: var(--soft); font-size: 13.5px; }
#cards + nav { margin-top: 16px; }
#class, #guessed { max-width: 220px; }
@media (min-width: 900px) { #cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""

SCRIPT = """
const first = ({ guesses }) => guesses.length ? guesses[0][0] : "", isRight = thing => thing.labels.includes(first(thing));
const pair = (label, guess) => JSON.stringify([label, guess]);
const pairs = new Set(things.flatMap(thing => thing.labels.map(label => pair(label, first(thing)))));

const searched = (thing, { title, captions }) => [...thing.labels, first(thing), title, ...captions];
function wanted(thing) {
  const is = (id, value) => !item(id).value || item(id).value === value;
  const ofClass = !item("class").value || thing.labels.includes(item("class").value);
  return is("which", isRight(thing) ? "right" : "wrong") && ofClass && is("guessed", first(thing)) && is("fold", thing.fold);
}
/* A true class that is not among the guesses is less likely than any that is: the surer another, the less. */
function value({ labels, guesses }, what) {
  const probability = guesses.length ? guesses[0][1] : null;
  if (what === "mistake") return guesses.length && labels.includes(guesses[0][0]) ? null : probability;
  const match = guesses.find(([name]) => labels.includes(name));
  return match ? match[1] : probability === null ? null : -probability;
}

function only(label, guess) {
  for (const [id, value] of [["which", ""], ["class", label], ["guessed", guess]]) item(id).value = value;
  choose();
  item("top").scrollIntoView();
}
function bar(labels, [name, probability]) {
  const label = labels.find(one => pairs.has(pair(one, name))), there = label !== undefined;
  const own = labels.includes(name), words = own ? `✓ ${name}` : name;
  const shown = probability === null ? "–" : probability.toLocaleString("en", { style: "percent", minimumFractionDigits: 1 });
  const line = make("div", own ? "guess true" : "guess", make(there ? "button" : "span", "", words), make("span", "", shown));
  line.style.setProperty("--w", `${100 * probability}%`);
  if (there) line.firstChild.onclick = () => only(label, name);
  return line;
}
function card(thing) {
  const { labels, guesses, fold } = thing, exhibit = exhibits[thing.exhibit], right = isRight(thing);
  const badge = make("span", right ? "badge ok" : "badge miss", right ? "✓ right" : "✗ wrong");
  const head = make("div", "head", make("b", "", exhibit.title), badge, ...(fold ? [make("span", "chip", `fold: ${fold}`)] : []));
  const missing = guesses.some(([name]) => labels.includes(name)) ? "" : ", which is not among the guesses";
  const known = make("p", "class", labels.length > 1 ? "classes: " : "class: ", make("b", "", labels.join("; ")), missing);
  const words = make("div", "words", captions(exhibit.captions, 1));
  return make("article", "card", head, media(exhibit), known, ...guesses.map(guess => bar(labels, guess)), words);
}

const { compare } = new Intl.Collator("en", { numeric: true });
for (const [id, of] of [["class", ({ labels }) => labels], ["guessed", first], ["fold", ({ fold }) => fold]]) {
  const names = [...new Set(things.flatMap(of))].filter(Boolean).sort(compare);
  item(id).append(...names.map(name => new Option(name, name)));
  item(id).parentElement.hidden = !names.length;
}
start();
"""
