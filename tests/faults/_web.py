"""Texts that mean ill, a real server of the page on clips named by them, and requests to it that no client would make."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from forks import ROOT
from running import TINY, run

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.search import builder
from clip4vla.web import html

APPLE = ROOT / "tests/sample/food/fruit/apple_red.png"
RAN = "window.ran=1"  # what a text that became a script would do
SHORT = [
    f"<script>{RAN}</script>", f"</script><script>{RAN}</script>", f'"><img src=x onerror={RAN}>', f"'><svg onload={RAN}>",
    f'" onmouseover={RAN} x="', f"javascript:{RAN}", f"[x](javascript:{RAN})", f'<a href="javascript:{RAN}">x</a>',
    f"${{{RAN}}} {{{{{RAN}}}}} {{%x%}}", "<!--<script>", "]]>", "--> <!-- --!>", "\u202eRTL \u2066x", "a\u2028b\u2029c",
    f"</title><script>{RAN}</script>", f"</style><script>{RAN}</script>", f"</textarea><iframe srcdoc='<script>{RAN}</script>'>",
    "&lt;script&gt; &amp;", "$\\frac{$", "$x^$ \\", "a | b \\| c", "__proto__", "_hidden", "=1+1", "</option><option>x",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/x'>", "<base href=http://127.0.0.1:9/><img src=y.png>",
    "Z" + "\u0351" * 300, "bell\x07 esc\x1b[31m",
]  # fmt: skip
LONG = "x" * 100_000
HOSTILE = [*SHORT, LONG, html.cut(LONG)]  # the last: as the search page shows the one before it


def build(folder: Path) -> None:
    """media with captions, names and labels of HOSTILE; out, their shards; M, a tiny model; IDX, their index."""
    media = folder / "media"
    media.mkdir()
    with open(media / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption", "label", "lang"])
        for number, text in enumerate(HOSTILE):
            source = APPLE.with_suffix((".png", ".ogg")[number % 2])
            name = text.replace("/", "\u2215")[:50] + source.suffix
            shutil.copy(source, media / name)
            table.writerow([name, text, text, text[:99]])
    done = run("data_prep/shard.py", "configs/data/folder.yaml", f"media_root={media}", f"out={folder}/out")
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = CLIP4VLA(TINY, ModelConfig(), SpectrogramConfig()).eval()
    model.save_pretrained(folder / "M")
    builder.build(
        CLIP4VLA.from_pretrained(folder / "M"), str(folder / "M"), [f"{folder}/out/media/train"], folder / "IDX"
    )


class Server:
    """The page's, as a process on a port of its own; for a `with` block."""

    def __init__(self, folder: Path, limit: int = 2) -> None:
        command = [sys.executable, "-m", "clip4vla.web", "IDX", "--port", "0", "--max-upload", str(limit)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.log = open(folder / "stderr", "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        line = self.process.stdout.readline()
        assert "clips" in line, (folder / "stderr").read_text()
        self.address = re.match(r"http://127\.0\.0\.1:\d+", line)[0]
        self.host = self.address.removeprefix("http://")
        self.events = {}
        for one in json.loads(self.get("/config")[1])["dependencies"]:
            self.events.update({kind: one["id"] for _, kind in one["targets"] if kind not in self.events})

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def said(self) -> str:
        """All of its stderr."""
        self.log.seek(0)
        return self.log.read()

    def memory(self, what: str = "VmRSS") -> float:
        """MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return round(int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024)

    def raw(self, data: bytes, timeout: float = 60, shut: bool = False) -> tuple[int, bytes]:
        """(status, body) of bytes sent as they are; status 0: the connection ended without an answer."""
        with socket.create_connection(("127.0.0.1", int(self.host.partition(":")[2])), timeout) as link:
            got = b""
            try:
                link.sendall(data)
                if shut:
                    link.shutdown(socket.SHUT_WR)
                while part := link.recv(1 << 16):
                    got += part
            except ConnectionError:
                pass
        head, _, body = got.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
        return int(head.split()[1]) if head.startswith(b"HTTP/1.") else 0, body

    def held(self, path: str) -> socket.socket:
        """A connection that has asked for a path, and says and takes nothing more."""
        link = socket.create_connection(("127.0.0.1", int(self.host.partition(":")[2])), 60)
        link.sendall(self.request("GET", path))
        return link

    def request(self, method: str, path: str, body: bytes = b"", head: str = "", host: str = "") -> bytes:
        """The bytes of a request, its path as it is."""
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        lines = f"{method} {path} HTTP/1.1\r\nHost: {host or self.host}\r\nConnection: close\r\n{length}{head}\r\n"
        return lines.encode("latin-1") + body

    def get(self, path: str) -> tuple[int, bytes]:
        status, body = self.raw(self.request("GET", path))
        return status, body

    def upload(self, name: str, data: bytes) -> tuple[int, bytes]:
        """(status, answer) of a file."""
        part = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        kind = "Content-Type: multipart/form-data; boundary=x\r\n"
        return self.raw(self.request("POST", "/gradio_api/upload", part + data + b"\r\n--x--\r\n", kind))

    def join(self, query: bytes) -> tuple[int, bytes]:
        """(status, answer) of a query as bytes."""
        return self.raw(self.request("POST", "/gradio_api/queue/join", query, "Content-Type: application/json\r\n"))

    def ask(self, event: str, first: object, session: str) -> tuple[int, str]:
        """(status, HTML of the hits) of a query that the page could send."""
        query = {"data": [first, 0.5, 0.5], "fn_index": self.events[event], "session_hash": session}
        status, answer = self.join(json.dumps(query).encode())
        if status != 200:
            return status, answer.decode()
        status, stream = self.get(f"/gradio_api/queue/data?session_hash={session}")
        stream = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + stream)  # of chunks
        messages = [json.loads(line[6:]) for line in stream.decode().split("\n") if line.startswith("data: ")]
        last = next((one for one in messages if one["msg"] == "process_completed"), None)
        return status, str(last["output"].get("data", ["", ""])[1]) if last else ""

    def drop(self, name: str, data: bytes, session: str) -> tuple[int, str]:
        """The same of a file, as the page uploads it and asks with it."""
        status, answer = self.upload(name, data)
        if status != 200:
            return status, ""
        path = json.loads(re.search(rb"\[.*\]", answer)[0])[0]
        return self.ask("upload", {"path": path, "meta": {"_type": "gradio.FileData"}}, session)

    def alive(self) -> None:
        """Assert that it answers, once its line of queries has room, and never had to say anything."""
        assert self.process.poll() is None, self.said()
        end, status, found = time.monotonic() + 60, 503, ""
        while status == 503 and time.monotonic() < end:
            status, found = self.ask("submit", "an apple", f"alive{time.monotonic_ns()}")
            time.sleep(0.5 * (status == 503))
        assert status == 200 and found.count("class='card'") == 12, (status, found[:300])
        assert self.said() == "", self.said()[-2000:]


def listening(pid: int) -> list[str]:
    """Addresses that a process and its children listen on, hexadecimal as the kernel has them."""
    tasks = [pid]
    for one in tasks:
        for task in Path(f"/proc/{one}/task").iterdir():
            tasks += map(int, (task / "children").read_text().split())
    found = set()
    for one in tasks:
        links = [os.readlink(link) for link in Path(f"/proc/{one}/fd").iterdir() if link.is_symlink()]
        nodes = {link[8:-1] for link in links if link.startswith("socket:[")}
        for table in ("tcp", "tcp6"):
            rows = [
                line.split() for line in Path(f"/proc/{one}/net/{table}").read_text(encoding="utf-8").splitlines()[1:]
            ]
            found |= {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in nodes}
    return sorted(found)
