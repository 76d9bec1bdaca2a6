"""A model hub on loopback, as far as huggingface_hub's own client asks one: repositories whose files are sent with a commit."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator

from flask import Flask, Response, request
from werkzeug.serving import make_server

COMMIT = "0" * 40


def app() -> tuple[Flask, dict[str, dict[str, bytes]]]:
    """The server, and the files of each repository."""
    server, repos = Flask("hub"), {}

    @server.post("/api/repos/create")
    def create():
        tree = request.get_json()
        repos.setdefault(f"{tree.get('organization') or 'me'}/{tree['name']}", {})
        return {"url": f"{request.host_url}me/{tree['name']}"}

    @server.post("/api/validate-yaml")
    def validate():
        return {"errors": [], "warnings": []}

    @server.post("/api/models/<user>/<name>/preupload/<revision>")
    def preupload(user, name, revision):
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in request.get_json()["files"]
        ]
        return {"files": files}

    @server.post("/api/models/<user>/<name>/commit/<revision>")
    def commit(user, name, revision):
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repos[f"{user}/{name}"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return {"commitUrl": f"{request.host_url}{user}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    @server.get("/api/models/<user>/<name>")
    @server.get("/api/models/<user>/<name>/revision/<revision>")
    def info(user, name, revision="main"):
        if f"{user}/{name}" not in repos:
            return Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": path} for path in repos[f"{user}/{name}"]]
        return {"id": f"{user}/{name}", "modelId": f"{user}/{name}", "sha": COMMIT, "siblings": files, "private": False}

    @server.get("/<user>/<name>/resolve/<revision>/<path>")
    def resolve(user, name, revision, path):
        data = repos[f"{user}/{name}"][path]
        etag = hashlib.sha256(data).hexdigest()
        return Response(
            data, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content_type="application/octet-stream"
        )

    @server.get("/api/models/<user>/<name>/tree/<revision>")
    def tree(user, name, revision):
        found = repos.get(f"{user}/{name}", {})
        return json.dumps([{"type": "file", "path": p, "size": len(d), "oid": COMMIT} for p, d in found.items()])

    return server, repos


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """(its URL, the files that were pushed), while the block runs."""
    server, repos = app()
    listener = make_server("127.0.0.1", 0, server, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", repos
    finally:
        listener.shutdown()
