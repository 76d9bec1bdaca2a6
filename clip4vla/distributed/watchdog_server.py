"""Serve all ranks from a process beside rank 0: name the one that failed, died or hangs, once, and end them all.

Each rank is a connection: the kernel breaks it even for kill -9, and keepalive does where a machine is lost. Time is counted
in turns of the loop here, so that a job which is suspended as a whole, server and all, does not run out of it.

    python clip4vla/distributed/watchdog_server.py RANKS

prints its port and a token, and leaves when stdin and all connections are closed.
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
    """Holds what one rank has reported."""

    link: socket.socket
    unread: bytes = b""
    number: int = -1  # -1: has not shown the token yet
    host: str = ""
    passed: int = 0  # places so far
    place: str = ""
    stack: str = ""
    last_seen: int = 0  # turn of its last message
    last_progress: int = 0  # turn of its last new place

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host})"


class WatchdogServer:
    """Reads the ranks' messages until all have left."""

    def __init__(self, world: int) -> None:
        if world == 1 or not socket.has_dualstack_ipv6():
            self.listener = socket.create_server(("127.0.0.1" if world == 1 else "", 0), backlog=BACKLOG + world)
        else:
            self.listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=BACKLOG + world, dualstack_ipv6=True
            )
        self.token, self.limit = secrets.token_hex(16), 0.0
        self.ranks: dict[int, Rank] = {}  # by number: those at work
        self.unauthenticated: list[Rank] = []  # without the token so far
        self.error: tuple[int, int, str] | None = None  # (turn, exit code, text): the first one reported
        self.ended_at, self.turn, self.parent = 0, 1, True
        self.events = selectors.DefaultSelector()
        self.events.register(self.listener, selectors.EVENT_READ, self._accept)
        self.events.register(sys.stdin, selectors.EVENT_READ, self._parent_left)

    def run(self) -> None:
        print(self.listener.getsockname()[1], self.token, flush=True)
        last = time.monotonic()
        while (self.parent or self.ranks) and not (self.ended_at and self.turn > self.ended_at + GRACE):
            for key, _ in self.events.select(TURN):
                key.data()
            if time.monotonic() - last >= TURN:
                self.turn, last = self.turn + 1, time.monotonic()
                self._drop_unauthenticated()
                if not self.ended_at:
                    self._check_for_hang()

    def _parent_left(self) -> None:
        self.parent = False
        self.events.unregister(sys.stdin)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # no descriptor is left, or the caller is gone
            link, _ = self.listener.accept()
            rank = Rank(link, last_seen=self.turn)
            self.unauthenticated.append(rank)
            self.events.register(link, selectors.EVENT_READ, lambda: self._read(rank))

    def _drop_unauthenticated(self) -> None:
        """Close connections that send nothing, which would take all descriptors in the end."""
        for rank in [rank for rank in self.unauthenticated if self.turn - rank.last_seen > PATIENCE]:
            self._lost(rank)

    def _read(self, rank: Rank) -> None:
        try:
            data = rank.link.recv(1 << 16)
        except OSError:
            data = b""
        *lines, rank.unread = (rank.unread + data).split(b"\n")
        for line in lines:
            self._on_rank_message(rank, line)
        if not data or (rank.number < 0 and (lines or len(rank.unread) > WORD)):
            self._lost(rank)

    def _on_rank_message(self, rank: Rank, line: bytes) -> None:
        """Update what is known of a rank by one line of JSON that it sent."""
        if rank.number < 0 and self.token.encode() not in line:
            return  # a stranger, say a port scanner
        message = json.loads(line)
        if "token" in message and rank.number < 0:
            rank.number, rank.host, self.limit = message["rank"], message["host"], message["limit"]
            rank.last_progress, self.ranks[rank.number] = self.turn, rank
            self.unauthenticated = [other for other in self.unauthenticated if other is not rank]
        if message.get("passed", 0) > rank.passed:
            rank.passed, rank.place, rank.last_progress = message["passed"], message["place"], self.turn
        rank.last_seen, rank.stack = self.turn, message.get("stack", "")
        if "error" in message and self.error is None:
            where = "" if message["code"] == 2 else f"error: {rank} failed at {rank.place}:\n"
            self.error = self.turn, message["code"], where + message["error"]
        if "over" in message:
            self.ranks.pop(rank.number)

    def _lost(self, rank: Rank) -> None:
        self.events.unregister(rank.link)
        rank.link.close()
        self.unauthenticated = [other for other in self.unauthenticated if other is not rank]
        if self.ranks.pop(rank.number, None) and not self.ended_at:
            why = "killed, out of memory, or its machine is gone"
            self._end(1, f"error: {rank} died without a word, last seen at {rank.place}: {why}")

    def _check_for_hang(self) -> None:
        """End the job, checked each turn, for an error that no death explains, or if no rank moves any more."""
        if self.error and self.turn > self.error[0] + 1:
            self._end(*self.error[1:])
        elif self.ranks:
            # the others may wait for that one, rightly
            newest = max(rank.last_progress for rank in self.ranks.values())
            if (self.turn - newest) * TURN > self.limit + GRACE:
                self._end(1, self._hang())

    def _hang(self) -> str:
        """Name the ranks that lag, of these the silent ones if any is, and give the stack of the first that still sends one."""
        least = min(rank.passed for rank in self.ranks.values())
        late = [rank for _, rank in sorted(self.ranks.items()) if rank.passed == least]
        late = [rank for rank in late if self.turn - rank.last_seen > GRACE] or late
        names = ", ".join(map(str, late[:NAMED])) + (f" and {len(late) - NAMED} more" if len(late) > NAMED else "")
        quiet = self.turn - late[0].last_seen
        state = f"; no sign of life for {quiet * TURN:.0f} s: stopped, or stuck in a call" if quiet > GRACE else ""
        waiting = sorted({rank.place for rank in self.ranks.values() if rank not in late})
        others = f"; the others ({len(self.ranks) - len(late)}) at {', '.join(waiting[:NAMED])}" if waiting else ""
        where = f"{names} at {late[0].place}{state}{others}"
        message = f"error: nothing moved for {self.limit / 60:g} min (train.hang_timeout_minutes): {where}"
        example = next((rank for rank in late if rank.stack), None)
        return f"{message}\n{example}, {example.stack}" if example else message

    def _end(self, code: int, message: str) -> None:
        self.ended_at = self.turn
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(message.rstrip(), file=sys.stderr, flush=True)
        for rank in self.ranks.values():
            with contextlib.suppress(OSError):
                rank.link.sendall(f"{code}\n".encode())


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # launchers send them to all processes; this one leaves after the ranks
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a socket for each rank
    WatchdogServer(int(sys.argv[1])).run()
