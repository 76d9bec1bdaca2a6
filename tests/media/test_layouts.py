"""Files that are several, joined end to end, and what follows the media of a file."""

import io
import random

import numpy as np
import pytest
import torch
from media_files import colours, ffmpeg, joined, pitch, shown, tone
from PIL import Image

from clip4vla.config import FramesConfig
from clip4vla.media.av_reader import duration, iter_audio_windows, read_clip
from clip4vla.media.source import Source

# file: codec, and the rate of the second file; its first is 44.1 kHz mono, its second stereo
SOUNDS = {
    "vorbis.ogg": ("libvorbis", 22050), "opus.opus": ("libopus", 48000), "flac.ogg": ("flac", 22050),
    "speex.ogg": ("libspeex", 8000), "mp3.mp3": ("libmp3lame", 22050), "aac.aac": ("aac", 22050),
    "flac.flac": ("flac", 22050), "wav.wav": ("pcm_s16le", 22050), "ms.wav": ("adpcm_ms", 22050), "wma.wma": ("wmav2", 22050),
    "mp2.ts": ("mp2", 22050), "ac3.ts": ("ac3", 48000), "mp2.mpg": ("mp2", 22050), "up.aac": ("aac", 96000),
}  # fmt: skip
FIRST_RATE = {"speex.ogg": 16000, "up.aac": 24000, "opus.opus": 48000}
LYRICS = b"LYRICSBEGININD0000200LYR00100" + b"[00:01]la la la\r\n" * 6 + b"000131LYRICS200"
APE = b"APETAGEX" + bytes.fromhex("d0070000 29000000 01000000 000000a0 0000000000000000") + b"x" * 9
JUNK = {
    "zeros": bytes(20_000), "one zero": bytes(1), "many zeros": bytes(300_000), "ones": b"\xff" * 5000, "line": b"\r\n",
    "page": b"<!DOCTYPE html><html><body><h1>504 Gateway Time-out</h1></body></html>\n" * 30, "lyrics": LYRICS,
    "tags": LYRICS + APE + b"TAG" + b"x" * 125, "noise": random.Random(0).randbytes(20_000),
    "much noise": random.Random(1).randbytes(300_000),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two folders of the same names: 1.5 s of 400 Hz, mono, and 1.5 s of 800 Hz, stereo."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    for folder, hertz, channels in zip(folders, (400, 800), (1, 2), strict=True):
        outputs = []
        for name, (codec, rate) in SOUNDS.items():
            rate = rate if channels == 2 else FIRST_RATE.get(name, 44100)
            outputs += ["-c:a", codec, "-ar", rate, "-ac", channels, folder / name]
        ffmpeg(*tone(hertz, 1.5, 48000), *outputs)
    return folders


@pytest.mark.parametrize("name", SOUNDS)
def test_joined_sounds_are_read_one_after_the_other_at_the_higher_rate(files, tmp_path, name):
    first, second = (folder / name for folder in files)
    rates = FIRST_RATE.get(name, 44100), SOUNDS[name][1]
    for number, parts in enumerate(((first, second), (second, first), (first, first))):
        path = joined(tmp_path / f"{number}-{name}", *(part.read_bytes() for part in parts))
        hertz = [400 if part == first else 800 for part in parts]
        clip = read_clip(path, None, None, None)
        assert clip.seconds == duration(path) == pytest.approx(3, abs=0.16)
        assert clip.wave.shape[1] / clip.rate == pytest.approx(3, abs=0.16)
        assert clip.rate == max(rates[part == second] for part in parts) and len(clip.wave) == (
            2 if second in parts else 1
        )
        assert [pitch(clip.wave, clip.rate, t, t + 1) for t in (0.25, 1.85)] == hertz
        later = read_clip(path, 1.85, 2.85, None)
        assert later.seconds == 1 and pitch(later.wave, later.rate, 0, 1) == hertz[1]
        windows = [window for window in iter_audio_windows(path, 1.0, 0.5)]
        assert [pitch(windows[i][2], windows[i][3], 0.1, 0.9) for i in (0, -1)] == hertz


@pytest.mark.parametrize(
    "name", ["mp3.mp3", "aac.aac", "vorbis.ogg", "flac.ogg", "flac.flac", "wav.wav", "wma.wma", "mp2.ts"]
)
def test_what_follows_the_sound_is_left_out(files, tmp_path, name):
    plain = read_clip(files[0] / name, None, None, None)
    for kind, junk in JUNK.items():
        path = joined(tmp_path / f"{kind} {name}", (files[0] / name).read_bytes(), junk)
        clip = read_clip(path, None, None, None)
        assert clip.seconds == plain.seconds and torch.equal(clip.wave, plain.wave), kind
        ((_, end, wave, _),) = iter_audio_windows(path, 60.0, 1.0)
        assert end == plain.seconds and torch.equal(wave, plain.wave), kind


def test_no_sample_is_lost_where_the_sampling_rate_changes(files, tmp_path):
    parts = [(folder / "wav.wav").read_bytes() for folder in files]
    clip = read_clip(joined(tmp_path / "a.wav", *parts, *parts), None, None, None)
    assert abs(clip.wave.shape[1] - 6 * clip.rate) <= 2


def test_tags_and_covers_between_mp3_files_are_no_sound(files, tmp_path):
    first, second = ((folder / "mp3.mp3").read_bytes() for folder in files)
    cover = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(cover, "PNG")
    size = len(cover.getvalue())
    id3 = b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + cover.getvalue()
    for between in (b"TAG" + b"x" * 125, b"TAG" + b"x" * 125 + id3, LYRICS, id3):
        clip = read_clip(joined(tmp_path / "two.mp3", first, between, second), None, None, None)
        assert clip.wave.shape[1] / clip.rate == pytest.approx(3, abs=0.1)
        assert [pitch(clip.wave, clip.rate, t, t + 1) for t in (0.25, 1.85)] == [400, 800]


@pytest.mark.parametrize("name", ["mp3.mp3", "aac.aac", "vorbis.ogg", "flac.flac", "wma.wma"])
def test_broken_sound_is_still_damage(files, tmp_path, name):
    data, noise = (files[0] / name).read_bytes(), random.Random(0).randbytes
    third = len(data) // 3
    broken = {
        "zeros to the end": data[:third] + bytes(len(data) - third),
        "noise inside": data[:third] + noise(third // 4) + data[third + third // 4 :],
        "noise to the end": data[:third] + noise(len(data) - third),
    }
    broken |= {"cut off": data[: 2 * third]} if name in ("aac.aac", "flac.flac", "wma.wma") else {}
    for kind, bytes_ in broken.items():
        if name == "vorbis.ogg" and kind == "zeros to the end" or name == "wma.wma" and kind == "noise inside":
            continue  # as a shorter file, and as noise: these formats do not say
        path = joined(tmp_path / f"{kind} {name}", bytes_)
        with pytest.raises(ValueError, match="corrupt sound|truncated|unreadable"):
            read_clip(path, None, None, None)


@pytest.mark.parametrize("ext, words", [("ts", "mpeg2video -r 25 -c:a mp2"), ("mpg", "mpeg1video -r 25 -c:a mp2")])
def test_joined_transport_streams_keep_pictures_and_sound_in_step(tmp_path, ext, words):
    ffmpeg(*colours("red"), *tone(400, 1), "-c:v", *words.split(), tmp_path / f"a.{ext}")
    ffmpeg(*colours("blue"), *tone(800, 1), "-c:v", *words.split(), tmp_path / f"b.{ext}")
    path = joined(tmp_path / f"ab.{ext}", *((tmp_path / f"{name}.{ext}").read_bytes() for name in "ab"))
    clip = read_clip(path, None, None, FramesConfig(size=32, fps=5, max_frames=10))
    assert clip.seconds == pytest.approx(2, abs=0.3) and shown(clip.frames) in ("rrrrrbbbbb", "rrrrrrbbbb")
    assert [pitch(clip.wave, clip.rate, t, t + 0.6) for t in (0.2, 1.25)] == [400, 800]
    later = read_clip(path, 1.3, 1.8, FramesConfig(size=32, fps=5))
    assert shown(later.frames) == "bb" and pitch(later.wave, later.rate, 0, 0.5) == 800


def test_joined_ogg_files_with_pictures_are_named(files, tmp_path):
    ffmpeg(*colours("red"), "-c:v", "libtheora", tmp_path / "a.ogv")
    video, sound = (tmp_path / "a.ogv").read_bytes(), (files[0] / "vorbis.ogg").read_bytes()
    for parts in ((video, video), (sound, video), (video, sound)):
        with pytest.raises(ValueError, match="several files with pictures, joined to one"):
            read_clip(joined(tmp_path / "two.ogv", *parts), None, None, FramesConfig())


def test_a_file_that_changes_is_looked_at_again(files, tmp_path):
    path = joined(tmp_path / "a.mp3", (files[0] / "mp3.mp3").read_bytes())
    assert duration(path) == pytest.approx(1.5, abs=0.1)
    joined(path, path.read_bytes(), (files[1] / "mp3.mp3").read_bytes())
    assert duration(path) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_part_of_a_file_is_read_as_a_file_of_its_own(files, tmp_path, name):
    """Such as the member of a tar: joined files with junk after them, with other bytes before and after."""
    first, second = ((folder / name).read_bytes() for folder in files)
    whole = joined(tmp_path / f"whole-{name}", first, second, JUNK["page"] if name.endswith((".ogg", ".mp3")) else b"")
    size = whole.stat().st_size
    tar = joined(tmp_path / "x.tar", first[:1000], bytes(24), whole.read_bytes(), first, JUNK["noise"])
    part = Source(str(tar), 1024, 1024 + size, f"x.tar/{name}")
    for start, end in ((None, None), (1.85, 2.5)):
        clip, same = (read_clip(path, start, end, None) for path in (whole, part))
        assert (clip.seconds, clip.rate) == (same.seconds, same.rate) and torch.equal(clip.wave, same.wave)
