"""What a browser may ask of the page's server. Gradio's also serves files and fetches addresses; this page needs neither.

Everything else is 404. The names of this machine alone are answered to, so that no page of another site can reach it by a
name that points here (DNS rebinding), and no form of another site can send to it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
API = "/gradio_api/"
CALLS = tuple(
    API + call for call in ("upload", "upload_progress", "queue/join", "queue/data", "startup-events", "info")
)
UNDER = ("/assets/", "/static/", API + "heartbeat/")
BODY = 1 << 16  # bytes of a request without a file
HEADERS = {  # the browser itself refuses to ask another host; gradio's templates need eval
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _plain(path: str) -> bool:
    """Is it the path of a file of gradio's own?"""
    return ".." not in path and len(path) < 256 and re.fullmatch(r"[\w./~+@-]*", path, re.ASCII) is not None


class Guard:
    """An ASGI application before another. uploads: the folder that they lie in; limit: bytes of one.

    local: answer to names of this machine alone.
    """

    def __init__(self, inner: Any, uploads: str, limit: int, local: bool) -> None:
        self.inner, self.uploads, self.limit, self.local = inner, Path(uploads), limit, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        status = self._status(scope)
        if not status and scope["path"] == API + "queue/join":
            status, receive = await self._read(receive)
        if status:
            await sent({"type": "http.response.start", "status": status, "headers": []})
            return await sent({"type": "http.response.body"})
        await self.inner(scope, receive, sent)

    def _status(self, scope: Any) -> int:
        """Why not to answer, 0 to do so."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        host, path = headers.get("host", ""), scope["path"]
        origin = headers.get("origin", f"http://{host}")
        if scope["type"] != "http" or not (path in PAGE + CALLS or path.startswith(UNDER) and _plain(path)):
            return 404
        if urlsplit(origin).netloc != host or self.local and urlsplit(f"//{host}").hostname not in LOCAL:
            return 403
        if scope["method"] in ("GET", "HEAD"):
            return 0
        size = headers.get("content-length", "")
        if not size.isdigit() or "transfer-encoding" in headers:  # which would count for more than the length
            return 411
        return 413 if int(size) > (self.limit if path == API + "upload" else BODY) else 0

    async def _read(self, receive: Any) -> tuple[int, Any]:
        """(400 if a file that is named in a query is no upload, else 0; the query, to be read again)."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            status = 400 if self._strays(json.loads(body)) else 0
        except (ValueError, RecursionError):
            status = 400
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        return status, again

    def _strays(self, data: Any) -> bool:
        """Does it name a file elsewhere? Gradio, mounted, would copy any file of this machine, and fetch from any address."""
        if isinstance(data, dict):
            path = Path(os.path.abspath(str(data.get("path", self.uploads / "none"))))
            return self.uploads not in path.parents or any(map(self._strays, data.values()))
        return isinstance(data, list) and any(map(self._strays, data))
