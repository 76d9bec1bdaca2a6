"""data_prep/sets/folder.py: one's own table of captions, as people spell it."""

import json
import unicodedata

import pytest
from annotation_files import reasons
from sample_prep import rows_of, tones

from clip4vla.data.sample_metadata import validate
from clip4vla.errors import UserError
from data_prep.checks.folders import inspect
from data_prep.checks.page import summary

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café/Noël.wav") for form in ("NFC", "NFD"))


def test_two_tables_stop(prepare):
    files = {"captions.csv": "path,caption\na.wav,x\n", "captions.jsonl": '{"path": "b.wav", "caption": "y"}'}
    with pytest.raises(
        UserError, match="annotations=.*: one table of captions, not both; name one, as annotations=/"
    ) as stop:
        prepare("folder", files, ["a.wav", "b.wav"])
    table = str(stop.value).rpartition("annotations=")[2]
    assert [row.id for row in prepare("folder", files, annotations=table)[0]] == ["a.wav"]
    lines = table.removesuffix("csv") + "jsonl"
    assert [row.id for row in prepare("folder", files, annotations=lines)[0]] == ["b.wav"]


def test_one_file_is_one_sample_however_its_lines_spell_it(prepare):
    paths = ["a.wav", "./a.wav", ".//a.wav", "d/./b.wav", "d//b.wav", COMPOSED, DECOMPOSED]
    csv = "path,caption\n" + "".join(f"{path},{i}\n" for i, path in enumerate(paths))
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.wav", "d/b.wav", COMPOSED])
    assert [(row.id, row.item, row.group, row.media, row.captions) for row in rows] == [
        ("a.wav", "a.wav", "a.wav", "a.wav", ["0", "1", "2"]),
        ("d/b.wav", "d/b.wav", "d/b.wav", "d/b.wav", ["3", "4"]),
        (COMPOSED, COMPOSED, COMPOSED, COMPOSED, ["5", "6"]),
    ]
    assert not skipped


@pytest.mark.parametrize("path", [COMPOSED, DECOMPOSED], ids=["composed", "decomposed"])
@pytest.mark.parametrize(
    "there", [COMPOSED, DECOMPOSED, COMPOSED[:5] + DECOMPOSED[6:]], ids=["composed", "decomposed", "mixed"]
)
def test_accents_are_the_same_whether_composed_or_not(prepare, path, there):
    """macOS decomposes the names of files; mixed: in a folder that was made elsewhere."""
    rows, skipped = prepare("folder", {"captions.csv": f"path,caption\n{path},x\n"}, [there])
    assert [(row.id, row.media) for row in rows] == [(COMPOSED, there)] and not skipped
    rows, skipped = prepare("activitynet", {"train.json": {path[5:-4].strip("/"): {"sentences": ["x"]}}})
    assert [row.media for row in rows] == [there] and not skipped
    name, head = path.rpartition("/")[2], "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    file = f"development/{there.rpartition('/')[2]}"
    rows, skipped = prepare("clotho", {"clotho_captions_development.csv": f"{head}{name},x\n"}, [file])
    assert [row.media for row in rows] == [file] and not skipped


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("Split", "split"), ("spilt", "split"), ("fold", "split"), ("audiotype", "audio_type"), ("AudioType", "audio_type"),
        ("begin", "start"), ("start_time", "start"), ("end (s)", "end"), ("lable", "label"), ("Category", "label"),
        ("language", "lang"),
    ],
)  # fmt: skip
def test_a_column_that_is_spelt_otherwise_is_named_with_the_nearest(prepare, tmp_path, name, nearest):
    why = f"no column is called {name}, the nearest is {nearest}: rename or remove it"
    with pytest.raises(UserError) as stop:
        prepare("folder", {"captions.csv": f"path,caption,{name}\na.wav,x,1\n"}, ["a.wav"])
    assert f"; 1 malformed; captions.csv:2: {why}" in str(stop.value)
    lines = [{"caption": "x", name: 1}, {"caption": "y"}]
    text = "\n".join(json.dumps({"path": "a.wav"} | line) for line in lines)
    rows, skipped = prepare("folder", {"own.jsonl": text}, annotations=str(tmp_path / "annotations/own.jsonl"))
    assert [row.captions for row in rows] == [["y"]] and reasons(skipped) == {"own.jsonl:1": f"malformed: {why}"}


def test_columns_that_are_not_read_are_listed_once(prepare):
    csv = ",path,caption,duration,Author,split,my_split\n0,a.wav,x,3,me,val,1\n1,b.wav,y,3,me,val,2\n"
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.wav", "b.wav"])
    assert [row.split for row in rows] == ["val", "val"]
    assert reasons(skipped) == {
        "captions.csv": "unusable: columns that are not read: Author, duration, my_split; those that are: "
        "path, caption, start, end, audio_type, label, split, lang, labels, picture, sound, id, group"
    }


def test_spaces_around_a_cell_are_no_part_of_it(prepare):
    csv = "path,caption,audio_type,label,split,lang\na.wav , x ,nb ,dog ,val ,de \n"
    (row,), _ = prepare("folder", {"captions.csv": csv}, ["a.wav"])
    assert (row.media, row.captions, row.audio_type, row.label, row.split, row.lang) == (
        "a.wav",
        ["x"],
        "nb",
        "dog",
        "val",
        "de",
    )


def test_a_label_or_a_split_is_one_text(prepare):
    lines = [{"label": ["a"]}, {"split": ["a"]}, {"split": {"a": 1}}, {"lang": 1}, {"path": 3}, {"split": 1}]
    text = "\n".join(json.dumps({"path": "a.wav", "caption": "x"} | line) for line in lines)
    rows, skipped = prepare("folder", {"captions.jsonl": text}, ["a.wav"])
    assert [row.split for row in rows] == ["1"]
    assert reasons(skipped) == {
        f"captions.jsonl:{n}": "malformed: path, lang, label or split is no text" for n in range(1, 6)
    }


def test_the_plan_of_a_table_with_a_line_that_is_no_utf8(run, tmp_path):
    (tmp_path / "media").mkdir()
    for name in "ab":
        (tmp_path / "media" / f"{name}.wav").touch()
    head, why = "path,caption\na.wav,Ein Käfer\n", "captions.csv:2: not UTF-8 text; convert the file: iconv"
    for text, share, code, words in (
        (head + "b.wav,A cat\n", 0.5, 0, f"1 malformed, the first: {why}"),
        (head + "b.wav,A cat\n", 0.01, 2, f"the first: {why}"),
        (head + "b.wav,Café\n", 1, 2, f"; 2 malformed; {why}"),
    ):
        (tmp_path / "media/captions.csv").write_bytes(text.encode("latin-1"))
        got, printed = run(
            tmp_path / "out", f"max_failed_fraction={share}", "--plan", media=tmp_path / "media", dataset="folder"
        )
        assert got == code and words in printed, printed


# Pairs, ids, separators


def test_a_picture_and_a_sound_are_one_sample(prepare):
    csv = "picture,sound,caption,group,id,audio_type\n"
    csv += "cat.png,a/cat_1.wav,A cat,cats,c1,vb\ncat.png,a/cat_1.wav,Un chat,cats,c1,vb\ncat,cat_2,Again,cats,c2,vb\n"
    csv += "cat.png,,Silent,,,\n,a/cat_1.wav,Unseen,,,\ncat.png,gone.wav,Lost,,,\nnone,cat_2,Lost,,,\n"
    csv += "cat.png,cat_2,Other file,,c1,\n"
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["cat.png", "a/cat_1.wav", "b/cat_2.flac"])
    assert [(row.id, row.group, row.picture, row.media, row.captions) for row in rows] == [
        ("c1", "cats", "cat.png", "a/cat_1.wav", ["A cat", "Un chat"]),
        ("c2", "cats", "cat.png", "b/cat_2.flac", ["Again"]),
        ("cat.png", "cat.png", "cat.png", None, ["Silent"]),
        ("a/cat_1.wav", "a/cat_1.wav", None, "a/cat_1.wav", ["Unseen"]),
    ]
    assert reasons(skipped) == {
        "cat.png+gone.wav": "missing: no file named cat.png+gone.wav",
        "none+cat_2": "missing: no file named none+cat_2",
        "captions.csv:9": "malformed: id c1 is that of another file or interval too",
    }


def test_a_path_or_a_pair(prepare):
    csv = "path,picture,caption\na.wav,cat.png,x\na.wav,,y\n"
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.wav", "cat.png"])
    assert [row.captions for row in rows] == [["y"]] and list(reasons(skipped)) == ["captions.csv:2"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_says_what_stands_between_cells(prepare, separator):
    cells = [["path", "caption", "label"], ["a.wav", '"Rain, hard; then a\tpause"', "rain"], ["b.wav", "x", ""]]
    csv = "\ufeff" + "".join(separator.join(line) + "\n" for line in cells)
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.wav", "b.wav"])
    assert [(row.captions, row.label) for row in rows] == [(["Rain, hard; then a pause"], "rain"), (["x"], None)]
    assert not skipped


def test_a_path_without_suffix_is_an_id(prepare):
    csv = "path,caption,start,end\nabcdefghijk,Cut,30,40\nabcdefghijk,Whole,50,60\nRain 1.2,All,,\nabc,None,,\na.mp4,Exact,1,2\n"
    media = ["x/abcdefghijk_30_40.mp4", "abcdefghijk.mkv", "Rain 1.2.wav", "a.mp4"]
    rows, skipped = prepare("folder", {"captions.csv": csv}, media)
    assert [(row.id, row.media, row.start, row.end) for row in rows] == [
        ("abcdefghijk@30-40", media[0], None, None),
        ("abcdefghijk@50-60", media[1], 50, 60),
        ("Rain 1.2", media[2], None, None),
        ("a.mp4@1-2", media[3], 1, 2),
    ]
    assert reasons(skipped) == {"abc": "missing: no file named abc"}
    rows, _ = prepare("folder", {}, clips_already_cut=True)
    assert [(row.media, row.start) for row in rows] == [(name, None) for name in media]


def test_an_id_with_frames_and_sound_in_two_files_is_of_both(prepare):
    """With a column of its own for the picture, of the id's files the sound alone."""
    files = {"captions.csv": "path,picture,sound,caption\nlmnopqrstuv,,,x\n,cat.png,lmnopqrstuv,y\n"}
    rows, skipped = prepare("folder", files, ["lmnopqrstuv.mp4", "lmnopqrstuv.wav", "cat.png"])
    assert [(row.media, row.picture) for row in rows] == [
        ("lmnopqrstuv.wav", "lmnopqrstuv.mp4"),
        ("lmnopqrstuv.wav", "cat.png"),
    ] and not skipped


def test_labels_are_a_list_or_stand_between_semicolons(prepare, tmp_path):
    csv = "path,caption,labels\na.wav,x,Speech; Male speech ;Speech\nb.wav,y,\n"
    rows, _ = prepare("folder", {"captions.csv": csv}, ["a.wav", "b.wav"])
    assert [row.labels for row in rows] == [["Speech", "Male speech"], []]
    lines = [{"labels": ["a", "b; c"]}, {"labels": [1]}, {"labels": {"a": 1}}]
    text = "\n".join(json.dumps({"path": "a.wav", "caption": "x"} | line) for line in lines)
    rows, skipped = prepare("folder", {"own.jsonl": text}, annotations=str(tmp_path / "annotations/own.jsonl"))
    assert [row.labels for row in rows] == [["a", "b; c"]]
    assert reasons(skipped) == {
        f"own.jsonl:{n}": "malformed: labels are a list of texts, or a text with ; between them" for n in (2, 3)
    }


def test_labels_go_through_shards_and_check(run, tmp_path):
    tones(tmp_path / "media", "t1", "t2", "t3")
    lines = [{"labels": ["Speech", "Rain"]}, {"labels": ["Rain"]}, {"label": "x"}]
    lines = [{"path": f"t{i}.wav", "caption": "x"} | line for i, line in enumerate(lines, 1)]
    table = tmp_path / "own.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed = run(tmp_path / "out", f"annotations={table}", media=tmp_path / "media", dataset="folder")
    assert code == 0, printed
    rows = {row["id"]: row for row in rows_of(tmp_path / "out/media/train")}
    assert [rows[f"t{i}.wav"].get("labels") for i in (1, 2, 3)] == [["Speech", "Rain"], ["Rain"], None]
    assert "labels" not in rows["t3.wav"] and rows["t3.wav"]["label"] == "x"  # the bytes of earlier versions
    reports = inspect([str(tmp_path / "out")], None, False)
    assert not reports[0].findings
    assert "labels: 3 classes, 1.33 a clip, Rain 2, Speech 1, x 1" in summary(reports, reports[0].tally)
    for wrong in ("Rain", [1], [""]):
        with pytest.raises(ValueError, match="json: labels is "):
            validate(rows["t1.wav"] | {"labels": wrong})
