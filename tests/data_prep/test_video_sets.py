"""data_prep/sets/videos.py and howto100m.py: more sets of videos, and other forms of MSR-VTT's and HowTo100M's annotations."""

import json

import pytest
from annotation_files import reasons

from clip4vla.errors import UserError


def test_msvd_takes_the_clips_that_its_lists_name(prepare):
    text = "# Copyright\n\n-4wsuPCjDBc_5_15 a squirrel eats\n-4wsuPCjDBc_5_15 a  squirrel &amp; nuts\n_0nX-El-ySo_83_93 a man\n"
    text += "unusedunuse_1_2 a dog\nbroken a cat\nlostlostlos_1.5_2 x\n"
    files = {
        "AllVideoDescriptions.txt": text,
        "train_list.txt": "-4wsuPCjDBc_5_15\nlostlostlos_1.5_2\nbroken\n",
        "test_list.txt": "_0nX-El-ySo_83_93\n",
    }
    rows, skipped = prepare("msvd", files, ["YouTubeClips/-4wsuPCjDBc_5_15.avi", "_0nX-El-ySo.mp4"])
    assert [(row.id, row.item, row.split, row.captions, row.start, row.end) for row in rows] == [
        ("-4wsuPCjDBc_5_15", "-4wsuPCjDBc", "train", ["a squirrel eats", "a squirrel & nuts"], None, None),
        ("_0nX-El-ySo_83_93", "_0nX-El-ySo", "test", ["a man"], 83, 93),
    ]
    assert reasons(skipped) == {
        "AllVideoDescriptions.txt:7": "malformed: broken is not ID_START_END",
        "lostlostlos_1.5_2": "missing: no file named lostlostlos",
    }


def test_didemo_joins_the_moments_of_a_video(prepare):
    def moment(number, video, text):
        return {"annotation_id": number, "video": video, "description": text, "times": [[0, 0]], "num_segments": 6}

    one, two = "54322086@N00_2408598493_274c77d26a.avi", "12090392@N02_13482799053_87ef417396.mov"
    files = {
        "train_data.json": [
            moment(1, one, "a dog"),
            moment(2, two, "a cat "),
            moment(3, one, "the dog &lt; jumps"),
            {},
        ],
        "test_data.json": [moment(4, "gone.mov", "x"), {"video": two, "annotation_id": 5}],
    }
    rows, skipped = prepare("didemo", files, [f"videos/{one[:-4]}.mp4", f"videos/{two}.mp4"])
    assert [(row.id, row.split, row.captions, row.media, row.start, row.end) for row in rows] == [
        (one, "train", ["a dog the dog < jumps"], f"videos/{one[:-4]}.mp4", 0, 30),
        (two, "train", ["a cat"], f"videos/{two}.mp4", 0, 30),
    ]
    assert reasons(skipped) == {
        "train_data.json: 3": "malformed: no video",
        f"test_data.json: {two}": "malformed: no description",
        "gone.mov": "missing: no file named gone.mov",
    }


def test_lsmdc_gathers_the_sentences_of_a_clip(prepare):
    def line(name, text):
        return "\t".join([name, *["00.00.51.926", "00.00.54.129"] * 2, text]) + "\n"

    one, two = "0001_American_Beauty_00.00.51.926-00.00.54.129", "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"
    files = {
        "LSMDC16_annos_training.csv": line(one, 'SOMEONE says "no, thanks.') + line(one, "He leaves.") + "a\tb\n",
        "LSMDC16_challenge_1000_publictect.csv": line(two, "A plane lands."),
    }
    rows, skipped = prepare("lsmdc", files, [f"0001_American_Beauty/{one}.avi", f"3009_BATTLE_LOS_ANGELES/{two}.avi"])
    assert [(row.id, row.split, row.captions, row.start) for row in rows] == [
        (one, "train", ['SOMEONE says "no, thanks.', "He leaves."], None),
        (two, "test", ["A plane lands."], None),
    ]
    assert reasons(skipped) == {"LSMDC16_annos_training.csv:3": "malformed: 2 cells between tabs, not 6"}


def test_valor32k(prepare):
    clips = [{"video_id": "x-2Abohj8VY_30.000_40.000", "desc": "With the rumble, a crowd spoke."}, {"video_id": "a_b"}]
    rows, skipped = prepare("valor32k", {"desc_val.json": clips}, ["x-2Abohj8VY_30.000_40.000.mp4"])
    assert [(row.id, row.split, row.captions, row.start, row.audio_type) for row in rows] == [
        ("x-2Abohj8VY_30_40", "val", ["With the rumble, a crowd spoke."], None, "both")
    ]
    assert reasons(skipped) == {"desc_val.json: a_b": "malformed: a_b is not ID_START_END"}


@pytest.mark.parametrize("number", [400, 600])
def test_kinetics(prepare, number):
    head = "label,youtube_id,time_start,time_end,split"
    files = {
        "train.csv": f'{head},is_cc\n"playing, drums",---QUuC4vJs,84,94,train,0\nabseiling,lostlostlos,1,11,train,0\n',
        "validate.csv": f"{head}\nabseiling,--GkrdYZ9Tc,0,10,validate\n",
        f"kinetics_{number}_test.csv": "youtube_id,time_start,time_end,split\n--nQbRBEz2s,104,114,test\n",
    }
    media = ["train/---QUuC4vJs_000084_000094.mp4", "--GkrdYZ9Tc.mp4", "--nQbRBEz2s_000104_000114.mp4"]
    rows, skipped = prepare(f"kinetics{number}", files, media)
    assert [(row.id, row.split, row.label, row.captions, row.start) for row in rows] == [
        ("---QUuC4vJs_84_94", "train", "playing, drums", ["playing, drums"], None),
        ("--GkrdYZ9Tc_0_10", "val", "abseiling", ["abseiling"], 0),
        ("--nQbRBEz2s_104_114", "test", None, [], None),
    ]
    assert {row.source for row in rows} == {f"kinetics{number}"}
    assert reasons(skipped) == {"lostlostlos_1_11": "missing: no file named lostlostlos"}


# MSR-VTT

SENTENCES = [("video0", "a man"), ("video6513", "a woman"), ("video7010", "a dog"), ("video0", "a car")]
MEDIA = [f"{name}.mp4" for name in ("video0", "video6513", "video7010")]


def microsoft(*videos):
    """A file as Microsoft ships it, of videos (name, split)."""
    return {
        "info": {"year": "2016"},
        "videos": [{"video_id": name, "split": split, "category": 9, "id": 0} for name, split in videos],
        "sentences": [
            {"caption": text, "video_id": name, "sen_id": 0} for name, text in SENTENCES if name in dict(videos)
        ],
    }


def coco():
    """MSR_VTT.json."""
    return {
        "images": [{"id": name} for name in ("video0", "video6513", "video7010")] + [{"id": 3}],
        "annotations": [{"caption": text, "image_id": name, "id": 0} for name, text in SENTENCES] + [{"caption": "x"}],
    }


FORMS = {
    "microsoft": {
        "train_val_videodatainfo.json": microsoft(("video0", "train"), ("video6513", "validate")),
        "test_videodatainfo.json": microsoft(("video7010", "test")),
    },
    "coco": {"annotation/MSR_VTT.json": coco()},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_msrvtt(prepare, form):
    rows, skipped = prepare("msrvtt", FORMS[form], MEDIA)
    assert [(row.id, row.split, row.captions) for row in rows] == [
        ("video0", "train", ["a man", "a car"]),
        ("video6513", "val", ["a woman"]),
        ("video7010", "test", ["a dog"]),
    ]
    broken = {"MSR_VTT.json: sentence 4": "malformed: no image_id", "MSR_VTT.json: 3": "malformed: no video_id"}
    assert reasons(skipped) == (broken if form == "coco" else {})
    lists = {
        "MSRVTT_train.9k.csv": "video_id\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": "video_id,sentence\nvideo7010,a pup\n",
    }
    rows, _ = prepare("msrvtt_1ka", lists, MEDIA)
    assert [(row.id, row.split, row.captions) for row in rows] == [
        ("video0", "train", ["a man", "a car"]),
        ("video7010", "test", ["a pup"]),
    ]


def test_the_form_of_msrvtt_that_has_all_comes_first(prepare, tmp_path):
    rows, _ = prepare(
        "msrvtt", FORMS["coco"] | FORMS["microsoft"] | {"MSRVTT_data.json": microsoft(("video0", "test"))}, MEDIA
    )
    assert [(row.id, row.split) for row in rows] == [("video0", "test")]
    rows, _ = prepare("msrvtt", {}, annotations=str(tmp_path / "annotations/annotation/MSR_VTT.json"))
    assert len(rows) == 3


# HowTo100M

HOWTO = "video_id,category_1,category_2,rank,task_id\nabcdefghijk,Food,Recipes,3,77\nvvvvvvvvvvv,Food,Recipes,3,77\n"
TALK = {"start": [0, 6], "end": [5.5, 12], "text": ["a b c", "d e f"]}


@pytest.mark.parametrize("name", ["raw_caption.json", "sentencified_htm_370k.json", "howto100m_captions/", ""])
def test_other_narrations_of_howto100m(prepare, tmp_path, name):
    files = {"HowTo100M_v1.csv": HOWTO}
    if name.endswith(".json"):
        files |= {name: {"abcdefghijk": TALK, "vvvvvvvvvvv": {"start": [0], "end": [1]}, "other": TALK}}
    else:
        files |= {f"{name}abcdefghijk.csv": ",start,end,text\n0,0,5.5,a b c\n1,6,12,d e f\n", f"{name}other.csv": "x\n"}
        files |= {f"{name}vvvvvvvvvvv.csv": 'start,end,text\n0,1,"open\n'}
    rows, skipped = prepare("howto100m", files, ["abcdefghijk.mp4", "vvvvvvvvvvv.mp4"])
    assert [(row.id, row.start, row.end, row.captions, row.label) for row in rows] == [
        ("abcdefghijk_0", 0, 12, ["a b c d e f"], "Food")
    ]
    assert [item.why for item in skipped] == ["malformed"] and "vvvvvvvvvvv" in skipped[0].where
    (tmp_path / "annotations/caption.json").write_text(json.dumps({"abcdefghijk": TALK | {"text": ["g h i", "j k l"]}}))
    if name.endswith(".json"):
        with pytest.raises(
            UserError, match="annotations=.*: several narrations; name one, as annotations=/.*/caption.json"
        ):
            prepare("howto100m", {})
    rows, _ = prepare("howto100m", {}, annotations=str(tmp_path / "annotations/caption.json"))
    assert rows[0].captions == ["g h i j k l"]
