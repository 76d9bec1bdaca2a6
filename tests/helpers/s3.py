"""A real S3 server on loopback (moto's), and a proxy before it that fails, cuts and delays a seeded share of the answers."""

import contextlib
import http.client
import logging
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "shards"
PUBLIC = {"x-amz-acl": "public-read"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to 127.0.0.1:port. For GETs of objects, shares of faults: `fail` answers 500, `cut` closes after
    half of the body, `slow` waits `delay` seconds in the middle of it. `refused`: methods answered 500; `puts`: PUTs after so
    many are, too. `seen` lists (method, path, bytes asked), `done` the faults."""

    daemon_threads = True

    def __init__(self, port: int, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.random, self.lock = port, random.Random(seed), threading.Lock()
        self.fail = self.cut = self.slow = self.delay = 0.0
        self.refused, self.puts = "", 1 << 30
        self.seen: list[tuple[str, str, str]] = []
        self.done: list[str] = []

    def draw(self) -> str:
        """What happens to this answer."""
        with self.lock:
            lot = self.random.random()
        for fault in ("fail", "cut", "slow"):
            lot -= getattr(self, fault)
            if lot < 0:
                self.done.append(fault)
                return fault
        return ""

    @contextlib.contextmanager
    def faults(self, **shares: float) -> Iterator[None]:
        """These faults for a while."""
        before = {name: getattr(self, name) for name in shares}
        self.__dict__.update(shares)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def handle_error(self, *_: object) -> None:
        """Clients that give up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.seen.append((self.command, self.path, asked))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_object = self.command == "GET" and self.path.split("?")[0].count("/") > 1
        fault = self.server.draw() if is_object else ""
        self.server.puts -= self.command == "PUT"
        if fault == "fail" or self.command in self.server.refused.split() or self.server.puts < 0:
            return self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        reply = connection.getresponse()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date")}
        data = reply.read()
        connection.close()
        self._answer(reply.status, headers, data, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        headers = {k: v for k, v in headers.items() if k.lower() != "content-length" or self.command == "HEAD"}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        half = len(data) // 2 if fault else len(data)
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.server.delay)
        self.wfile.write(data[half:])


@contextlib.contextmanager
def serve() -> Iterator[tuple[FaultyProxy, dict[str, str]]]:
    """(proxy, environment for s3fs): a server with an empty bucket, whose objects plain HTTP may read."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = FaultyProxy(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    S3FileSystem.clear_instance_cache()  # they know the endpoint of another test's server
    try:
        yield proxy, environment(proxy.server_port)
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


def environment(port: int) -> dict[str, str]:
    """What makes s3fs talk to a server here, and to no other."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip


def put(folder: Path, prefix: str, port: int) -> None:
    """All files below a folder as objects PREFIX/NAME."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        connection.request(
            "PUT", f"/{BUCKET}/{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes(), PUBLIC
        )
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200, reply.status
