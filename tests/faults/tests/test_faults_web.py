"""A slice of the campaign against the page's server and the HTML pages, on one server and one chromium."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest
import uvicorn
from faults import web
from faults._pages import chromium
from faults._web import RAN, Server, build, listening
from forks import ROOT
from running import run

from clip4vla.web import security


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    build(folder)
    (folder / "secret.txt").write_text("SECRET")
    return folder


@pytest.fixture(scope="module")
def server(place):
    with Server(place, limit=1) as one:
        yield one


@pytest.mark.parametrize("kind", ["paths", "queries", "requests", "uploads", "hosts"])
def test_what_means_ill_is_refused_or_answered_and_never_ends_the_server(server, kind):
    found = web.attack(server, kind, 25, random.Random(7), 7)
    assert found["tried"] == found.get("answered", 0) + found["refused"] and found["crashed"] == 0


def test_hostile_texts_stay_text_in_every_page(place, server):
    found = chromium(place, server, queries=2)
    assert {"retrieval", "captions", "classification", "comparison", "check", "search"} <= found.keys()


def test_it_listens_on_this_machine_alone(server):
    assert listening(server.process.pid) == ["0100007F"]


def test_uploads_have_room_for_so_many(tmp_path):
    """Also those under way; what was left behind goes."""
    guard = security.SecurityMiddleware(None, str(tmp_path), 100, (), False, {}, (), ())
    for number in range(security.ROOM - 1):
        (tmp_path / str(number)).write_bytes(bytes(100))
    assert guard._room(100)
    guard.under_way = 1
    assert not guard._room(100)
    (tmp_path / "empty").mkdir()
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    assert guard._room(100) and not list(tmp_path.iterdir())
    for number in range(security.FILES + 1):
        (tmp_path / str(number)).touch()
    assert guard._room(100)
    for number in range(security.FILES + 1):
        (tmp_path / str(number)).write_text("x")
    assert not guard._room(100)
    os.utime(tmp_path / "7", (0, time.time() - security.SHORT - 1))  # has had its turn
    os.utime(tmp_path / "8", (0, time.time() - security.SHORT - 1))
    assert guard._room(100) and not (tmp_path / "7").exists()


@pytest.mark.parametrize(
    ("host", "numbers", "known"),
    [
        ("127.0.0.1:80", False, True),
        ("LOCALHOST", False, True),
        ("192.168.1.9", False, False),
        ("192.168.1.9:80", True, True),
        ("[fe80::1]:80", True, True),
        ("evil.example", True, False),
        ("[", True, False),
        ("a@127.0.0.1", True, False),
        ("", True, False),
    ],
)
def test_names_of_other_sites_are_not_answered_to(host, numbers, known):
    assert security.SecurityMiddleware(None, "", 0, security.LOCAL, numbers, {}, (), ())._known(host) == known


def test_nobody_but_a_page_can_have_a_query_computed(server):
    """Each differs in one thing from what the page sends."""
    good = {"data": ["a", 0.5, 0.5], "fn_index": server.events["submit"], "session_hash": "s"}
    bad = [
        {"data": [5, 0.5, 0.5]},
        {"data": ["a", 0.5]},
        {"data": ["a", True, 0.5]},
        {"data": ["a", 2, 0.5]},
        {"session_hash": "s" * 65},
        {"session_hash": "../x"},
        {"fn_index": 99},
        {"fn_index": True},
        {"fn_index": [0]},
        {"data": "abc"},
    ]
    join = [server.join(json.dumps(good | one).encode())[0] for one in [{}, *bad]]
    assert join == [200] + [400] * len(bad)


def test_a_terminal_obeys_no_name(place):
    """What the commands print of captions and languages has no control characters."""
    words = [sys.executable, "-m", "clip4vla.search", "query", "an apple", "--index", "IDX", "-k", "99"]
    done = subprocess.run(words, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    checked = run("data_prep/check.py", place / "out", "--decode", "0")
    for said in (done.stdout, checked.stdout):
        assert "esc [31m" in said and "".join(said.split("\n")).isprintable()


def test_a_lone_half_of_a_character_is_searched_for(server):
    status, found = server.ask("submit", f"\ud800 {RAN}", "half")
    assert status == 200 and "class='card'" in found


def test_connections_are_limited_in_number_and_silence(server):
    """One too many is closed at once, and the first after two turns at most."""
    port, most = int(server.host.partition(":")[2]), security.CONNECTIONS
    links = [socket.create_connection(("127.0.0.1", port), 2 * security.TURN + 5) for _ in range(most + 1)]
    start = time.monotonic()
    assert links[-1].recv(1) == b"" and time.monotonic() < start + 5
    links[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        links[0].recv(1)
    links[0].settimeout(2 * security.TURN + 5)
    assert links[0].recv(1) == b""
    for link in links:
        link.close()
    server.alive()


def test_silent_streams_lock_nobody_out(server):
    """The page opens one a session, and no heartbeats; neither are ended by a time limit."""
    status, found = server.ask("submit", "", "silent")
    assert status == 200 and "Type what you look for" in found
    stream = "/gradio_api/queue/data?session_hash=silent"
    with contextlib.ExitStack() as links:
        for path in [stream, "/gradio_api/heartbeat/x"] * (security.CONNECTIONS // 2):
            links.enter_context(server.held(path))
        time.sleep(2 * security.TURN + 1)
        server.alive()
        assert server.get(stream)[0] == 503


def test_streams_are_limited_in_number_and_end_with_their_session(tmp_path):
    """One that is asked for twice, or is one too many, is refused; the query string goes on as the page sends it."""
    sessions, seen, stop = {str(i) for i in range(security.STREAMS + 1)}, [], asyncio.Event()

    async def stream(scope, receive, send):
        seen.append(scope["query_string"])
        await stop.wait()
        raise RuntimeError("what gradio raises for a session that it has forgotten")

    async def main():
        guard = security.SecurityMiddleware(stream, str(tmp_path), 100, security.LOCAL, False, {}, sessions, ())
        said = []

        async def ask(query):
            async def send(message):
                said.append(message.get("status"))

            scope = {"type": "http", "method": "GET", "path": security.STREAM, "query_string": query.encode()}
            await guard({**scope, "headers": [(b"host", b"localhost")]}, None, send)

        streams = [asyncio.create_task(ask(f"session_hash={i}&session_hash=0")) for i in range(security.STREAMS)]
        await asyncio.sleep(0)
        for query in ("session_hash=7", f"session_hash={security.STREAMS}", "session_hash=x", ""):
            await ask(query)
        assert said[::2] == [503, 503, 404, 404] and len(seen) == security.STREAMS and seen[7] == b"session_hash=7"
        sessions.clear()
        stop.set()
        await asyncio.gather(*streams)
        assert set(said[8::2]) == {404} and not guard.streams

    asyncio.run(main())


def test_who_takes_nothing_of_an_answer_is_cut_off(monkeypatch):
    """Also when it is all in the server's buffer already; who takes it slowly gets it all."""
    monkeypatch.setattr(security, "TURN", 0.3)
    size = 32 << 20  # more than the kernel takes

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def main():
        config = uvicorn.Config(answer, http=security.SlowClientProtocol, ws="none", lifespan="off", log_level="error")
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: security.SlowClientProtocol(config, state, {}), "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
        slow, other = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        for one in (writer, other):
            one.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        taken = 0
        while part := await slow.read(1 << 20):
            taken += len(part)
            await asyncio.sleep(0.04)
        assert taken > size
        async with asyncio.timeout(5):
            while state.connections:
                await asyncio.sleep(0.1)
        writer.close()
        listening.close()

    asyncio.run(main())


def test_gradios_paths_of_uploads_are_forgotten_and_old_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(security, "SHORT", 0.1)
    (tmp_path / "old").touch()
    os.utime(tmp_path / "old", (0, 0))
    (tmp_path / "new").touch()
    noted = [{"a"}, {"b"}]

    async def lives(scope, receive, send):
        await asyncio.sleep(0.5)

    guard = security.SecurityMiddleware(lives, str(tmp_path), 100, (), False, {}, (), noted)
    asyncio.run(guard({"type": "lifespan"}, None, None))
    assert noted == [set(), set()] and os.listdir(tmp_path) == ["new"]
