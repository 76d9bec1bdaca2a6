"""Show how far data preparation is, in one line, and estimate how far it has to go."""

import functools
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from clip4vla.media.worker_pool import WorkerStatus, run_units
from data_prep.manifest import ManifestRow

EVERY = 30.0  # s between lines where there is no terminal
TRIED = 32  # samples made for an estimate
Make = Callable[[ManifestRow], tuple[dict[str, Any], dict[str, bytes]]]


class Progress:
    """Show items/s, hours of media a minute, failures and time left: a bar on a terminal, else a line every 30 s."""

    def __init__(self, total: int):
        self.total, self.start, self.printed_at = total, time.monotonic(), time.monotonic()
        self.items = self.seconds = self.failed = 0
        self.made = 0  # items that were not there yet: rates are of these
        self.bar = tqdm(total=total, unit="clip", disable=None, file=sys.stderr, bar_format="{l_bar}{bar}| {desc}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if error[0] is None:
            print(self.line(self.items, self.made, self.seconds, self.failed), file=sys.stderr, flush=True)

    def add(self, items: int, note: dict[str, Any]) -> None:
        """Count a unit that is finished, or was so before."""
        self.items += items
        self.failed += len(note["quarantined"])
        if "kept" not in note:
            self.made += items
            self.seconds += note["seconds"]

    def tick(self, statuses: list[WorkerStatus]) -> None:
        """Show the state, with what the workers have done of their units."""
        items, seconds, failed = (int(sum(part)) for part in zip(*(status.counts for status in statuses), strict=True))
        line = self.line(self.items + items, self.made + items, self.seconds + seconds, self.failed + failed)
        if not self.bar.disable:
            self.bar.n, self.bar.desc = self.items + items, line
            self.bar.refresh()
        elif time.monotonic() - self.printed_at > EVERY:
            self.printed_at = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def line(self, items: int, made: int, seconds: float, failed: int) -> str:
        """Return the line to show; rates are since the start."""
        passed = time.monotonic() - self.start
        rate = made / passed
        left = tqdm.format_interval((self.total - items) / rate) if rate else "?"
        hours = seconds / 60 / passed
        return f"{items} of {self.total} clips, {rate:.1f}/s, {hours:.2f} h of media/min, {failed} failed, {left} left"


def estimate(rows: list[ManifestRow], make: Make, per_shard: int, limit: float) -> str:
    """Estimate size and time from some rows picked at random (seed 0) and made, in a worker that may hang or crash."""
    tried = random.Random(0).sample(rows, min(TRIED, len(rows)))
    ((_, (size, seconds, failed, cpu)),) = run_units([tried], functools.partial(_try, make), 1, limit, lambda _: None)
    share = len(rows) / len(tried)
    first = f"; the first that fails: {failed[0]}" if failed else ""
    return (
        f"from {len(tried)} of {len(rows)} clips: {size * share / 1e9:.3g} GB in about {-(-len(rows) // per_shard)} shards, "
        f"{seconds * share / 3600:.3g} h of media, {len(failed) / len(tried):.0%} failing, {cpu * share / 3600:.2g} core hours"
        f"{first}"
    )


def _try(
    make: Make, tried: list[ManifestRow], failed_items: dict[int, str], status: WorkerStatus
) -> tuple[float, float, list[str], float]:
    """Make the rows; return (bytes in a tar, seconds of media, what failed and why, seconds of CPU)."""
    size, seconds, failed, began = 0, 0.0, [], time.process_time()
    for i, row in enumerate(tried):
        status.start(i)
        try:
            if i in failed_items:
                raise ValueError(failed_items[i])
            meta, members = make(row)
        except ValueError as error:
            failed.append(f"{row.media or row.picture}: {error}")
            continue
        parts = [len(str(meta)), *map(len, members.values())]
        size += sum(512 + -(-part // 512) * 512 for part in parts)  # a header, and padding
        seconds += meta["duration"]
    return size, seconds, failed, time.process_time() - began
