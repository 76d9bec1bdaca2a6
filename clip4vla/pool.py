"""Worker processes for files that may hang or crash a decoder: the item is blamed, the worker replaced, the rest goes on."""

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip4vla.config import UserError

FORK = multiprocessing.get_context("fork")
NO_ITEM = -1
STOPPED = 2.0  # s between two looks, which take half a second: we did not run meanwhile


class _Culprit(NamedTuple):
    """An item and what it did to its worker."""

    item: int
    why: str


class At:
    """Where a worker is in its unit, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self.numbers = FORK.RawArray("d", [NO_ITEM, 0, 0, 0, 0])

    def start(self, item: int) -> None:
        """The worker begins an item; NO_ITEM: it is between items, and no time limit holds."""
        self.numbers[1] = time.monotonic()
        self.numbers[0] = item

    def done(self, seconds: float, failed: bool) -> None:
        """An item is finished that lasted `seconds` of media."""
        self.numbers[2] += 1
        self.numbers[3] += seconds
        self.numbers[4] += failed

    def reset(self) -> None:
        """A new unit begins."""
        self.numbers[:] = [NO_ITEM, 0, 0, 0, 0]

    @property
    def item(self) -> int:
        """Number of the item in work, or NO_ITEM."""
        return int(self.numbers[0])

    @property
    def counts(self) -> tuple[float, float, float]:
        """(items, seconds of media, failures) of the unit so far."""
        return tuple(self.numbers[2:5])

    def overdue(self, limit: float) -> int | None:
        """The item in work if it has taken more than `limit` seconds."""
        item = self.item
        return item if item != NO_ITEM and time.monotonic() - self.numbers[1] > limit else None

    def postpone(self, seconds: float) -> None:
        """Do not count these seconds, in which all processes were stopped."""
        self.numbers[1] += seconds


Do = Callable[[Any, dict[int, str], At], Any]


class _Worker:
    """A process that does one unit after another."""

    def __init__(self, do: Do) -> None:
        self.at, self.unit = At(), None
        self.blamed: dict[int, str] = {}
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(do, theirs, self.at), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, unit: Any, blamed: dict[int, str]) -> None:
        self.unit, self.blamed = unit, blamed
        self.at.reset()
        self.pipe.send((unit, blamed))

    def blame(self, item: int, why: str) -> tuple[Any, dict[int, str]]:
        """The unit again, with an item marked as the culprit; the process is no more."""
        self.end()
        return self.unit, self.blamed | {item: why}

    def go_on(self) -> bool:
        """Whether the process was stopped (SIGSTOP), which is not its item's doing: it is continued, with all of the time."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        stopped = stat.exists() and stat.read_text(encoding="latin-1").rpartition(")")[2].split()[0] == "T"
        if stopped:
            assert self.process.pid
            self.at.start(self.at.item)
            os.kill(self.process.pid, signal.SIGCONT)
        return stopped

    def end(self) -> None:
        """Kill the process; one that waits for a dead disk dies later."""
        self.process.kill()
        self.process.join(10)


def _serve(do: Do, pipe: Connection, at: At) -> None:
    _begin()
    while True:
        unit, blamed = pipe.recv()
        try:
            pipe.send(do(unit, blamed, at))
        except Exception as error:
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
            pipe.send(error)


def _begin() -> None:
    """What every worker process does first."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Never outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def work(units: Iterable[Any], do: Do, workers: int, limit: float, tick: Callable[[list[At]], None]) -> Iterator[Any]:
    """(unit, do(unit, blamed, at)) in the order in which they are finished, from `workers` processes.

    do tells `at` which item it begins; an item that takes more than `limit` seconds or crashes the process comes back in
    `blamed` (item number: reason) when the unit is done anew. tick gets every worker's place twice a second. What `do`
    raises is raised here. Raises UserError if a worker is killed from outside, by lack of memory as a rule.
    """
    blameless: dict[int, str] = {}
    waiting = [(unit, blameless) for unit in units][::-1]
    idle = [_Worker(do) for _ in range(min(workers, len(waiting)))]
    busy: list[_Worker] = []
    seen = time.monotonic()
    try:
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                busy[-1].give(*waiting.pop())
            ready = wait([worker.pipe for worker in busy], timeout=0.5)
            gap, seen = time.monotonic() - seen, time.monotonic()
            if gap > STOPPED:  # Ctrl-Z, or SLURM suspended the job
                for worker in busy:
                    worker.at.postpone(gap)
            tick([worker.at for worker in busy])
            for worker in list(busy):
                if worker.pipe in ready:
                    result = _answer(worker)
                elif (item := worker.at.overdue(limit)) is not None and not worker.go_on():
                    result = _Culprit(item, f"gave up after {limit:g} s")
                else:
                    continue
                busy.remove(worker)
                if isinstance(result, _Culprit):
                    waiting.append(worker.blame(*result))
                    idle.append(_Worker(do))
                else:
                    idle.append(worker)
                    yield worker.unit, result
    finally:
        for worker in idle + busy:
            worker.end()


def _answer(worker: _Worker) -> Any:
    """What the worker sent, or the item at which it died; what `do` raised is raised."""
    try:
        result = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return _Culprit(worker.at.item, _death(worker))
    if isinstance(result, Exception):
        raise result
    return result


def _death(worker: _Worker) -> str:
    worker.process.join()
    code, item = worker.process.exitcode, worker.at.item
    assert code is not None
    if code in (-signal.SIGKILL, -signal.SIGTERM) or item == NO_ITEM:
        raise UserError(
            f"a worker was killed at item {item} of {worker.unit} (exit code {code}; out of memory?): start again with fewer "
            "workers=N; finished shards stay"
        )
    return _crash(code)


def _crash(code: int) -> str:
    return f"crashed the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


class Apart:
    """A generator function that runs in a process of its own, since what it reads may hang or crash a decoder."""

    def __init__(self, make: Callable[..., Iterator[Any]], limit: float) -> None:
        self.make, self.limit = make, limit
        self.quiet = threading.Lock()  # to be held where other threads compute: what they lock stays locked in a fork
        self.process: Any = None

    def iterate(self, *words: Any) -> Iterator[Any]:
        """What make(*words) yields, and the OSError or ValueError that it raises.

        Raises ValueError if nothing comes for `limit` seconds or the process dies; the next call has a new one.
        """
        if not self.process:
            self._start()
        self.pipe.send(words)
        while True:
            kind, thing = self._next()
            if kind == "raised":
                raise thing
            if kind == "end":
                return
            yield thing

    def close(self) -> None:
        """Kill the process."""
        if self.process:
            self.process.kill()
            self.process.join(10)
            self.pipe.close()
            self.process = None

    def _start(self) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_stream, args=(self.make, theirs), daemon=True)
        with self.quiet:
            self.process.start()
        theirs.close()

    def _next(self) -> tuple[str, Any]:
        """(yield, raised or end; what). Waits are counted, not the clock: we may be stopped (Ctrl-Z, SLURM)."""
        try:
            if any(self.pipe.poll(0.5) for _ in range(math.ceil(2 * self.limit))):
                return pickle.loads(self.pipe.recv_bytes())
            reason = f"gave up after {self.limit:g} s"
        except (EOFError, ConnectionResetError):
            self.process.join()
            reason = _crash(self.process.exitcode)
        self.close()
        raise ValueError(reason)


def _stream(make: Callable[..., Iterator[Any]], pipe: Connection) -> None:
    _begin()
    while True:
        words = pipe.recv()
        try:
            for thing in make(*words):
                pipe.send_bytes(pickle.dumps(("yield", thing)))  # send() would put tensors into shared memory
            pipe.send_bytes(pickle.dumps(("end", None)))
        except Exception as error:
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            pipe.send_bytes(pickle.dumps(("raised", error)))
