"""Media containers: mutated real ones, and hostile ones by name, through everything that reads media."""

import itertools
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.data import preprocessing
from clip4vla.media.av_reader import PastEndError, duration, iter_audio_windows, read_clip
from faults._mutate import mutate

SPEC, FRAMES = SpectrogramConfig(), FramesConfig()
PICTURES = "-f lavfi -i testsrc=d=1.5:s=64x48:r=8"
SOUND = "-f lavfi -i sine=d=1.5:r=16000"
ORIGINALS = {
    "a.mp4": f"{PICTURES} {SOUND} -c:v libx264 -pix_fmt yuv420p -c:a aac",
    "a.mkv": f"{PICTURES} {SOUND} -c:v libx264 -pix_fmt yuv420p -c:a libvorbis",
    "a.webm": f"{PICTURES} {SOUND} -c:v libvpx-vp9 -deadline realtime -cpu-used 8 -c:a libopus",
    "a.avi": f"{PICTURES} {SOUND} -c:v mpeg4 -c:a mp3",
    "a.ts": f"{PICTURES} {SOUND} -c:v mpeg2video -c:a mp2",
    "a.ogg": f"{SOUND} -c:a libvorbis",
    "a.wav": SOUND,
    "a.flac": SOUND,
    "a.mp3": SOUND,
}


def originals(folder: Path) -> dict[str, bytes]:
    """Tiny files of every kind, by name."""
    for name, words in ORIGINALS.items():
        subprocess.run(["ffmpeg", "-v", "error", "-y", *words.split(), "-bitexact", str(folder / name)], check=True)
    return {name: (folder / name).read_bytes() for name in ORIGINALS}


def mutated(folder: Path):
    """A case: one original, mutated, read in every way; the outcome of the first way counts, all must be allowed."""
    files = originals(folder)

    def case(number: int, rng: random.Random) -> str:
        name = sorted(files)[number % len(files)]
        path = folder / f"{number}{Path(name).suffix}"
        path.write_bytes(mutate(files[name], rng))
        try:
            return every_way(path, rng)
        finally:
            path.unlink()

    return case


def every_way(path: Path, rng: random.Random) -> str:
    """Read by all functions; "refused" if any of them refuses it."""
    ways = (
        lambda: duration(path),
        lambda: read_clip(path, rng.choice((None, 0.7)), rng.choice((None, 1.2)), rng.choice((None, FRAMES)), 17.92),
        lambda: preprocessing.read(path, SPEC, FRAMES, rng.choice(("v", "a", "av"))),
        lambda: sum(1 for _ in itertools.islice(iter_audio_windows(path, 0.5, 0.1), 100)),
        lambda: sum(1 for _ in itertools.islice(preprocessing.windows(path, SPEC), 100)),
    )
    outcome = "correct"
    for way in ways:
        try:
            way()
        except ValueError as error:
            assert type(error) in (ValueError, PastEndError) and "\n" not in str(error), repr(error)
            outcome = "refused"
    return outcome


def wav(rate: int, channels: int, samples: int, claimed: int | None = None, bits: int = 16) -> bytes:
    """A RIFF file whose header may lie about the bytes of data that follow."""
    data = np.resize(np.array([0, 9000, 0, -9000], "<i2"), samples * channels).tobytes()
    size = len(data) if claimed is None else claimed
    block = channels * bits // 8 & 0xFFFF
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + size & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def flac_claiming(data: bytes, rate: int, samples: int) -> bytes:
    """A FLAC file with another rate (20 bits) and number of samples (36 bits) in its header."""
    head = int.from_bytes(data[18:26], "big")
    kept = head >> 36 & (1 << 8) - 1  # channels, bits
    return data[:18] + (rate << 44 | kept << 36 | samples).to_bytes(8, "big") + data[26:]


def patched(data: bytes, box: bytes, at: int, value: bytes, nth: int = 0) -> bytes:
    """An MP4 with other bytes at an offset behind the name of a box."""
    place = -1
    for _ in range(nth + 1):
        place = data.index(box, place + 1)
    place += 4 + at
    return data[:place] + value + data[place + len(value) :]


def hostile(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of what is hostile by design."""
    files = originals(folder)
    mp4, flac, big = files["a.mp4"], files["a.flac"], 2**31 - 1
    made = {
        "ten_hours_by_header.wav": wav(16000, 1, 16000, claimed=36000 * 32000),
        "ten_hours_by_header.flac": flac_claiming(flac, 16000, 36000 * 16000),
        "most_samples_at_1_hz.flac": flac_claiming(flac, 1, 2**36 - 1),
        "rate_0.wav": wav(0, 1, 16000),
        "rate_1.wav": wav(1, 1, 16000),
        "rate_2147483647.wav": wav(big, 1, 16000),
        "rate_4294967295.wav": wav(2**32 - 1, 1, 16000),
        "rate_655349.flac": flac_claiming(flac, 655349, 24000),
        "rate_191999.wav": wav(191999, 2, 191999),
        "rate_7919.wav": wav(7919, 1, 7919),
        "channels_0.wav": wav(16000, 0, 16000),
        "channels_255.wav": wav(16000, 255, 100),
        "channels_65535.wav": wav(16000, 65535, 10),
        "bits_0.wav": wav(16000, 1, 16000, bits=0),
        "no_samples.wav": wav(16000, 1, 0),
        "zero_bytes.mp4": b"",
        "zero_duration.mp4": patched(patched(mp4, b"mvhd", 16, bytes(4)), b"mdhd", 16, bytes(4)),
        "timescale_0.mp4": patched(mp4, b"mdhd", 12, bytes(4)),
        "timescale_huge.mp4": patched(mp4, b"mdhd", 12, b"\xff" * 4),
        "duration_huge.mp4": patched(
            patched(mp4, b"mvhd", 16, b"\x7f" + b"\xff" * 3), b"mdhd", 16, b"\x7f" + b"\xff" * 3
        ),
        "huge_timestamps.mp4": patched(mp4, b"stts", 12, b"\x7f\xff\xff\xff"),
        "negative_timestamps.mp4": patched(mp4, b"ctts", 12, b"\x80\x00\x00\x00") if b"ctts" in mp4 else mp4,
        "edit_list_huge.mp4": patched(mp4, b"elst", 12, b"\x7f\xff\xff\xff"),
        "size_0x0.mp4": patched(patched(mp4, b"avc1", 24, bytes(4)), b"tkhd", 76, bytes(8)),
        "size_60000.mp4": patched(mp4, b"avc1", 24, struct.pack(">HH", 60000, 60000)),
        "ends_at_once.mp4": mp4[: mp4.index(b"mdat") + 4],
        "ends_at_once.mkv": files["a.mkv"][:600],
        "two_in_one.mp4": mp4 + mp4,
        "other_suffix.mp4": files["a.flac"],
        "box_of_itself.mp4": mp4[:32] + (struct.pack(">I", 8) + b"moov") * 100000,
        "boxes_of_boxes.mp4": mp4[:32] + b"".join(struct.pack(">I", 8 * (5000 - i)) + b"moov" for i in range(5000)),
        "script.svg.mp4": b"<svg/>",
        "concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "playlist.ts": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
        yield name, folder / name
    for name, words in LARGE.items():
        subprocess.run(["ffmpeg", "-v", "error", "-y", *words.split(), str(folder / name)], check=True)
        yield name, folder / name


LARGE = {  # real ones, of few bytes
    "ten_hours_of_silence.flac": "-f lavfi -i anullsrc=r=8000:cl=mono -t 36000 -compression_level 0",
    "wide_60000.mkv": "-f lavfi -i color=s=60000x64:d=0.2:r=5 -c:v ffv1",
    "tall_60000.mkv": "-f lavfi -i color=s=64x60000:d=0.2:r=5 -c:v ffv1",
    "pixels_of_60000_to_1.mkv": "-f lavfi -i color=s=64x64:d=0.2:r=5,setsar=60000 -c:v ffv1",
    "width_1.mkv": "-f lavfi -i color=s=2x16000:d=0.4:r=5 -c:v ffv1",
    "pixels_16384x16000.mkv": "-f lavfi -i color=s=16384x16000:d=0.2:r=5 -c:v mjpeg -pix_fmt yuvj420p",
}
