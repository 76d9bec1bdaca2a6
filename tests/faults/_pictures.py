"""JPEG and PNG: mutated real ones and hostile ones by name, through Pillow, and through DALI with the right CRC-32."""

import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip4vla.config import DataSources, FramesConfig, MaskConfig, SpectrogramConfig
from clip4vla.data import preprocessing
from clip4vla.data.loader import Loader
from clip4vla.data.sampler import EvalSampler
from clip4vla.data.shards import INDEX, ShardFolder, write_index, write_shard
from clip4vla.media.images import Fit, read_picture
from faults._mutate import mutate

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>%s</text></svg>'
SPEC, SIZE, BATCH = SpectrogramConfig(), FramesConfig().size, 4


def pixels(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Smooth noise, which compresses as photos do."""
    rough = np.random.default_rng(width).integers(0, 256, (height // 8 + 1, width // 8 + 1, channels), dtype=np.uint8)
    return rough.repeat(8, 0).repeat(8, 1)[:height, :width]


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    """Bytes of a picture."""
    out, image = io.BytesIO(), Image.fromarray(pixels(*size))
    if mode == "I;16":
        image = Image.fromarray((pixels(*size, 1)[..., 0] * np.uint16(257)).astype(np.uint16))
    (image if mode == "I;16" else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def stills() -> dict[str, bytes]:
    """Real pictures of every kind that files come in, by name."""
    return {
        "rgb.jpg": encoded("JPEG"), "grey.jpg": encoded("JPEG", "L"), "cmyk.jpg": encoded("JPEG", "CMYK"),
        "progressive.jpg": encoded("JPEG", progressive=True), "rgb.png": encoded("PNG"), "alpha.png": encoded("PNG", "RGBA"),
        "palette.png": encoded("PNG", "P"), "deep.png": encoded("PNG", "I;16"), "bits.png": encoded("PNG", "1"),
        "still.gif": encoded("GIF", "P"), "plain.bmp": encoded("BMP"), "rgb.webp": encoded("WEBP"),
    }  # fmt: skip


def stills_mutated(folder: Path):
    """A case: a mutated file through read_picture."""
    files = stills()

    def case(number: int, rng: random.Random) -> None:
        name = sorted(files)[number % len(files)]
        path = folder / f"{number}{Path(name).suffix}"
        path.write_bytes(mutate(files[name], rng))
        try:
            assert read_picture(path, Fit((SIZE, SIZE))).shape == (SIZE, SIZE, 3)
        finally:
            path.unlink()

    return case


def chunk(name: bytes, data: bytes) -> bytes:
    """One of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_claiming(width: int, height: int, data: bytes = b"", more: bytes = b"", colour: int = 2) -> bytes:
    """A PNG whose header says so; its data may be few bytes, or that many zeros packed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", data or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose header says so."""
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def hostile() -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of what is hostile by design."""
    yield "claims_60000.jpg", jpeg_claiming(60000, 60000)
    yield "claims_60000.png", png_claiming(60000, 60000)
    yield "claims_2147483647.png", png_claiming(2**31 - 1, 2**31 - 1)
    yield "claims_13000.jpg", jpeg_claiming(13000, 13000)  # just allowed
    yield "claims_13000.png", png_claiming(13000, 13000)
    yield "is_13000.png", png_claiming(13000, 13000, zlib.compress(bytes(13000 * (13000 * 4 + 1)), 9), colour=6)
    yield "wide_60000.png", png_claiming(60000, 1, zlib.compress(bytes(180001)))
    yield "size_0x0.png", png_claiming(0, 0)
    yield "size_0x0.jpg", jpeg_claiming(0, 0)
    yield "text_bomb.png", png_claiming(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))
    yield "profile_bomb.png", png_claiming(8, 8, more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))))
    yield "data_bomb.png", png_claiming(8, 8, zlib.compress(bytes(3 * 10**8), 9))
    yield "million_chunks.png", png_claiming(8, 8, more=chunk(b"tEXt", b"a\0b") * 10**6)
    yield "zero_bytes.jpg", b""
    yield "zero_bytes.png", b""
    yield (
        "no_such_suffix.bmp",
        b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)[:52],
    )
    yield (
        "exif_loop.jpg",
        encoded("JPEG")[:2]
        + b"\xff\xe1\0\x20Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0"
        + encoded("JPEG")[2:],
    )
    more = b"".join(b'<!ENTITY e%d "%s">' % (i, b"&e%d;" % (i - 1) * 10 if i else b"x" * 10) for i in range(12))
    yield "entities.svg", b"<!DOCTYPE s [" + more + b"]>" + SVG % b"&e11;"
    yield "reads_a_file.svg", b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + SVG % b"&x;"
    yield "claims_60000.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="60000000"/>'


def meta(key: str, frames: int, segments: int) -> dict:
    """A clip's json."""
    rows = segments * SPEC.segment_rows
    return {
        "id": key, "item": key, "group": key, "source": "s", "split": "t", "captions": ["a"], "caption_langs": ["en"],
        "lang": "", "audio_type": "nb", "label": None, "start": None, "end": None, "duration": 1.8 * segments,
        "n_frames": frames, "n_segments": segments, "n_rows": rows, "has_audio": bool(segments),
        "has_frames": bool(frames), "media": {"audio": None, "frames": None},
    }  # fmt: skip


def strips() -> dict[str, bytes]:
    """Frames of two pictures, and pictures of one segment, as they may come into a shard."""
    double, single = (SIZE, 2 * SIZE), (SIZE, SIZE)
    return {
        "frames.jpg": encoded("JPEG", size=double), "frames.jpg progressive": encoded("JPEG", size=double, progressive=True),
        "fbank.jpg": encoded("JPEG", "L", single), "fbank.png": encoded("PNG", "L", single),
    }  # fmt: skip


def shard_of(folder: Path, samples: list[dict[str, bytes]]) -> ShardFolder:
    """A folder of one shard whose index has the CRC-32 of these very bytes."""
    keys = [f"{i:04}" for i in range(len(samples))]
    members = [{"json": json.dumps(meta(k, 2, 1)).encode(), **s} for k, s in zip(keys, samples, strict=True)]
    print_ = {"spectrogram": vars(SPEC), "frames": vars(FramesConfig())}
    counts = {"samples": len(samples), "with_audio": len(samples), "with_frames": len(samples), "seconds": 1.0}
    shard = write_shard(folder / "s-t-000000.tar", zip(keys, members, strict=True))
    write_index(folder, fingerprint=print_, media_root=".", source="s", split="t", counts=counts, shards=[shard])
    assert (folder / INDEX).exists()
    return ShardFolder.open(str(folder))


def loader_of(folder: ShardFolder, log: Path, max_corrupt_fraction: float = 1.0) -> Loader:
    """Everything of a folder, BATCH samples at a time."""
    cfg = DataSources(max_corrupt_fraction=max_corrupt_fraction, decode_threads=1)
    return Loader(
        [folder], EvalSampler([[s.samples for s in folder.shards]], BATCH), cfg, seed=0, mask=MaskConfig(),
        tokenize=lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64), needs=("frames", "fbank"),
        device=torch.device("cpu"), damage_log=log,
    )  # fmt: skip


def in_shards(folder: Path):
    """A case: a shard of a batch, one of whose samples has a mutated picture under its right CRC-32, through the loader.

    The batch comes with the other three, and what is left out is in the log by its key.
    """
    good = strips()

    def case(number: int, rng: random.Random) -> str:
        place = folder / f"{number}"
        place.mkdir()
        name = sorted(good)[number % len(good)]
        try:
            return one_of_a_batch(place, rng.randrange(BATCH), {name.split()[0]: mutate(good[name], rng)})
        finally:
            shutil.rmtree(place)

    return case


def one_of_a_batch(place: Path, which: int, members: dict[str, bytes]) -> str:
    """A batch whose sample `which` has these members for those of the same kind, loaded."""
    good = strips()
    samples = [{"fbank.jpg": good["fbank.jpg"], "frames.jpg": good["frames.jpg"]} for _ in range(BATCH)]
    kinds = {name.partition(".")[0] for name in members}
    samples[which] = {k: v for k, v in samples[which].items() if k.partition(".")[0] not in kinds} | members
    return loaded(shard_of(place, samples), which, place / "corrupt.jsonl")


def loaded(folder: ShardFolder, which: int, log: Path) -> str:
    """`counted` if sample `which` was left out and named, `correct` if all came; the search reads the same."""
    loader = loader_of(folder, log)
    batch, key = loader.batch(0), f"{which:04}"
    others = [f"{i:04}" for i in range(BATCH) if i != which]
    assert [name for name in batch.ids if name and name != key] == others, batch.ids
    assert len(batch.frames) == 2 * sum(map(bool, batch.ids)) and len(batch.segments) == sum(map(bool, batch.ids))
    for clip, sample in enumerate(folder.read([(0, n) for n in range(BATCH)])):
        try:
            preprocessing.of_shard(meta(str(clip), 2, 1), sample, SPEC)
        except ValueError:
            assert clip == which
    if not loader.corrupt:
        assert key in batch.ids
        return "correct"
    (row,) = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert row["key"] == key and row["reason"] and key not in batch.ids, row
    return "counted"


def hostile_strips() -> dict[str, dict[str, bytes]]:
    """Members for a sample in a shard, by name: pictures that are hostile, of other kinds, or of other sizes than their json."""
    other = {name: data for name, data in hostile() if not name.endswith((".svg", ".bmp")) and "13000" not in name}
    made = {name: {f"frames.{name[-3:]}": data} for name, data in (other | stills()).items()}
    tall, deep = encoded("PNG", size=(SIZE, 3 * SIZE)), encoded("PNG", "I;16", (SIZE, SIZE))
    return made | {
        "three_frames_for_two.png": {"frames.png": tall}, "deep_segment.png": {"fbank.png": deep},
        "cmyk_frames.jpg": {"frames.jpg": encoded("JPEG", "CMYK", (SIZE, 2 * SIZE))},
        "narrow_segment.png": {"fbank.png": encoded("PNG", "L", (8, 8))},
        "claims_60000_segment.jpg": {"fbank.jpg": jpeg_claiming(60000, 60000)},
        "palette_segment.png": {"fbank.png": encoded("PNG", "P", (SIZE, SIZE))},
        "turned_frames.jpg": {"frames.jpg": transpose(encoded("JPEG", size=(SIZE, 2 * SIZE)))},
    }  # fmt: skip


def transpose(data: bytes) -> bytes:
    """A JPEG with an EXIF orientation of a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def read(path: Path) -> None:
    """A still picture."""
    assert read_picture(path, Fit((SIZE, SIZE))).shape == (SIZE, SIZE, 3)
