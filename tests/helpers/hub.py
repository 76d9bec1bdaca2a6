"""A model hub on loopback, as far as huggingface_hub's own client asks one: repositories whose files are sent with a commit."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath

from flask import Flask, Response, abort, request
from werkzeug.serving import make_server

COMMIT = "0" * 40
GATED = b"gated"  # a file that is sent to nobody


def app() -> tuple[Flask, dict[str, dict[str, bytes]]]:
    """The server, and the files of each repository; a data set's is called datasets/USER/NAME."""
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

    def files_of(kind, user, name):
        """Of a model's repository, or of a data set's, whose name in `repos` begins with datasets/."""
        name = f"{user}/{name}" if kind == "models" else f"{kind}/{user}/{name}"
        if name not in repos:
            status = 404 if "Authorization" in request.headers else 401  # to one without a login it may be private
            abort(Response(status=status, headers={"X-Error-Code": "RepoNotFound"}))
        return repos[name]

    def entry(path, data):
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    @server.get("/api/<kind>/<user>/<name>")
    @server.get("/api/<kind>/<user>/<name>/revision/<revision>")
    def info(kind, user, name, revision="main"):
        files = [{"rfilename": path} for path in files_of(kind, user, name)]
        return {"id": f"{user}/{name}", "modelId": f"{user}/{name}", "sha": COMMIT, "siblings": files, "private": False}

    @server.get("/<user>/<name>/resolve/<revision>/<path:path>")
    @server.get("/<kind>/<user>/<name>/resolve/<revision>/<path:path>")
    def resolve(user, name, revision, path, kind="models"):
        files = files_of(kind, user, name)
        if files.get(path) == GATED:
            return Response(status=403, headers={"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT})
        if path not in files:
            return Response(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        sent = Response(files[path], headers={"X-Repo-Commit": COMMIT}, content_type="application/octet-stream")
        sent.set_etag(hashlib.sha256(files[path]).hexdigest())
        return sent.make_conditional(request, accept_ranges=True, complete_length=len(files[path]))

    @server.get("/api/<kind>/<user>/<name>/tree/<revision>")
    @server.get("/api/<kind>/<user>/<name>/tree/<revision>/<path:folder>")
    def tree(kind, user, name, revision, folder=""):
        """What lies in a folder, or with `recursive` below it."""
        inside, folders, deep = [], {}, request.args.get("recursive", "").lower() == "true"
        for path, data in files_of(kind, user, name).items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            parents = list(map(str, PurePosixPath(path).relative_to(folder).parents))[-2::-1]
            folders |= {str(PurePosixPath(folder, parent)): None for parent in (parents if deep else parents[:1])}
            inside += [entry(path, data)] if deep or not parents else []
        if folder and not inside and not folders:
            return Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        return [{"type": "directory", "path": path, "oid": COMMIT} for path in folders] + inside

    @server.post("/api/<kind>/<user>/<name>/paths-info/<revision>")
    def paths_info(kind, user, name, revision):
        files = files_of(kind, user, name)
        asked = request.get_json(silent=True) or request.form.to_dict(flat=False)
        listed = [entry(path, files[path]) for path in asked["paths"] if path in files]
        folders = [path for path in asked["paths"] if any(file.startswith(f"{path}/") for file in files)]
        return listed + [{"type": "directory", "path": path, "oid": COMMIT} for path in folders]

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
