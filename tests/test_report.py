"""The page as a browser sees it: headless chromium loads it, and a script in a copy of it reports what it finds."""

import io
import json
import re
import shutil
import subprocess
import wave

import numpy as np
import pytest
from PIL import Image

from clip4vla.report import Exhibit, Hit, Query, run_plot, spectrogram_png, write

EVIL = "<script>alert(1)</script> \"quoted\" & 'single' <img src=x onerror=alert(2)>"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --v=0"
).split()
PROBE = """<script>addEventListener("load", () => {
  const all = [...document.querySelectorAll("*")], some = name => [...document.querySelectorAll(name)];
  const shown = () => some(".card").filter(card => card.offsetHeight).length;
  const found = {
    images: some("img").length, loaded: some("img").filter(image => image.naturalWidth).length,
    players: some("audio").length, scripts: some("script").length, right: some(".hit.right .mark").length,
    captions: some(".caption").map(caption => caption.textContent), text: document.querySelector("main").innerText,
    outside: all.filter(item => /^https?:/.test(item.src || item.href)).length, cards: shown(),
    wide: document.documentElement.scrollWidth > innerWidth };
  const set = (id, key, value) => { if (document.getElementById(id)) {
    document.getElementById(id)[key] = value; document.getElementById(id).dispatchEvent(new Event("change")); } };
  set("failures", "checked", true); found.failed = shown();
  set("direction", "value", "audio_to_text/vb"); found.both = shown();
  set("failures", "checked", false); found.direction = shown();
  document.title = JSON.stringify(found); });</script>"""


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def exhibit(number, captions=None):
    """A clip with a picture, a sweep as its sound, and that sweep's line as its spectrogram."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    grey = rng.integers(20, 60, (224 * (1 + number % 3), 224), dtype=np.uint8)
    rows = np.arange(len(grey))
    grey[rows, rows * 223 // len(grey)] = 250
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        phase = np.cumsum(np.linspace(100, 4000, 8000)) * 2 * np.pi / 16000
        file.writeframes((np.sin(phase) * 9000).astype("<i2").tobytes())
    texts = captions or [f"A thing, number {number}.", f"Ding numéro {number}, как бы ни было"]
    picture = encoded(small.resize((224, 224), Image.Resampling.BICUBIC), "JPEG")
    return Exhibit(f"animals/thing_{number}", texts, picture, encoded(Image.fromarray(grey), "PNG"), sound.getvalue())


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
    return numbers | {"n_queries": 1234, "n_gallery": 87, "p": p}


def query(direction, rank, captions=None, n_hits=5):
    hits = [Hit(exhibit(i, captions if i == 2 else None), 0.9 - i / 10, i + 1 == rank) for i in range(n_hits)]
    return Query(direction, exhibit(7, captions), rank, hits)


def page(path):
    directions = [
        f"{a}_to_{b}/{s}" for a in ("text", "audio") for b in ("audio", "text", "vision") if a != b for s in "ab"
    ]
    queries = [
        query("text_to_audio/nb", 1, [EVIL]),
        query("text_to_audio/nb", 17.5, [f"caption {i}" for i in range(20)]),
        query("audio_to_text/vb", 2),
        query("audio_to_text/vb", 1),
        query("vision_to_audio/nb", float("nan")),
    ]
    metrics = {"text_to_audio/nb": summary_row(45.0), **{name: summary_row(8.0, None) for name in directions}}
    config = {"run_dir": "runs/<b>", "model": {"clip": "ViT-B-32", "fusion": "global_global"}, "seed": 0, "steps": 4000}
    write(
        path, f"Retrieval {EVIL}", config, {"pretrain/stamps": rows(), "clip": rows(3), "empty": []}, metrics, queries
    )


def browse(path, folder, width=1400):
    """(what the probe found, console lines) of a copy of the page in chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.fail("no chromium found: apt-get install chromium")
    copy = folder / f"probe_{width}.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</main>", f"</main>{PROBE}"), encoding="utf-8")
    command = [
        browser,
        *FLAGS,
        f"--window-size={width},900",
        f"--user-data-dir={folder}/profile",
        "--dump-dom",
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    found = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&"))
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page(folder / "new" / "report.html")
    return folder / "new" / "report.html", folder


@pytest.mark.parametrize("width", [1400, 500])
def test_everything_loads_and_fits_without_console_errors(site, width):
    found, console = browse(*site, width)
    assert console == []
    assert found["images"] == found["loaded"] == 3 + 5 * 5 * 2 + 2 + 1  # curves, hits, two sounds and a picture asked
    assert found["players"] == 5 * 5 + 2
    assert found["outside"] == 0 and not found["wide"]
    assert found["right"] == 3
    assert "no right answer in the gallery" in found["text"] and "✗ right answer at rank 17.5 of 87" in found["text"]
    assert "45.0" in found["text"] and "0.0005" in found["text"] and "model.fusion" in found["text"]


def test_captions_stay_text(site):
    found, console = browse(*site)
    assert found["captions"].count(EVIL) == 2 and EVIL in found["text"]
    assert found["scripts"] == 2  # the page's own and the probe
    assert console == []


def test_filters_by_direction_and_failure(site):
    found, _ = browse(*site)
    assert (found["cards"], found["failed"], found["both"], found["direction"]) == (5, 3, 1, 2)


def test_the_probe_notices_what_it_is_to_notice(site, tmp_path):
    broken = tmp_path / "broken.html"
    extra = (
        '<img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/x.png"><script>nowhere()</script></main>'
    )
    broken.write_text(site[0].read_text(encoding="utf-8").replace("</main>", extra), encoding="utf-8")
    found, console = browse(broken, tmp_path)
    assert found["images"] - found["loaded"] == 2 and found["outside"] == 1 and found["scripts"] == 3
    assert any("nowhere is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_a_page_with_nothing_but_a_title_loads(tmp_path):
    write(tmp_path / "report.html", "Nothing yet", {}, {}, {}, [])
    found, console = browse(tmp_path / "report.html", tmp_path)
    assert found["text"].strip() == "Nothing yet" and console == []


def test_spectrograms_run_to_the_right_with_low_frequencies_below():
    grey = np.zeros((300, 224), np.uint8)
    grey[290, 10] = 255  # late and low
    with Image.open(io.BytesIO(spectrogram_png(grey))) as image:
        pixels = np.asarray(image.convert("RGB")).sum(-1)
    assert pixels.shape == (224, 300)
    assert np.unravel_index(pixels.argmax(), pixels.shape) == (223 - 10, 290)


def test_a_plot_has_a_panel_for_what_the_rows_have():
    """Three to a line, below the losses: here lr and grad_norm; then five more; then, without rows, none."""
    more = ("clips_per_s", "data_wait", "alignment", "tflops", "memory_gib")
    plots = [run_plot("a", some) for some in ([], rows(), [row | dict.fromkeys(more, 1.0) for row in rows()])]
    heights = []
    for plot in plots:
        with Image.open(io.BytesIO(plot)) as image:
            heights.append(image.height)
            assert image.width == 1140
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0]) > 0
