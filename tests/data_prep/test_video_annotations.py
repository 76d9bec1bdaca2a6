"""data_prep/annotations.py: sets of videos with captions, steps or classes."""

import pytest
from annotation_files import reasons
from forks import ROOT

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError

MSRVTT = {
    "info": {"contributor": "Microsoft"},
    "videos": [
        {"video_id": "video0", "split": "train", "start time": 137.72, "end time": 149.44, "category": 9, "url": "u"},
        {"video_id": "video6513", "split": "validate", "start time": 1.0, "end time": 2.0},
        {"video_id": "video7010", "split": "test", "start time": 1.0, "end time": 2.0},
        {"video_id": "video9999", "split": "test", "start time": 1.0, "end time": 2.0},
        {"video_id": "video0", "split": "train"},
        {"split": "train"},
        {"video_id": "video1", "split": "dev"},
    ],
    "sentences": [
        {"caption": "a man &amp; a car", "video_id": "video0", "sen_id": 0},
        {"caption": "a woman", "video_id": "video6513", "sen_id": 1},
        {"caption": " a man & a  car", "video_id": "video0", "sen_id": 2},
        {"caption": "", "video_id": "video0", "sen_id": 3},
        {"caption": "a dog", "video_id": "video0", "sen_id": 4},
        {"video_id": "video0", "sen_id": 5},
    ],
}


def test_msrvtt(prepare):
    media = ["TrainValVideo/video0.mp4", "TrainValVideo/video6513.mp4", "TestVideo/video7010.mp4"]
    rows, skipped = prepare("msrvtt", {"MSRVTT_data.json": MSRVTT}, media)
    assert [(row.id, row.split, row.captions, row.media) for row in rows] == [
        ("video0", "train", ["a man & a car", "a dog"], media[0]),
        ("video6513", "val", ["a woman"], media[1]),
        ("video7010", "test", [], media[2]),
    ]
    assert (rows[0].start, rows[0].end, rows[0].audio_type, rows[0].source) == (None, None, "both", "msrvtt")
    assert reasons(skipped) == {
        "MSRVTT_data.json: sentence 5": "malformed: no caption",
        "MSRVTT_data.json: video0": "malformed: duplicate of MSRVTT_data.json: video0",
        "MSRVTT_data.json: 5": "malformed: no video_id",
        "MSRVTT_data.json: video1": "malformed: split 'dev' is not train, validate or test",
        "video9999": "missing: no file named video9999",
    }


def test_msrvtt_1ka(prepare):
    test = 'key,vid_key,video_id,sentence\nret0,msr7010,video7010,"a person, connecting"\nret1,msr1,video9999,lost\n'
    files = {
        "MSRVTT_data.json": MSRVTT,
        "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo6513\nvideo5\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": test + "ret2,msr7010,video7010,again\n",
    }
    rows, skipped = prepare("msrvtt_1ka", files, ["video0.mp4", "video6513.mp4", "video7010.mp4"])
    assert [(row.id, row.split, row.captions) for row in rows] == [
        ("video0", "train", ["a man & a car", "a dog"]),
        ("video6513", "train", ["a woman"]),
        ("video7010", "test", ["a person, connecting"]),
    ]
    assert {row.source for row in rows} == {"msrvtt_1ka"}  # never taken for the full split
    assert reasons(skipped) == {
        "MSRVTT_data.json: sentence 5": "malformed: no caption",
        "MSRVTT_train.9k.csv:4": "malformed: video5 has no sentence",
        "MSRVTT_train.9k.csv:5": "malformed: duplicate of MSRVTT_train.9k.csv:2",
        "MSRVTT_JSFUSION_test.csv:4": "malformed: duplicate of MSRVTT_JSFUSION_test.csv:2",
        "video9999": "missing: no file named video9999",
    }


def test_vatex(prepare):
    files = {
        "vatex_training_v1.0.json": [
            {
                "videoID": "-_a_b-c_d-e_000122_000132",
                "enCap": ["A man.", "", "A man."],
                "chCap": ["一个人。", "一个人。"],
            },
            {"videoID": "-_a_b-c_d-e_000200_000210", "enCap": ["B."], "chCap": []},
            {"videoID": "no times", "enCap": ["C."]},
            "not an object",
            {"videoID": "-_a_b-c_d-e_000200_000210", "enCap": ["D."]},
        ],
        "vatex_private_test_without_annotations.json": [{"videoID": "zyxwvutsrqp_000000_000010"}],
        "vatex_validation_v1.0.json": [{"videoID": "goneeeeeeee_000003_000013", "enCap": ["E."], "chCap": ["F"]}],
    }
    media = ["-_a_b-c_d-e_000122_000132.mp4", "-_a_b-c_d-e.mkv", "zyxwvutsrqp.mp4"]
    rows, skipped = prepare("vatex", files, media)
    assert [(row.id, row.item, row.split, row.media, row.start, row.end) for row in rows] == [
        ("-_a_b-c_d-e_000122_000132", "-_a_b-c_d-e", "train", media[0], None, None),
        ("-_a_b-c_d-e_000200_000210", "-_a_b-c_d-e", "train", media[1], 200, 210),
        ("zyxwvutsrqp_000000_000010", "zyxwvutsrqp", "private", media[2], 0, 10),
    ]
    assert (rows[0].captions, rows[0].caption_langs) == (["A man.", "一个人。"], ["en", "zh"])
    assert (rows[2].captions, rows[2].caption_langs) == ([], []) and rows[0].audio_type == "both"
    name = "vatex_training_v1.0.json"
    why = reasons(skipped)
    assert why.pop(f"{name}: 3").startswith("malformed: not of the expected form: string indices must be integers")
    assert why == {
        f"{name}: no times": "malformed: videoID no times is not ID_START_END",
        f"{name}: {rows[1].id}": f"malformed: duplicate of {name}: {rows[1].id}",
        "goneeeeeeee_000003_000013": "missing: no file named goneeeeeeee",
    }


def test_captions_of_the_languages_that_are_asked_for_are_kept(prepare):
    both, chinese, none = "abcdefghijk_000000_000010", "abcdefghijk_000010_000020", "abcdefghijk_000020_000030"
    clips = [
        {"videoID": both, "enCap": ["A man.", "B."], "chCap": ["一个人。"]},
        {"videoID": chinese, "enCap": [], "chCap": ["一个人。"]},
        {"videoID": none},
    ]
    files = {"vatex_training_v1.0.json": clips}
    for languages, wanted in (
        (["en"], [["A man.", "B."], [], []]),
        (["zh", "fr"], [["一个人。"], ["一个人。"], []]),
        ([], [["A man.", "B.", "一个人。"], ["一个人。"], []]),
    ):
        rows, skipped = prepare("vatex", files, ["abcdefghijk.mp4"], languages=languages)
        assert [row.id for row in rows] == [both, chinese, none] and not skipped  # a clip without captions stays
        assert [row.captions for row in rows] == wanted
        for row in rows:
            assert row.caption_langs == ["zh" if text == "一个人。" else "en" for text in row.captions]
    with pytest.raises(UserError, match="^languages=eng: no caption is in them; there are en, zh$"):
        prepare("vatex", files, ["abcdefghijk.mp4"], languages=["eng"])
    assert load(DataConfig, ROOT / "configs/data/vatex.yaml").languages == ["en"]


def test_cut_files_named_after_the_whole_video(prepare):
    files = {"vatex_public_test_english_v1.1.json": [{"videoID": "abcdefghijk_000122_000132", "enCap": ["A."]}]}
    (row,), _ = prepare("vatex", files, ["abcdefghijk.mp4"], clips_already_cut=True)
    assert (row.split, row.media, row.start, row.end) == ("test", "abcdefghijk.mp4", None, None)


def test_activitynet_joins_sentences_to_a_paragraph(prepare):
    activity = {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81]],
        "sentences": ["A  man.", " He &lt; she. "],
    }
    files = {
        "train.json": {"v_QOlSCBRmfWY": activity, "v_v_b-": activity, "v_gone": activity, "v_x": {"duration": 3.0}},
        "val_1.json": {"v__valid": activity},
        "val_2.json": {"v__valid": activity | {"sentences": ["", " "]}},
    }
    rows, skipped = prepare("activitynet", files, ["v_QOlSCBRmfWY.mp4", "v_b-.mkv", "_valid.webm"])
    assert [(row.id, row.split, row.media, row.captions) for row in rows] == [
        ("QOlSCBRmfWY", "train", "v_QOlSCBRmfWY.mp4", ["A man. He < she."]),
        ("v_b-", "train", "v_b-.mkv", ["A man. He < she."]),
        ("_valid", "val", "_valid.webm", ["A man. He < she."]),
        ("_valid", "val2", "_valid.webm", []),
    ]
    assert rows[0].start is None and rows[0].end is None
    assert reasons(skipped) == {
        "train.json: v_x": "malformed: no sentences",
        "gone": "missing: no file named gone",
    }


def test_youcook2_has_a_row_per_segment(prepare):
    def segment(number, start, end, **more):
        return {"id": number, "segment": [start, end]} | more

    steps = [segment(0, 90, 102, sentence="spread margarine &#39;thick&#39;"), segment(1, 114, 127, sentence="add oil")]
    database = {
        "GLd3aX16z_-": {"subset": "training", "recipe_type": "113", "duration": 241.62, "annotations": steps},
        "fn9anlEL4FI": {
            "subset": "validation",
            "recipe_type": 101,
            "annotations": [segment(0, 5, 6), segment(1, 9, 8)],
        },
        "newsubsetxx": {"subset": "extra", "recipe_type": "1", "annotations": [segment(0, 5, 6)]},
        "nosegmentsx": {"subset": "training", "recipe_type": "1"},
        "cdefghijklm": {"subset": "testing", "recipe_type": "1", "annotations": [segment(0, 0, 6)]},
    }
    media = ["training/113/GLd3aX16z_-.mp4", "GLd3aX16z_-_114_127.mp4", "fn9anlEL4FI.mp4"]
    rows, skipped = prepare("youcook2", {"youcookii_annotations_trainval.json": {"database": database}}, media)
    assert [(row.id, row.split, row.media, row.start, row.end, row.label) for row in rows] == [
        ("GLd3aX16z_-_90_102", "train", media[0], 90, 102, "113"),
        ("GLd3aX16z_-_114_127", "train", media[1], None, None, "113"),
        ("fn9anlEL4FI_5_6", "val", media[2], 5, 6, "101"),
    ]
    assert rows[0].captions == ["spread margarine 'thick'"] and rows[2].captions == []
    assert rows[0].item == rows[1].item == "GLd3aX16z_-" and rows[0].group != rows[1].group  # R@k is by segment
    assert sorted(f"{item.where}: {item.reason}" for item in skipped) == [
        "cdefghijklm_0_6: no file named cdefghijklm",
        "youcookii_annotations_trainval.json: fn9anlEL4FI: start 9.0 and end 8.0 do not span any time",
        "youcookii_annotations_trainval.json: newsubsetxx: subset 'extra' is not one of training, validation, testing",
        "youcookii_annotations_trainval.json: nosegmentsx: no segment",
    ]


def test_ucf101_splits_are_its_three_test_lists(prepare):
    def name(group, clip="01", label="ApplyEyeMakeup"):
        return f"{label}/v_{label}_g{group}_c{clip}.avi"

    files = {
        "classInd.txt": "1 ApplyEyeMakeup\r\n2 YoYo\r\nbroken\r\n",
        "testlist01.txt": f"{name('01')}\r\n{name('01', '02')} 1\r\n{name('01', label='YoYo')}\r\n",
        "testlist02.txt": f"{name('08')}\n{name('01', '02')}\n",
        "testlist03.txt": f"{name('15')}\n",
        "trainlist01.txt": f"{name('08')} 1\n{name('22')} 1\n\n{name('23')} 2\n{name('22', label='NoClass')} 3\n",
        "trainlist02.txt": f"{name('01')} 1\n{name('22')} 1\n{name('24')} 1\n",
        "trainlist03.txt": f"{name('01')} 1\n{name('22')} 1\n",
    }
    media = [name("01"), name("01", "02"), "flat/v_YoYo_g01_c01.mp4", name("08"), name("15"), name("22")]
    rows, skipped = prepare("ucf101", files, media)
    assert [(row.id, row.split) for row in rows] == [
        ("v_ApplyEyeMakeup_g01_c01", "test01"),
        ("v_ApplyEyeMakeup_g01_c02", "test01"),
        ("v_YoYo_g01_c01", "test01"),
        ("v_ApplyEyeMakeup_g08_c01", "test02"),
        ("v_ApplyEyeMakeup_g15_c01", "test03"),
        ("v_ApplyEyeMakeup_g22_c01", "train"),
    ]
    assert rows[0].group == rows[1].group == "v_ApplyEyeMakeup_g01" and rows[2].media == "flat/v_YoYo_g01_c01.mp4"
    assert (rows[0].label, rows[0].captions, rows[2].captions) == ("ApplyEyeMakeup", ["apply eye makeup"], ["yo yo"])
    assert reasons(skipped) == {
        "classInd.txt:3": "malformed: not a number and a class",
        "testlist02.txt:2": "malformed: v_ApplyEyeMakeup_g01_c02 is in test01 too",
        "trainlist01.txt:4": "malformed: ApplyEyeMakeup 2 is not a class of classInd.txt",
        "trainlist01.txt:5": "malformed: NoClass 3 is not a class of classInd.txt",
        "v_ApplyEyeMakeup_g24_c01": "missing: no file named v_ApplyEyeMakeup_g24_c01",
    }
