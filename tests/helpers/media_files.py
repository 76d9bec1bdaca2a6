"""Small media made at test time by ffmpeg, and what can be measured of them."""

import subprocess
from pathlib import Path

import numpy as np
from torch import Tensor


def ffmpeg(*words: object) -> bytes:
    done = subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, words)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def tone(hertz: int, seconds: float, rate: int = 44100) -> list[str]:
    """Words for a sine of ffmpeg as input, with its amplitude 0.4."""
    return ["-f", "lavfi", "-i", f"aevalsrc='0.4*sin(2*PI*t*{hertz})':d={seconds}:s={rate}"]


def colours(*names: str, seconds: float = 1, fps: int = 10) -> list[str]:
    """Words for pictures of one colour after the other as input."""
    each = [f"color={name}:s=64x48:d={seconds}:r={fps},format=yuv420p[{i}]" for i, name in enumerate(names)]
    joined = "".join(f"[{i}]" for i in range(len(names))) + f"concat=n={len(names)}:v=1:a=0"
    return ["-f", "lavfi", "-i", ";".join([*each, joined])]


def pitch(wave: Tensor, rate: int, begin: float, end: float) -> int:
    """The strongest frequency in Hz of an interval of seconds, to the nearest 50."""
    part = wave.mean(0).numpy()[round(begin * rate) : round(end * rate)]
    assert len(part) >= 0.9 * (end - begin) * rate and np.abs(part).max() > 0.1
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return 50 * round(int(spectrum.argmax()) * rate / len(part) / 50)


def shown(frames: list[np.ndarray]) -> str:
    """The strongest colour of each frame: r, g or b."""
    return "".join("rgb"[int(frame.mean((0, 1)).argmax())] for frame in frames)


def joined(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path
