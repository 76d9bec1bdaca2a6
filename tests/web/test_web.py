"""The page as a person meets it: headless chromium types, clicks, drops files; and as somebody does who means it ill."""

import concurrent.futures
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import zlib
from urllib.parse import quote

import gradio
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from forks import ROOT
from gradio_page import APPLE, CARD, CARDS, NASTY, Browser
from running import PATIENCE, TINY, run

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.report.preview import ClipPreview
from clip4vla.search import builder
from clip4vla.search.index import Hit, Index
from clip4vla.search.store import ITEMS
from clip4vla.web import html
from clip4vla.web.app import HITS, LONGEST, Searcher, application, page


@pytest.fixture(scope="module")
def place(sample_shards, tmp_path_factory):
    """A folder: M, a tiny model; IDX, an index of shards and of a picture with nasty captions; what is no media."""
    folder = tmp_path_factory.mktemp("web")
    torch.manual_seed(0)
    model = CLIP4VLA(TINY, ModelConfig(), SpectrogramConfig()).eval()
    model.save_pretrained(folder / "M")
    (folder / "media").mkdir()
    shutil.copy(APPLE, folder / "media" / "an <i>apple.png")
    places = [f"{sample_shards}/{name}/train" for name in ("sounds", "speech_fr")] + [str(folder / "media")]
    builder.build(CLIP4VLA.from_pretrained(folder / "M"), "M", places, folder / "IDX")
    with contextlib.closing(sqlite3.connect(folder / "IDX" / ITEMS)) as db, db:
        nasty = json.dumps([NASTY, "second", "third"])
        db.execute("UPDATE items SET shown = json_set(shown, '$.captions', json(?)) WHERE media = 'v'", (nasty,))
        assert db.total_changes == 1
    (folder / "secret.txt").write_text("SECRET")
    return folder


@pytest.fixture(scope="module")
def server(place):
    """(its address, its process), in the folder; a small limit of uploads, and proxies that httpx refuses."""
    command = [sys.executable, "-m", "clip4vla.web", "IDX", "--model", "M", "--port", "0", "--max-upload", "1"]
    proxies = {"ALL_PROXY": "socks5://127.0.0.1:9", "https_proxy": "ftp://127.0.0.1:9", "NO_PROXY": "[::1"}
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place)} | proxies
    process = subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "clips" in line, process.communicate()
    yield re.match(r"http://127\.0\.0\.1:\d+", line)[0], process
    process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.process.terminate()
    one.process.wait()


def expected(place, query, weight, ratio):
    """{name: score} of all items, in float64, from the vectors on disk."""
    with contextlib.closing(sqlite3.connect(place / "IDX" / ITEMS)) as db:
        rows = db.execute("SELECT shown, vector FROM items").fetchall()
        parts = json.loads(db.execute("SELECT value FROM meta WHERE key = 'parts'").fetchone()[0])
    wanted = {"v": 1 - weight, "vb": weight * (1 - ratio), "nb": weight * ratio}
    shares = np.array([wanted.get(part, 0.0) for part in parts])
    vectors = [np.frombuffer(vector, "<f2").astype(float).reshape(len(parts), -1) for _, vector in rows]
    return {json.loads(shown)["name"]: shares @ (v @ query) for (shown, _), v in zip(rows, vectors, strict=True)}


def check(cards, scores):
    """The cards are the best of these scores, in order."""
    best = sorted(scores.values(), reverse=True)[:HITS]
    assert [card["score"] for card in cards] == pytest.approx(best, abs=6e-4)
    assert [card["score"] for card in cards] == pytest.approx([scores[card["name"]] for card in cards], abs=6e-4)


@functools.cache
def model_of(place):
    return CLIP4VLA.from_pretrained(place / "M")


def vector(place, words):
    return model_of(place).encode_text(words)[0].double().numpy()


def test_a_text_is_typed_and_sliders_search_again(place, server, browser):
    words = "a hammer <b>\u00e9</b>"
    browser.go(server[0])
    assert "gradio" not in browser.js("document.body.innerText").lower()
    browser.write(words)
    browser.key("Enter", 13)
    cards, query = browser.found(f"“{words}”"), vector(place, words)
    check(cards, expected(place, query, 0.5, 0.5))
    assert len(cards) == HITS and all(
        card["images"] == 2 and card["players"] == 1 for card in cards if "sound" in card["parts"]
    )
    assert re.search(rf"best {HITS} of \d+ · \d+ ms", browser.js("document.querySelector('#results').innerText"))

    for slider, end, weight, ratio in (("weight", "End", 1, 0.5), ("ratio", "End", 1, 1), ("weight", "Home", 0, 1)):
        browser.slide(slider, end)
        scores = expected(place, query, weight, ratio)
        best = [float(score) for score in sorted(scores.values(), reverse=True)[:HITS]]
        browser.until(f"{CARDS}.every((card, i) => Math.abs(card.score - {best}[i]) < 6e-4)")
        check(browser.js(CARDS), scores)

    browser.write("x" * (LONGEST + 50))
    browser.click("#search")
    browser.found(f"“{'x' * LONGEST}”")
    browser.click("#examples button")
    example = browser.js("document.querySelector('#examples button').textContent").strip()
    browser.found(f"“{example}”")
    assert browser.js("document.querySelector('#words input').value") == example


def test_files_are_dropped_and_found_and_what_they_say_stays_text(place, server, browser):
    browser.go(server[0])
    browser.slide("weight", "Home")
    browser.drop(APPLE)
    cards = browser.found("apple_red.png")
    nasty = next(card for card in cards if card["name"] == "an <i>apple.png")
    assert nasty["captions"] == [NASTY, "second", "third"] and nasty["parts"] == "pictures 1.000"
    assert browser.js("document.querySelector('#results').querySelectorAll('script, i, [onerror]').length") == 0
    assert browser.js("document.querySelectorAll('.asked img').length") == 1

    browser.slide("weight", "End")
    browser.drop(APPLE.with_suffix(".ogg"))
    cards = browser.found("apple_red.ogg")
    assert browser.js("document.querySelectorAll('.asked :is(img, audio)').length") == 2
    own = next(card for card in cards if card["name"].endswith("sounds/food/fruit/apple_red"))
    assert own["parts"].endswith("sound 1.000")
    assert browser.js("document.querySelector('#words input').value") == ""


def broken(folder):
    """Files by what the page is to say of them."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    picture, sound = APPLE.read_bytes(), APPLE.with_suffix(".ogg")
    files = {
        "text.wav": (b"no sound\n" * 50, "not a sound, picture or video that can be read"),
        "empty.mp3": (b"", "the file is empty"),
        "cut.png": (picture[: len(picture) // 2], "a picture that cannot be read: image file is truncated"),
        "cut.ogg": (sound.read_bytes()[:200], "not a sound, picture or video that can be read"),
        "huge.png": (b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")), "more than 64 megapixels"),
        "list.m3u8": (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{sound}\n#EXT-X-ENDLIST\n".encode(),
            "not a sound",
        ),
        "list.wav": (f"ffconcat version 1.0\nfile '{sound}'\n".encode(), "not a sound"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a sound"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: said for name, (_, said) in files.items()}


def test_what_cannot_be_read_is_said_on_the_page(tmp_path, server, browser):
    browser.go(server[0])
    for name, said in broken(tmp_path).items():
        browser.drop(tmp_path / name)
        browser.until(f"document.querySelector('.notice')?.textContent.startsWith({json.dumps(f'{name}: {said}')})")
    (tmp_path / "big.wav").write_bytes(bytes(3 << 20))
    browser.drop(tmp_path / "big.wav")
    browser.until("document.body.innerText.includes('exceed the maximum allowed size')")
    shutil.copy(APPLE, tmp_path / "picture named.wav")
    browser.drop(tmp_path / "picture named.wav")
    assert browser.found("picture named.wav")
    browser.write("  ")
    browser.key("Enter", 13)
    browser.until("document.querySelector('.notice')?.textContent.startsWith('Type what you look for')")


def test_a_phone_has_room(server, browser):
    for width in (390, 1280):
        browser.go(server[0], width)
        browser.write("wide " * 50)
        browser.click("#search")
        browser.found(f"“{'wide ' * 49}wide”")
        assert browser.js("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
        assert browser.js(f"new Set({CARD}.map(card => card.getBoundingClientRect().x)).size") == (
            1 if width == 390 else 3
        )


def test_the_page_asked_nobody_but_its_server_and_met_no_error(server, browser):
    sent = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert len(sent) > 100 and {url for url in sent if not url.startswith((server[0] + "/", "data:", "blob:"))} == set()
    logged = [e["params"]["entry"] for e in browser.events if e.get("method") == "Log.entryAdded"]
    errors = [entry for entry in logged if entry["level"] == "error" and "upload_progress" not in entry.get("url", "")]
    assert [entry.get("url") for entry in errors] == []  # uploads have no progress: gradio would keep its ids
    assert not [url for url in sent if "heartbeat" in url]
    kinds = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert [e for e in browser.events if e.get("method") in kinds] == []


def http_(address, method, path, body=None, headers=None):
    """(status, body) of a path as it is: nothing is normalised."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True, skip_host="Host" in (headers or {}))
        length = {} if body is None else {"Content-Length": str(len(body))}
        for name, value in (length | (headers or {})).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def send(address, name, data):
    """(status, answer) of an upload."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return http_(address, "POST", "/gradio_api/upload", head + data + b"\r\n--x--\r\n", kind)


def ask(address, event, data):
    """What an event of the page answers: (status, its last message)."""
    deps = json.loads(http_(address, "GET", "/config")[1])["dependencies"]
    number = next(one["id"] for one in deps if any(kind == event for _, kind in one["targets"]))
    session = f"{random.getrandbits(64):x}"
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    status, answer = http_(address, "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    if status != 200:
        return status, answer
    said = http_(address, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]
    messages = [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: ")]
    return status, next(one for one in messages if one["msg"] == "process_completed")


def test_no_file_can_be_asked_for(place, server):
    address = server[0]
    status, answer = send(address, "mine.txt", b"SECRET")
    assert status == 200
    targets = [
        json.loads(answer)[0],
        f"{place}/secret.txt",
        "secret.txt",
        f"{place}/IDX/{ITEMS}",
        "IDX/" + ITEMS,
        "/etc/passwd",
    ]
    ways = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/static/", "/assets/", "/",
            "/gradio_api/heartbeat/../file=", "/gradio_api/stream/x/", "/static/..%2f..%2f..%2f"]  # fmt: skip
    steps = ["", "../" * 12, "..%2f" * 12, "%2e%2e/" * 12, "%252e%252e%252f" * 12, "..\\" * 12, "file://"]
    for way, step, target in itertools.product(ways, steps, targets):
        for name in {target, target.lstrip("/"), quote(target, safe=""), quote(quote(target, safe=""), safe="")}:
            status, body = http_(address, "GET", way + step + name)
            assert (
                status in (400, 403, 404) and b"SECRET" not in body and b"root:" not in body and b"SQLite" not in body
            )
    for path in ("file=http://127.0.0.1/", "proxy=http://127.0.0.1/", "run/text", "call/text", "runs", "vibe-code"):
        assert http_(address, "GET", f"/gradio_api/{path}")[0] == 404
    for path in ("/monitoring", "/docs", "/openapi.json", "/login", "/pwa_icon", "/gradio_api", "//etc/passwd"):
        assert http_(address, "GET", path)[0] == 404


def test_a_query_names_no_file_of_the_machine_and_no_address(place, server):
    address = server[0]
    mine = json.loads(send(address, "apple.png", APPLE.read_bytes())[1])[0]
    over = mine + "/../../../secret.txt"
    for path in (f"{place}/secret.txt", str(APPLE), "IDX/" + ITEMS, "https://example.org/x.png", "//etc/passwd", over):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert [ask(address, event, [file, 0.5, 0.5])[0] for event in ("upload", "submit")] == [400, 400]
    file = {"path": mine, "meta": {"_type": "gradio.FileData"}}
    assert "apple.png" in ask(address, "upload", [file, 0.5, 0.5])[1]["output"]["data"][1]


def test_limits_and_other_sites(server):
    address = server[0]
    json_ = {"Content-Type": "application/json"}
    join = "/gradio_api/queue/join"
    assert send(address, "big.wav", bytes(1 << 19))[0] == 200 and send(address, "big.wav", bytes(2 << 20))[0] == 413
    assert http_(address, "POST", join, b"[" + b"1," * 50000 + b"1]", json_)[0] == 413
    assert http_(address, "POST", join, b"[" * 60000, json_)[0] == 400
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": "multipart/form-data; boundary=x"}
    assert http_(address, "POST", "/gradio_api/upload", None, chunked)[0] == 411
    assert http_(address, "POST", "/gradio_api/upload", b"0\r\n\r\n", chunked | {"Content-Length": "5"})[0] in (
        400,
        411,
    )
    assert http_(address, "GET", "/", headers={"Host": "evil.example"})[0] == 403  # a name that was made to point here
    assert http_(address, "POST", join, b"{}", json_ | {"Origin": "http://evil.example"})[0] == 403
    assert http_(address, "GET", "/", headers={"Host": f"localhost:{address.rpartition(':')[2]}"})[0] == 200
    long = ask(address, "submit", ["x" * (LONGEST + 1), 0.5, 0.5])[1]["output"]["data"][1]
    assert f"{LONGEST} characters at most" in long and "card" not in long


def test_several_ask_at_once(place, server):
    words = [f"number {i}" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: ask(server[0], "submit", [one, 0.0, 0.5]), words))
    for one, (status, message) in zip(words, found, strict=True):
        output = message["output"]["data"][1]
        assert status == 200 and f"“{one}”" in output
        best = max(expected(place, vector(place, one), 0.0, 0.5).values())
        assert float(re.search(r"class='score'>([-\d.]+)<", output)[1]) == pytest.approx(best, abs=6e-4)


def test_it_ends_without_a_word_and_leaves_no_upload(place, server):
    assert send(server[0], "left.txt", b"left")[0] == 200 and list(place.glob("clip4vla-web-*/*/left.txt"))
    server[1].send_signal(signal.SIGTERM)
    out, err = server[1].communicate(timeout=PATIENCE)
    assert server[1].returncode == 0 and (out, err) == ("", "")
    assert not list(place.glob("clip4vla-web-*"))


def test_an_upload_leaves_no_trace_in_memory_but_what_the_guard_clears(place, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = page(Searcher(Index.open(place / "IDX"), model_of(place)), 1)
    guard = application(blocks, str(tmp_path), 1, ("testserver",), False)
    client, statuses = TestClient(guard), gradio.routes.file_upload_statuses
    done = client.post("/gradio_api/upload?upload_id=" + "x" * 9999, files={"files": ("a.txt", b"a")})
    (path,) = done.json()
    assert (statuses._statuses, statuses._signals) == ({}, {})
    assert blocks.upload_file_set == {path} and blocks.upload_file_set in guard.noted
    paths = ("upload_progress?upload_id=x", "heartbeat/x", "queue/data?session_hash=x")
    assert [client.get(f"/gradio_api/{one}").status_code for one in paths] == [404] * 3


def test_a_card_has_so_many_captions_and_each_so_much_of_its_text():
    """All of an answer is in memory until it is fetched."""
    clip = ClipPreview("n" * 5000, [f"{number} " + "&" * 5000 for number in range(100)])
    hit = Hit(1, 0.5, {"v": 0.5}, "", [], None, None, "", "")
    card = html.hits_section("asked", None, [(hit, clip)], {"v": 0.0}, [])
    assert card.count("class='caption'") == html.MOST and "98 more<" in card and "... and 80 more<" in card
    assert card.count("&amp;") == html.MOST * html.LONGEST - 2 * 10 - 3 * 10
    assert card.count("n" * html.LONGEST + "...<") == 1 and "n" * (html.LONGEST + 1) not in card
    few = html.hits_section("asked", None, [(hit, ClipPreview("n", ["a", "b", "c"]))], {"v": 0.0}, [])
    assert few.count("class='caption'") == 3 and "1 more<" in few and "..." not in few


def test_a_damaged_index_is_one_line(place, tmp_path):
    shutil.copytree(place / "IDX", tmp_path / "IDX")
    with contextlib.closing(sqlite3.connect(tmp_path / "IDX" / ITEMS)) as db, db:
        db.execute("UPDATE items SET shown = '[]'")
    done = run(ROOT / "clip4vla/web/__main__.py", tmp_path / "IDX", "--model", place / "M", "--port", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(
        f"error: {tmp_path}/IDX/{ITEMS}: not a readable index .*: remove it and build it again", done.stderr
    )


def test_sliders_that_change_nothing_are_not_shown(place, tmp_path):
    model = model_of(place)
    builder.build(model, "M", [str(place / "media")], tmp_path / "pictures")
    for folder, weight, shown in ((tmp_path / "pictures", 0, False), (place / "IDX", 0.5, True)):
        components = page(Searcher(Index.open(folder), model), 1).config["components"]
        sliders = [one["props"] for one in components if one["type"] == "slider"]
        assert [(one["value"], one["visible"]) for one in sliders] == [(weight, shown), (0.5, shown)]


def test_mistakes_are_one_line(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            (["nowhere"], "nowhere: no index there"),
            ([place / "IDX", "--model", "M", "--port", port], f"cannot listen on 127.0.0.1, port {port}"),
            ([place / "IDX", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        ):
            done = run(ROOT / "clip4vla/web/__main__.py", *words)
            assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1 and done.stdout == ""
    without = "import sys; sys.modules['gradio'] = None; from clip4vla.web.__main__ import main; main()"
    (place / "without.py").write_text(without)
    done = run(place / "without.py", place / "IDX", "--port", 0)
    assert (
        done.returncode == 2 and done.stderr.endswith("pip install 'clip4vla[web]'\n") and done.stderr.count("\n") == 1
    )
