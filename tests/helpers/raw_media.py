"""A few small media in bytes, tars of them, and what shards of them hold."""

import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from media_files import colours, ffmpeg, tone
from PIL import Image


@functools.cache
def medium(suffix: str) -> bytes:
    """A second or so of the format: a video with sound (mp4), one without (webm), a sound, or a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{suffix}")
        if suffix == "mp4":
            ffmpeg(*colours("red", "blue"), *tone(400, 2), "-shortest", path)
        elif suffix == "mkv":
            ffmpeg(*colours("green"), "-c:v", "mpeg4", path)
        elif suffix == "png":
            Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
        elif suffix in ("wav", "flac"):
            soundfile.write(path, 0.4 * np.sin(np.arange(8000) * 0.1), 8000)
        else:
            ffmpeg(*tone(400, 1, 16000), path)
        return path.read_bytes()


def write_tar(path: Path, members: dict[str, bytes | str | dict]) -> Path:
    """A tar of these members, in order; dictionaries as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_files(out: Path) -> dict[str, bytes]:
    """Tars, indexes and lists of what failed, by path below `out`."""
    names = ("*.tar", "index.json", "entries.jsonl", "quarantine.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in sorted(out.rglob(name))}
