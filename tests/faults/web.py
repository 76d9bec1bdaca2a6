"""The search page's server under paths, queries, uploads and connections that mean ill; hostile texts in every HTML page.

Each answer is a page, a notice or a refusal; a 500, a traceback, or an end of the server is a crash.
"""

import itertools
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from faults._mutate import mutate
from faults._pages import chromium
from faults._web import APPLE, HOSTILE, Server, build, listening

REFUSED = (0, 400, 403, 404, 405, 408, 411, 413, 415, 422, 431, 501, 503)
SECRETS = (b"SECRET", b"root:", b"SQLite format")


def campaign(folder: Path, seed: int) -> dict:
    """Everything, some five minutes."""
    build(folder)
    (folder / "secret.txt").write_text("SECRET")
    rng, found = random.Random(seed), {}
    with Server(folder) as server:
        server.alive()
        begin = server.memory()
        for name, count in {"paths": 2000, "queries": 2000, "requests": 2000, "uploads": 300, "hosts": 200}.items():
            found[name] = attack(server, name, count, rng, seed)
        found["slow"] = slow(server, 1500)
        found["silent"] = silent(server, 600)
        found["crowd"] = crowd(server, 50, 45, seed)
        found["listens on"] = listening(server.process.pid)
        found["pages"] = chromium(folder, server)
        server.alive()
        found["memory MB"] = {"begin": begin, "end": server.memory(), "peak": server.memory("VmHWM")}
        server.process.terminate()
        assert server.process.wait(20) == 0 and server.said() == "" and not list(folder.glob("clip4vla-web-*"))
    return found


def attack(server: Server, name: str, count: int, rng: random.Random, seed: int) -> dict:
    """That many of a kind: how many were answered and refused; AssertionError names the first that is worse."""
    outcomes: Counter[str] = Counter()
    make = {"paths": paths, "queries": queries, "requests": requests, "uploads": uploads, "hosts": hosts}[name]
    start = time.monotonic()
    for number, (what, (status, body)) in zip(range(count), make(server, rng), strict=False):
        case = f"seed {seed}, {name} {number}: {what[:300]!r}: {status} {body[:200]!r}"
        assert status == 200 or status in REFUSED, case
        data = body if isinstance(body, bytes) else body.encode()
        assert not any(secret in data for secret in SECRETS), case
        assert server.process.poll() is None and server.said() == "", f"{case}\n{server.said()[-2000:]}"
        outcomes["answered" if status == 200 else "refused"] += 1
    server.alive()
    return {"tried": count, **outcomes, "crashed": 0, "seconds": round(time.monotonic() - start, 1)}


def paths(server: Server, rng: random.Random) -> Iterator:
    """Files of the machine, asked for in every way that servers have fallen for."""
    place = Path(f"/proc/{server.process.pid}/cwd").readlink()
    targets = [
        f"{place}/secret.txt",
        "secret.txt",
        "IDX/items.sqlite",
        "/etc/passwd",
        "M/config.json",
        "proc/self/environ",
    ]
    ways = [
        "/",
        "//",
        "/file=",
        "/file/",
        "/gradio_api/file=",
        "/gradio_api/file/",
        "/gradio_api/proxy=",
        "/static/",
        "/assets/",
        "/gradio_api/stream/x/",
        "/gradio_api/heartbeat/x/",
        "/theme.css/",
        "/gradio_api/upload_progress?upload_id=",
        "/gradio_api/queue/data?session_hash=",
        "/config?deep_link=",
        "/?deep_link=",
        "/custom_component/",
        "/static/fonts/",
    ]
    steps = [
        "",
        "../" * 9,
        "..%2f" * 9,
        "%2e%2e/" * 9,
        "%252e%252e%252f" * 9,
        "..\\" * 9,
        "..;/" * 9,
        "file://",
        "%00",
        "./.",
        "\xff",
    ]
    ends = ["", "%00", "%00.png", "?x", "#x", "/", "%20", "::$DATA", ";.css", "\t"]
    while True:
        path = rng.choice(ways) + rng.choice(steps) + rng.choice(targets) + rng.choice(ends)
        yield path, server.raw(server.request(rng.choice(("GET", "GET", "HEAD", "POST", "PUT")), path))


def queries(server: Server, rng: random.Random) -> Iterator:
    """What no page sends: values of other types, files of the machine, broken and deep JSON."""
    odd = [
        None,
        True,
        -1,
        0.5,
        7,
        1e999,
        float("nan"),
        "",
        "x" * 30000,
        "\ud800",
        "\0",
        [],
        {},
        [[]],
        "../x",
        *HOSTILE[:9],
        {"path": "/etc/passwd"},
        {"path": "http://127.0.0.1:9/"},
        {"path": "\0"},
        {"__type__": "update"},
        "[" * 20000,
    ]
    while True:
        query = {"data": ["an apple", 0.5, 0.5], "fn_index": rng.choice([*server.events.values()]), "session_hash": "s"}
        if rng.random() < 0.5:
            query[rng.choice([*query, "trigger_id", "event_data", "batched"])] = rng.choice(odd)
        if rng.random() < 0.5 and isinstance(query["data"], list):
            query["data"] = [rng.choice((one, rng.choice(odd))) for one in query["data"]] + [0] * rng.choice((0, 0, 1))
        body = json.dumps(query).encode()
        body = rng.choice((body, body, mutate(body, rng), b'{"a":' * 9000, body[:-1]))
        yield body, server.join(body)


def requests(server: Server, rng: random.Random) -> Iterator:
    """HTTP that is none, or that lies of its length."""
    good = server.request("POST", "/gradio_api/queue/join", b'{"data": ["an apple", 0.5, 0.5]}', "Content-Type: x\r\n")
    lies = [
        "Content-Length: 99999999999",
        "Content-Length: -1",
        "Content-Length: 5, 6",
        "Content-Length: 0x9",
        "Transfer-Encoding: chunked",
        "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: x",
        "Expect: 100-continue",
        f"X: {'x' * 70000}",
        "\r\n".join(f"X{i}: y" for i in range(3000)),
        "Range: bytes=0-,0-,0-",
        "Accept-Encoding: " + "gzip;q=9," * 999,
        ": x",
        "X\0: y",
    ]
    while True:
        path = rng.choice(
            ("/", "/config", "/gradio_api/upload", "/gradio_api/queue/join", "*", "http://127.0.0.1:9/", "x" * 9999)
        )
        lying = server.request(
            rng.choice(("GET", "POST", "OPTIONS", "CONNECT", "TRACE", "\x16\x03")), path, b"", rng.choice(lies) + "\r\n"
        )
        data = rng.choice((lying, mutate(good, rng), rng.randbytes(rng.choice((1, 99, 9999)))))
        yield data, server.raw(data, shut=True)


def uploads(server: Server, rng: random.Random) -> Iterator:
    """Files under names of others, corrupt, too large, and none at all; the page then asks with them."""
    sound = APPLE.with_suffix(".ogg")
    files = [
        APPLE.read_bytes(),
        sound.read_bytes(),
        b"PK\3\4" + bytes(99),
        b"<html><script>window.ran=1</script>",
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.ran=1'/>",
        f"#EXTM3U\n{sound}\n".encode(),
        bytes(3 << 20),
        f"ffconcat version 1.0\nfile '{sound}'\n".encode(),
        b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\1\0",
    ]
    names = [
        "a.jpg",
        "a.wav",
        "a.html",
        "a.svg",
        "../../a.png",
        "..",
        "a\\0b",
        "<img src=x onerror=window.ran=1>.png",
        "x" * 300,
    ]
    for number in range(10**9):
        data, name = rng.choice(files), rng.choice(names)
        data = mutate(data, rng) if rng.random() < 0.5 else data
        yield f"{name} {data[:99]!r}", server.drop(name, data, f"u{number}")


def hosts(server: Server, rng: random.Random) -> Iterator:
    """Pages of other sites: names that point here (DNS rebinding), forms and scripts that send."""
    names = [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "[",
        "[::1",
        "",
        "a@127.0.0.1",
        "2130706433",
        "\xe9",
    ]
    while True:
        name = rng.choice(names)
        head = rng.choice((f"Origin: http://{name}\r\n", "Origin: null\r\n", "Origin: http://[\r\n"))
        if rng.random() < 0.5:
            answer = server.raw(server.request("GET", "/config", host=name or " "))
        else:
            answer = server.raw(server.request("POST", "/gradio_api/queue/join", b"{}", head))
        assert answer[0] in (400, 403), f"{name!r}, {head!r}: {answer}"
        yield f"{name} {head}", answer


def slow(server: Server, count: int) -> dict:
    """Connections that say nothing, or a byte a second: all are closed, and then a person is answered."""
    port, start = int(server.host.partition(":")[2]), time.monotonic()
    links = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(count)]
    for link in links:
        link.setblocking(False)
    some = dict(enumerate(links))
    while some and time.monotonic() < start + 60:
        time.sleep(1)
        some = {number: link for number, link in some.items() if _lives(number, link)}
    for link in links:
        link.close()
    assert not some, f"{len(some)} of {count} idle connections are still open after a minute"
    server.alive()
    return {"connections": count, "all closed after s": round(time.monotonic() - start, 1), "crashed": 0}


def silent(server: Server, count: int) -> dict:
    """That many clients that hold a stream of answers open, each of a session of its own, and as many heartbeats: a person
    is answered, and nobody's stream ends the server."""
    start, links = time.monotonic(), []
    for number in range(count):
        server.ask("submit", "", f"silent{number}")
        for path in (f"queue/data?session_hash=silent{number}", f"heartbeat/silent{number}"):
            with suppress(OSError):  # one too many
                links.append(server.held(f"/gradio_api/{path}"))
    server.alive()
    for link in links:
        link.close()
    server.alive()
    return {"streams": count, "seconds": round(time.monotonic() - start, 1), "crashed": 0}


def _lives(number: int, link: socket.socket) -> bool:
    """One byte more of every second one; whether it is still open."""
    try:
        if number % 2:
            link.send(b"G")
        return bool(link.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def crowd(server: Server, clients: int, seconds: float, seed: int) -> dict:
    """That many clients at once: three of five ask by text, one by a file, one sends garbage. Who is refused waits a moment.

    Latencies in ms.
    """
    end, times, outcomes, wrong = time.monotonic() + seconds, {"text": [], "file": []}, Counter(), []

    def client(number: int) -> None:
        kind = ("text", "text", "text", "file", "garbage")[number % 5]
        bad = queries(server, random.Random(f"{seed} {number}"))
        for turn in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
            begin, name = time.monotonic(), f"c{number}x{turn}"
            try:
                if kind == "text":
                    status, body = server.ask("submit", f"an apple {number} {turn}", name)
                elif kind == "file":
                    status, body = server.drop("a.png", APPLE.read_bytes(), name)
                else:
                    status, body = next(bad)[1]
            except OSError as error:
                status, body = -1, repr(error)
            outcomes[f"{kind} {'answered' if status == 200 else 'refused'}"] += 1
            if kind in times and status == 200:
                times[kind].append(1000 * (time.monotonic() - begin))
            if not (status in REFUSED or status == 200 and (kind == "garbage" or "class='card'" in body)):
                wrong.append((kind, status, body[:200]))
            time.sleep(0.3 * (status != 200))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"seed {seed}: {len(wrong)} of the crowd's, the first: {wrong[0]}"
    assert all(len(some) > 1 for some in times.values()), f"seed {seed}: hardly anybody was answered: {outcomes}"
    server.alive()
    cuts = {kind: statistics.quantiles(some, n=20) for kind, some in times.items()}
    latency = {kind: {"median ms": round(cut[9]), "95% ms": round(cut[18])} for kind, cut in cuts.items()}
    return {
        "clients": clients,
        "seconds": seconds,
        **outcomes,
        "crashed": 0,
        **latency,
        "peak MB": server.memory("VmHWM"),
    }
