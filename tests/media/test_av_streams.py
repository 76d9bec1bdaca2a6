"""Packets and frames as odd as files have them: without a time, empty, of another form than those before, turned and mirrored."""

import itertools
import struct

import numpy as np
import pytest
import torch
from media_files import colours, ffmpeg, joined, pitch, shown, tone

from clip4vla.config import FramesConfig
from clip4vla.media.av_reader import iter_audio_windows, read_clip

CFG = FramesConfig(size=32, fps=5, max_frames=15)
UNTIMED_SOUND = {"wmav2": "wma", "wmav1": "mkv", "adpcm_ms": "wav", "adpcm_ima_wav": "wav"}
UNTIMED_PICTURES = ("libx264 -bf 0 -f vob", "mpeg2video -r 25 -bf 2 -f vob", "libx264 -bf 0 -f asf")


@pytest.mark.parametrize("codec", UNTIMED_SOUND)
def test_frames_of_sound_without_a_time_come_after_those_before(tmp_path, codec):
    path = tmp_path / f"a.{UNTIMED_SOUND[codec]}"
    ffmpeg("-f", "lavfi", "-i", "aevalsrc='0.4*sin(2*PI*t*400*pow(2,floor(t)))':d=3:s=44100", "-c:a", codec, path)
    clip = read_clip(path, None, None, None)
    assert clip.wave.shape[1] / clip.rate == pytest.approx(3, abs=0.1) == clip.seconds
    assert [pitch(clip.wave, clip.rate, t + 0.15, t + 0.85) for t in range(3)] == [400, 800, 1600]
    for begin in (1.15, 1.2, 2.15):  # 1.2 s lies in the second frame of a packet of ADPCM
        part, first = read_clip(path, begin, begin + 0.7, None).wave, round(begin * clip.rate)
        if codec.startswith("adpcm"):
            assert torch.equal(part, clip.wave[:, first : first + round(0.7 * clip.rate)])
        assert pitch(part, clip.rate, 0, 0.7) == (800 if begin < 2 else 1600)
    windows = list(iter_audio_windows(path, 1.0, 0.5))
    assert [pitch(wave, rate, 0.15, 0.85) for _, _, wave, rate in windows] == [400, 800, 1600]


@pytest.mark.parametrize("words", UNTIMED_PICTURES)
def test_pictures_without_a_time_come_after_those_before(tmp_path, words):
    ffmpeg(*colours("red", "0x00ff00", "blue"), "-c:v", *words.split(), tmp_path / "a.mpg")
    clip = read_clip(tmp_path / "a.mpg", None, None, CFG)
    assert clip.seconds == pytest.approx(3, abs=0.1) and shown(clip.frames) == "rrrrrgggggbbbbb"
    assert shown(read_clip(tmp_path / "a.mpg", 1.2, 1.8, CFG).frames) == "ggg"


def test_an_empty_packet_leaves_the_picture_on_show(tmp_path):
    ffmpeg(
        *colours("red", "0x00ff00", "blue"), "-c:v", "libtheora", tmp_path / "a.ogv"
    )  # of a colour, one is not empty
    clip = read_clip(tmp_path / "a.ogv", 0, 2.05, CFG)
    assert shown(clip.frames) == "rrrrrggggg"
    assert shown(read_clip(tmp_path / "a.ogv", 1.2, 1.8, CFG).frames) == "ggg"


@pytest.mark.parametrize("codec", ["flac", "libspeex"])
def test_intervals_of_ogg_files_that_cannot_be_entered_are_those_asked_for(tmp_path, codec):
    sound = "aevalsrc='0.4*sin(2*PI*t*400*pow(2,floor(t)))':d=3:s=16000"
    ffmpeg("-f", "lavfi", "-i", sound, "-c:a", codec, tmp_path / "a.ogg")
    clip = read_clip(tmp_path / "a.ogg", 2.15, 2.85, None)
    assert pitch(clip.wave, clip.rate, 0, 0.7) == 1600


def test_surround_sound_that_becomes_mono_is_read_through(tmp_path):
    ffmpeg(
        *tone(400, 1.5, 48000), "-c:a", "ac3", "-ac", 6, tmp_path / "a.ts", "-c:a", "ac3", "-ac", 1, tmp_path / "b.ts"
    )
    path = joined(tmp_path / "ab.ts", *((tmp_path / name).read_bytes() for name in ("a.ts", "b.ts")))
    clip = read_clip(path, None, None, None)
    assert len(clip.wave) == 2 and clip.seconds == pytest.approx(3, abs=0.1)
    assert [pitch(clip.wave, clip.rate, t, t + 1) for t in (0.25, 1.75)] == [400, 400]


def test_pictures_are_turned_and_mirrored_as_by_ffmpeg(tmp_path):
    made = ["-c:v", "libx264", "-qp", 0, "-pix_fmt", "yuv444p"]
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=0.4:r=5", *made, tmp_path / "plain.mp4")
    data = (tmp_path / "plain.mp4").read_bytes()
    at, seen = data.index(b"tkhd") + 44, set()
    for turned, across, down in itertools.product((False, True), (1, -1), (1, -1)):
        a, b, c, d = (0, down, across, 0) if turned else (across, 0, 0, down)
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        path = joined(tmp_path / "turned.mp4", data[:at], matrix, data[at + 36 :])
        raw = ffmpeg("-i", path, "-frames:v", 1, "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
        theirs = np.frombuffer(raw, np.uint8).reshape(64, 64, 3)
        (ours,) = read_clip(path, 0, 0.1, FramesConfig(size=64)).frames
        np.testing.assert_array_equal(ours, theirs, str((turned, across, down)))
        seen.add(ours.tobytes())
    assert len(seen) == 8
