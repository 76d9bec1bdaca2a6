"""Read from any fsspec URL, with time-outs that hold, retries and concurrent ranges.

Endpoints, credentials and connection pools are fsspec's own settings (AWS_ENDPOINT_URL, AWS_PROFILE, FSSPEC_S3_KEY, ...,
~/.config/fsspec); here are only data.request_timeout, data.retries and the cache (range_cache.py). A call gives up after
(retries + 1) * timeout seconds in which nothing arrived, however many ranges are waiting.
"""

import asyncio
import errno
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

from clip4vla.config import DataSources
from clip4vla.errors import one_line
from clip4vla.io.local_files import local_files
from clip4vla.io.range_cache import node_cache

CONCURRENT = 32  # requests in flight of one call
GAP = 64 << 10  # bytes between two ranges that are read along: 1 ms at 64 MB/s, less than a request takes
PIECE = 8 << 20  # bytes of the largest request
PAUSE, LONGEST = 0.25, 30.0  # s before the first retry, doubled for each further one; times 0.5 to 1.5
DEFAULT = DataSources()
_random = random.SystemRandom()  # the global generator belongs to the run
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, ImportError)
Answer = TypeVar("Answer")


class Range(NamedTuple):
    """Names bytes start..end of a file whose content has the sha256 `version`."""

    path: str
    version: str
    start: int
    end: int


def open_folder(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open a URL or local path: (file system, path in it); raises ValueError or ImportError for an unknown protocol."""
    if "://" not in url:  # fsspec takes data:x and a::b for URLs too
        return LocalFileSystem(), str(Path(url).absolute())
    return fsspec.core.url_to_fs(url)


class Reader:
    """Reads byte ranges of shards, through data.cache if they are remote."""

    def __init__(self, fs: fsspec.AbstractFileSystem, cfg: DataSources):
        self.fs, self.cfg = fs, cfg
        self.cache = node_cache(cfg.cache, cfg.cache_gb) if cfg.cache and not _is_local(fs) else None

    def read(self, ranges: Sequence[Range], intact: Callable[[int, bytes], bool]) -> Iterable[bytes | BaseException]:
        """Read the bytes of each range, or the exception that says why they could not be had.

        intact(i, bytes) says whether range i came as it should: only such bytes are cached, and what the cache gives
        otherwise is dropped there and read from its source.
        """
        if self.cache is None:
            return self._fetch(ranges)
        names = [f"{r.version} {r.start} {r.end}" for r in ranges]
        blobs: list[Any] = [self.cache.get(name) for name in names]
        missing = [i for i, blob in enumerate(blobs) if blob is None or not intact(i, blob)]
        for i, blob in zip(missing, self._fetch([ranges[i] for i in missing]), strict=True):
            if blobs[i] is not None:
                self.cache.drop(names[i])
            blobs[i] = blob
        good = [i for i in missing if isinstance(blobs[i], bytes) and intact(i, blobs[i])]
        self.cache.put({names[i]: blobs[i] for i in good})
        return blobs

    def _fetch(self, ranges: Sequence[Range]) -> Iterable[bytes | BaseException]:
        paths, starts, ends = [r.path for r in ranges], [r.start for r in ranges], [r.end for r in ranges]
        return read_ranges(self.fs, paths, starts, ends, self.cfg)


def read_ranges(
    fs: fsspec.AbstractFileSystem, paths: list[str], starts: list[int], ends: list[int], cfg: DataSources = DEFAULT
) -> Iterable[bytes | BaseException]:
    """Read bytes starts[i]..ends[i] of each paths[i], or give an exception in their place.

    On remote file systems neighbours are one request, requests are concurrent, an attempt takes cfg.request_timeout seconds
    at most, and what may heal (no answer, 5xx, a cut connection, fewer bytes than asked) is tried cfg.retries times more.
    """
    if _is_local(fs):
        return local_files.read(paths, starts, ends)
    requests = _merged(paths, starts, ends)
    out: list[Any] = [None] * len(paths)
    try:
        answers = _run(fs, _all(fs, requests, cfg))
    except Exception as error:  # a file system that cannot even start
        answers = [error] * len(requests)
    for request, answer in zip(requests, answers, strict=True):
        for i in request.wanted:
            out[i] = _part(answer, starts[i] - request.start, ends[i] - starts[i])
    return out


def read_file(fs: fsspec.AbstractFileSystem, path: str, cfg: DataSources = DEFAULT) -> bytes:
    """Read a whole file, in pieces so that the time-out fits any size; raises FileNotFoundError, else OSError with one line."""
    if _is_local(fs):
        return fs.cat_file(path)
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == PIECE:
        start = len(pieces) * PIECE
        try:
            pieces.append(call(fs, "cat_file", path, start=start, end=start + PIECE, cfg=cfg))
        except OSError as error:
            if not _is_past_end(error.__cause__):
                raise
            break  # the file ended with the piece before
    return b"".join(pieces)


def exists(fs: fsspec.AbstractFileSystem, path: str, cfg: DataSources = DEFAULT) -> bool:
    """Check that a file is there and not empty; unlike fsspec's, it does not take an unanswered question for a no."""
    try:
        return bool(call(fs, "cat_file", path, start=0, end=1, cfg=cfg))
    except FileNotFoundError:
        return False


def size(fs: fsspec.AbstractFileSystem, path: str, cfg: DataSources = DEFAULT) -> int:
    """Return the bytes that a file has; raises FileNotFoundError or OSError."""
    return int((fs.info(path) if _is_local(fs) else call(fs, "info", path, cfg=cfg))["size"])


def call(
    fs: fsspec.AbstractFileSystem, method: str, *args: Any, cfg: DataSources, seconds: float = 0, **words: Any
) -> Any:
    """Call fs.method(*args, **words), each attempt for at most `seconds`, which defaults to cfg.request_timeout.

    Raises FileNotFoundError or OSError.
    """
    patience = _Patience(cfg, seconds or cfg.request_timeout)
    try:
        return _run(fs, _retried(lambda: _invoke(fs, method, *args, **words), patience))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(line(error)) from error


class _Request(NamedTuple):
    """Asks for bytes start..end of a file, and keeps the numbers of the ranges in it."""

    path: str
    start: int
    end: int
    wanted: list[int]


def _merged(paths: list[str], starts: list[int], ends: list[int]) -> list[_Request]:
    """Merge ranges of a file with at most GAP bytes between them into one request, up to PIECE bytes."""
    requests: list[_Request] = []
    for i in sorted(range(len(paths)), key=lambda i: (paths[i], starts[i])):
        path, start, end, wanted = requests[-1] if requests else ("", 0, 0, [])
        if path == paths[i] and starts[i] - end <= GAP and ends[i] - start <= PIECE:
            requests[-1] = _Request(path, start, max(end, ends[i]), [*wanted, i])
        else:
            requests.append(_Request(paths[i], starts[i], ends[i], [i]))
    return requests


class _Patience:
    """Decides when to give up: an attempt after `seconds`, the call after (retries + 1) * seconds without any answer."""

    def __init__(self, cfg: DataSources, seconds: float):
        self.seconds, self.retries = seconds, cfg.retries
        self.renew()

    def renew(self) -> None:
        """Start the call's time again, as something arrived."""
        self.end = time.monotonic() + (self.retries + 1) * self.seconds

    def left(self) -> float:
        """Return the seconds until the call is given up."""
        return self.end - time.monotonic()


async def _all(fs: Any, requests: list[_Request], cfg: DataSources) -> list[bytes | BaseException]:
    """Fetch the bytes of every request, or its exception."""
    patience, gate = _Patience(cfg, cfg.request_timeout), asyncio.Semaphore(CONCURRENT)

    async def one(request: _Request) -> bytes:
        async with gate:
            return await _retried(lambda: _bytes(fs, request), patience)

    return await asyncio.gather(*map(one, requests), return_exceptions=True)


async def _bytes(fs: Any, request: _Request) -> bytes:
    """Attempt a request once; every byte or an exception."""
    blob = await _invoke(fs, "cat_file", request.path, start=request.start, end=request.end)
    asked = request.end - request.start
    if len(blob) > asked:
        raise ValueError(f"{len(blob)} bytes instead of {asked}: the server does not know byte ranges")
    if len(blob) < asked:
        raise _Short(blob)
    return blob


class _Short(OSError):
    """Holds the bytes of an answer that has fewer than asked for."""


def _part(answer: bytes | BaseException, at: int, size: int) -> bytes | BaseException:
    """Cut one range out of a request's answer; of a file that is too short, what is there is good."""
    if isinstance(answer, BaseException) and not isinstance(answer, _Short):
        return answer
    part = (answer.args[0] if isinstance(answer, _Short) else answer)[at : at + size]
    return part if len(part) == size else OSError(f"{len(part)} of {size} bytes")


async def _retried(attempt: Callable[[], Awaitable[Answer]], patience: _Patience) -> Answer:
    """Attempt until there is an answer, and return it; raises the last attempt's exception."""
    tries = 0
    while True:
        try:
            answer = await _within(attempt(), patience)
            patience.renew()
            return answer
        except Exception as error:
            pause = min(LONGEST, PAUSE * 2**tries) * _random.uniform(0.5, 1.5)
            if tries == patience.retries or pause > patience.left() or not _may_heal(error):
                raise
        await asyncio.sleep(pause)
        tries += 1


async def _within(work: Awaitable[Answer], patience: _Patience) -> Answer:
    """Await work; TimeoutError when it takes too long, even if it does not let itself be cancelled (wait_for would wait)."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=max(0, min(patience.seconds, patience.left())))
    if done:
        return task.result()
    task.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody asks any more
    task.cancel()
    raise TimeoutError(f"no answer in {patience.seconds:g} s")


async def _invoke(fs: Any, method: str, *args: Any, **words: Any) -> Any:
    """Run a file system's method: its coroutine, or in a daemon thread, so that a call that hangs does not hold up the exit."""
    if fs.async_impl:
        return await getattr(fs, f"_{method}")(*args, **words)
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def work() -> None:
        outcome: tuple[Any, Exception | None]
        try:
            outcome = getattr(fs, method)(*args, **words), None
        except Exception as error:
            outcome = None, error
        loop.call_soon_threadsafe(_settle, future, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if not future.done():  # given up meanwhile
        future.set_exception(error) if error else future.set_result(result)


def _run(fs: Any, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine in fsspec's own event loop, from any other thread."""
    loop = fs.loop if fs.async_impl else fsspec.asyn.get_loop()
    return asyncio.run_coroutine_threadsafe(work, loop).result()


def _may_heal(error: BaseException) -> bool:
    """Decide whether another attempt makes sense: not for 4xx, nor for a mistake in the call."""
    status = _status(error)
    if status:
        return status >= 500 or status in (408, 429)
    refused = getattr(error, "errno", None) in (errno.EINVAL, errno.ENOSYS, errno.ENOSPC)  # s3fs: 400 and 416, 501
    return not (refused or isinstance(error, _FINAL))


def _status(error: BaseException | None) -> int:
    """Find the HTTP status in an aiohttp or gcsfs error, else 0."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else 0


def _is_past_end(error: BaseException | None) -> bool:
    """Tell whether a range began after the end of the file: 416, which s3fs calls EINVAL."""
    return _status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL


def line(error: BaseException) -> str:
    kind, text = type(error).__name__, one_line(error, 300)
    return kind if text == kind else f"{kind}: {text}"


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)
