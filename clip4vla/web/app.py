"""Build the search page as a gradio application, and serve it."""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from clip4vla.api import CLIP4VLA
from clip4vla.errors import UserError
from clip4vla.report.preview import ClipPreview
from clip4vla.search.index import Index
from clip4vla.search.store import index_errors, parse_item
from clip4vla.web import html
from clip4vla.web.security import BODY, LOCAL, SecurityMiddleware, SlowClientProtocol
from clip4vla.web.uploads import read

if TYPE_CHECKING:
    import gradio

TITLE = "CLIP4VLA search"
HITS = 12
LONGEST = 300  # characters of a query
WAITING = 64  # queries in line; more are refused
SESSIONS = 256  # of which answers that nobody fetched, and last queries, are kept
TRIED = 5  # examples of queries
FONT = ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"]  # of the machine: none is loaded


@dataclass
class Query:
    """Keep a query, so that sliders need not encode it again: a text's vector (D,), or a file's by part (P, D)."""

    words: str
    vectors: np.ndarray
    shown: ClipPreview | None = None


class Searcher:
    """Answer the page's events: encode a query, search, write the hits as HTML. They come one at a time."""

    def __init__(self, index: Index, model: CLIP4VLA) -> None:
        self.index, self.model = index, model
        counts = index.store.counts()
        self.weighed = bool(counts["with_pictures"] and counts["with_sound"])  # does a weight change anything
        self.weight = 0.5 if self.weighed else float(counts["with_sound"] > 0)
        self.typed = bool(counts["with_sound"]) and {"vb", "nb"} <= set(index.parts)
        media = [f"{counts[f'with_{kind}']:,} with {kind}" for kind in ("pictures", "sound")]
        self.facts = [f"{counts['items']:,} clips", *media, f"model {_short(index.model)}"]

    def examples(self) -> list[str]:
        """Return the first captions of some clips; UserError if the index is corrupt."""
        some = "SELECT shown FROM items WHERE id >= ? ORDER BY id LIMIT 1"
        with index_errors(self.index.store.path):
            last = self.index.store.newest()
            rows = [self.index.store.db.execute(some, (i * last // TRIED,)).fetchone() for i in range(TRIED)]
            captions = [parse_item(row[0])["captions"] for row in rows if row]
        return list(dict.fromkeys(few[0] for few in captions if few and len(few[0]) <= LONGEST))

    def text(self, words: str, sound_weight: float, ratio: float) -> tuple[Query | None, str]:
        """Search with words; return (the query, HTML)."""
        started, words = time.perf_counter(), " ".join((words or "").encode("utf-8", "replace").decode().split())
        if not words:
            return None, html.notice("Type what you look for, or drop a file.")
        if len(words) > LONGEST:
            return None, html.notice(f"A query has {LONGEST} characters at most; this one has {len(words):,}.")
        asked = Query(f"“{words}”", self.model.encode_text(words)[0].cpu().numpy())
        return asked, self.again(asked, sound_weight, ratio, started)

    def upload(self, path: str, sound_weight: float, ratio: float) -> tuple[Query | None, str, None, str]:
        """Search with an uploaded file; return (the query, HTML, an empty drop zone, no words)."""
        started, file = time.perf_counter(), Path(path)
        try:
            clip, shown = read(file, self.index.spectrogram, self.index.frames, self.model.pictures)
        except ValueError as error:
            return None, html.notice(f"{file.name}: {error}"), None, ""
        by_part = self.model.encode([clip], self.index.parts[1:])
        asked = Query(file.name, np.stack([by_part[part][0].numpy() for part in self.index.parts]), shown)
        return asked, self.again(asked, sound_weight, ratio, started), None, ""

    def again(self, asked: Query | None, sound_weight: float, ratio: float, started: float | None = None) -> str:
        """Return HTML of the hits of a query that is encoded already."""
        if asked is None:
            return ""
        started = started or time.perf_counter()
        weight, share = float(sound_weight), float(ratio) if self.typed else None
        try:
            hits = self.index.search(self._vector(asked, weight, share), HITS, weight, share)
        except UserError as error:
            return html.notice(f"{asked.words}: {error}")
        took = f"{1000 * (time.perf_counter() - started):.0f} ms"
        sound = dict(zip(self.index.parts, self.index.weights(1.0, share).tolist(), strict=True))
        shown = [(hit, self.index.exhibit(hit)) for hit in hits]
        facts = [f"best {len(hits)} of {len(self.index):,}", took]
        return html.hits_section(asked.words, asked.shown, shown, sound, facts)

    def _vector(self, asked: Query, sound_weight: float, ratio: float | None) -> np.ndarray:
        """Return the vector (D,) to search with: a file's pictures and sound are weighed as those of clips are."""
        if asked.vectors.ndim == 1:
            return asked.vectors
        has_pictures, has_sound = asked.vectors[0].any(), asked.vectors[1:].any()
        weight = sound_weight if has_pictures and has_sound else float(has_sound)
        return self.index.weights(weight, ratio) @ asked.vectors


def page(searcher: Searcher, limit: int) -> "gradio.Blocks":
    """Build the page. Its events wait in one line: one query at a time is computed. limit: MB of an upload."""
    import gradio as gr

    one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        asked, examples = gr.State(), searcher.examples()
        gr.HTML(html.heading(TITLE, searcher.facts), apply_default_css=False, js_on_load=None)
        with gr.Row(elem_id="ask"):
            words = gr.Textbox(
                placeholder="What do you look for?", max_length=LONGEST, max_lines=1, autofocus=True, label="query",
                show_label=False, container=False, min_width=0, elem_id="words",
            )  # fmt: skip
            button = gr.Button("Search", variant="primary", scale=0, min_width=100, elem_id="search")
        with gr.Row(elem_id="examples"):
            tries = [gr.Button(text, size="sm", scale=0, min_width=0) for text in examples]
        with gr.Row(elem_id="how", equal_height=True):
            drop = gr.File(label=f"Or a sound, picture or video of up to {limit} MB", elem_id="drop")
            named = {
                "weight": ("Ranking: images / audio", searcher.weight, searcher.weighed),
                "ratio": ("Audio type token", 0.5, searcher.typed),
            }
            sliders = [
                gr.Slider(0, 1, value, step=0.05, label=label, visible=there, buttons=[], min_width=260, elem_id=name)
                for name, (label, value, there) in named.items()
            ]  # what their ends mean is in web_results.STYLE
        results = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="results")
        gr.on([words.submit, button.click], searcher.text, [words, *sliders], [asked, results], **one)
        for example in tries:
            outputs = [asked, results, words]
            example.click(lambda text, *at: (*searcher.text(text, *at), text), [example, *sliders], outputs, **one)
        drop.upload(searcher.upload, [drop, *sliders], [asked, results, drop, words], **one)
        for slider in sliders:
            slider.change(
                searcher.again, [asked, *sliders], results, trigger_mode="always_last", show_progress="hidden", **one
            )
    blocks.queue(max_size=WAITING)
    # gradio has no setting for these: it keeps 2000 answers, and some of every session without end
    waiting = blocks._queue
    waiting.pending_messages_per_session = gr.utils.LRUCache(SESSIONS)
    waiting.pending_event_ids_session = gr.utils.LRUCache(SESSIONS)
    blocks.state_session_capacity = SESSIONS
    return blocks


def application(
    blocks: "gradio.Blocks", uploads: str, limit: int, names: Collection[str], numbers: bool
) -> SecurityMiddleware:
    """Mount the page as an ASGI application; limit: MB of an upload; names, numbers: of hosts, that it answers to."""
    import gradio as gr
    from fastapi import FastAPI, Response

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.get("/favicon.ico")(lambda: Response(html.ICON, media_type="image/svg+xml"))
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=["monospace"])
    gr.mount_gradio_app(
        outer, blocks, "/", footer_links=[], run_history=False, show_error=False, max_file_size=f"{limit}mb", ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=theme, css=html.STYLE,
    )  # fmt: skip
    blocks.config["connect_heartbeat"] = False  # a stream for as long as a page is open; the limits do without
    kinds: dict[str, type] = {"file": dict, "state": type(None)}
    events = {number: kinds.get(event.inputs[0].get_block_name(), str) for number, event in blocks.fns.items()}
    sessions = blocks._queue.pending_messages_per_session
    return SecurityMiddleware(
        outer, uploads, (limit << 20) + BODY, names, numbers, events, sessions, blocks.temp_file_sets
    )


def serve(index: Index, model: CLIP4VLA, listener: socket.socket, limit: int, names: Collection[str] = ()) -> None:
    """Serve the page at a socket, until SIGINT or SIGTERM. Uploads lie in a folder of its own, which is removed then.

    names: of other hosts that it answers to.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            logging.getLogger("uvicorn.error").disabled = True  # it would list the pages that are open
            self.should_exit = self.force_exit = True

    host, port = listener.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="clip4vla-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        searcher = Searcher(index, model)
        known = (*LOCAL, socket.gethostname().lower(), *map(str.lower, names))
        asgi = application(page(searcher, limit), os.path.abspath(folder), limit, known, numbers=host not in LOCAL)
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{port}: {', '.join(searcher.facts)}; Ctrl-C ends it", flush=True)
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each upload that is none
        quiet: dict[str, Any] = {"log_level": "error", "proxy_headers": False, "server_header": False}
        Server(uvicorn.Config(asgi, http=SlowClientProtocol, ws="none", **quiet)).run([listener])


def _short(model: str) -> str:
    """Shorten a model's folder to the end of its path, of a checkpoint with its run's name."""
    parts = Path(model).parts
    return "/".join(parts[-3:] if "checkpoints" in parts[-2:-1] else parts[-2:])
