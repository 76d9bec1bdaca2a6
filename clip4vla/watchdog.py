"""A rank that fails, dies or hangs is named once, and all ranks end: each rank's side of it; judge.py is the other.

A hang: no rank passes a new place for `train.timeout`. Only the standard library: entry scripts import this first.
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

BEAT = 1.0  # seconds between two words to the judge
LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed", "ds", "torchrun", "torch.distributed.run")  # by the second


class Watch:
    """This rank and its connection to the judge. Nothing is watched, and no process ended, outside the scripts' `cli`."""

    def __init__(self) -> None:
        self.mine = False  # whether the process is ours to end
        self.link: socket.socket | None = None
        self.judge: subprocess.Popen | None = None
        self.sending = threading.Lock()
        self.world, self.limit, self.passed = 1, 0.0, 0
        self.launchers = launchers() or []
        self.at("start-up")

    def at(self, place: str) -> None:
        """Note where the program is, say "step 12: data". All ranks pass the same places in the same order."""
        self.place, self.since = place, time.monotonic()
        self.passed += 1

    def call_judge(self, world: int) -> str:
        """Start the judge of a job of so many ranks; the word to `join` it with."""
        words = [sys.executable, "-I", str(Path(__file__).with_name("judge.py")), str(world)]
        self.judge = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.judge.stdout
        return self.judge.stdout.readline().strip()

    def join(self, word: str, address: str, rank: int, world: int, minutes: float) -> None:
        """Connect to the judge on the host `address`; from here on so many minutes without a move end all ranks.

        Raises ConnectionError, in one line, if the judge cannot be reached.
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

    def fail(self, code: int, said: str) -> None:
        """Report an error. Of several ranks, the judge ends this one; a single one returns, and its caller speaks."""
        if self.link is None or self.world == 1:
            return
        with contextlib.suppress(Exception):  # a full disk, or no stdout at all
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            self._send({"passed": self.passed, "place": self.place, "code": code, "error": said})
            time.sleep(30)

    def stop(self, in_order: bool = True) -> None:
        """The end of this rank's work. Unless it is in good order, the other ranks end too."""
        link, self.link, self.mine = self.link, None, False
        if link is not None:
            with contextlib.suppress(OSError), self.sending:
                if in_order or self.world == 1:  # a single rank has said itself what there is to say
                    link.sendall(b'{"over": true}\n')
                link.shutdown(socket.SHUT_RDWR)
        if self.judge is not None:
            assert self.judge.stdin
            self.judge.stdin.close()  # it leaves after the last rank
            self.judge = None

    def _send(self, message: dict[str, Any]) -> None:
        with self.sending:
            if self.link is not None:
                self.link.sendall(json.dumps(message).encode() + b"\n")

    def _run(self, link: socket.socket) -> None:
        words = select.poll()  # select.select takes no descriptor above 1023
        words.register(link, select.POLLIN)
        while self.link is link:
            stuck = time.monotonic() - self.since > self.limit
            with contextlib.suppress(OSError):  # the next lines see it too
                self._send({"passed": self.passed, "place": self.place} | ({"stack": stacks()} if stuck else {}))
            if words.poll(BEAT * 1000):
                self._told(link)
            above = launchers()
            if above is not None and (
                0 in above or above != self.launchers
            ):  # left behind, where the same command may start again
                self.leave(f"error: {socket.gethostname()} at {self.place}: the launcher is gone (killed?)")

    def _told(self, link: socket.socket) -> None:
        """The judge's exit code ends this process; so does a judge that is gone, since then nothing ends a hang."""
        try:
            code = link.recv(16)
        except OSError:
            code = b""
        if self.link is not link:  # stopped meanwhile
            return
        if not code:
            self.leave(f"error: {socket.gethostname()} at {self.place}: the connection to rank 0's machine is lost")
        os._exit(int(code))

    def leave(self, why: str, speakers: int = 1) -> None:
        """End this process; nobody is left to say why once: so many of each node do."""
        if int(os.environ.get("LOCAL_RANK", "0")) < speakers:
            with contextlib.suppress(OSError):
                print(why, file=sys.stderr, flush=True)
        os._exit(1)


def keep_alive(link: socket.socket) -> None:
    """A peer whose machine is lost breaks the connection within half a minute; a process that is stopped does not."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def launchers() -> list[int] | None:
    """The processes of deepspeed or torchrun right above this one, nearest first, and 0 if the first of them is gone.

    None if that cannot be told now, as without a free file descriptor.
    """
    found: list[int] = []
    pid, below = os.getppid(), ""
    try:
        while name := next((word for word in _command(pid) if word in LAUNCHERS), ""):
            found.append(pid)
            pid, below = (
                int(Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[1]),
                name,
            )
        if below == LAUNCHERS[0] and pid == 1:
            found.append(0)
    except (FileNotFoundError, ProcessLookupError):  # no /proc, or a process that leaves meanwhile
        pass
    except OSError:
        return None
    return found


def _command(pid: int) -> list[str]:
    return [os.path.basename(word) for word in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:4]]


def stacks() -> str:
    """The 12 innermost calls of each of this process's threads."""
    names = {t.ident: t.name for t in threading.enumerate() if t.name != "watchdog"}
    found = [(names[ident], frame) for ident, frame in sys._current_frames().items() if ident in names]
    return "\n".join(f"{name}:\n{''.join(traceback.format_stack(frame, limit=12))}" for name, frame in found)


watch = Watch()
