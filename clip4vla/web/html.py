"""Write the HTML of hits: a card for each hit, with pictures and sound inside as data: URIs. All text is escaped."""

from html import escape

from clip4vla.report.preview import ClipPreview, data_uri
from clip4vla.search.index import Hit

CAPTIONS = 2  # of a card; the others open at a click
MOST = 20  # of a clip
LONGEST = 2000  # characters of one, and of a clip's name
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="none" stroke="#1d4ed8" stroke-width="2">
<circle cx="7" cy="7" r="5"/><path d="m11 11 4 4M5 6v2m2-4v6m2-4v2"/></svg>"""


def heading(title: str, facts: list[str]) -> str:
    """Return HTML of the page's title and facts on the index."""
    return f"<h1>{escape(title)}</h1>{_soft(facts)}"


def notice(text: str) -> str:
    """Return HTML of one line instead of hits."""
    return f"<p class='notice' role='alert'>{escape(text)}</p>"


def hits_section(
    asked: str,
    query: ClipPreview | None,
    hits: list[tuple[Hit, ClipPreview]],
    sound: dict[str, float],
    facts: list[str],
) -> str:
    """Return HTML of hits, best first; query: the file that was asked with.

    sound: shares of an index's parts in the sound's cosine.
    """
    medium = f"<div class='asked'>{_media(query)}</div>" if query else ""
    cards = "".join(_card(place, *hit, sound) for place, hit in enumerate(hits, 1))
    return f"<section><h2>{escape(asked)}</h2>{_soft(facts)}{medium}<ol class='cards'>{cards}</ol></section>"


def cut(text: str) -> str:
    """Cut a text of a clip to LONGEST characters: answers that nobody fetches stay in memory."""
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _soft(facts: list[str]) -> str:
    return f"<p class='soft'>{' · '.join(map(escape, facts))}</p>"


def _card(place: int, hit: Hit, shown: ClipPreview, sound: dict[str, float]) -> str:
    cosine = sum(sound[part] * score for part, score in hit.scores.items())
    parts = {"pictures": hit.scores.get("v"), "sound": cosine if hit.scores.keys() - {"v"} else None}
    cosines = " · ".join(f"{name} {score:.3f}" for name, score in parts.items() if score is not None)
    head = f"<b>{place}</b><span class='score'>{hit.score:.3f}</span><span class='parts'>{cosines}</span>"
    captions = [f"<p class='caption'>{escape(cut(text))}</p>" for text in shown.captions[:MOST]]
    more, left = captions[CAPTIONS:], len(shown.captions) - MOST
    last = f"<p>... and {left} more</p>" if left > 0 else ""
    rest = f"<details><summary>{len(more) + max(left, 0)} more</summary>{''.join(more)}{last}</details>" if more else ""
    name = cut(shown.title)
    where = name if hit.start is None else f"{name}, {_time(hit.start)}–{_time(hit.end)}"
    words = f"{''.join(captions[:CAPTIONS])}{rest}<p class='id'>{escape(where)}</p>"
    return f"<li class='card'><div class='head'>{head}</div>{_media(shown)}<div class='words'>{words}</div></li>"


def _time(seconds: float | None) -> str:
    """Format seconds as 1:23; "" for None, the end of the medium."""
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _media(shown: ClipPreview) -> str:
    """Return HTML of picture, spectrogram and player, as far as there are any."""
    images = [("picture", shown.picture), ("spectrogram", shown.spectrogram)]
    parts = [f"<img class='{kind}' alt='{kind}' src='{data_uri(data, 'image/jpeg')}'>" for kind, data in images if data]
    if shown.audio:
        uri = data_uri(shown.audio, escape(shown.audio_mime))
        parts.append(f"<audio controls preload='none' src='{uri}'></audio>")
    return f"<div class='media'>{''.join(parts)}</div>" if parts else ""


STYLE = """
:root { --line: #e2e6ec; --soft: #5b6472; --ink: #1b2330; --ground: #f4f6f9; --paper: #fff; --mark: #1d4ed8; }
.dark { --line: #2b3444; --soft: #9aa5b5; --ink: #e6eaf0; --ground: #12161d; --paper: #1a202b; --mark: #8ab4ff; }
.gradio-container, .gradio-container .main { background: var(--ground); color: var(--ink); }
.gradio-container .main { max-width: 1360px !important; margin: 0 auto;
  padding: 20px clamp(12px, 3vw, 32px) 60px !important; }
.gradio-container .html-container { padding: 0; }
.gradio-container :is(h1, h2, p, ol) { margin: 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.gradio-container h1 { font-size: clamp(21px, 4vw, 30px); font-weight: 700; line-height: 1.3; }
.gradio-container h2 { font-size: 19px; font-weight: 700; margin-top: 12px; }
.gradio-container .soft { color: var(--soft); font-size: 13.5px; margin-top: 2px; }
.gradio-container .notice { background: var(--paper); border: 1px solid var(--line); border-left: 4px solid #d97706;
  border-radius: 8px; padding: 12px 16px; }

#ask { flex-wrap: nowrap; gap: 8px; }
#words input { background: var(--paper); font-size: 16px; }
#examples { gap: 6px 8px; flex-wrap: wrap; margin-top: -6px; }
#examples button { flex: none !important; max-width: 100%; border-radius: 99px; padding: 2px 12px; white-space: nowrap;
  background: none; border: 1px solid var(--line); color: var(--soft); font-weight: 400; }
#examples button:hover { background: var(--paper); color: var(--ink); }
#drop { background: var(--paper); }
#drop label { position: static; border: 0; background: none; box-shadow: none; padding: 10px 12px 0; font-size: 14px; }
#drop label > span { display: none; }
#drop button { height: 44px !important; }
#drop [data-testid=upload-text] { flex-direction: row; gap: 6px; padding: 0; font-size: 13.5px; min-height: 0; }
#drop [data-testid=upload-icon] { width: 18px; margin: 0; }
#how .block { background: var(--paper); }
:is(#weight, #ratio) :is([data-testid=min-value], [data-testid=max-value]) { display: block; font-size: 0;
  white-space: nowrap; }
:is(#weight, #ratio) :is([data-testid=min-value], [data-testid=max-value])::after { font-size: 13px; color: var(--soft); }
#weight [data-testid=min-value]::after { content: "pictures"; }
#weight [data-testid=max-value]::after { content: "sound"; }
#ratio [data-testid=min-value]::after { content: "speech [VB]"; }
#ratio [data-testid=max-value]::after { content: "[NB] other"; }

.asked { max-width: 460px; margin-top: 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.gradio-container .cards { margin-top: 12px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 12px; min-width: 0;
  display: flex; flex-direction: column; gap: 8px; }
.card .head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 10px; font-variant-numeric: tabular-nums; }
.card .score { color: var(--mark); font-weight: 600; }
.card .parts { color: var(--soft); font-size: 12.5px; margin-left: auto; }
.media { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.media img { border-radius: 6px; margin: 0; }
.media .picture { width: auto; max-width: 100%; height: auto; max-height: 112px; background: #eef1f5; }
.media .spectrogram { flex: 1 1 120px; width: 0; height: 112px; object-fit: fill; }
.media audio { width: 100%; height: 34px; }
.dark audio { color-scheme: dark; }
.words { font-size: 15px; line-height: 1.4; }
.words .caption ~ .caption, .words details { color: var(--soft); font-size: 13.5px; }
.words summary { cursor: pointer; }
.gradio-container .words .id { color: var(--soft); font-size: 12.5px; margin-top: 4px; }
"""
