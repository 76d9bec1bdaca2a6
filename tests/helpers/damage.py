"""Damage to a folder of shards, each kind by a function."""

import io
import json
import os
import random
import tarfile

import indexes
from faults._tars import member
from PIL import Image

from clip4vla.data.shards import HEADER, write_shard


def flipped_bit(folder):
    flip(tar(folder), place(folder, 2, "fbank.jpg")[0] + 40)


def truncated(folder):
    data = tar(folder).read_bytes()
    tar(folder).write_bytes(data[: place(folder, 9, "frames.jpg")[0] + 100])


def damaged_header(folder):
    flip(tar(folder), place(folder, 4, "json")[0] - 512 + 10)


def no_tar(folder):
    tar(folder).unlink()


def rubbish(folder):
    tar(folder).write_bytes(random.Random(0).randbytes(50_000))


def empty(folder):
    tar(folder).write_bytes(b"")


def endless(folder):
    path = tar(folder)
    path.unlink()
    path.symlink_to("/dev/zero")


def a_terabyte(folder):
    os.truncate(tar(folder), 2**40)


def pax_of_digits(folder):
    """In front of the tenth sample, which moves the others; tarfile would read it for half a minute."""
    data, at = tar(folder).read_bytes(), place(folder, 9, "json")[0] - HEADER
    tar(folder).write_bytes(data[:at] + member("x", b"1" * 10**5, tarfile.XHDTYPE) + data[at:])


def wrong_sha256(folder):
    tree = index(folder)
    tree["shards"][0]["sha256"] = "0" * 64
    indexes.write(folder, tree)


def wrong_crc32(folder):
    tree = index(folder)
    tree["shards"][0]["entries"][5][1]["json"][2] ^= 1
    indexes.write(folder, tree)


def wrong_offset(folder):
    tree = index(folder)
    tree["shards"][0]["entries"][5][1]["frames.jpg"][0] += 512
    indexes.write(folder, tree)


def member_not_in_index(folder):
    tree = index(folder)
    del tree["shards"][0]["entries"][1][1]["frames.jpg"]
    indexes.write(folder, tree)


def sample_not_in_index(folder):
    tree = index(folder)
    del tree["shards"][0]["entries"][1]
    tree["shards"][0]["samples"] -= 1
    indexes.write(folder, tree)


def malformed_entry(folder):
    tree = index(folder)
    tree["shards"][0]["entries"][1] = ["key", {"json": [0]}]
    indexes.write(folder, tree)


def member_not_in_tar(folder):
    old = index(folder)
    rewrite(folder, lambda content: list(content.values())[6].pop("fbank.jpg"))
    indexes.write(folder, old)


def member_missing(folder):
    rewrite(folder, lambda content: list(content.values())[6].pop("frames.jpg"))


def not_json(folder):
    rewrite(folder, lambda content: list(content.values())[0].update(json=b'{"id": "\xff'))


def half_a_picture(folder):
    def cut(content):
        members = list(content.values())[7]
        members["frames.jpg"] = members["frames.jpg"][:1500]

    rewrite(folder, cut)


def a_picture_of_another_size(folder):
    out = io.BytesIO()
    Image.new("RGB", (224, 100)).save(out, "JPEG")
    rewrite(folder, lambda content: list(content.values())[7].update({"frames.jpg": out.getvalue()}))


def wrong_counts(folder):
    tree = index(folder)
    tree["counts"]["seconds"] += 5
    indexes.write(folder, tree)


def tar(folder, number=0):
    return sorted(folder.glob("*.tar"))[number]


def index(folder):
    return indexes.read(folder)


def samples(folder, number=0):
    """Key and members of each sample of a tar, by Python's tarfile."""
    found = {}
    with tarfile.open(tar(folder, number)) as file:
        for info in file:
            key, _, ext = info.name.partition(".")
            found.setdefault(key, {})[ext] = file.extractfile(info).read()
    return found


def rewrite(folder, change, number=0):
    """A shard and index that agree, after `change` of its samples: damage that checksums do not see."""
    tree, content = index(folder), samples(folder, number)
    change(content)
    tree["shards"][number] = write_shard(tar(folder, number), content.items())
    indexes.write(folder, tree)


def edit(folder, entry=3, **fields):
    """Fields of one sample's json changed (None as ...: taken away)."""

    def change(content):
        members = list(content.values())[entry]
        meta = json.loads(members["json"]) | fields
        members["json"] = json.dumps({k: v for k, v in meta.items() if v is not ...}).encode()

    rewrite(folder, change)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def place(folder, entry, ext):
    return index(folder)["shards"][0]["entries"][entry][1][ext]
