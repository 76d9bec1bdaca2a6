"""Cases run one by one in this process, each watched: what came out, how long it took, what it touched, and the memory of all."""

import contextlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip4vla.errors import UserError
from faults._trees import Damage

SECONDS = 20  # of a case
MEMORY = 1 << 30  # bytes that the cases of a target may add to what was there
LINE = 2_200  # characters of a one-line error
SECRET = "the canary is alive"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = "os.mkdir os.remove os.rmdir os.rename os.link os.symlink os.truncate os.chmod shutil.rmtree".split()
NEVER = "os.system os.exec os.posix_spawn os.spawn subprocess.Popen socket.connect socket.getaddrinfo pty.spawn".split()


class Hang(BaseException):
    """A case takes too long; no handler of errors may take it for one."""


@dataclass
class Target:
    """One thing to be fed with damage. prepare(folder) -> what `case` takes, once; case(state, damage) -> what came out.

    may: audited events that the thing itself needs.
    """

    name: str
    prepare: Callable[[Path], Any]
    case: Callable[[Any, Damage], str]
    may: tuple[str, ...] = ()
    cases: int = 1000


@dataclass
class Watch:
    """Python's audit events while a case runs: nothing but `root` is written, nothing in `canary` is read, nothing started."""

    root: str = ""
    canary: str = ""
    may: tuple[str, ...] = ()
    on: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on or event not in ("open", *CHANGES, *NEVER) or event in self.may:
            return
        if event in NEVER:
            self.seen.append(f"{event} {args!r:.200}")
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        path = os.path.realpath(path) if path and "\0" not in path else ""
        written = event != "open" or isinstance(args[2], int) and args[2] & WRITES
        if path.startswith(self.canary) or written and path and not path.startswith((self.root, "/dev/")):
            self.seen.append(f"{event} {path:.200}")


watch = Watch()
sys.addaudithook(watch)  # without end: it cannot be taken away
sys.dont_write_bytecode = True  # of a module that a case is the first to import


@contextlib.contextmanager
def watched(folder: Path, may: tuple[str, ...]) -> Iterator[None]:
    """Everything in folder/root is open to cases; folder/canary is whole in the end."""
    canary = folder / "canary"
    canary.mkdir(parents=True)
    for name in ("secret.txt", "secret.png"):
        (canary / name).write_text(SECRET)
    watch.root, watch.canary, watch.may = os.path.realpath(folder / "root"), os.path.realpath(canary), may
    yield
    assert sorted(path.name for path in canary.iterdir()) == ["secret.png", "secret.txt"], sorted(canary.iterdir())
    assert all(path.read_text() == SECRET for path in canary.iterdir())


def run(target: Target, folder: Path, seed: int, cases: int = 0, failed: list[str] | None = None) -> dict[str, Any]:
    """Figures of that many cases; AssertionError naming seed and case for the first that is not survived.

    failed: gets all of those instead.
    """
    place, cases = folder / target.name.replace(" ", "_"), cases or target.cases
    (place / "root").mkdir(parents=True)
    outcomes: Counter[str] = Counter()
    slowest, begin = (0.0, -1), time.monotonic()
    with watched(place, target.may):
        state = target.prepare(place / "root")
        with _memory() as grown:
            for number in range(cases):
                damage = Damage(random.Random(f"{target.name} {seed} {number}"), watch.canary)
                outcome, seconds, wrong = _case(target, state, damage)
                if wrong:
                    wrong = f"{target.name}, seed {seed}, case {number}: {wrong}"
                    assert failed is not None, wrong
                    failed.append(wrong)
                outcomes[outcome] += 1
                slowest = max(slowest, (seconds, number))
    counts = {"cases": cases, "outcomes": dict(sorted(outcomes.items()))}
    times = {
        "slowest_s": round(slowest[0], 2),
        "slowest_case": slowest[1],
        "seconds": round(time.monotonic() - begin, 1),
    }
    return counts | times | {"peak_mib": round(grown() / 2**20)}


def _case(target: Target, state: Any, damage: Damage) -> tuple[str, float, str]:
    """(outcome, seconds, what is wrong with it)."""
    begin, wrong = time.monotonic(), ""
    watch.seen.clear()
    watch.on = True
    try:
        with _alarm():
            outcome = target.case(state, damage)
    except UserError as error:
        outcome, said = "one-line error", str(error)
        if not said.isprintable() or not said or len(said) > LINE:
            wrong = f"not one printable line of {LINE} characters at most: {said!r:.300}"
    except (Exception, Hang):
        outcome, wrong = "failure", traceback.format_exc(limit=-6)[-3000:]
    finally:
        watch.on = False
    return outcome, time.monotonic() - begin, f"touched {watch.seen}" if watch.seen else wrong


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"{SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory() -> Iterator[Callable[[], int]]:
    """Address space is limited inside; gives what tells how much resident memory came on top at most."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins again
    before, limits = _status("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 2 * MEMORY, limits[1]))
    peak = 0
    try:
        yield lambda: peak
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        peak = _status("VmHWM") - before
    assert peak < MEMORY, f"{peak / 2**20:.0f} MiB more than before"


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
