"""Many cases of one target in worker processes: what came of each, how long it took, how much memory."""

import multiprocessing
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from clip4vla.errors import UserError
from clip4vla.media.worker_pool import NO_ITEM, WorkerStatus, run_units

CHUNK = 125  # cases of a process before its memory is looked at


def trial(
    do: Callable[[int, random.Random], str | None], cases: int, seed: int, limit: float = 20, mib: int = 1024
) -> dict:
    """Run do(number, rng) for each number; the figures, or AssertionError naming seed and case.

    do returns "correct" (None counts as such) or "counted"; UserError and ValueError are the one-line refusals that callers
    count. Anything else, more than `limit` seconds, a dead process, or more than `mib` MiB on top of its start fails.
    """
    chunks = [range(first, min(first + CHUNK, cases)) for first in range(0, cases, CHUNK)]

    def chunk(numbers: range, failed_items: dict[int, str], status: WorkerStatus) -> dict[str, Any]:
        return _chunk(do, numbers, seed, failed_items, status)

    results = [result for _, result in run_units(chunks, chunk, 2, limit, lambda statuses: None)]
    bad = [line for result in results for line in result["bad"]]
    assert not bad, f"seed {seed}: {len(bad)} of {cases} not survived: " + "\n".join(bad[:20])
    peak, slowest = max(r["mib"] for r in results), max(r["slowest"] for r in results)
    assert peak <= mib, f"seed {seed}: {peak} MiB on top, more than {mib}"
    outcomes = sum((r["outcomes"] for r in results), Counter())
    return {"cases": cases, **dict(sorted(outcomes.items())), "slowest_s": slowest, "peak_mib": peak, "bound_mib": mib}


def _chunk(do, numbers: range, seed: int, failed_items: dict[int, str], status: WorkerStatus) -> dict[str, Any]:
    """Outcomes of some cases in this process; memory is the growth of its largest resident set."""
    multiprocessing.current_process()._config["daemon"] = False  # check.py has processes of its own
    _forget_peak()
    outcomes, bad, slowest, before = Counter[str](), [], 0.0, _resident()
    for number in numbers:
        if number in failed_items:
            bad.append(f"case {number}: {failed_items[number]}")
            continue
        start = time.monotonic()
        status.start(number)
        outcomes[_outcome(do, number, seed, bad)] += 1
        slowest = max(slowest, time.monotonic() - start)
    status.start(NO_ITEM)
    grown = (_peak() - before) // 1024
    return {"outcomes": outcomes, "bad": bad, "slowest": round(slowest, 2), "mib": grown}


def _outcome(do, number: int, seed: int, bad: list[str]) -> str:
    try:
        return do(number, random.Random(f"{seed} {number}")) or "correct"
    except (UserError, ValueError) as error:
        text = str(error)
        if type(error) in (UserError, ValueError) and "\n" not in text.strip() and text.strip():
            return "refused"
        bad.append(f"case {number}: {type(error).__name__} of several lines: {text[:300]!r}")
    except Exception as error:
        at = error.__traceback__
        while at.tb_next and "site-packages" not in at.tb_next.tb_frame.f_code.co_filename:
            at = at.tb_next
        where = f"{at.tb_frame.f_code.co_filename.rsplit('/', 1)[1]}:{at.tb_lineno}"
        bad.append(f"case {number}: {type(error).__name__} at {where}: {str(error)[:300]}")
    return "failed"


def _forget_peak() -> None:
    with open(
        "/proc/self/clear_refs", "w", encoding="utf-8"
    ) as file:  # the peak since the last case, not since the fork
        file.write("5")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """KiB that the kernel tells of this process."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])


def capped(gib: float) -> None:
    """No more address space than there is now and so much on top: what asks for more gets an error, not the machine."""
    now = _status("VmSize") << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2**30),) * 2)
