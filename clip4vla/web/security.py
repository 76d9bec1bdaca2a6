"""Restrict what a browser may ask of the page's server. Gradio's also serves files and fetches addresses.

Neither is needed.
Everything else is 404. Only addresses and known names are answered to, so that no page of another site can reach it by a
name that points here (DNS rebinding), and no form of another site can send to it. Who is slow, or asks for much, has to end.
"""

import asyncio
import ipaddress
import json
import logging
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
API = "/gradio_api/"
STREAM = API + "queue/data"
CALLS = (STREAM, *(API + call for call in ("upload", "queue/join", "startup-events", "info")))
UNDER = ("/assets/", "/static/")
BODY = 1 << 16  # bytes of a request without a file
KEPT = 300  # s that an upload stays at most, and may take
SHORT = 60  # s that another request may take, unless it is a stream
STREAMS = 320  # at once: these may take as long as the queries before theirs
FILES, ROOM = 256, 25  # uploads that lie there at once, and their bytes in uploads of the largest size
CONNECTIONS = 512  # at once
TURN = 10  # s that a connection may take to begin a request
HEADERS = {  # the browser itself refuses to ask another host; gradio's templates need eval
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class SlowClientProtocol(H11Protocol):
    """Close a connection that is one too many, or in a turn or two begins no request, or takes nothing of an answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(TURN, self._look, self.cycle, 0)

    def _look(self, last: Any, left: int) -> None:
        """Close the connection if it stalls. last: the request at the last look.

        left: bytes not taken by the client then.
        """
        if self not in self.connections:
            return
        rest = self.transport.get_write_buffer_size()
        if rest and rest == left:
            self.transport.abort()  # close() would wait for the client
        elif self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        self.loop.call_later(TURN, self._look, self.cycle, rest)


def _plain(path: str) -> bool:
    """Tell whether it is the path of a file of gradio's own."""
    return ".." not in path and len(path) < 256 and re.fullmatch(r"[\w./~+@-]*", path, re.ASCII) is not None


class SecurityMiddleware:
    """Filter requests to an ASGI application. uploads: the folder that they lie in; limit: bytes of one.

    names: of hosts, that are answered to; numbers: so are IP addresses, which no other site can make its own;
    events: by number what the page sends with one: str, dict (an upload) or NoneType; sessions: those that have asked;
    noted: gradio's sets of paths of uploads.
    """

    def __init__(
        self, inner: Any, uploads: str, limit: int, names: Collection[str], numbers: bool, events: dict[int, type],
        sessions: Collection[str], noted: Collection[set[str]],
    ) -> None:  # fmt: skip
        self.inner, self.uploads, self.limit, self.names, self.numbers = inner, uploads, limit, names, numbers
        self.events, self.sessions, self.noted = events, sessions, noted
        self.under_way = 0  # bytes of uploads
        self.streams: set[str] = set()  # sessions that are answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            tidying = asyncio.create_task(self._tidy())
            try:
                return await self.inner(scope, receive, send)
            finally:
                tidying.cancel()
        done = {"begun": False, "over": False}

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                done["begun"] = True
                own = ((name.lower().encode(), value.encode()) for name, value in HEADERS.items())
                message["headers"] = [*message["headers"], *own]
            elif message["type"] == "http.response.body":
                done["over"] = not message.get("more_body", False)
            await send(message)

        try:
            status = await self._answered(scope, receive, sent)
        except TimeoutError:
            status = 408
        except Exception as error:  # of gradio's, or of what it calls
            logging.getLogger("uvicorn.error").error("%s: %r", scope["path"], error)
            status = 500
        if status and not done["begun"]:
            await sent({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        if status and not done["over"]:
            await sent({"type": "http.response.body"})

    async def _answered(self, scope: Any, receive: Any, send: Any) -> int:
        """Answer a request; return 0 after the answer, else the status that says why there is none."""
        path, headers = scope["path"], {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        if status := self._status(scope, headers):
            return status
        if path == STREAM:
            return await self._streamed(scope, receive, send)
        if path == API + "upload":
            return await self._uploaded(int(headers.get("content-length", 0)), scope, receive, send)
        async with asyncio.timeout(SHORT):
            if path == API + "queue/join" and not (receive := await self._read(receive)):
                return 400
            await self.inner(scope, receive, send)
        return 0

    async def _streamed(self, scope: Any, receive: Any, send: Any) -> int:
        """Stream a session's answers, one stream at a time; it ends by itself once the session is forgotten."""
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if session not in self.sessions:
            return 404
        if session in self.streams or len(self.streams) >= STREAMS:
            return 503
        self.streams.add(session)
        try:
            await self.inner({**scope, "query_string": f"session_hash={session}".encode()}, receive, send)
        except Exception:
            if session in self.sessions:
                raise
            return 404
        finally:
            self.streams.discard(session)
        return 0

    async def _uploaded(self, size: int, scope: Any, receive: Any, send: Any) -> int:
        """Take an upload of `size` bytes, without its query: gradio would keep an upload_id without end."""
        if not self._room(size):
            return 503
        self.under_way += size
        try:
            async with asyncio.timeout(KEPT):
                await self.inner({**scope, "query_string": b""}, receive, send)
        finally:
            self.under_way -= size
        return 0

    async def _tidy(self) -> None:
        """Remove old uploads, also if no other comes; gradio would keep their paths without end."""
        while True:
            await asyncio.sleep(SHORT)
            self._sizes(KEPT)
            for paths in self.noted:
                paths.clear()

    def _status(self, scope: Any, headers: dict[str, str]) -> int:
        """Return the status of a request that is refused, 0 for one to answer."""
        host, path = headers.get("host", ""), scope["path"]
        if scope["type"] != "http" or not (path in PAGE + CALLS or path.startswith(UNDER) and _plain(path)):
            return 404
        if headers.get("origin", f"//{host}").partition("//")[2] != host or not self._known(host):
            return 403
        if scope["method"] in ("GET", "HEAD"):
            return 0
        size = headers.get("content-length", "")
        if not size.isdigit() or "transfer-encoding" in headers:  # which would count for more than the length
            return 411
        return 413 if int(size) > (self.limit if path == API + "upload" else BODY) else 0

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return "@" not in host and (name in self.names or self.numbers and bool(ipaddress.ip_address(name)))
        except ValueError:
            return False

    def _room(self, more: int) -> bool:
        """Tell whether there is room for one more upload.

        What has been there for long goes, and if need be what has had its turn.
        """
        return any(self._fits(self._sizes(age), more) for age in (KEPT, SHORT))

    def _fits(self, sizes: list[int], more: int) -> bool:
        return len(sizes) < FILES and sum(sizes) + self.under_way + more <= ROOM * self.limit

    def _sizes(self, age: float) -> list[int]:
        """Remove uploads older than `age` s; return the bytes of the others.

        Gradio leaves an empty file for each that has asked.
        """
        sizes = []
        for folder, folders, names in os.walk(self.uploads):
            for name in folders + names:
                with suppress(OSError):  # gone meanwhile, or a folder with something in it
                    path = os.path.join(folder, name)
                    state = os.stat(path)
                    if state.st_mtime < time.time() - age:
                        (os.rmdir if name in folders else os.unlink)(path)
                    elif name in names and state.st_size:
                        sizes.append(state.st_size)
        return sizes

    async def _read(self, receive: Any) -> Any:
        """Read a query as the page itself sends it; return a `receive` to read it again, None if it is none."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            query = self._query(json.loads(body))
        except (ValueError, RecursionError, TypeError, KeyError):
            query = None
        if query is None:
            return None
        whole: list[dict[str, Any]] = [{"type": "http.request", "body": json.dumps(query).encode(), "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        return again

    def _query(self, sent: Any) -> dict[str, Any] | None:
        """Return the checked query; None, ValueError, TypeError or KeyError if the page would not send it."""
        number, session, (first, *shares) = sent["fn_index"], sent["session_hash"], sent["data"]
        kind = self.events[number]
        known = first is None or kind is not type(None) and type(first) is kind
        if kind is dict:
            path = self._upload(first["path"])
            first, known = {"path": path, "meta": {"_type": "gradio.FileData"}}, path is not None
        known &= (
            type(number) is int
            and len(shares) == 2
            and all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
        )
        known &= re.fullmatch(r"\w{1,64}", session, re.ASCII) is not None
        return {"data": [first, *shares], "fn_index": number, "session_hash": session} if known else None

    def _upload(self, path: str) -> str | None:
        """Return the path of an upload.

        Gradio, mounted, would copy any file of this machine, and fetch from any address.
        """
        path = os.path.abspath(path)
        return path if os.path.dirname(os.path.dirname(path)) == self.uploads and os.path.isfile(path) else None
