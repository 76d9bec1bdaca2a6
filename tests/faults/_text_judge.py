"""Garbage on the port of the process that watches the ranks: no rank is told to end, and it stays small."""

import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JUDGE = Path(__file__).parents[2] / "clip4vla/distributed/watchdog_server.py"


def garbage(rng: random.Random) -> bytes:
    """What scanners, browsers and enemies say first."""
    return rng.choice(
        (
            lambda: rng.randbytes(rng.choice((0, 1, 100, 100_000))),
            lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            lambda: b"\n" * 1000,
            lambda: b'{"token": "' + rng.randbytes(16).hex().encode() + b'", "rank": 0, "host": "x", "limit": 0}\n',
            lambda: b'{"over": true}\n{"code": 1, "error": "x"}\n',
            lambda: b"[" * 100_000 + b"\n",
            lambda: b"x" * 1_000_000,
            lambda: b"\x16\x03\x01\x02\x00\x01",
            lambda: b'{"passed": 1e400}\n' * 100,
        )
    )()


def storm(cases: int, seed: int) -> dict[str, Any]:
    """That many strangers, some of whom stay, while two ranks work; both are heard to the end, which is in order."""
    rng, kept = random.Random(f"judge {seed}"), []
    judge = subprocess.Popen(
        [sys.executable, "-IB", str(JUDGE), "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert judge.stdout and judge.stdin
    try:
        port, token = judge.stdout.readline().split()
        ranks = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(2)]
        for number, rank in enumerate(ranks):
            rank.sendall(json.dumps({"token": token, "rank": number, "host": "h", "limit": 600}).encode() + b"\n")
        for number in range(cases):
            stranger = socket.create_connection(("127.0.0.1", int(port)), timeout=5)
            try:
                stranger.sendall(garbage(rng))
            except OSError:
                pass  # it has closed the door
            kept = [*kept, stranger][-100:] if rng.random() < 0.5 else kept
            if number % 50 == 0:
                for rank in ranks:
                    rank.sendall(json.dumps({"passed": number, "place": f"step {number}"}).encode() + b"\n")
        time.sleep(1.5)
        for rank in ranks:
            rank.setblocking(False)
            try:
                raise AssertionError(f"judge, seed {seed}: a rank was told {rank.recv(16)!r}")
            except BlockingIOError:
                pass  # nothing was
        peak = _peak(judge.pid)
        for rank in ranks:
            rank.setblocking(True)
            rank.sendall(b'{"over": true}\n')
            rank.close()
        judge.stdin.close()
        assert judge.wait(20) == 0, f"judge, seed {seed}: it ended with {judge.returncode}"
    finally:
        judge.kill()
        judge.wait()
    assert peak < 64, f"judge, seed {seed}: {peak} MiB"
    return {"cases": cases, "outcomes": {"stranger shown out, ranks undisturbed": cases}, "peak_mib": peak}


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
