"""Tars: mutated under an unchanged index, and hostile ones by name, through the reader, check.py's reading and its repair."""

import contextlib
import io
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from clip4vla.config import FramesConfig
from clip4vla.data.shards import HEADER, CorruptSample, ShardFolder
from clip4vla.errors import UserError
from data_prep.checks.folders import check, find, inspect
from data_prep.checks.shard import Rules, ShardCheckJob, check_shard
from faults._mutate import mutate
from faults._pictures import BATCH, SPEC, loader_of, shard_of, strips

TAR = "s-t-000000.tar"
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**60)}
RULES = Rules("s", "t", SPEC, FramesConfig().size)


def whole(folder: Path) -> ShardFolder:
    """A shard of a batch, intact."""
    good = strips()
    return shard_of(folder, [{"fbank.jpg": good["fbank.jpg"], "frames.jpg": good["frames.jpg"]} for _ in range(BATCH)])


def mutated(folder: Path):
    """A case: the tar mutated, anywhere or in its headers; what is read is what was written, or counted as corrupt."""
    (folder / "whole").mkdir()
    good = whole(folder / "whole")
    data, samples = (folder / "whole" / TAR).read_bytes(), good.read([(0, n) for n in range(BATCH)])

    def case(number: int, rng: random.Random) -> str:
        place = folder / f"{number}"
        shutil.copytree(folder / "whole", place)
        (place / TAR).write_bytes(in_header(data, rng) if number % 2 else mutate(data, rng))
        try:
            return examined(place, samples, repairs=number % 10 == 0)
        finally:
            shutil.rmtree(place)

    return case


def in_header(data: bytes, rng: random.Random) -> bytes:
    """One of the headers mutated, and its checksum made right in half the cases."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = rng.choice([info.offset for info in tar])
    head = bytearray(mutate(data[at : at + HEADER], rng)[:HEADER].ljust(HEADER, b"\0"))
    if rng.random() < 0.3:
        head[156] = rng.choice(b"0123456789LKSxgVXA\0")  # type of member
    if rng.random() < 0.5:
        head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
    return data[:at] + bytes(head) + data[at + HEADER :]


def examined(place: Path, samples: list[dict], repairs: bool) -> str:
    """Read by all that reads tars; the reader gives the bytes that were written or none, check finds what it lacks."""
    folder = ShardFolder.open(str(place))
    found = folder.read([(0, n) for n in range(BATCH)])
    corrupt = [n for n, sample in enumerate(found) if isinstance(sample, CorruptSample)]
    assert all(found[n] == samples[n] for n in range(BATCH) if n not in corrupt)
    tally, findings = check_shard(ShardCheckJob(str(place), 0, folder.shards[0], RULES, None))
    assert findings or not corrupt
    assert len(tally) >= BATCH - len(corrupt), findings
    if repairs:
        repaired(place)
    return "counted" if corrupt or findings else "correct"


def repaired(place: Path) -> None:
    """check.py --repair leaves a folder without findings, or says in one line that nothing of it is left."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            inspect([str(place)], None, True)
        except UserError as error:
            assert "is empty" in str(error), error
        else:
            assert not [f for report in check(find([str(place)]), None) for f in report.findings]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> bytes:
    """Header and data of a member as any tar program may have written it."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, len(data), pax
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    return info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % HEADER)


def claiming(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of a size that does not follow, negative or huge, with the right checksum."""
    head = bytearray(member(name, b"x", kind)[:HEADER])
    head[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else (size & (1 << 96) - 1).to_bytes(12, "big")
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
    return bytes(head)


class Code:
    """What a pickle of it does when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.canary),)


def hostile(canary: Path) -> dict[str, bytes]:
    """Members to put before those of a shard, by name."""
    code = pickle.dumps(Code(canary))
    return {
        "symbolic_link": member("0000.json", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        "hard_link": member("0000.frames.jpg", kind=tarfile.LNKTYPE, link="../../etc/passwd"),
        "parent": member("../../../0000.json", b"{}"),
        "absolute": member(str(canary), b"{}"),
        "device": member("0000.json", kind=tarfile.CHRTYPE),
        "pipe": member("0000.json", kind=tarfile.FIFOTYPE),
        "folder": member("0000.json", kind=tarfile.DIRTYPE),
        "unknown_type": member("0000.json", kind=b"Z"),
        "size_8_EiB": claiming("0000.json", 2**63),
        "size_negative": claiming("0000.json", -512),
        "size_negative_behind_another": member("0000.x", b"{}") + claiming("0000.json", -512),
        "size_negative_of_pax": claiming("0000.json", -512, tarfile.XHDTYPE),
        "size_negative_of_long_name": claiming("0000.json", -1024, tarfile.GNUTYPE_LONGNAME),
        "long_name_claims_8_EiB": claiming("0000.json", 2**63, tarfile.GNUTYPE_LONGNAME),
        "long_name_1_MB": member("n" * 10**6, b"{}"),
        "pax_size": member("0000.json", b"{}", size=str(10**30)),
        "pax_path": member("0000.json", b"{}", path="../../../etc/passwd"),
        "pax_1_MB": member("0000.json", b"{}", comment="x" * 10**6),
        "pax_100000_records": member("0000.json", b"{}", **{f"k{i}": "v" for i in range(10**5)}),
        "pax_1_MB_of_digits": member("x", b"1" * 10**6, kind=tarfile.XHDTYPE),
        "global_pax_1_MB_of_digits": member("x", b"1" * 10**6, kind=tarfile.XGLTYPE),
        "400_pax_headers": 400 * member("x", kind=tarfile.XHDTYPE),
        "400_global_pax_headers": 400 * member("x", kind=tarfile.XGLTYPE),
        "400_long_names": 400 * member("x", b"n" * 200, kind=tarfile.GNUTYPE_LONGNAME),
        "pax_of_itself": member("x", b"0 path=x\n0 path=x\n", kind=tarfile.XHDTYPE),
        "sparse_1_EiB": claiming("0000.json", 2**60, tarfile.GNUTYPE_SPARSE),
        "sparse_of_pax": member("0000.json", b"1\n0\n1\n" + bytes(506), **SPARSE),
        "20000_members": b"".join(member(f"{i}.x") for i in range(20000)),
        "same_name_again": member("0000.json", b"{}"),
        "pickle": member("0000.pickle", code) + member("0000.pyd", code) + member("0000.pth", code) + member("0000.pt", code),
        "zeros_first": bytes(2 * HEADER),
        "compressed": b"\x1f\x8b\x08" + bytes(509),
    }  # fmt: skip


def survives(folder: Path, name: str, data: bytes, canary: Path) -> str:
    """The hostile members before a whole shard's: everything reads on, nothing is run, made or written elsewhere."""
    good = whole(folder)
    samples, tar = good.read([(0, n) for n in range(BATCH)]), folder / TAR
    tar.write_bytes(data + tar.read_bytes())
    before = sorted(path.relative_to(folder.parent) for path in folder.parent.rglob("*"))
    outcome = examined(folder, samples, repairs=False)
    loader_of(good, folder / "corrupt.jsonl").batch(0)
    repaired(folder)
    assert not canary.exists(), name
    new = {p.relative_to(folder.parent) for p in folder.parent.rglob("*")} - set(before)
    assert {path.parts[0] for path in new} <= {folder.name}, new
    return outcome
