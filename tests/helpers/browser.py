"""Pages in headless chromium, and what the tests of pages put into them."""

import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from clip4vla.report.preview import ClipPreview, ogg, spectrogram_jpeg

EVIL = "<script>alert(1)</script> \"quoted\" & 'single' <img src=x onerror=alert(2)>"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0"
).split()
PROBE = """<script>addEventListener("load", () => {
  const all = [...document.querySelectorAll("*")], some = name => [...document.querySelectorAll(name)];
  const item = id => document.getElementById(id), shown = () => some(".card").length;
  const found = {
    images: some("img").length, loaded: some("img").filter(image => image.naturalWidth).length,
    players: some("audio").length, scripts: some("script:not([type])").length,
    right: some(".hit.right .mark").length, landed: some(".hit.right .head b").map(place => place.textContent),
    captions: some(".caption").map(caption => caption.textContent), text: document.querySelector("main").innerText,
    outside: all.filter(item => /^https?:/.test(item.src || item.href)).length, cards: shown(),
    wide: document.documentElement.scrollWidth > innerWidth };
  const set = (id, key, value) => {
    item(id)[key] = value; item(id).dispatchEvent(new Event(item(id).oninput ? "input" : "change")); };
  const titles = () => some(".asked .id").map(title => title.textContent.split(":")[0]);
  if (item("sort")) {
    item("next").click(); found.second = [titles(), item("page").textContent, item("next").disabled]; item("previous").click();
    found.sorted = Object.fromEntries([...item("sort").options].map(option => {
      set("sort", "value", option.value); return [option.textContent, titles()]; }));
    set("sort", "value", ""); set("search", "value", "NUMBER 11"); found.searched = titles(); set("search", "value", "");
    set("failures", "checked", true); found.failed = item("shown").textContent;
    set("direction", "value", "audio_to_text/vb"); found.both = titles();
    set("failures", "checked", false); found.direction = titles(); }
  top.postMessage(found, "*"); });</script>"""
FRAME = """<!doctype html><title></title><style>body { margin: 0 } iframe { border: 0; height: 900px; width: %dpx }</style>
<script>onmessage = message => { document.title = JSON.stringify(message.data); };</script><iframe src="%s"></iframe>"""


def exhibit(number, captions=None):
    """A clip with a picture, the line of a sweep as its spectrogram, and a sound that is its own."""
    small = Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    grey = np.full((224 * (1 + number % 3), 224), 40 + number, np.uint8)
    rows = np.arange(len(grey))
    grey[rows, rows * 223 // len(grey)] = 250
    texts = captions or [f"A thing, number {number}.", f"Ding numéro {number}, как бы ни было"]
    picture = encoded(small.resize((224, 224), Image.Resampling.BICUBIC), "JPEG")
    sound = ogg(torch.sin(torch.arange(4000) * (0.1 + number / 50)), 16000)
    return ClipPreview(f"animals/thing_{number}", texts, picture, spectrogram_jpeg(grey), sound)


def rows(n=400):
    """metrics.jsonl as training writes it, an evaluation row and a repeated step among them."""
    rng = np.random.default_rng(0)
    value = {
        key: 5 * np.exp(-np.arange(n) / 90) + rng.random(n) * 0.4 for key in ("loss", "loss/at", "loss/av", "loss/aa")
    }
    lines = [
        {"step": 10 * i, "lr": 1e-4, "grad_norm": 1.0} | {k: float(v[i]) for k, v in value.items()} for i in range(n)
    ]
    return [*lines, {"step": 50, "eval/R@1": 3.0}, lines[-1]]


def summary_row(recall, p=0.0005):
    numbers = {"R@1": recall, "R@5": recall * 1.5, "R@10": recall * 1.9, "MedR": 4.5, "MeanR": 17.25}
    chance = {"R@1": 1.15, "R@5": 5.75, "R@10": 11.5}
    return numbers | {"n_queries": 1234, "n_gallery": 87, "p_value": p, "chance": chance}


def chromium(address, folder, *flags):
    """(the document after its load event, console lines)"""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.fail("no chromium found: apt-get install chromium")
    command = [browser, *FLAGS, *flags, f"--user-data-dir={folder}/profile", "--dump-dom", str(address)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def browse(path, folder, width=1400, probe=PROBE):
    """(what the probe found, console lines) of a copy of the page in a frame: no window is as narrow as a phone."""
    copy, frame = folder / "probe.html", folder / f"frame_{width}.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</main>", f"</main>{probe}"), encoding="utf-8")
    frame.write_text(FRAME % (width, copy.name), encoding="utf-8")
    return chromium(frame, folder, "--virtual-time-budget=3000", "--window-size=1400,900")


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
