"""data_prep/media_names.py and MediaFolder: the names that authors and downloaders give to files."""

import json
import subprocess
import sys
import tracemalloc

import pytest
from annotation_files import reasons
from forks import ROOT

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep import manifest
from data_prep.annotations import read
from data_prep.manifest import AmbiguousError, Located, MediaFolder
from data_prep.media_names import read_listed

ID, OTHER = "-_a_b-c_d-e", "v_0Y1-2_3-Y"  # ids as hard as they come: 11 characters that look like parts of names
WHOLE = Located("", 130, 140)
CUT = Located("")


@pytest.fixture
def there(tmp_path):
    """The media folder that holds these files, each as long as the number beside it, or empty."""

    def make(*paths, cut=False):
        for path, size in (each if isinstance(each, tuple) else (each, 0) for each in paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(bytes(size))
        return MediaFolder(tmp_path, cut)

    return make


@pytest.mark.parametrize("video", ["dQw4w9WgXcQ", ID, OTHER, "Y_________a", "-----------", "12345678901"])
@pytest.mark.parametrize(
    "name, where",
    [
        ("{}.mp4", WHOLE),
        ("v_{}.mp4", WHOLE),
        ("Rain [hard] - part_2 [{}].mkv", WHOLE),
        ("[{}].webm", WHOLE),
        ("Rain_1-2-{}.mp4", WHOLE),
        ("Y{}.wav", CUT),
        ("{}_130.0-140.0.wav", CUT),  # audioset-download
        ("{}_130.0_140.0.ogg", CUT),
        ("{}_130-140.wav", CUT),
        ("{}_130_140.flac", CUT),
        ("Y{}_130_140.flac", CUT),
        ("v_{}_130_140.mp4", CUT),
        ("{}_000130_000140.mp4", CUT),
        ("{}_130.000_140.000.mp4", CUT),
        ("{}_130000_140000.m4a", CUT),
        ("{}_130000_138500.flac", CUT),  # the video ends there
        ("{}_130.wav", CUT),
        ("{}_130000.wav", CUT),
        ("{}.f137.mp4", WHOLE),
        ("Rain [{}].f251.webm", WHOLE),
    ],
)
def test_a_clip_is_known_by_the_names_that_downloaders_give(there, video, name, where):
    path = f"some/folder/{name.format(video)}"
    assert there(path).find_clip(video, 130, 140) == where._replace(media=path)
    assert there().find_clip("another_one", 130, 140) is None


@pytest.mark.parametrize(
    "name",
    [
        *("{}_130_141.wav", "{}_129.0-140.0.wav", "{}_13_140.wav", "{}_130500_140000.wav", "{}_130000_150000.wav"),
        *("{}_130000_130400.wav", "{}_130_138.wav", "x{}.wav", "{}x.wav", "{}_130_140_2.wav", "Rain{}.mp4"),
        *("Rain [{}] 2.mp4", "YY{}.wav", "{}_0130_140.5.wav", "{} 130.wav"),
    ],
)
def test_names_of_other_clips_are_not_taken(there, name):
    assert there(f"{name.format(ID)}").find_clip(ID, 130, 140) is None


def test_ids_that_hold_what_separates_names(there):
    """A file is of the id whose place the other parts leave, though another id could be read into it."""
    media = there("a-cdefghijk_1.wav", "v_abcdefghi_0_10.wav", "v_abcdefghj_3.mp4", "Yabcdefghij.mp4")
    assert media.find_clip("cdefghijk_1", 0, 10) is None  # not Title-ID: it is a-cdefghijk from 1 s on
    assert media.find_clip("a-cdefghijk", 1, 11) == Located("a-cdefghijk_1.wav")
    assert media.find_clip("v_abcdefghi", 0, 10) == Located("v_abcdefghi_0_10.wav")
    assert media.find_clip("abcdefghi_0", 10, 20) is None
    assert media.find_clip("Yabcdefghij", 0, 10) == Located("Yabcdefghij.mp4", 0, 10)  # a whole video, no Y before it
    for video, start in (("v_abcdefghj", 3), ("abcdefghj_3", 0)):
        with pytest.raises(AmbiguousError, match="it may be v_abcdefghj_3.mp4, and that may be another clip"):
            media.find_clip(video, start, start + 10)
    assert media.find("v_abcdefghj_3") == Located("v_abcdefghj_3.mp4")  # by its own whole name: ActivityNet's


def test_zero_seconds_are_no_milliseconds(there):
    assert there(f"{ID}_0_5.wav").find_clip(ID, 0, 10) is None
    assert there(f"{ID}_0_8500.wav").find_clip(ID, 0, 10) == Located(f"{ID}_0_8500.wav")
    assert there(f"{ID}_12.5_20.wav").find_clip(ID, 12.5, 20) == Located(f"{ID}_12.5_20.wav")


def test_the_surest_name_comes_first_and_whole_files_may_be_cut(there):
    names = [
        f"{ID}_130_140.wav",
        f"{ID}_130.wav",
        f"{ID}_130000_139000.wav",
        f"Y{ID}.wav",
        f"{ID}.wav",
        f"a [{ID}].wav",
    ]
    there(*names, f"a-{ID}.wav")
    for name in names:
        assert there().find_clip(ID, 130, 140).media == name
        (there().root / name).unlink()
    assert there(cut=True).find_clip(ID, 130, 140) == Located(f"a-{ID}.wav")


# Two files


@pytest.mark.parametrize(
    "video, sound, where",
    [
        ("{}.f137.mp4", "{}.f251.webm", (130, 140, None)),
        ("a [{}].f137.mp4", "a [{}].f140.m4a", (130, 140, None)),
        ("{}.mp4", "{}.m4a", (130, 140, None)),
        ("{}_130_140.mp4", "{}_130.0-140.0.wav", (None, None, None)),
        ("video/{}.mp4", "wav/Y{}.wav", (None, None, 130)),
        ("video/{}_130.mp4", "wav/{}.wav", (130, 140, 0.0)),
    ],
)
def test_a_video_and_a_sound_of_a_clip_are_joined(there, video, sound, where):
    start, end, picture_start = where
    video, sound = video.format(ID), sound.format(ID)
    assert there(video, sound).find_clip(ID, 130, 140) == Located(sound, start, end, video, picture_start)


def test_a_merged_file_comes_before_its_parts_and_names_of_files_are_joined_too(there):
    media = there(f"{ID}.mkv", f"{ID}.f137.mp4", "video0.mp4", "audio/video0.wav")
    assert media.find_video(ID) == Located(f"{ID}.mkv")
    assert media.find("video0") == Located("audio/video0.wav", picture="video0.mp4")


def test_two_candidates_are_named_and_neither_is_taken(prepare):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    lines = [f"{i},abcdefghij{i},30,a\n" for i in range(4)]
    media = ["Rain [abcdefghij0].mkv", "Rain 2 [abcdefghij0].mkv", "abcdefghij1.mp4", "abcdefghij1.webm"]
    media += [
        "x/abcdefghij2_30.0-40.0.wav",
        "y/abcdefghij2_30.0-40.0.wav",
        "abcdefghij3_30.wav",
        "abcdefghij3_30000.wav",
    ]
    rows, skipped = prepare("audiocaps", {"test.csv": head + "".join(lines)}, media)
    assert [row.media for row in rows] == [
        media[2],
        media[4],
    ]  # of equal name, and copies as audioset-download makes them
    assert reasons(skipped) == {
        "test.csv:2": f"unusable: it may be {media[1]} or {media[0]}, and that may be another clip: rename or remove one",
        "test.csv:5": f"unusable: it may be {media[6]} or {media[7]}, and that may be another clip: rename or remove one",
    }


def test_equal_names_with_other_content_are_two_candidates(there):
    media = there(("x/a.wav", 1), ("y/a.wav", 2), ("x/b.wav", 1), ("y/b.wav", 1))
    with pytest.raises(AmbiguousError, match="x/a.wav or y/a.wav"):
        media.find("a")
    assert media.find("b") == Located("x/b.wav")


@pytest.mark.parametrize("cut, name", [(True, "{}.wav"), (False, "{}_10000_18000.wav")])
def test_a_file_is_not_taken_for_two_clips(prepare, cut, name):
    """Two intervals of one video, and a single file that would be either."""
    names = [f"{ID}_000010_000020", f"{ID}_000010_000025", f"{OTHER}_000003_000013"]
    files = {"vatex_training_v1.0.json": [{"videoID": video} for video in names]}
    media = [name.format(ID), f"{OTHER}.mp4"]
    rows, skipped = prepare("vatex", files, media, clips_already_cut=cut)
    assert [row.id for row in rows] == names[2:]
    why = f"unusable: {media[0]} would be another clip of its video too"
    assert reasons(skipped) == {names[0]: why, names[1]: why}


# Numbers


def test_audiocaps_download_names_files_by_the_number_of_a_caption(prepare):
    """A clip of five captions may be there under the number of any."""
    csv = "audiocap_id,youtube_id,start_time,caption\n103549,a2345678901,20,A\n103550,a2345678901,20,B\n7,b2345678901,0,C\n"
    rows, skipped = prepare("audiocaps", {"test.csv": csv}, ["test/103550.wav", "test/7.wav", "8.wav"])
    assert [(row.media, row.captions, row.start) for row in rows] == [
        ("test/103550.wav", ["A", "B"], None),
        ("test/7.wav", ["C"], None),
    ]
    assert not skipped


def test_numbers_of_video2dataset_are_what_the_json_beside_says(there, tmp_path):
    watch = "https://www.youtube.com/watch?v="
    listed = {
        "000000012": {"url": f"{watch}{ID}&t=3", "key": "000000012", "status": "success"},
        "000000013_00001": {"url": f"https://youtu.be/{ID}", "clips": [["00:02:10.000", "00:02:20.000"]]},
        "000000014": {"url": "https://example.org/a.mp4", "videoID": OTHER},
        "000000015": {"videoID": OTHER, "youtube_id": ID},
        "000000016_00000": {"url": f"{watch}{OTHER}", "clips": [[0.0, 5.0], [5.0, 9.0]]},
        "000000017": ["no object"],
    }
    for key, content in listed.items():
        (tmp_path / "00000").mkdir(exist_ok=True)
        (tmp_path / f"00000/{key}.json").write_text(json.dumps(content))
    media = there(*(f"00000/{key}.mp4" for key in [*listed, "000000018"]))
    assert media.find_clip(ID, 130, 140) == Located("00000/000000013_00001.mp4")
    assert media.find_clip(ID, 60, 70) == Located("00000/000000012.mp4", 60, 70)
    assert media.find_clip(OTHER, 0, 5) == Located("00000/000000014.mp4", 0, 5)
    assert [key for key in listed if read_listed(tmp_path / f"00000/{key}.mp4")] == [*listed][:3]
    assert media.find_clip("z2345678901", 0, 10, own_name="000000012") is None  # a number of another list


# Where little or nothing is there


def test_where_little_is_there_the_files_of_no_clip_are_named(prepare):
    clips = [{"videoID": f"abcdefghij{i}_000001_000002"} for i in range(3)]
    media = ["abcdefghij1_000001_000002.mp4", "clip of 0.mp4", "clip of 2.mp4"]
    rows, skipped = prepare("vatex", {"vatex_training_v1.0.json": clips}, media)
    assert len(rows) == 1 and [item.why for item in skipped] == ["missing", "missing", "unusable"]
    assert skipped[2].reason == "3 media files there, for example clip of 0.mp4: are the others named otherwise?"


def test_where_there_are_no_media_the_annotations_are_not_read(prepare):
    """The first line stops: AudioSet has two million."""
    files = {"class_labels_indices.csv": "mid,display_name\n", "eval_segments.csv": "a, no, number, label\n"}
    with pytest.raises(UserError, match="no video and no sound there"):
        prepare("audioset", files)


# Millions of clips


def test_a_clip_of_audioset_takes_little_memory(tmp_path, monkeypatch):
    """2.08 million in 1.5 GB: tracemalloc counts what is left at the highest point, less what a few lines take."""
    ids = [f"{i:011d}" for i in range(4000)]
    (tmp_path / "class_labels_indices.csv").write_text("mid,display_name\nm,Speech\n")
    (tmp_path / "eval_segments.csv").write_text("".join(f'{name}, 30.000, 40.000, "m"\n' for name in ids))
    monkeypatch.setattr(manifest, "_walk", lambda root: (f"unbalanced_train/Y{name}.wav" for name in ids))
    cfg = DataConfig(dataset="audioset", media_root=str(tmp_path))
    tracemalloc.start()
    rows, _ = read(cfg)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 4000 and most / 4000 < 520


def test_reading_annotations_brings_no_torch():
    """It takes half a gigabyte."""
    code = "import sys, data_prep.annotations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
