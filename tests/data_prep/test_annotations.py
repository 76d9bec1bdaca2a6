"""data_prep/annotations.py: each set's own files, with the oddities that they have, become rows."""

import time
from collections import Counter

import pytest
from annotation_files import reasons
from forks import ROOT

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from clip4vla.media.source import PICTURES, SOUNDS, VIDEOS
from data_prep.annotations import read
from data_prep.sets.howto100m import merge

# HowTo100M

HOWTO = "video_id,category_1,category_2,rank,task_id\n"


def talk(*lines):
    return dict(zip(("start", "end", "text"), map(list, zip(*lines, strict=True)), strict=True))


def test_neighbouring_lines_merge_until_ten_seconds_and_five_words():
    lines = [(0, 4, "one two"), (3, 11, "three"), (11, 14, "four"), (14, 16, "five six")]
    assert merge(lines) == [(0, 16, "one two three four five six")]  # 11 s hold three words only
    lines = [(0, 10, "a b c d e"), (12, 21.9, "f g h i j"), (22, 23, "k")]
    assert merge(lines) == [(0, 10, "a b c d e"), (12, 23, "f g h i j k")]
    assert merge([*lines[:2], (21, 22.1, "k"), (23, 24, "l")])[1] == (12, 24, "f g h i j k l")
    assert merge([(0, 10, "a b c d e"), (30, 31, "f")]) == [(0, 31, "a b c d e f")]  # the remainder joins
    assert merge([(0, 9, "a b c d e")]) == [] and merge([(0, 20, "a b")]) == [] and merge([]) == []
    assert merge([(0, 12, "a b c"), (1, 5, "d e")]) == [(0, 12, "a b c d e")]  # the last line need not end last


def test_a_narration_that_grows_longer_than_a_caption_may_be_is_malformed(prepare):
    talks = {"longvvvvvvv": talk(*((0, i, "a b c d e" * 2000) for i in range(9)), (0, 99, "f"))}
    csv = HOWTO + "longvvvvvvv,,,,\nfinewwwwwww,,,,\n"
    talks["finewwwwwww"] = talk((0, 10, "a b c d e"))
    files = {"HowTo100M_v1.csv": csv, "caption.json": talks}
    rows, skipped = prepare("howto100m", files, ["longvvvvvvv.mp4", "finewwwwwww.mp4"])
    assert [row.item for row in rows] == ["finewwwwwww"]
    assert [item.why for item in skipped] == ["malformed"] and "a text of 162010 characters" in skipped[0].reason


def test_howto100m(prepare):
    words = "a &amp; b  c d"
    talks = {
        "-_a-b_c-d_e": talk((0, 10, words), (10, 19, "x"), (20, 21, "y z v w"), (21, 22, "")),
        "unwantedxxx": talk((0, 10, words)),
        "shortyyyyyy": talk((0, 2, "too short")),
        "unevenzzzzz": {"start": [0, 1], "end": [1], "text": ["a", "b"]},
        "backwardsss": talk((9, 3, "gone"), (0, 10, words)),
        "notextttttt": {"start": [0], "end": [1]},
    }
    names = ["-_a-b_c-d_e", "shortyyyyyy", "unevenzzzzz", "backwardsss", "notextttttt", "silentttttt"]
    csv = HOWTO + "".join(f"{name},Food and Entertaining,Recipes,3,77\n" for name in [*names, "-_a-b_c-d_e", "lost"])
    media = [f"sub/{name}.mp4" for name in names]
    rows, skipped = prepare("howto100m", {"HowTo100M_v1.csv": csv, "caption.json": talks}, media)
    assert [(row.id, row.start, row.end, row.captions) for row in rows] == [
        ("-_a-b_c-d_e_0", 0, 10, ["a & b c d"]),
        ("-_a-b_c-d_e_1", 10, 21, ["x y z v w"]),
        ("backwardsss_0", 0, 10, ["a & b c d"]),
    ]
    first = rows[0]
    assert (first.item, first.group, first.source, first.media) == (
        "-_a-b_c-d_e",
        "-_a-b_c-d_e_0",
        "howto100m",
        f"sub/{names[0]}.mp4",
    )
    assert (first.audio_type, first.label, first.caption_langs) == ("vb", "Food and Entertaining", ["en"])
    assert reasons(skipped) == {
        "HowTo100M_v1.csv:8": "malformed: duplicate of HowTo100M_v1.csv:2",
        "lost": "missing: no file named lost",
        "caption.json: shortyyyyyy": "unusable: less than 10 s or 5 words in all",
        "caption.json: unevenzzzzz": "malformed: not start, end and text of equal length: "
        "zip() argument 2 is shorter than argument 1",
        "caption.json: backwardsss": "malformed: 1 of 2 lines end before they start",
        "caption.json: notextttttt": "malformed: not start, end and text of equal length: no text",
        "HowTo100M_v1.csv:7": "unusable: no lines in caption.json",
    }


def test_howto100m_takes_clips_spread_over_a_video_and_few_videos_for_val(prepare):
    names = [f"v{i:010d}" for i in range(1500)]
    lines = talk(*((10 * i, 10 * i + 10, "a b c d e") for i in range(9)))
    talks = {name: lines for name in names}
    csv = HOWTO + "".join(f"{name},A,B,1,2\n" for name in names)
    media = [f"{name}.webm" for name in names]
    rows, _ = prepare("howto100m", {"HowTo100M_v1.csv": csv, "caption.json": talks}, media, clips_per_video=3)
    assert Counter(row.item for row in rows) == dict.fromkeys(names, 3)
    assert [row.start for row in rows[:3]] == [10, 40, 70] and rows[0].id == "v0000000000_1"
    assert {row.item for row in rows if row.split == "val"} == {"v0000000531"}  # by sha256sum and bc
    assert len({row.id for row in rows}) == len(rows)


def test_a_caption_file_cut_short_stops(prepare):
    files = {"HowTo100M_v1.csv": HOWTO + "a,A,B,1,2\n", "caption.json": '{"a": {"start": [0, 1'}
    with pytest.raises(UserError, match=r"caption.json: not valid JSON, perhaps cut short: .*; get it again"):
        prepare("howto100m", files, ["a.mp4"])


# Sounds

CLASSES = """index,mid,display_name
0,/m/09x0r,Speech
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00125,"Inside, small room"
"""
HEAD = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
"""


def test_audioset(prepare):
    train = HEAD + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00125"\n\n-0_a, 0.000, 9.500, "/m/05zppz"\n'
    files = {
        "class_labels_indices.csv": CLASSES,
        "balanced_train_segments.csv": train,
        "unbalanced_train_segments.csv": HEAD + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r"\nx, y, 10, "/m/09x0r"\n',
        "eval_segments.csv": HEAD + 'abc_d, 5.000, 15.000, "/m/09x0r,/m/unknown"\ne, 5.000, 4.000, "/m/09x0r"\n'
        'zzz, 5.000, 15.000, "/m/09x0r"\n_last_, 0.000, 10.000, "/m/09x0r"\nf, 1.000, 2.000, /m/09x0r, /m/09x0r\n',
    }
    rows, skipped = prepare("audioset", files, ["train/Y--PJHxphWEs.wav", "-0_a.mp4", "_last_.m4a"])
    assert [(row.id, row.split, row.media, row.start, row.end) for row in rows] == [
        ("--PJHxphWEs_30_40", "train", "train/Y--PJHxphWEs.wav", None, None),  # cut already
        ("-0_a_0_9.5", "train", "-0_a.mp4", 0, 9.5),
        ("_last__0_10", "test", "_last_.m4a", 0, 10),
    ]
    assert rows[0].captions == ["The sound of Speech, Inside, small room"]
    assert [row.labels for row in rows[:2]] == [["Speech", "Inside, small room"], ["Male speech, man speaking"]]
    assert {(row.audio_type, row.source) for row in rows} == {("nb", "audioset")} and rows[0].item == "--PJHxphWEs"
    assert reasons(skipped) == {
        "unbalanced_train_segments.csv:4": "malformed: duplicate of balanced_train_segments.csv:4",
        "unbalanced_train_segments.csv:5": "malformed: could not convert string to float: 'y'",
        "eval_segments.csv:4": "malformed: label '/m/unknown' is not in class_labels_indices.csv",
        "eval_segments.csv:5": "malformed: start 5.0 and end 4.0 do not span any time",
        "zzz_5_15": "missing: no file named zzz",
        "eval_segments.csv:8": "malformed: more cells than the header has columns",
    }


def test_audioset_with_one_of_its_tables(prepare):
    files = {"class_labels_indices.csv": CLASSES, "eval_segments.csv": HEAD + 'a, 0.000, 10.000, "/m/09x0r"\n'}
    rows, skipped = prepare("audioset", files, ["a.flac"])
    assert [(row.item, row.split) for row in rows] == [("a", "test")] and not skipped


def test_audiocaps_gathers_the_captions_of_a_clip(prepare):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    val = head + '1,-r_n-,130,"Water &quot;pours&quot;,  then stops"\n2,y2,0,A dog\n\n3,-r_n-,130,A man talks\n'
    val += "4,-r_n-,130,A man talks\n5,-r_n-,130, \n6,-r_n-,60,Elsewhere\n7,bad,soon,A cat\n8,,1,A cat\n9,short\n"
    files = {"train.csv": "\ufeff" + head + "1,t1,20,Speech\n", "val.csv": val}
    media = ["-r_n-_130.wav", "-r_n-.mp4", "Yy2.wav", "t1_20_30.flac"]
    rows, skipped = prepare("audiocaps", files, media)
    assert [(row.id, row.split, row.captions, row.media) for row in rows] == [
        ("t1_20_30", "train", ["Speech"], "t1_20_30.flac"),
        ("-r_n-_130_140", "val", ['Water "pours", then stops', "A man talks", "A man talks"], "-r_n-_130.wav"),
        ("y2_0_10", "val", ["A dog"], "Yy2.wav"),
        ("-r_n-_60_70", "val", ["Elsewhere"], "-r_n-.mp4"),
    ]
    assert rows[1].caption_langs == ["en", "en", "en"] and rows[1].audio_type == "nb"
    assert (rows[1].picture, rows[1].picture_start, rows[3].picture) == ("-r_n-.mp4", 130, None)
    assert rows[1].item == rows[3].item and rows[1].group != rows[3].group
    assert (rows[1].start, rows[3].start, rows[3].end) == (None, 60, 70)
    assert reasons(skipped) == {
        "val.csv:9": "malformed: could not convert string to float: 'soon'",
        "val.csv:10": "malformed: no id",
        "val.csv:11": "malformed: could not convert string to float: ''",
    }


def test_clotho_keeps_equal_names_of_its_parts_apart(prepare):
    head = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    files = {
        "clotho_captions_development.csv": head + 'Rain 1.2.wav,"Rain, hard",Rain,Rain,,It rains\n',
        "clotho_captions_evaluation.csv": head + "Rain 1.2.wav,a,b,c,d,e\nmissing.wav,a,b,c,d,e\n../up.wav,a,b,c,d,e\n"
        "Rain 1.2.wav,a,b,c,d,e\ntoo.wav,a, many,b,c,d,e\n",
    }
    media = ["development/Rain 1.2.wav", "evaluation/Rain 1.2.wav", "up.wav"]
    rows, skipped = prepare("clotho", files, media)
    assert [(row.id, row.split, row.media) for row in rows] == [
        ("Rain 1.2.wav", "train", "development/Rain 1.2.wav"),
        ("Rain 1.2.wav", "test", "evaluation/Rain 1.2.wav"),
    ]
    assert rows[0].captions == ["Rain, hard", "Rain", "It rains"] and rows[1].captions == list("abcde")
    assert (rows[0].audio_type, rows[0].start, rows[0].end) == ("nb", None, None)
    assert reasons(skipped) == {
        "missing.wav": "missing: no file named missing.wav",
        "clotho_captions_evaluation.csv:4": "malformed: evaluation/../up.wav: leaves the media root",
        "clotho_captions_evaluation.csv:5": "malformed: duplicate of clotho_captions_evaluation.csv:2",
        "clotho_captions_evaluation.csv:6": "malformed: more cells than the header has columns",
    }


def test_urbansound8k_has_a_split_per_fold(prepare):
    csv = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
    csv += "101415-3-0-2.wav,101415,0,4,1,1,3,dog_bark\n7389-1-0-0.wav,7389,1,2,1,10,1,car_horn\n"
    csv += "7389-1-0-1.wav,7389,1,2,1,11,1,car_horn\n24074-1-0-3.wav,24074,1,2,1,2,1,car_horn\n"
    media = ["fold1/101415-3-0-2.ogg", "fold10/7389-1-0-0.wav"]  # as its archive has them, and re-encoded
    rows, skipped = prepare("urbansound8k", {"metadata/UrbanSound8K.csv": csv}, media)
    assert [(row.split, row.group, row.label, row.captions, row.audio_type) for row in rows] == [
        ("fold1", "101415", "dog_bark", ["dog bark"], "nb"),
        ("fold10", "7389", "car_horn", ["car horn"], "nb"),
    ]
    assert reasons(skipped) == {
        "UrbanSound8K.csv:4": "malformed: fold '11' is not 1 to 10",
        "24074-1-0-3": "missing: no file named 24074-1-0-3",
    }


def test_names_of_grid_spell_its_sentences(prepare):
    media = ["s1/bbaf2n.mpg", "s1/bbaf3s.mpg", "s2/bbaf2n.mpg", "s1/srwc1a.mpg", "s1/lgbzzp.mpg", "s1/aaaaaa.mpg"]
    rows, skipped = prepare("grid", {"readme.txt": ""}, [*media, "s1/longer_name.mpg"])
    assert [(row.id, row.captions, row.group, row.split) for row in rows] == [
        ("s1_bbaf2n", ["bin blue at f two now"], "bbaf2n", "train"),
        ("s1_bbaf3s", ["bin blue at f three soon"], "bbaf3s", "test"),
        ("s1_lgbzzp", ["lay green by z zero please"], "lgbzzp", "train"),
        ("s1_srwc1a", ["set red with c one again"], "srwc1a", "train"),
        ("s2_bbaf2n", ["bin blue at f two now"], "bbaf2n", "train"),
    ]
    assert {row.audio_type for row in rows} == {"vb"}
    assert reasons(skipped) == {"s1/aaaaaa.mpg": "malformed: aaaaaa spells no sentence of GRID's"}


def test_splits_of_grid_meet_where_they_should(prepare):
    """Sentences whose hashes are 19, 20, 29 and 30 of 100."""
    names = ["bgwb7a", "brbt1s", "lgbg1a", "brbazp"]
    rows, _ = prepare("grid", {"readme.txt": ""}, [f"s1/{name}.mpg" for name in names])
    split = {row.group: row.split for row in rows}
    assert [split[name] for name in names] == ["test", "val", "val", "train"]


def test_esc50_has_a_split_per_fold(prepare):
    csv = "filename,fold,target,category,esc10,src_file,take\n"
    csv += "1-101296-A-19.wav,1,19,thunderstorm,False,101296,A\n1-101296-B-19.wav,1,19,thunderstorm,False,101296,B\n"
    csv += "5-9032-A-0.wav,5,30,door_wood_knock,True,9032,A\nx.wav,6,0,dog,True,1,A\ngone.wav,2,0,dog,True,1,A\n"
    media = ["audio/1-101296-A-19.wav", "audio/1-101296-B-19.wav", "audio/5-9032-A-0.wav"]
    rows, skipped = prepare("esc50", {"meta/esc50.csv": csv}, media)
    assert [row.item for row in prepare("esc10", {"meta/esc50.csv": csv}, media)[0]] == ["5-9032-A-0.wav"]
    assert [(row.split, row.group, row.label) for row in rows] == [
        ("fold1", "101296", "thunderstorm"),
        ("fold1", "101296", "thunderstorm"),
        ("fold5", "9032", "door_wood_knock"),
    ]
    assert rows[2].captions == ["door wood knock"] and rows[2].audio_type == "nb" and rows[0].item != rows[1].item
    assert reasons(skipped) == {
        "esc50.csv:5": "malformed: fold '6' is not 1 to 5",
        "gone.wav": "missing: no file named gone.wav",
    }


# Videos


# A folder of one's own


def test_folder_with_a_table(prepare):
    csv = "\ufeffpath,caption,start,end,audio_type,label,split,lang\n"
    lines = [
        "a/tone.ogg,A  tone &amp; more,0.2,0.5,nb,t,train,",
        "a/tone.ogg,Beep,0.2,0.5,nb,t,train,",
        "a/tone.ogg,Beep,0.2,,nb,,,de",
        " ",
        "red.PNG,Red,,,,,my val,",
        "film.mp4,A film,,,,,,",
        "gone.wav,Gone,,,,,,",
        "../red.PNG,Out,,,,,,",
        "/etc/x.png,Out,,,,,,",
        "film.mp4,,,,,,,",
        "film.mp4,Bad,3,2,,,,",
        "film.mp4,Bad,0,inf,,,,",
        "notes.txt,Bad,,,,,,",
        "film.mp4,Bad,,,loud,,,",
    ]
    media = ["a/tone.ogg", "red.PNG", "film.mp4", "notes.txt"]
    rows, skipped = prepare("folder", {"captions.csv": csv + "\n".join(lines)}, media)
    assert [(row.id, row.split, row.captions, row.picture, row.media) for row in rows] == [
        ("a/tone.ogg@0.2-0.5", "train", ["A tone & more", "Beep"], None, "a/tone.ogg"),
        ("a/tone.ogg@0.2-", "train", ["Beep"], None, "a/tone.ogg"),
        ("red.PNG", "my_val", ["Red"], "red.PNG", None),
        ("film.mp4", "train", ["A film"], None, "film.mp4"),
    ]
    tone = rows[0]
    assert (tone.start, tone.end, tone.audio_type, tone.label, tone.lang) == (0.2, 0.5, "nb", "t", "en")
    assert tone.source == "media" and rows[1].caption_langs == ["de"] and rows[3].audio_type == "both"
    assert reasons(skipped) == {
        "gone.wav": "missing: no file named gone.wav",
        "captions.csv:9": "malformed: ../red.PNG: leaves the media root",
        "captions.csv:10": "malformed: /etc/x.png: leaves the media root",
        "captions.csv:11": "malformed: path or caption is empty",
        "captions.csv:12": "malformed: start 3.0 and end 2.0 do not span any time",
        "captions.csv:13": "malformed: start 0.0 and end inf do not span any time",
        "captions.csv:14": f"malformed: notes.txt: unknown kind of file, not one of {' '.join(PICTURES + VIDEOS + SOUNDS)}",
        "captions.csv:15": "malformed: audio_type 'loud' is not vb, nb or both",
    }


def test_a_clip_keeps_its_first_thousand_captions_and_the_lines_of_others_are_counted(prepare):
    csv = "path,caption\n" + "".join(f"a.mp4,caption {i % 3000}\n" for i in range(30_000)) + "b.mp4,x\n"
    begin = time.process_time()
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.mp4", "b.mp4"])
    assert time.process_time() - begin < 10
    assert rows[0].captions == [f"caption {i}" for i in range(1000)] and len(rows[0].caption_langs) == 1000
    assert rows[1].captions == ["x"] and len(skipped) == 20_000
    assert reasons(skipped[:1]) == {"captions.csv:1002": "unusable: more than 1000 captions of one clip"}


def test_the_captions_of_one_line_are_a_thousand_at_most(prepare):
    captions = {f"{lang}Cap": [f"{lang} {i}" for i in range(600)] for lang in ("en", "ch")}
    clip = {"videoID": "v_000001_000011"} | captions
    rows, skipped = prepare("vatex", {"vatex_training_v1.0.json": [clip]}, ["v_000001_000011.mp4"])
    assert Counter(rows[0].caption_langs) == {"en": 600, "zh": 400} and rows[0].captions[-1] == "ch 399"
    assert [item.why for item in skipped] == ["unusable"]


def test_folder_with_json_lines_beside_the_media(prepare):
    text = (
        '{"path": "a.png", "caption": "x"}\nnot json\n\n[1]\n{"path": "a.png", "caption": 1, "start": 2}\n{"path": 3}\n'
    )
    rows, skipped = prepare("folder", {"../media/captions.jsonl": text}, ["a.png"], annotations="")
    assert [(row.id, row.captions, row.start) for row in rows] == [("a.png", ["x"], None), ("a.png@2-", ["1"], 2)]
    assert [item.where for item in skipped] == [f"captions.jsonl:{n}" for n in (2, 4, 6)]


# What stops a run


@pytest.mark.parametrize(
    "dataset, files, words",
    [
        ("howto100m", {"caption.json": {}}, "no HowTo100M_v1.csv there"),
        ("howto100m", {"HowTo100M_v1.csv": HOWTO}, "none of caption.json, raw_caption*.json, sentencified_htm_*.json, ID.csv"),
        ("audioset", {"class_labels_indices.csv": CLASSES}, "none of balanced_train_segments.csv, unbalanced"),
        ("audioset", {"eval_segments.csv": HEAD}, "no class_labels_indices.csv there"),
        ("audioset", {"class_labels_indices.csv": "index,mid\n"}, "indices.csv: the first line names no column display_name"),
        ("msrvtt", {"MSRVTT_data.json": {"videos": []}}, "MSRVTT_data.json: JSON, but not a dict with videos and sentences"),
        ("msrvtt", {"MSRVTT_data.json": '{"videos": ['}, "MSRVTT_data.json: not valid JSON"),
        ("msrvtt_1ka", {"MSRVTT_data.json": {}}, "no MSRVTT_train.9k.csv, no MSRVTT_JSFUSION_test.csv there"),
        ("vatex", {"vatex_validation_v1.0.json": {}}, "vatex_validation_v1.0.json: JSON, but not a list"),
        ("audiocaps", {"val.csv": "audiocap_id,youtube_id,caption\n"}, "val.csv: the first line names no column start_time"),
        ("audiocaps", {"val.csv": ""}, "val.csv: the first line names no column caption and start_time and youtube_id"),
        ("clotho", {"clotho_captions_validation.csv": "file_name,caption_1\n"}, "names no column caption_2 and caption_3"),
        ("activitynet", {}, "none of train.json, val_1.json, val_2.json there"),
        ("youcook2", {"youcookii_annotations_trainval.json": []}, "not a dict with database"),
        ("esc50", {"esc50.csv": "filename,fold\n"}, "esc50.csv: the first line names no column category and src_file"),
        ("ucf101", {"classInd.txt": "1 A\n", "testlist01.txt": "A/x.avi\n"}, "none of trainlist01.txt"),
        ("folder", {}, "no captions.csv or captions.jsonl in"),
        ("folder", {"captions.csv": "file,caption\n"}, "captions.csv: the first line names no column path"),
        ("folder", {"captions.csv": 'path,caption\na.png,"' + "x\n" * 70000}, "captions.csv:"),
    ],
)  # fmt: skip
def test_files_and_columns_that_are_not_there(prepare, dataset, files, words):
    with pytest.raises(UserError) as caught:
        prepare(dataset, {"README": ""} | files)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_media_folder_no_annotations_and_nothing_found(prepare):
    with pytest.raises(UserError, match="media_root=/nowhere/at/all: no such folder"):
        prepare("vatex", {}, media_root="/nowhere/at/all")
    with pytest.raises(UserError, match="annotations=/nowhere/at/all: no such file or folder"):
        prepare("vatex", {}, annotations="/nowhere/at/all")
    clips = [{"videoID": "a_000001_000002"}, {"videoID": "b_000001_000002"}, {}]
    files = {"vatex_training_v1.0.json": clips}
    with pytest.raises(UserError, match="media_root=.*/media: no video and no sound there; the config's header"):
        prepare("vatex", files)
    layout = "nothing in vatex's layout: 2 media files there, for example sub/c.mp4; 2 missing; 1 malformed; "
    with pytest.raises(UserError, match=f"{layout}.*right folder") as caught:
        prepare("vatex", files, ["sub/c.mp4", "sub/d.wav"])
    assert "\n" not in str(caught.value)


def test_one_annotation_file_can_be_named(prepare, tmp_path):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    files = {"train.csv": head + "1,a,0,x\n", "test.csv": head + "2,b,0,y\n"}
    rows, _ = prepare("audiocaps", files, ["a.wav", "b.wav"], annotations=str(tmp_path / "annotations" / "test.csv"))
    assert [(row.item, row.split) for row in rows] == [("b", "test")]


def test_stamps_pass_through():
    rows, skipped = read(DataConfig(dataset="stamps", media_root=str(ROOT / "tests" / "sample")))
    assert {"pictures", "sounds", "speech_en"} <= {row.source for row in rows} and not skipped


def test_a_stamp_whose_text_is_too_long_for_a_caption_is_malformed(prepare):
    texts = {"../media/a.txt": "A cat.\n", "../media/b.txt": "A dog.\nfr.utf8=" + "x" * 100_001}
    rows, skipped = prepare("stamps", texts, ["a.png", "b.png"])
    assert [row.id for row in rows] == ["pictures/a"]
    assert reasons(skipped) == {"b.txt": "malformed: a text of 100001 characters"}
