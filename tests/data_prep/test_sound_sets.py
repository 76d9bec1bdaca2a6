"""data_prep/sets/sounds.py and speech.py: sets of sounds and speech in the files of their authors."""

from typing import get_args, get_type_hints

from annotation_files import reasons

from clip4vla.config import DataConfig
from data_prep.annotations import PACKED, SETS


def test_every_data_set_of_the_settings_has_its_generator():
    assert sorted(SETS | PACKED) == sorted(get_args(get_type_hints(DataConfig)["dataset"]))


def test_vggsound(prepare):
    csv = '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,"female speech, woman speaking",train\n'
    csv += "--56QUhyDQM,185,playing tennis,val\nx,soon,a,train\ngonegonegon,3,a,train\n"
    media = ["video/---g-f_I2yQ_000001.mp4", "--0PQM4-hqg.mkv"]
    rows, skipped = prepare("vggsound", {"vggsound.csv": csv}, media)
    assert [(row.id, row.split, row.label, row.captions, row.media, row.start, row.end) for row in rows] == [
        ("---g-f_I2yQ_1_11", "test", "people marching", ["The sound of people marching"], media[0], None, None),
        (
            "--0PQM4-hqg_30_40",
            "train",
            "female speech, woman speaking",
            ["The sound of female speech, woman speaking"],
            media[1],
            30,
            40,
        ),
    ]
    assert {(row.source, row.audio_type) for row in rows} == {("vggsound", "nb")}
    assert reasons(skipped) == {
        "vggsound.csv:3": "malformed: split 'val' is not train or test",
        "vggsound.csv:4": "malformed: could not convert string to float: 'soon'",
        "gonegonegon_3_13": "missing: no file named gonegonegon",
    }


def test_fsd50k_has_several_labels(prepare):
    dev = "fname,labels,mids,split\n"
    dev += '64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n10,Rain,/m/06mb1,val\n11,Rain,/m/06mb1,dev\n'
    files = {
        "FSD50K.ground_truth/dev.csv": dev,
        "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n37199,"Accelerating_and_revving_and_vroom,Car","/a,/b"\n',
    }
    media = ["FSD50K.dev_audio/64760.wav", "FSD50K.dev_audio/10.wav", "FSD50K.eval_audio/37199.wav"]
    rows, skipped = prepare("fsd50k", files, media)
    assert [(row.id, row.split, row.labels, row.label, row.media) for row in rows] == [
        ("64760", "train", ["Electric guitar", "Guitar", "Music"], None, media[0]),
        ("10", "val", ["Rain"], None, media[1]),
        ("37199", "test", ["Accelerating and revving and vroom", "Car"], None, media[2]),
    ]
    assert rows[0].captions == ["The sound of Electric guitar, Guitar, Music"]
    assert reasons(skipped) == {"dev.csv:4": "malformed: split 'dev' is not train or val"}


def test_captions_of_musiccaps_may_span_lines(prepare):
    csv = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n"
    csv += '-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","[\'low quality\', \'sad\']","A ""sad"" ballad,\n\nsoft.",4,False,True\n'
    csv += '-0SdAVK79lg,30,40,/m/0155w,"[\'guitar song\']",A guitar.,0,False,False\nx,1,2,,,"open,0,False,False\n'
    rows, skipped = prepare("musiccaps", {"musiccaps-public.csv": csv}, ["-0Gj8-vB1q4.wav", "-0SdAVK79lg_30.wav"])
    assert [(row.id, row.split, row.captions, row.start) for row in rows] == [
        ("-0Gj8-vB1q4_30_40", "test", ['A "sad" ballad, soft.'], 30),
        ("-0SdAVK79lg_30_40", "train", ["A guitar."], None),
    ]
    assert [item.where for item in skipped] == ["musiccaps-public.csv:6"] and skipped[0].why == "malformed"


def test_auto_acd_finds_the_clips_that_were_cut_from_its_videos(prepare):
    files = {
        "train.csv": "youtube_id,caption\n--PJHxphWEs,A bird sings.\nYabcdefghij,A dog.\n0123456789a_000017,Water.\n"
        "lostlostlos,x\n",
        "test.csv": 'youtube_id,caption\n-_a-b_c-d_e,"A man, then a car."\n-_a-b_c-d_e,A second.\ntwotwotwotw,x\n',
    }
    media = ["Y--PJHxphWEs.flac", "Yabcdefghij_30.wav", "0123456789a_000017.mp4", "a/-_a-b_c-d_e_30000_40000.flac"]
    media += ["twotwotwotw_10.wav", "twotwotwotw_30.wav"]
    rows, skipped = prepare("auto_acd", files, media)
    assert [(row.id, row.split, row.captions, row.media) for row in rows] == [
        ("--PJHxphWEs", "train", ["A bird sings."], media[0]),
        ("Yabcdefghij", "train", ["A dog."], media[1]),
        ("0123456789a_000017", "train", ["Water."], media[2]),
        ("-_a-b_c-d_e", "test", ["A man, then a car.", "A second."], media[3]),
    ]
    assert reasons(skipped) == {
        "lostlostlos": "missing: no file named lostlostlos",
        "test.csv:4": f"unusable: it may be {media[4]} or {media[5]}, and that may be another clip: rename or remove one",
    }


def test_wavcaps_keeps_equal_numbers_of_its_sources_apart(prepare, tmp_path):
    def part(*sounds):
        return {"num_captions_per_audio": 1, "data": [{"id": name, "caption": text} for name, text in sounds]}

    files = {
        "AudioSet_SL/as_final.json": part(("Yb0RFKhbpFJA.wav", "Wind &amp; a man.")),
        "BBC_Sound_Effects/bbc_final.json": part(("NHU05104134", "A jungle.")),
        "FreeSound/fsd_final.json": part(("2219", "Rain."), ("7", "Lost.")),
        "SoundBible/sb_final.json": part(("2219", "An airplane."), (3, "No text.")),
    }
    inside = "mnt/fast/nobackup/scratch4weeks/xm00178/WavCaps/data/waveforms"
    media = [
        f"AudioSet_SL/{inside}/AudioSet_SL_flac/Yb0RFKhbpFJA.flac",
        "BBC_Sound_Effects_flac/NHU05104134.flac",
        f"FreeSound/{inside}/FreeSound_flac/2219.flac",
        "SoundBible_flac/2219.flac",
    ]
    rows, skipped = prepare("wavcaps", files, media)
    assert [(row.id, row.captions, row.media) for row in rows] == [
        ("AudioSet_SL/Yb0RFKhbpFJA", ["Wind & a man."], media[0]),
        ("BBC_Sound_Effects/NHU05104134", ["A jungle."], media[1]),
        ("FreeSound/2219", ["Rain."], media[2]),
        ("SoundBible/2219", ["An airplane."], media[3]),
    ]
    assert {(row.source, row.split, row.audio_type) for row in rows} == {("wavcaps", "train", "nb")}
    assert reasons(skipped).pop("FreeSound/7") == "missing: no file named FreeSound/7" and len(skipped) == 2
    alone = str(tmp_path / "annotations/SoundBible/sb_final.json")
    (row,), _ = prepare("wavcaps", {}, annotations=alone, media_root=str(tmp_path / "media/SoundBible_flac"))
    assert row.media == "2219.flac"  # the folder of the one source is the root


def test_wavcaps_leaves_out_what_the_authors_lists_name(prepare):
    def part(*names):
        return {"num_captions_per_audio": 1, "data": [{"id": name, "caption": "a"} for name in names]}

    files = {
        "AudioSet_SL/as_final.json": part("Ya.wav", "Yb.wav"),
        "FreeSound/fsd_final.json": part("1", "2", "3"),
        "blacklist_exclude_all_ac.json": {"AudioSet": ["Ya.wav"], "FreeSound": ["1", ["x"]]},
        "blacklist_exclude_ub8k_esc50_vggsound.json": {"FreeSound": ["3"]},
    }
    media = ["AudioSet_SL_flac/Ya.flac", "AudioSet_SL_flac/Yb.flac", *(f"FreeSound_flac/{i}.flac" for i in (1, 2, 3))]
    rows, skipped = prepare("wavcaps", files, media)
    assert [row.id for row in rows] == ["AudioSet_SL/Yb", "FreeSound/2"] and not skipped


# Speech


def test_librispeech_reads_transcripts_beside_the_sounds(prepare):
    folder = "../media/LibriSpeech/{}/{}/{}.trans.txt"
    files = {
        folder.format("train-clean-100", "103/1240", "103-1240"): "103-1240-0000 CHAPTER ONE\n103-1240-0001 THAT HAD\n",
        folder.format("test-other", "1688/142285", "1688-142285"): "1688-142285-0000 THERE'S IRON THEY SAY\n",
    }
    media = [f"LibriSpeech/train-clean-100/103/1240/103-1240-000{i}.flac" for i in range(2)]
    media += ["LibriSpeech/test-other/1688/142285/1688-142285-0000.flac"]
    rows, skipped = prepare("librispeech", files, media, annotations="")
    assert {(row.id, row.split, *row.captions, row.media) for row in rows} == {
        ("103-1240-0000", "train-clean-100", "CHAPTER ONE", media[0]),
        ("103-1240-0001", "train-clean-100", "THAT HAD", media[1]),
        ("1688-142285-0000", "test-other", "THERE'S IRON THEY SAY", media[2]),
    }
    assert {row.audio_type for row in rows} == {"vb"} and not skipped


def test_ljspeech_takes_the_text_with_numbers_written_out(prepare):
    text = (
        'LJ001-0001|Printing, in "1455"|Printing, in "fourteen fifty-five"\nLJ001-0002|plain\nbroken\nLJ001-0003|a|b\n'
    )
    rows, skipped = prepare("ljspeech", {"metadata.csv": text}, ["wavs/LJ001-0001.wav", "wavs/LJ001-0002.wav"])
    assert [(row.id, row.split, row.captions) for row in rows] == [
        ("LJ001-0001", "train", ['Printing, in "fourteen fifty-five"']),
        ("LJ001-0002", "train", ["plain"]),
    ]
    assert [item.where for item in skipped] == ["metadata.csv:3", "LJ001-0003"]


def test_speech_commands(prepare):
    files = {"validation_list.txt": "no/a1_nohash_0.wav\n", "testing_list.txt": b"yes/b2_nohash_0.wav\n\xff\n"}
    media = ["no/a1_nohash_0.wav", "no/c3_nohash_1.wav", "yes/b2_nohash_0.wav", "_background_noise_/pink_noise.wav"]
    rows, skipped = prepare("speech_commands", files, media)
    assert [(row.id, row.split, row.label, row.group, row.captions, row.media) for row in rows] == [
        ("no/a1_nohash_0", "val", "no", "a1", ["no"], media[0]),
        ("no/c3_nohash_1", "train", "no", "c3", ["no"], media[1]),
        ("yes/b2_nohash_0", "test", "yes", "b2", ["yes"], media[2]),
    ]
    assert {row.audio_type for row in rows} == {"vb"} and [item.where for item in skipped] == ["testing_list.txt:2"]


def test_spokencoco_pairs_a_picture_with_each_of_its_sounds(prepare):
    def spoken(name, text):
        return {"text": text, "speaker": "m1", "uttid": name, "wav": f"wavs/val/0/{name}.wav"}

    image = "val2014/COCO_val2014_000000325114.jpg"
    data = [
        {
            "image": image,
            "captions": [spoken("m1-a_325114_1", "A URINAL IN A RESTROOM"), spoken("m1-b_325114_2", "TWO")],
        },
        {"image": "val2014/gone.jpg", "captions": [spoken("m1-a_325114_1x", "X")]},
        {"image": image},
        {"image": image, "captions": [spoken("m1-lost", "Y")]},
    ]
    media = [f"coco/{image}", "SpokenCOCO/wavs/val/0/m1-a_325114_1.wav", "SpokenCOCO/wavs/val/0/m1-b_325114_2.flac"]
    media += ["SpokenCOCO/wavs/val/0/m1-a_325114_1x.wav"]
    rows, skipped = prepare("spokencoco", {"SpokenCOCO_val.json": {"data": data}}, media)
    assert [(row.id, row.picture, row.media, row.captions) for row in rows] == [
        ("m1-a_325114_1", media[0], media[1], ["A URINAL IN A RESTROOM"]),
        ("m1-b_325114_2", media[0], media[2], ["TWO"]),
    ]
    assert {(row.group, row.item, row.split, row.audio_type) for row in rows} == {(image, image, "val", "vb")}
    assert reasons(skipped) == {
        f"SpokenCOCO_val.json: {image}": "malformed: no captions",
        "m1-a_325114_1x": "missing: no file named val2014/gone.jpg",
        "m1-lost": "missing: no file named wavs/val/0/m1-lost.wav",
    }
