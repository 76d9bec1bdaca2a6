"""The process beside rank 0 that hears all ranks, names the one that failed, died or hangs, once, and ends them all.

Each rank is a connection: the kernel breaks it even for kill -9, and keepalive does where a machine is lost. Time is counted
in turns of the loop here, so that a job which is suspended as a whole, judge and all, does not run out of it.

    python clip4vla/judge.py RANKS    prints its port and a token; leaves when stdin and all connections are closed
"""

import contextlib
import json
import resource
import secrets
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass

TURN = 1.0  # seconds
GRACE = 3  # turns: for the stack of the rank that hangs, and for ranks to leave
NAMED = 4  # ranks named in a message
BACKLOG = 128  # connections that wait, beside those of the ranks
PATIENCE, WORD = 60, 4096  # turns and bytes in which a connection has to show the token


@dataclass
class Rank:
    """What one rank has said of itself."""

    link: socket.socket
    unread: bytes = b""
    number: int = -1  # -1: has not shown the token yet
    host: str = ""
    passed: int = 0  # places so far
    place: str = ""
    stack: str = ""
    heard: int = 0  # turn of its last word
    moved: int = 0  # turn of its last new place

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host})"


class Judge:
    """Reads the ranks' words until all have left."""

    def __init__(self, world: int) -> None:
        if world == 1 or not socket.has_dualstack_ipv6():
            self.door = socket.create_server(("127.0.0.1" if world == 1 else "", 0), backlog=BACKLOG + world)
        else:
            self.door = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=BACKLOG + world, dualstack_ipv6=True
            )
        self.token, self.limit = secrets.token_hex(16), 0.0
        self.ranks: dict[int, Rank] = {}  # by number: those at work
        self.strangers: list[Rank] = []  # without the token so far
        self.error: tuple[int, int, str] | None = None  # (turn, exit code, text): the first one reported
        self.judged, self.turn, self.parent = 0, 1, True
        self.events = selectors.DefaultSelector()
        self.events.register(self.door, selectors.EVENT_READ, self._accept)
        self.events.register(sys.stdin, selectors.EVENT_READ, self._parent_left)

    def run(self) -> None:
        print(self.door.getsockname()[1], self.token, flush=True)
        last = time.monotonic()
        while (self.parent or self.ranks) and not (self.judged and self.turn > self.judged + GRACE):
            for key, _ in self.events.select(TURN):
                key.data()
            if time.monotonic() - last >= TURN:
                self.turn, last = self.turn + 1, time.monotonic()
                self._show_out()
                if not self.judged:
                    self._look()

    def _parent_left(self) -> None:
        self.parent = False
        self.events.unregister(sys.stdin)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # no descriptor is left, or the caller is gone
            link, _ = self.door.accept()
            rank = Rank(link, heard=self.turn)
            self.strangers.append(rank)
            self.events.register(link, selectors.EVENT_READ, lambda: self._read(rank))

    def _show_out(self) -> None:
        """Connections that say nothing would take all descriptors in the end."""
        for rank in [rank for rank in self.strangers if self.turn - rank.heard > PATIENCE]:
            self._lost(rank)

    def _read(self, rank: Rank) -> None:
        try:
            data = rank.link.recv(1 << 16)
        except OSError:
            data = b""
        *lines, rank.unread = (rank.unread + data).split(b"\n")
        for line in lines:
            self._hear(rank, line)
        if not data or (rank.number < 0 and (lines or len(rank.unread) > WORD)):
            self._lost(rank)

    def _hear(self, rank: Rank, line: bytes) -> None:
        if rank.number < 0 and self.token.encode() not in line:
            return  # a stranger, say a port scanner
        words = json.loads(line)
        if "token" in words and rank.number < 0:
            rank.number, rank.host, self.limit = words["rank"], words["host"], words["limit"]
            rank.moved, self.ranks[rank.number] = self.turn, rank
            self.strangers = [other for other in self.strangers if other is not rank]
        if words.get("passed", 0) > rank.passed:
            rank.passed, rank.place, rank.moved = words["passed"], words["place"], self.turn
        rank.heard, rank.stack = self.turn, words.get("stack", "")
        if "error" in words and self.error is None:
            where = "" if words["code"] == 2 else f"error: {rank} failed at {rank.place}:\n"
            self.error = self.turn, words["code"], where + words["error"]
        if "over" in words:
            self.ranks.pop(rank.number)

    def _lost(self, rank: Rank) -> None:
        self.events.unregister(rank.link)
        rank.link.close()
        self.strangers = [other for other in self.strangers if other is not rank]
        if self.ranks.pop(rank.number, None) and not self.judged:
            why = "killed, out of memory, or its machine is gone"
            self._end(1, f"error: {rank} died without a word, last seen at {rank.place}: {why}")

    def _look(self) -> None:
        """Each turn: an error that no death explains, or nothing that moves any more."""
        if self.error and self.turn > self.error[0] + 1:
            self._end(*self.error[1:])
        elif self.ranks:
            newest = max(rank.moved for rank in self.ranks.values())  # the others may wait for that one, rightly
            if (self.turn - newest) * TURN > self.limit + GRACE:
                self._end(1, self._hang())

    def _hang(self) -> str:
        """Which ranks are behind, of these the silent ones if any is; and the calls of the first that can still tell."""
        least = min(rank.passed for rank in self.ranks.values())
        late = [rank for _, rank in sorted(self.ranks.items()) if rank.passed == least]
        late = [rank for rank in late if self.turn - rank.heard > GRACE] or late
        names = ", ".join(map(str, late[:NAMED])) + (f" and {len(late) - NAMED} more" if len(late) > NAMED else "")
        quiet = self.turn - late[0].heard
        state = f"; no sign of life for {quiet * TURN:.0f} s: stopped, or stuck in a call" if quiet > GRACE else ""
        waiting = sorted({rank.place for rank in self.ranks.values() if rank not in late})
        others = f"; the others ({len(self.ranks) - len(late)}) at {', '.join(waiting[:NAMED])}" if waiting else ""
        said = f"error: nothing moved for {self.limit / 60:g} min (train.timeout): {names} at {late[0].place}{state}{others}"
        told = next((rank for rank in late if rank.stack), None)
        return f"{said}\n{told}, {told.stack}" if told else said

    def _end(self, code: int, said: str) -> None:
        self.judged = self.turn
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(said.rstrip(), file=sys.stderr, flush=True)
        for rank in self.ranks.values():
            with contextlib.suppress(OSError):
                rank.link.sendall(f"{code}\n".encode())


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # launchers send them to all processes; this one leaves after the ranks
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a socket for each rank
    Judge(int(sys.argv[1])).run()
