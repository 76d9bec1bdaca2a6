"""Seeded damage to bytes, as disks, networks and enemies do it."""

import random

EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four of: flips, a cut, a hole, a repeat, a splice, zeros, an integer of extreme value."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice((_flip, _flip, _cut, _hole, _repeat, _splice, _zeros, _integer, _integer))(data, rng)
    return data


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A part of it, a short one as a rule; half of them begin among the first KB, where headers are."""
    at = rng.randrange(min(len(data), rng.choice((1024, len(data)))) or 1) if data else 0
    return at, min(len(data), at + rng.choice((1, 4, 16, 256, 4096)))


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 16)) if data else 0):
        out[_span(data, rng)[0]] ^= 1 << rng.randrange(8)
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _hole(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 3, 20)) + data[end:]


def _splice(data: bytes, rng: random.Random) -> bytes:
    (start, end), (other, _) = _span(data, rng), _span(data, rng)
    return data[:other] + data[start:end] + data[other + end - start :]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _integer(data: bytes, rng: random.Random) -> bytes:
    """One of EXTREME over what is there, in either order of bytes."""
    start, size = _span(data, rng)[0], rng.choice((1, 2, 4, 8))
    value = rng.choice(EXTREME) & (1 << 8 * size) - 1
    return data[:start] + value.to_bytes(size, rng.choice(("little", "big"))) + data[start + size :]
