"""local_files.py: files kept open give what opening them for each range would give, and are closed again."""

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip4vla.io import local_files
from clip4vla.io.local_files import LocalFiles

DATA = [random.Random(i).randbytes(5000) for i in range(3)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i, data in enumerate(DATA):
        (folder / str(i)).write_bytes(data)
    return [str(folder / str(i)) for i in range(3)]


def read(files, paths, starts, ends):
    return list(files.read(paths, starts, ends))


def held(folder) -> int:
    """Descriptors of this process on files of a folder, those that were removed included."""
    links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(f"{folder}/") for link in links if link.is_symlink())


@settings(max_examples=50, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6000), st.integers(0, 3000)), max_size=20))
def test_any_ranges_are_slices_of_the_files(paths, ranges):
    files, (numbers, starts, sizes) = LocalFiles(), zip(*ranges, strict=True) if ranges else ((), (), ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "KEPT", 2)  # fewer than there are files and ranges
        got = read(files, [paths[i] for i in numbers], starts, [a + n for a, n in zip(starts, sizes, strict=True)])
    assert got == [DATA[i][start : start + size] for i, start, size in ranges]


def test_a_file_replaced_truncated_removed_or_come_back_is_read_as_it_is(tmp_path):
    files, path = LocalFiles(), tmp_path / "a"
    twice = [str(path)] * 2, [0, 2], [2, 6]

    def missing(files=files):
        return [str(error) for error in read(files, *twice) if isinstance(error, FileNotFoundError)]

    assert len(missing()) == 2 and str(path) in missing()[0]
    path.write_bytes(b"abcdef")
    assert read(files, *twice) == [b"ab", b"cdef"]
    (tmp_path / "b").write_bytes(b"ghijkl")
    (tmp_path / "b").replace(path)
    assert read(files, *twice) == [b"gh", b"ijkl"]
    os.truncate(path, 3)
    assert read(files, *twice) == [b"gh", b"i"]
    path.unlink()
    assert len(missing()) == 2
    path.write_bytes(b"mnopqr")
    assert read(files, *twice) == [b"mn", b"opqr"] and held(tmp_path) == 1
    del files, missing
    assert held(tmp_path) == 0


def test_few_files_stay_open_and_hostile_ranges_cost_none(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "KEPT", 4)
    names = [str(tmp_path / str(i)) for i in range(10)]
    for name in names:
        Path(name).write_text(name, encoding="utf-8")
    files = LocalFiles()
    assert read(files, names, [0] * 10, [1000] * 10) == [name.encode() for name in names] and held(tmp_path) == 4
    wrong = read(files, [names[0], names[0], "/nothing\0", str(tmp_path)], [0, 2**70, 0, 0], [2**62, 2**70 + 1, 1, 1])
    assert [isinstance(answer, Exception) for answer in wrong] == [True] * 4 and held(tmp_path) <= 4


def test_a_descriptor_that_became_stale_is_opened_once_more(paths, monkeypatch):
    files, pread, failures = LocalFiles(), os.pread, []
    first = read(files, paths[:1], [0], [9])

    def stale(fd, size, at):
        if len(failures) < 1:
            failures.append(fd)
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(fd, size, at)

    monkeypatch.setattr(os, "pread", stale)
    assert read(files, paths[:1], [0], [9]) == first and failures
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(-1, size, at))
    (error,) = read(files, paths[:1], [0], [9])
    assert isinstance(error, OSError) and error.errno == errno.EBADF


def test_the_kernel_knows_of_every_range_before_one_is_waited_for_and_short_reads_go_on(paths, monkeypatch):
    """NFS sends a request for each; and may answer in parts."""
    files, done, pread, fadvise = LocalFiles(), [], os.pread, os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: (done.append(words[1:]), fadvise(*words)))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: (done.append(at), pread(fd, min(size, 7), at))[1])
    assert read(files, paths, [0, 10, 20], [9, 30, 25]) == [DATA[0][:9], DATA[1][10:30], DATA[2][20:25]]
    ahead = os.POSIX_FADV_WILLNEED
    assert done[:3] == [(0, 9, ahead), (10, 20, ahead), (20, 5, ahead)] and done[3:] == [0, 7, 10, 17, 24, 20]
