"""End all ranks when one fails, dies or hangs, and name it once: each rank's side; watchdog_server.py is the other side.

A hang: no rank passes a new place for `train.hang_timeout_minutes`. Only the standard library: entry scripts import this first.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

BEAT = 1.0  # seconds between two messages to the watchdog server
LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed", "ds", "torchrun", "torch.distributed.run")  # by the second


class Watch:
    """Connects this rank to the watchdog server. Outside the scripts' `cli` nothing is watched, and no process ended."""

    def __init__(self) -> None:
        self.enabled = False  # whether the process is ours to end
        self.link: socket.socket | None = None
        self.server: subprocess.Popen | None = None  # on rank 0
        self.sending = threading.Lock()
        self.world, self.limit, self.n_progress = 1, 0.0, 0
        self.launchers = launchers() or []
        self.progress("start-up")

    def progress(self, phase: str) -> None:
        """Note where the program is, say "step 12: data". All ranks pass the same places in the same order."""
        self.phase, self.since = phase, time.monotonic()
        self.n_progress += 1

    def start_server(self, world: int) -> str:
        """Start the watchdog server of a job of `world` ranks, and return its port and token, which `join` needs."""
        command = [sys.executable, "-I", str(Path(__file__).with_name("watchdog_server.py")), str(world)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout
        return self.server.stdout.readline().strip()

    def join(self, word: str, address: str, rank: int, world: int, minutes: float) -> None:
        """Connect to the watchdog server on the host `address`; from here on `minutes` without a move end all ranks.

        word: what start_server returned. Raises ConnectionError, in one line, if the server cannot be reached.
        """
        port, token = word.split()
        self.world, self.limit = world, minutes * 60
        try:
            self.link = socket.create_connection((address, int(port)), timeout=60)
        except OSError as error:
            raise ConnectionError(
                f"{address}:{port}: rank {rank} ({socket.gethostname()}) cannot reach the watchdog beside rank 0 ({error}): "
                "let the nodes connect to each other on all ports"
            ) from None
        keep_alive(self.link)
        self._send({"token": token, "rank": rank, "host": socket.gethostname(), "limit": self.limit})
        threading.Thread(target=self._run, args=(self.link,), daemon=True, name="watchdog").start()

    def fail(self, code: int, message: str) -> None:
        """Report an error. Of several ranks, the server ends this one; a single one returns, and its caller reports it."""
        if self.link is None or self.world == 1:
            return
        with contextlib.suppress(Exception):  # a full disk, or no stdout at all
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            self._send({"passed": self.n_progress, "place": self.phase, "code": code, "error": message})
            time.sleep(30)

    def stop(self, in_order: bool = True) -> None:
        """End the watch after this rank's work. Unless it ended in good order, the other ranks end too."""
        link, self.link, self.enabled = self.link, None, False
        if link is not None:
            with contextlib.suppress(OSError), self.sending:
                if in_order or self.world == 1:  # a single rank has reported its error itself
                    link.sendall(b'{"over": true}\n')
                link.shutdown(socket.SHUT_RDWR)
        if self.server is not None:
            assert self.server.stdin
            self.server.stdin.close()  # it leaves after the last rank
            self.server = None

    def _send(self, message: dict[str, Any]) -> None:
        with self.sending:
            if self.link is not None:
                self.link.sendall(json.dumps(message).encode() + b"\n")

    def _run(self, link: socket.socket) -> None:
        poller = select.poll()  # select.select takes no descriptor above 1023
        poller.register(link, select.POLLIN)
        while self.link is link:
            stuck = time.monotonic() - self.since > self.limit
            with contextlib.suppress(OSError):  # the next lines notice it too
                self._send({"passed": self.n_progress, "place": self.phase} | ({"stack": stacks()} if stuck else {}))
            if poller.poll(BEAT * 1000):
                self._on_server_message(link)
            above = launchers()
            if above is not None and (0 in above or above != self.launchers):  # the same command may start again here
                self.abort(f"error: {socket.gethostname()} at {self.phase}: the launcher is gone (killed?)")

    def _on_server_message(self, link: socket.socket) -> None:
        """End this process with the server's exit code; also if the server is gone, since then nothing ends a hang."""
        try:
            code = link.recv(16)
        except OSError:
            code = b""
        if self.link is not link:  # stopped meanwhile
            return
        if not code:
            self.abort(f"error: {socket.gethostname()} at {self.phase}: the connection to rank 0's machine is lost")
        os._exit(int(code))

    def abort(self, why: str, speakers: int = 1) -> None:
        """End this process; no server is left to say why once, so the first `speakers` ranks of each node do."""
        if int(os.environ.get("LOCAL_RANK", "0")) < speakers:
            with contextlib.suppress(OSError):
                print(why, file=sys.stderr, flush=True)
        os._exit(1)


def keep_alive(link: socket.socket) -> None:
    """Set a connection to break within half a minute if the peer's machine is lost; a stopped process does not break it."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def launchers() -> list[int] | None:
    """List the processes of deepspeed or torchrun right above this one, nearest first, and 0 if the first of them is gone.

    None if that cannot be known now, as without a free file descriptor.
    """
    pids: list[int] = []
    pid, below = os.getppid(), ""
    try:
        while name := next((word for word in _command(pid) if word in LAUNCHERS), ""):
            pids.append(pid)
            pid, below = (
                int(Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[1]),
                name,
            )
        if below == LAUNCHERS[0] and pid == 1:
            pids.append(0)
    except (FileNotFoundError, ProcessLookupError):  # no /proc, or a process that leaves meanwhile
        pass
    except OSError:
        return None
    return pids


def _command(pid: int) -> list[str]:
    return [os.path.basename(word) for word in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:4]]


def stacks() -> str:
    """Format the 12 innermost calls of each of this process's threads."""
    names = {t.ident: t.name for t in threading.enumerate() if t.name != "watchdog"}
    frames = [(names[ident], frame) for ident, frame in sys._current_frames().items() if ident in names]
    return "\n".join(f"{name}:\n{''.join(traceback.format_stack(frame, limit=12))}" for name, frame in frames)


watch = Watch()
