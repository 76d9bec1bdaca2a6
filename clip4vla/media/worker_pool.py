"""Run work on files that may hang or crash a decoder in processes: a bad item is marked, its worker replaced, the rest done."""

import ctypes
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

from clip4vla.errors import UserError

FORK = multiprocessing.get_context("fork")
NO_ITEM = -1
STOPPED = 2.0  # s between two looks, which take half a second: we did not run meanwhile


_NOT_YET = object()  # a worker is still at its unit


class _Culprit(NamedTuple):
    """Names an item that hung or crashed its worker, and says which of the two."""

    item: int
    why: str


class _StatusFields(ctypes.Structure):
    """Lays out the memory of a WorkerStatus."""

    _fields_ = [
        ("item", ctypes.c_double),
        ("started", ctypes.c_double),  # time.monotonic() at which the item was begun
        ("n_done", ctypes.c_double),
        ("media_seconds", ctypes.c_double),  # of the items that are done
        ("n_failed", ctypes.c_double),
    ]


class WorkerStatus:
    """Says where a worker is in its unit, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self.fields = FORK.RawValue(_StatusFields)
        self.reset()

    def start(self, item: int) -> None:
        """Begin an item; NO_ITEM: the worker is between items, and no time limit holds."""
        self.fields.started = time.monotonic()
        self.fields.item = item

    def done(self, seconds: float, failed: bool) -> None:
        """Count an item as finished that lasted `seconds` of media."""
        self.fields.n_done += 1
        self.fields.media_seconds += seconds
        self.fields.n_failed += failed

    def reset(self) -> None:
        """Begin a new unit, with nothing counted."""
        self.fields.item = NO_ITEM
        self.fields.started = self.fields.n_done = self.fields.media_seconds = self.fields.n_failed = 0

    @property
    def item(self) -> int:
        """Number of the item in work, or NO_ITEM."""
        return int(self.fields.item)

    @property
    def counts(self) -> tuple[float, float, float]:
        """Return (items, seconds of media, failures) of the unit so far."""
        return self.fields.n_done, self.fields.media_seconds, self.fields.n_failed

    def overdue(self, timeout: float) -> int | None:
        """Return the item in work if it has taken more than `timeout` seconds."""
        item = self.item
        return item if item != NO_ITEM and time.monotonic() - self.fields.started > timeout else None

    def postpone(self, seconds: float) -> None:
        """Leave out of the item's time these seconds, in which all processes were stopped."""
        self.fields.started += seconds


Do = Callable[[Any, dict[int, str], WorkerStatus], Any]


class _Worker:
    """Runs a process that does one unit after another."""

    def __init__(self, do: Do) -> None:
        self.status = WorkerStatus()
        self.unit: Any = None
        self.failed_items: dict[int, str] = {}  # of the unit, by number: the reason
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(do, theirs, self.status), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, unit: Any, failed_items: dict[int, str]) -> None:
        """Send a unit to the process, with the items that it must not touch."""
        self.unit, self.failed_items = unit, failed_items
        self.status.reset()
        self.pipe.send((unit, failed_items))

    def resume_if_stopped(self) -> bool:
        """Continue the process if it was stopped (SIGSTOP), which is not its item's doing; its item gets all of the time."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        stopped = stat.exists() and stat.read_text(encoding="latin-1").rpartition(")")[2].split()[0] == "T"
        if stopped:
            assert self.process.pid
            self.status.start(self.status.item)
            os.kill(self.process.pid, signal.SIGCONT)
        return stopped

    def end(self) -> None:
        """Kill the process; one that waits for a dead disk dies later."""
        self.process.kill()
        self.process.join(10)


def _serve(do: Do, pipe: Connection, status: WorkerStatus) -> None:
    """Do units in a worker process as they come, until the parent ends."""
    _begin()
    while True:
        unit, failed_items = pipe.recv()
        try:
            pipe.send(do(unit, failed_items, status))
        except Exception as error:
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
            pipe.send(error)


def _begin() -> None:
    """Prepare a worker process: one thread, default signals, no life after its parent."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Exit as soon as the parent process is gone."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def run_units(
    units: Iterable[Any], do: Do, workers: int, timeout: float, tick: Callable[[list[WorkerStatus]], None]
) -> Iterator[Any]:
    """Run do(unit, failed_items, status) in `workers` processes, and yield (unit, result) as units are finished.

    do calls status.start(item) as it begins each item. An item that takes more than `timeout` seconds or crashes the process
    is in `failed_items` (item number: reason) when its unit is done again. tick gets the status of all busy workers twice a
    second. What `do` raises is raised here. Raises UserError if a worker is killed from outside, by lack of memory as a rule.
    """
    waiting: list[tuple[Any, dict[int, str]]] = [(unit, {}) for unit in units]
    waiting.reverse()  # the next one is last
    idle = [_Worker(do) for _ in range(min(workers, len(waiting)))]
    busy: list[_Worker] = []
    last_look = time.monotonic()
    try:
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                busy[-1].give(*waiting.pop())
            ready = wait([worker.pipe for worker in busy], timeout=0.5)
            last_look = _forgive_standstill(busy, last_look)
            tick([worker.status for worker in busy])
            for worker in list(busy):
                result = _result(worker, worker.pipe in ready, timeout)
                if result is _NOT_YET:
                    continue
                busy.remove(worker)
                if isinstance(result, _Culprit):
                    worker.end()
                    waiting.append((worker.unit, worker.failed_items | {result.item: result.why}))
                    idle.append(_Worker(do))
                else:
                    idle.append(worker)
                    yield worker.unit, result
    finally:
        for worker in idle + busy:
            worker.end()


def _forgive_standstill(busy: list[_Worker], last_look: float) -> float:
    """Return the time now; if all of us were stopped since the last look (Ctrl-Z, SLURM), no item is charged for it."""
    gap, now = time.monotonic() - last_look, time.monotonic()
    if gap > STOPPED:
        for worker in busy:
            worker.status.postpone(gap)
    return now


def _result(worker: _Worker, ready: bool, timeout: float) -> Any:
    """Return what a worker's unit came to, the item at which it failed, or _NOT_YET; raises what `do` raised."""
    if ready:
        return _answer(worker)
    item = worker.status.overdue(timeout)
    if item is None or worker.resume_if_stopped():
        return _NOT_YET
    return _Culprit(item, f"gave up after {timeout:g} s")


def _answer(worker: _Worker) -> Any:
    """Receive what the worker sent, or return the item at which it died; what `do` raised is raised."""
    try:
        result = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return _Culprit(worker.status.item, _death(worker))
    if isinstance(result, Exception):
        raise result
    return result


def _death(worker: _Worker) -> str:
    """Say how the worker died; UserError if it was killed from outside."""
    worker.process.join()
    code, item = worker.process.exitcode, worker.status.item
    assert code is not None
    if code in (-signal.SIGKILL, -signal.SIGTERM) or item == NO_ITEM:
        raise UserError(
            f"a worker was killed at item {item} of {worker.unit} (exit code {code}; out of memory?): start again with fewer "
            "workers=N; finished shards stay"
        )
    return _crash(code)


def _crash(code: int) -> str:
    return f"crashed the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


class IsolatedIterator:
    """Runs a generator function in a process of its own, since what it reads may hang or crash a decoder."""

    def __init__(self, make: Callable[..., Iterator[Any]], timeout: float) -> None:
        self.make, self.timeout = make, timeout
        self.fork_lock = (
            threading.Lock()
        )  # to be held where other threads compute: what they lock stays locked in a fork
        self.process: Any = None

    def iterate(self, *words: Any) -> Iterator[Any]:
        """Yield what make(*words) yields, and raise the OSError or ValueError that it raises.

        Raises ValueError if nothing comes for `timeout` seconds or the process dies; the next call has a new one.
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
        with self.fork_lock:
            self.process.start()
        theirs.close()

    def _next(self) -> tuple[str, Any]:
        """Receive ("yield", "raised" or "end"; what). Waits are counted, not the clock: we may be stopped (Ctrl-Z, SLURM)."""
        try:
            if any(self.pipe.poll(0.5) for _ in range(math.ceil(2 * self.timeout))):
                return pickle.loads(self.pipe.recv_bytes())
            reason = f"gave up after {self.timeout:g} s"
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
