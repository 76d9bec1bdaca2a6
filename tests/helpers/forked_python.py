"""A `python` for shell scripts whose scripts are forks (forks.py): the same programs, without the seconds of their imports."""

import contextlib
import json
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from running import job

CLIENT = """#!{python} -IS
import json, os, socket, sys
if not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as end:
    end.connect({address!r})
    end.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode() + b"\\n")
    code, out, err = json.load(end.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        """Run one script; its first word is its path from the folder where it is started."""
        words, env, folder = json.loads(self.rfile.readline())
        with job(1, *words, env=env, cwd=Path(folder)) as started:
            done = started.wait()
        self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())


@contextlib.contextmanager
def forked_python() -> Iterator[str]:
    """Give, for the block, the folder of such a `python`: to be put in front of PATH."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        client = Path(folder, "python")
        client.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        client.chmod(0o700)
        with socketserver.ThreadingUnixStreamServer(address, _Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield folder
            finally:
                server.shutdown()
                thread.join()
