"""data_prep/sets: what the authors' own files hold beside what their formats say, in files of the same kind."""

import pytest

VIDEO, OTHER = "oJZUxU9szWA", "GLd3aX16zBg"


def step(number, start, end, sentence="stir"):
    return {"id": number, "segment": [start, end], "sentence": sentence}


def youcook2(**videos):
    database = {
        video: {"subset": "validation", "recipe_type": "416", "annotations": steps} for video, steps in videos.items()
    }
    return {"youcookii_annotations_trainval.json": {"database": database}}


# Captions that repeat


@pytest.mark.parametrize("split, count", [("train", 3), ("val", 5), ("test", 5)])
def test_equal_captions_count_each_where_they_are_queries(prepare, split, count):
    """AudioCaps' test has 4,875 captions, of which 118 repeat another of their clip."""
    head = "audiocap_id,youtube_id,start_time,caption\n"
    texts = ["A dog barks", "Rain", "A dog barks", "A dog  barks", "Wind"]
    lines = "".join(f"{i},{VIDEO},30,{text}\n" for i, text in enumerate(texts))
    (row,), _ = prepare("audiocaps", {f"{split}.csv": head + lines}, [f"{VIDEO}.wav"])
    assert len(row.captions) == len(row.caption_langs) == count


def test_equal_captions_of_one_line_count_each_in_tests(prepare):
    columns = [f"caption_{i}" for i in range(1, 6)]
    csv = f"file_name,{','.join(columns)}\na.wav,x,y,x,,z\n"
    files = {f"clotho_captions_{part}.csv": csv for part in ("development", "evaluation")}
    rows, _ = prepare("clotho", files, ["development/a.wav", "evaluation/a.wav"])
    assert [row.captions for row in rows] == [["x", "y", "z"], ["x", "y", "x", "z"]]
    clip = [{"videoID": f"{VIDEO}_000001_000011", "enCap": ["a", "a"], "chCap": ["b", "b"]}]
    (row,), _ = prepare("vatex", {"vatex_public_test_english_v1.1.json": clip}, [f"{VIDEO}.mp4"])
    assert (row.captions, row.caption_langs) == (["a", "a", "b", "b"], ["en", "en", "zh", "zh"])


# Names


@pytest.mark.parametrize("on_disk", [" Ambience Birds.wav", "Ambience Birds.wav"])
def test_names_that_begin_with_a_space(prepare, on_disk):
    """Three of Clotho's do; tables lose the space, and so do some disks."""
    head = f"file_name,{','.join(f'caption_{i}' for i in range(1, 6))}\n"
    files = {"clotho_captions_development.csv": f"{head} Ambience Birds.wav,a,b,c,d,e\n"}
    (row,), _ = prepare("clotho", files, [f"development/{on_disk}", "other/Ambience Birds.wav"])
    assert row.media == f"development/{on_disk}"
    (row,), _ = prepare("folder", {"captions.csv": f"path,caption\ndevelopment/{on_disk},a\n"})
    assert row.media == f"development/{on_disk}"
    (row,), _ = prepare("folder", {"captions.csv": "path,caption\ndevelopment/Ambience Birds.wav,a\n"})
    assert row.media == f"development/{on_disk}"


def test_names_that_begin_with_a_space_in_any_folder(prepare):
    head = f"file_name,{','.join(f'caption_{i}' for i in range(1, 6))}\n"
    (row,), _ = prepare("clotho", {"clotho_captions_evaluation.csv": f"{head} a b.wav,a,b,c,d,e\n"}, ["all/ a b.flac"])
    assert row.media == "all/ a b.flac"


# Steps of YouCook2


def test_two_steps_of_one_segment_are_two_samples(prepare):
    steps = [step(0, 120, 252, "soak"), step(1, 120, 252, "cook"), step(2, 252, 275)]
    rows, skipped = prepare("youcook2", youcook2(**{VIDEO: steps}), [f"{VIDEO}.mp4"])
    assert not skipped and [row.captions for row in rows] == [["soak"], ["cook"], ["stir"]]
    assert [row.id for row in rows] == [f"{VIDEO}_120_252", f"{VIDEO}_120_252_1", f"{VIDEO}_252_275"]
    assert rows[0].group == rows[1].group != rows[2].group


STEPS = {VIDEO: [step(0, 1, 9), step(1, 12, 20), step(2, 30, 41)], OTHER: [step(0, 0, 5), step(1, 5, 9)]}


def test_clips_named_by_number_are_those_steps(prepare):
    """ID_1 is the second step, and not the one that begins at 1 s."""
    media = [f"{video}_{each['id']}.mp4" for video, steps in STEPS.items() for each in steps]
    rows, skipped = prepare("youcook2", youcook2(**STEPS), media)
    assert [row.media for row in rows] == media and not skipped


def test_clips_named_by_start_are_those_steps(prepare):
    media = [f"{video}_{each['segment'][0]}.mp4" for video, steps in STEPS.items() for each in steps]
    rows, skipped = prepare("youcook2", youcook2(**STEPS), media)
    assert [row.media for row in rows] == media and not skipped


def test_a_number_that_may_be_a_start_is_left_out(prepare):
    """ID_1 alone, and a name by number and one by start of another video: no way to tell."""
    media = [f"{VIDEO}_1.mp4", f"{OTHER}_0.mp4"]
    rows, skipped = prepare("youcook2", youcook2(**STEPS), media)
    assert [row.media for row in rows] == media[1:]
    why = {item.reason for item in skipped if item.why == "unusable" and "may be" in item.reason}
    assert why == {f"{VIDEO}_1 may be step 1 or the one from 1 s on: rename the clips"}
