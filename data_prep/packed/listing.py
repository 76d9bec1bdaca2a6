"""List the tars and tables that media_root names: one, those of a folder, those of a pattern; local or at any fsspec URL."""

import fnmatch
import functools
import importlib
import io
import json
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

from clip4vla.errors import UserError, one_line
from clip4vla.io import remote
from clip4vla.io.walk import is_hidden, walk
from clip4vla.media.source import RangeReader

HUB = "hf:"  # and USER/NAME or USER/NAME:CONFIG
HUB_PATIENCE = 20  # s until the hub counts as away
HUB_ADVICE = {  # by the names of exceptions, of httpx and of requests, which older versions of huggingface_hub use
    "check its name; a private or gated one is given after `hf auth login` (or HF_TOKEN=..) and its owner's leave": {
        "RepositoryNotFoundError",
        "DatasetNotFoundError",
    },
    "start again when the hub answers, or with HF_HUB_OFFLINE=1 to take what was downloaded before": {
        "ConnectionError",
        "TransportError",
        "HTTPError",
        "Timeout",
    },
}
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet", ".arrow")}  # by dataset
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
WILD = re.compile(r"[{*?\[]")
AHEAD = 1 << 22  # bytes that a remote file is read ahead
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def base_of(dataset: str, media_root: str) -> str:
    """Return the folder or URL to which the paths of a data set are relative: the part of media_root without a pattern."""
    if dataset == "parquet" and media_root.startswith(HUB):
        return str(_datasets("config").HF_DATASETS_CACHE)
    if dataset not in SUFFIXES or ("://" not in media_root and os.path.isdir(media_root)):
        return media_root
    if wild := WILD.search(media_root):
        return media_root[: wild.start()].rpartition("/")[0] or "."
    return posixpath.dirname(media_root) or "." if media_root.endswith(SUFFIXES[dataset]) else media_root.rstrip("/")


def list_archives(dataset: str, media_root: str) -> tuple[str, list[str], list[str]]:
    """Return the base, and the paths relative to it of all tars or tables, and of compressed tars beside them.

    Raises UserError if there is no tar or table.
    """
    base, suffixes = base_of(dataset, media_root), SUFFIXES[dataset]
    compressed: list[str] = []
    if dataset == "parquet" and media_root.startswith(HUB):
        names = _hub_files(media_root.removeprefix(HUB), base)
    elif base == media_root.rstrip("/") or base == media_root:
        below = _files_below(base)
        names = [name for name in below if name.endswith(suffixes)]
        compressed = [name for name in below if name.endswith(COMPRESSED)] if dataset == "webdataset" else []
        names = _without_caches(base, names) if dataset == "parquet" else names
    else:
        names = _expanded(base, media_root.removeprefix(base).lstrip("/"))
    if dataset == "webdataset":
        _must_not_be_compressed(
            names or [*_files_below(base), *([] if WILD.search(media_root) else [media_root])], media_root
        )
    if not names:
        raise UserError(
            f"media_root={media_root}: no {' or '.join(suffixes)} file there; it names one, a folder, a pattern such as "
            "FOLDER/{00000..00009}.tar, or the URL of one"
        )
    return base, names, compressed


def _must_not_be_compressed(names: list[str], media_root: str) -> None:
    """Raise UserError if one of the names is a compressed tar's: its members have no places to be read from."""
    if compressed := next((name for name in names if name.endswith(COMPRESSED)), ""):
        raise UserError(
            f"media_root={media_root}: {compressed} is compressed, and members are read from their places: "
            "unpack the tars to plain ones, as with gunzip or zstd -d; media are compressed already"
        )


def _expanded(base: str, pattern: str) -> list[str]:
    """List the paths that braces and wildcards stand for: numbers in braces as they are, * ? and [] by what is there."""
    import braceexpand  # comes with webdataset

    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"media_root={base}/{pattern}: {error}; {{00000..00009}} is a pattern") from None
    if any(re.search(r"[*?\[]", name) for name in names):
        there = _files_below(base)
        names = [path for name in names for path in there if fnmatch.fnmatchcase(path, name)]
    return names


def _files_below(base: str) -> list[str]:
    """List the paths of all files below a folder or URL, relative to it and sorted, without what is hidden."""
    if "://" not in base:
        paths = [os.path.join(folder, name) for folder, _, files in walk(base) for name in files]
        return sorted(os.path.relpath(path, base) for path in paths)
    fs, root = _opened(base, os.getpid())
    try:
        paths = remote.call(fs, "find", root, cfg=remote.DEFAULT)
    except OSError as error:
        raise UserError(f"media_root={base}: cannot be listed: {error}; check the URL and the credentials") from None
    names = [posixpath.relpath(path, root) for path in paths]
    return sorted(name for name in names if not any(map(is_hidden, name.split("/"))))


def _without_caches(base: str, names: list[str]) -> list[str]:
    """Leave out the caches that `datasets` keeps beside a data set saved on disk: its state.json lists the files of data."""
    kept: dict[str, set[str]] = {}
    for folder in {posixpath.dirname(name) for name in names}:
        try:
            state = json.loads(Path(base, folder, "state.json").read_text(encoding="utf-8"))
            kept[folder] = {item["filename"] for item in state["_data_files"]}
        except (OSError, ValueError, LookupError, TypeError):
            continue
    pairs = [(name, *posixpath.split(name)) for name in names]
    return [name for name, folder, file in pairs if folder not in kept or file in kept[folder]]


def _hub_files(name: str, base: str) -> list[str]:
    """List the Arrow files that the package `datasets` makes of a data set of the hub, below its cache; it downloads them."""
    repository, _, config = name.partition(":")
    datasets = _datasets()
    if (
        sys.modules.get("transformers", "") is None
    ):  # clip4vla/cli.py's doing; `datasets` imports it where it has a place
        del sys.modules["transformers"]
    try:
        if repository.count("/") <= 1 and not os.path.isdir(repository) and not datasets.config.HF_HUB_OFFLINE:
            # asked once, for `datasets` asks a hub that does not answer six times, in half a minute
            importlib.import_module("huggingface_hub").HfApi().dataset_info(repository, timeout=HUB_PATIENCE)
        splits = datasets.load_dataset(repository, config or None)
    except Exception as error:  # whatever its readers, its network and the hub raise
        raise UserError(f"media_root={HUB}{name}: {_hub_refusal(error)}") from None
    files = [item["filename"] for split in splits.values() for item in split.cache_files]
    return [os.path.relpath(file, base) for file in files]


def _hub_refusal(error: Exception) -> str:
    """Say what the hub, or the package `datasets`, answered, and what to do about it."""
    chain = [error, *filter(None, [error.__cause__])]
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    why = f"{type(error).__name__}: {one_line(error, 300).rstrip('.')}"
    for advice, those in HUB_ADVICE.items():
        if kinds & those:
            return f"{why.partition('. ')[0]}; {advice}"  # links to pages of help follow
    return f"{why}; name it as hf:USER/NAME or hf:USER/NAME:CONFIG"


def _datasets(module: str = "") -> Any:
    """Import the package `datasets`, which comes with clip4vla[hf]."""
    return importlib.import_module(f"datasets.{module}" if module else "datasets")


def split_of(name: str) -> str:
    """Return the split that a path's words name, the last one of them; train if none does."""
    words = re.split("[^a-z]+", name.lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "train")


def open_archive(base: str, name: str) -> BinaryIO:
    """Open a tar or table to be read anywhere; raises OSError, and UserError as read_remote does."""
    if "://" not in base:
        return open(os.path.join(base, name), "rb")
    return io.BufferedReader(_RemoteFile(base, name), AHEAD)


def read_remote(base: str, name: str, begin: int, size: int) -> bytes:
    """Read the bytes [begin, begin + size) of a file at a URL; UserError if it does not answer: the run can go on later."""
    fs, root = _opened(base, os.getpid())
    (data,) = remote.read_ranges(fs, [f"{root}/{name}"], [begin], [begin + size])
    if isinstance(data, BaseException):
        raise _unanswered(base, name, remote.line(data))
    return data


def _unanswered(base: str, name: str, why: str) -> UserError:
    return UserError(f"{base}/{name}: {why}; finished shards stay: start again when it answers")


@functools.cache
def _opened(url: str, process: int) -> tuple[Any, str]:
    """Open a URL for a process. A fork has its own, and keeps its parent's, which would be closed in the wrong event loop."""
    try:
        return remote.open_folder(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"media_root={url}: {error}") from None


class _RemoteFile(RangeReader):
    """Reads a file at a URL by ranges, with io/remote.py's time-outs and retries."""

    def __init__(self, base: str, name: str) -> None:
        self.base, self.name = base, name
        fs, root = _opened(base, os.getpid())
        try:
            self.size = remote.size(fs, f"{root}/{name}")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unanswered(base, name, one_line(error)) from None

    def fill(self, buffer: memoryview, at: int) -> int:
        """Read from the URL."""
        buffer[:] = read_remote(self.base, self.name, at, len(buffer))
        return len(buffer)
