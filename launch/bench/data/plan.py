"""Planning: what one core does and what a clip takes, measured, and what follows for all of HowTo100M and AudioSet."""

import argparse
import io
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip4vla.cli import path_word
from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.media.av_reader import read_clip
from clip4vla.media.images import jpeg, png
from clip4vla.media.spectrogram import crop, decode, encode, log_mel
from data_prep.build_shards import sample
from data_prep.manifest import ManifestRow
from launch.bench.common import count
from launch.bench.data.prep import BIKES, BUNNY, H264, SMALL, Video, ffmpeg_version, psnr, rms, timed

CONFIG = Path(__file__).resolve().parents[3] / "configs/data/howto100m.yaml"
SPEECH = "tests/sample/household/arttools/scissors_small_open_desc_fr.ogg"
KINDS = {
    "howto100m": Video("howto100m.mp4", BIKES, SPEECH, 22, f"-vf {SMALL[BIKES]} {H264}", (10, 20)),
    "audioset": Video("audioset.mp4", BUNNY, BUNNY, 10, f"-vf {SMALL[BUNNY]} {H264}"),
    "audioset, sound alone": Video("audioset.m4a", BUNNY, BUNNY, 10, "-vn -c:a aac -ac 2"),
}
HOWTO100M, AUDIOSET, CORES = 1_200_000, 2_000_000, 64  # videos, clips, of the machine that is planned for
FBANK, FRAMES = ("jpg 95", "png"), (75, 90, 95)
TAR = 512  # bytes of a member's header, and what its data are padded to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="medians are over N rounds")
    parser.add_argument(
        "--markdown", type=path_word, metavar="FILE.json", help="print the tables of a plan that was saved"
    )


def main(args: argparse.Namespace) -> dict[str, Any] | str:
    """The figures, or the tables of saved ones."""
    return markdown(args.markdown) if args.markdown else plan(args.rounds)


def plan(rounds: int = 5) -> dict[str, Any]:
    """The measured figures and what they make; raises UserError if ffmpeg or scikit-video is missing."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = load(DataConfig, CONFIG, [f"media_root={folder}"])
        rows = {name: video.make(Path(folder)) for name, video in KINDS.items()}
        clips, codecs = measure(cfg, rows, rounds), compare_codecs(cfg, rows)
    totals = {"sets": sets(clips, cfg.clips_per_video, cfg.samples_per_shard)}
    totals["terabytes_by_codec"] = terabytes_by_codec(totals["sets"], clips, codecs)
    stored = (
        f"fbank {cfg.spectrogram.codec} {cfg.spectrogram.quality}, frames {cfg.frames.quality} at {cfg.frames.fps:g}/s"
    )
    head = {"stored": stored, "ffmpeg": ffmpeg_version(), "samples_per_tar": cfg.samples_per_shard, "rounds": rounds}
    return head | {"clips": clips, "codecs": codecs} | totals


def measure(cfg: DataConfig, rows: dict[str, ManifestRow], rounds: int) -> dict[str, Any]:
    """CPU seconds and bytes of each kind of clip, by shard.py's sample()."""
    made = {name: sample(cfg, row) for name, row in rows.items()}  # and warms up
    spent = [{name: timed(sample, cfg, row)[0] for name, row in rows.items()} for _ in range(rounds)]
    clips = {}
    for name, (meta, members) in made.items():
        sizes = {"json": len(json.dumps(meta, ensure_ascii=False).encode())}
        sizes |= {ext: len(data) for ext, data in members.items()}
        seconds = statistics.median(times[name] for times in spent)
        clips[name] = {
            "ffmpeg_options": KINDS[name].options,
            "of": [KINDS[name].picture, KINDS[name].sound],
            "seconds": meta["duration"],
            "cpu_s": seconds,
            "rounds_cpu_s": [times[name] for times in spent],
            "clips_per_core_second": 1 / seconds,
            "member_bytes": sizes,
            "tar_bytes": tar_bytes(sizes.values()),
        }
    return clips


def tar_bytes(sizes: Any) -> int:
    """Return the bytes that members of these sizes take in a tar."""
    return sum(TAR + math.ceil(size / TAR) * TAR for size in sizes)


def compare_codecs(cfg: DataConfig, rows: dict[str, ManifestRow]) -> dict[str, Any]:
    """Bytes of a clip by codec, and its error: rms dB of spectrograms, PSNR in dB of frames; of the clips with frames."""
    table: dict[str, Any] = {"fbank": {}, "frames": {}}
    for name, row in rows.items():
        clip = read_clip(Path(cfg.media_root, str(row.media)), row.start, row.end, cfg.frames)
        if not clip.frames or clip.wave is None:
            continue
        decibels = crop(log_mel(clip.wave, clip.rate, cfg.spectrogram), cfg.spectrogram)[0]  # R 224
        picture = encode(decibels[None], cfg.spectrogram)
        for codec, data in zip(FBANK, (jpeg(picture, 95, "4:4:4"), png(picture)), strict=True):
            read = decode(torch.from_numpy(pixels(data)), cfg.spectrogram)[: len(decibels)]
            _put(table["fbank"], codec, name, data, {"rms_db": rms(read - decibels)})
        strip = np.concatenate(clip.frames)
        for quality in FRAMES:
            data = jpeg(strip, quality)
            _put(table["frames"], str(quality), name, data, {"psnr_db": psnr(pixels(data), strip)})
    return table


def pixels(data: bytes) -> np.ndarray:
    """The picture of a JPEG or PNG, uint8."""
    return np.array(Image.open(io.BytesIO(data)))


def _put(table: dict[str, Any], codec: str, name: str, data: bytes, error: dict[str, float]) -> None:
    table.setdefault(codec, {})[name] = {"bytes": len(data)} | error


def sets(clips: dict[str, Any], clips_per_video: int, per_tar: int) -> dict[str, Any]:
    """Clips, core hours, days on 64 cores, terabytes (10^12 bytes) and tars of each data set, and of the paper's mixture."""
    made = {"HowTo100M": (HOWTO100M * clips_per_video, "howto100m"), "AudioSet": (AUDIOSET, "audioset")}
    made["AudioSet, sound alone"] = (AUDIOSET, "audioset, sound alone")
    table = {name: _needs(count, clips[kind], per_tar) for name, (count, kind) in made.items()}
    table["HowTo100M"] |= {"videos": HOWTO100M, "clips_per_video": clips_per_video}
    both = [table["HowTo100M"], table["AudioSet"]]
    table["HowTo100M + AudioSet"] = {key: sum(one[key] for one in both) for key in table["AudioSet"]}
    return table


def _needs(count: int, clip: dict[str, Any], per_tar: int) -> dict[str, Any]:
    hours = count / clip["clips_per_core_second"] / 3600
    days, terabytes = hours / CORES / 24, count * clip["tar_bytes"] / 1e12
    return {
        "clips": count,
        "core_hours": hours,
        f"days_on_{CORES}_cores": days,
        "terabytes": terabytes,
        "files": math.ceil(count / per_tar),
    }


def terabytes_by_codec(sets: dict[str, Any], clips: dict[str, Any], codecs: dict[str, Any]) -> dict[str, float]:
    """Terabytes of both sets for each pair of codecs."""
    counts = {"howto100m": sets["HowTo100M"]["clips"], "audioset": sets["AudioSet"]["clips"]}
    table = {}
    for fbank, quality in itertools.product(codecs["fbank"], codecs["frames"]):
        both = codecs["fbank"][fbank], codecs["frames"][quality]
        sizes = {kind: [clips[kind]["member_bytes"]["json"], *(one[kind]["bytes"] for one in both)] for kind in counts}
        total = sum(count * tar_bytes(sizes[kind]) for kind, count in counts.items())
        table[f"fbank {fbank}, frames {quality}"] = total / 1e12
    return table


def markdown(path: str) -> str:
    """The tables of a saved plan; raises UserError if the file is none."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        return "\n\n".join([_clips_table(saved), _codecs_table(saved), _sets_table(saved)])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a plan ({error}): make it with python launch/bench.py plan > {path}") from None


def _clips_table(saved: dict[str, Any]) -> str:
    names = {"howto100m": "10 s of a 360p video (HowTo100M)", "audioset": "10 s, 360p video and sound (AudioSet)"}
    lines = ["| clip | clips/s per core | KB in the tar |", "| --- | --- | --- |"]
    for kind, clip in saved["clips"].items():
        name, size = names.get(kind, "10 s, sound alone (AudioSet)"), clip["tar_bytes"] / 1e3
        lines.append(f"| {name} | {clip['clips_per_core_second']:.1f} | {size:.0f} |")
    return "\n".join(lines)


def _codecs_table(saved: dict[str, Any]) -> str:
    lines = ["| codec | KB, HowTo100M | KB, AudioSet | error, dB |", "| --- | --- | --- | --- |"]
    for what, error in (("fbank", "rms_db"), ("frames", "psnr_db")):
        for codec, kinds in saved["codecs"][what].items():
            sizes = " | ".join(f"{kinds[kind]['bytes'] / 1e3:.1f}" for kind in ("howto100m", "audioset"))
            errors = [kinds[kind][error] for kind in ("howto100m", "audioset")]
            pattern = "rms {:.2f}, {:.2f}" if what == "fbank" else "PSNR {:.1f}, {:.1f}"
            lines.append(f"| {what} {codec} | {sizes} | {pattern.format(*errors)} |")
    return "\n".join(lines)


def _sets_table(saved: dict[str, Any]) -> str:
    lines = ["| set | clips | core hours | days on 64 cores | TB | tars |", "| --- | --- | --- | --- | --- | --- |"]
    for name, needs in saved["sets"].items():
        days = needs[f"days_on_{CORES}_cores"]
        figures = f"{needs['core_hours']:,.0f} | {days:.2f} | {needs['terabytes']:.2f} | {needs['files']:,}"
        lines.append(f"| {name} | {needs['clips']:,} | {figures} |")
    return "\n".join(lines)
