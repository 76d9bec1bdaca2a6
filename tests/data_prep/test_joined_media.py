"""data_prep/build_shards.py: a clip from two files, and files that were cut already."""

import pytest
from media_files import colours, ffmpeg, pitch, shown, tone

from clip4vla.config import DataConfig
from clip4vla.media.av_reader import duration
from clip4vla.media.source import SOUNDS, VIDEOS
from data_prep.annotation_io import located
from data_prep.build_shards import check_not_cut, read_row, sample
from data_prep.manifest import ManifestRow, MediaFolder
from data_prep.plan import make_plan
from data_prep.progress import estimate

ID = "-_a_b-c_d-e"
H264 = ["-c:v", "libx264", "-g", 10, "-pix_fmt", "yuv420p"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """red, green, blue of 2 s each without sound; a tone of 400, 800 and 1200 Hz; and both cut from 2 s to 4 s."""
    root = tmp_path_factory.mktemp("media")
    ffmpeg(*colours("red", "lime", "blue", seconds=2), *H264, root / "whole.mp4")
    ffmpeg(*colours("lime", seconds=2), *H264, root / "cut.mp4")
    tones = "+".join(f"0.4*sin(2*PI*t*{400 * i})*between(t,{2 * i - 2},{2 * i})" for i in (1, 2, 3))
    ffmpeg("-f", "lavfi", "-i", f"aevalsrc='{tones}':d=6:s=16000", root / "whole.wav")
    ffmpeg(*tone(800, 2, 16000), root / "cut.wav")
    return root


def read(root, tmp_path, video, sound, names, start=2.0, end=4.0, cut=False):
    """The clip from 2 s to 4 s, of files with these names."""
    for source, name in zip((video, sound), names, strict=True):
        path = tmp_path / name.format(ID)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(root / source)
    place = MediaFolder(tmp_path, cut).find_clip(ID, start, end)
    row = located(ManifestRow(ID, ID, ID, "s", "test", ["a"], ["en"]), place)
    return DataConfig(media_root=str(tmp_path), clips_already_cut=cut), row


@pytest.mark.parametrize(
    "video, sound, names, cut",
    [
        ("whole.mp4", "whole.wav", ("{}.mp4", "{}.wav"), False),
        ("cut.mp4", "cut.wav", ("{}.mp4", "{}.wav"), True),
        ("whole.mp4", "cut.wav", ("video/{}.mp4", "wav/Y{}.wav"), False),
        ("cut.mp4", "cut.wav", ("video/{}.mp4", "wav/Y{}.wav"), False),
        ("cut.mp4", "cut.wav", ("video/{}.mp4", "wav/Y{}.wav"), True),
        ("cut.mp4", "whole.wav", ("{}_2_4.mp4", "{}.wav"), False),
        ("cut.mp4", "cut.wav", ("{}_2000_4000.mp4", "{}_2.0-4.0.wav"), False),
    ],
)
def test_frames_and_sound_of_two_files_are_of_one_interval(root, tmp_path, video, sound, names, cut):
    cfg, row = read(root, tmp_path, video, sound, names, cut=cut)
    clip = read_row(cfg, row)
    assert shown(clip.frames) == "gg" and pitch(clip.wave, clip.rate, 0.1, 1.9) == 800
    meta, members = sample(cfg, row)
    assert meta["has_audio"] and meta["has_frames"] and meta["n_frames"] == 2 and len(members) == 2
    assert meta["media"] == {"audio": names[1].format(ID), "frames": names[0].format(ID)}
    assert "picture_start" not in meta


@pytest.mark.parametrize(
    "video, sound, names, cut, why",
    [
        ("whole.mp4", "cut.wav", ("{}.mp4", "{}.wav"), True, "pictures of 6.00 s, sound of 2.00 s: not the same clip"),
        ("whole.mp4", "whole.wav", ("{}_2_4.mp4", "{}.wav"), False, "pictures of 6.00 s, sound of 2.00 s: not the"),
        ("cut.mp4", "cut.wav", ("{}.mp4", "{}.wav"), False, "the interval begins at 2 s, .*set clips_already_cut=true"),
    ],
)
def test_files_of_different_intervals_are_not_joined(root, tmp_path, video, sound, names, cut, why):
    cfg, row = read(root, tmp_path, video, sound, names, cut=cut)
    with pytest.raises(ValueError, match=why):
        sample(cfg, row)


def test_a_manifest_says_where_the_frames_begin_only_where_they_do(root, tmp_path):
    """Lines of other rows stay as they were: shards of changed lines are made again."""
    _, row = read(root, tmp_path, "whole.mp4", "cut.wav", ("{}.mp4", "Y{}.wav"))
    other = ManifestRow("b", "b", "b", "s", "test", ["b"], ["en"], media="b.wav")
    (tmp_path / "out").mkdir()
    (unit,) = make_plan(tmp_path / "out", [row, other], [], 4)
    assert sorted(unit.read(), key=lambda row: row.id) == [row, other] and row.picture_start == 2
    assert unit.text().count(b"picture_start") == 1


# Clips that were cut already


@pytest.mark.parametrize(
    "start, end, length, is_cut",
    [
        (30, 40, 30.02, True),  # a clip of 30 s: its end is no part of what is wanted
        (5, 15, 10.02, True),  # a clip of 10 s: the second half of it is the wrong half
        (30, 40, 39.0, False),  # a video that ends before the clip
        (30, 40, 33.0, False),
        (0, 10, 4.0, False),
        (30, 40, 300, False),
    ],
)
def test_the_end_of_a_clip_is_not_taken_for_a_clip(start, end, length, is_cut):
    seconds = min(end, length) - start
    if is_cut:
        with pytest.raises(ValueError, match=f"the interval begins at {start} s and has 10 s, the medium ends at"):
            check_not_cut(start, end, seconds)
    else:
        check_not_cut(start, end, seconds)


def test_an_estimate_names_the_first_failure(root, tmp_path):
    cfg, row = read(root, tmp_path, "cut.mp4", "cut.wav", ("{}_2_4.mp4", "{}.flac"), start=30.0, end=32.0)
    text = estimate([row], lambda row: sample(cfg, row), 4, 60)
    assert "100% failing" in text and text.endswith(
        f"; the first that fails: {ID}.flac: the interval begins at 30 s, the medium ends at 2.00 s: "
        "if each file holds the interval alone, set clips_already_cut=true"
    )


# Suffixes


@pytest.mark.parametrize("suffix", [".mts", ".m2ts", ".3g2", ".mka", ".aiff", "."])
def test_what_the_decoder_reads_is_media(root, tmp_path, suffix):
    form = {".3g2": "3g2", ".mka": "matroska", ".aiff": "aiff", ".": "mp4"}.get(suffix, "mpegts")
    codec = {".aiff": "pcm_s16be", ".3g2": "aac"}.get(suffix, "aac")
    ffmpeg("-i", root / "cut.wav", "-c:a", codec, "-f", form, tmp_path / f"{ID}{suffix}")
    assert MediaFolder(tmp_path).find_video(ID).media == f"{ID}{suffix}"
    assert (suffix in VIDEOS) != (suffix in SOUNDS) and duration(tmp_path / f"{ID}{suffix}") == pytest.approx(
        2, abs=0.15
    )
