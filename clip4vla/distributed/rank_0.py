"""Work that only rank 0 does while the other ranks wait, however long it takes."""

import time
from collections.abc import Callable
from pickle import PickleError
from typing import Any

from safetensors import SafetensorError

from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import one_line

# torch and safetensors have their own for a full disk, DeepSpeed has many for what it cannot read, fsspec one for s3fs missing
FAILURES = (OSError, RuntimeError, ValueError, LookupError, AssertionError, ImportError, PickleError, SafetensorError)
ProgressCallback = Callable[[str], None]  # says where a long piece of work is, see run_on_rank_0


def run_on_rank_0(work: Callable[[ProgressCallback], Any]) -> tuple[Any, str]:
    """Run work on rank 0 while the other ranks wait, and return (its result, why it failed or "") on all ranks.

    work(passed) calls passed(place) with each place it reaches, a line of text. The other ranks report the same places to
    their watchdogs, so train.hang_timeout_minutes counts from the last one on all ranks.
    """
    if collectives.rank() > 0:
        return _outcome_from_rank_0()
    try:
        outcome = work(_pass_to_all_ranks), ""
    except FAILURES as error:
        outcome = None, one_line(error)
    return collectives.all_gather_objects(outcome)[0]


def _pass_to_all_ranks(place: str) -> None:
    """Report a place on every rank; at most once a second, since it is a collective, which must not slow down the work."""
    if time.monotonic() - watch.since > 1:
        collectives.all_gather_objects(place)
        watch.progress(place)


def _outcome_from_rank_0() -> tuple[Any, str]:
    """Report the places that rank 0 passes until it sends its outcome, which is not a string, and return that."""
    while True:
        message = collectives.all_gather_objects(None)[0]
        if not isinstance(message, str):
            return message
        watch.progress(message)
