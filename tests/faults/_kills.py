"""Kill, start the same command again, until the work is done: what a kill is, how its moment is found, what it leaves behind."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from forks import ROOT
from running import deepspeed_command, job

PAUSE, STOP, KILL, TERM = "PAUSE", "STOP", "KILL", "TERM"
POLL = 0.002  # s between two looks for the moment
ENDS = 240.0  # s that a start may take, at most


@dataclass(frozen=True)
class Kill:
    """One blow. KILL, TERM, STOP are signals; PAUSE stops and continues, which the work must survive."""

    who: str  # a role of the work, or `all`
    sign: str
    when: str  # `time`: since the start; else a state of the work
    delay: float  # s after that
    seconds: float = 0.0  # until what is stopped is continued; 0: never


class Started:
    """A command at work: forked ranks (see forks.py), or with `launcher` a real one, whose output goes into files."""

    def __init__(self, folder: Path, ranks: int, words: list, launcher: bool = False):
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        env = {"TMPDIR": str(folder / "tmp")}
        self.launcher: subprocess.Popen | None = None
        if launcher:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            full = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env}
            self.folder = Path(tempfile.mkdtemp(prefix="launched"))
            with (self.folder / "out0").open("w") as out, (self.folder / "err0").open("w") as err:
                self.launcher = subprocess.Popen(
                    deepspeed_command(ranks, *words), cwd=ROOT, env=full, stdout=out, stderr=err, start_new_session=True
                )
            self.pids = [self.launcher.pid]
        else:
            self.job = job(ranks, *words, env=env)
            self.folder, self.pids = self.job.folder, [rank.pid for rank in self.job.ranks]
        self.marks = [os.fsencode(folder), os.fsencode(self.folder)]

    def processes(self) -> set[int]:
        """Those that have its folders in their environment, command line or open files, wherever they have gone."""
        return {
            int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _marked(entry, self.marks)
        }

    def said(self, stream: str) -> str:
        """All that was written to `out` or `err`."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob(f"{stream}*")))

    def below(self, pid: int, depth: int = 1) -> list[int]:
        """The process's children, or with depth 2 their children."""
        try:
            found = [child.pid for child in psutil.Process(pid).children()]
        except psutil.NoSuchProcess:
            return []
        return found if depth == 1 else [pid for child in found for pid in self.below(child, depth - 1)]

    def for_folders(self) -> bool:
        """Whether it has ended by itself, or lost a process of its own."""
        if self.launcher:
            return self.launcher.poll() is not None
        return any(not rank.is_alive() for rank in self.job.ranks)

    def wait(self) -> int:
        """The exit code; what a launcher that was killed leaves behind is not touched."""
        return self.launcher.wait(ENDS) if self.launcher else self.job.wait(ENDS).returncode

    def end(self) -> None:
        """Kill what is left, after a failure, and forget what was said."""
        for pid in self.processes():
            with _gone():
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        pass


@dataclass
class Storm:
    """What was hit, and what it took."""

    seed: int
    kills: int = 0
    starts: int = 0
    works: int = 0
    missed: int = 0  # the work ended before the moment came
    victims: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    lingered: float = 0.0  # s that a process outlived its job, at most

    def figures(self) -> dict:
        """As JSON."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
            if name != "seed"
        } | {"lingered": round(self.lingered, 1)}


class Work:
    """Something to do with one command, which may be killed: subclasses say with what, whom, when and what must come out."""

    name = ""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.fresh()

    def fresh(self) -> None:
        """Begin from nothing."""
        raise NotImplementedError

    def start(self) -> Started:
        """The command."""
        raise NotImplementedError

    def roles(self, started: Started) -> dict[str, list[int]]:
        """Processes by who they are."""
        return {f"rank {rank}": [pid] for rank, pid in enumerate(started.pids)}

    def states(self, started: Started) -> dict[str, Callable[[], bool]]:
        """Moments to aim at, of those that this start can have."""
        raise NotImplementedError

    def ended(self, started: Started, code: int, kill: Kill | None) -> bool:
        """Whether the work is done; AssertionError for anything that should not have been said or left."""
        raise NotImplementedError

    def check(self) -> None:
        """AssertionError unless the result is that of an undisturbed run."""
        raise NotImplementedError


def storm(work: Work, kills: list[Kill], seed: int) -> Storm:
    """All the kills, over as many repetitions of the work as they take; each is started again until it is done."""
    found, left, misses = Storm(seed), kills[::-1], 0
    while True:
        started = work.start()
        found.starts += 1
        case = f"seed {seed}, {work.name}, start {found.starts}"
        try:
            kill, misses = _blows(work, started, left, found, misses)
            case += f", {kill}"
            code = started.wait()
            found.lingered = max(found.lingered, nobody_left(started))
            found.codes[str(code)] += 1
            done = work.ended(started, code, kill)
            print(f"{case}: exit code {code}, {len(left)} kills to go", flush=True)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}\n{started.said('err')[-3000:]}") from error
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}\n{started.said('err')[-3000:]}") from error
        finally:
            started.end()
        if done:
            try:
                work.check()
            except AssertionError as error:
                raise AssertionError(f"{case}, at the end: {error}") from error
            found.works += 1
            if not left:
                return found
            work.fresh()


def _blows(work: Work, started: Started, left: list[Kill], found: Storm, misses: int) -> tuple[Kill | None, int]:
    """Blows until one that ends the command, which is returned, or until the command has ended."""
    began, states = time.monotonic(), work.states(started)
    while left:
        _bring_up(left, states)
        kill = left[-1]
        if not _reached(work, started, states, kill, began) or not (victims := _victims(work, started, kill)):
            found.missed += 1
            if misses == 2:  # its moment does not come: take another one
                left[-1] = Kill(kill.who, kill.sign, "time", kill.delay % 1, kill.seconds)
            return None, (misses + 1) % 3
        place = next((name for name, there in states.items() if there()), "elsewhere")
        left.pop()
        misses = 0
        _hit(victims, kill)
        found.kills += 1
        found.victims[f"{kill.who} {kill.sign}"] += 1
        found.moments[place] += 1
        if kill.sign != PAUSE:
            return kill, 0
        began = time.monotonic()
    return None, 0


def _bring_up(left: list[Kill], states: dict) -> None:
    """Make the next kill one whose moment this start can have, if there is any."""
    place = next((i for i in reversed(range(len(left))) if left[i].when in {"time", *states}), -1)
    left.append(left.pop(place))


def _reached(work: Work, started: Started, states: dict, kill: Kill, began: float) -> bool:
    """Wait for the kill's moment; whether it came before the end."""
    there = states.get(kill.when, lambda: kill.when == "time")
    while not there():
        if started.for_folders() or time.monotonic() > began + ENDS:
            return False
        time.sleep(POLL)
    until = (began if kill.when == "time" else time.monotonic()) + kill.delay
    while not started.for_folders():
        if time.monotonic() >= until and _victims(work, started, kill):
            return True
        time.sleep(POLL)
    return False


def _victims(work: Work, started: Started, kill: Kill) -> list[int]:
    if kill.who == "all":
        return sorted(started.processes())
    return work.roles(started).get(kill.who, [])


def _hit(victims: list[int], kill: Kill) -> None:
    sign = signal.SIGSTOP if kill.sign == PAUSE else getattr(signal, f"SIG{kill.sign}")
    for pid in victims:
        with _gone():
            os.kill(pid, sign)
    if kill.seconds:
        time.sleep(kill.seconds)
        for pid in victims:
            with _gone():
                os.kill(pid, signal.SIGCONT)


def _marked(entry: Path, marks: list[bytes]) -> bool:
    if int(entry.name) == os.getpid():
        return False
    try:
        texts = [(entry / name).read_bytes() for name in ("environ", "cmdline")]
        texts += [os.fsencode(os.readlink(file)) for file in (entry / "fd").iterdir()]
    except OSError:
        return False
    return any(mark in text for mark in marks for text in texts)


def nobody_left(started: Started, patience: float = 45.0) -> float:
    """Seconds until no process of the work is there."""
    began = time.monotonic()
    while left := started.processes():
        if time.monotonic() - began > patience:
            said = [
                Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")[:300] for pid in left if psutil.pid_exists(pid)
            ]
            raise AssertionError(f"processes {left} are left behind: {said}")
        time.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def nothing_left(folder: Path, forked: bool = True) -> Iterator[None]:
    """AssertionError if the block leaves a shared-memory segment, or a temporary file of the works in `folder`.

    But for two empty folders for each process that wandb was killed in: it makes them when it is imported.
    """
    before = _segments(forked)
    yield
    end = time.monotonic() + 20
    while (new := _segments(forked) - before) and time.monotonic() < end:  # others work here too
        time.sleep(0.5)
    assert not new, f"shared memory left behind: {new}"
    every = (path for place in folder.glob("*/tmp") for path in place.rglob("*"))
    left = [str(path) for path in every if not (re.search(r"wandb-\w+$", path.name) and not any(path.iterdir()))]
    assert not left, f"temporary files left behind: {left}"


def _segments(forked: bool) -> set[str]:
    """Shared memory; without the semaphores that multiprocessing makes in forks.py's forks alone, and clears up with us."""
    return {name for name in os.listdir("/dev/shm") if not (forked and name.startswith("sem.mp-"))}


def plan(rng: random.Random, count: int, choices: list[tuple[float, str, str, str, float, float]]) -> list[Kill]:
    """That many kills at random, each of (weight, who, sign, when, longest delay, seconds of a pause) once if it can be."""
    weights = [choice[0] for choice in choices]
    drawn = [*choices, *rng.choices(choices, weights, k=max(0, count - len(choices)))][:count]
    rng.shuffle(drawn)
    return [Kill(who, sign, when, rng.uniform(0, delay), seconds) for _, who, sign, when, delay, seconds in drawn]
