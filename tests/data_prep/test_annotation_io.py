"""data_prep/annotation_io.py: tables, lines and JSON of others, with quotes, bytes and numbers that do not belong there."""

import json

import pytest
from annotation_files import reasons

from clip4vla.config_io import NOT_UTF8
from clip4vla.errors import UserError
from data_prep.annotation_io import Places, read_csv
from data_prep.manifest import ManifestRow

UNCLOSED = "not a line of a table (unexpected end of data): write a quote inside a cell twice, and a cell in one line"
TALK = {"start": [0], "end": [12], "text": ["a b c d e"]}
TABLES = {  # name, text with room for a line, and what lies beside it; x.wav is a sample of each
    "howto100m": ("HowTo100M_v1.csv", "video_id,category_1\n{}x,Food\n", {"caption.json": {"x": TALK}}),
    "audioset": ("class_labels_indices.csv", "mid,display_name\n{}m,A\n", {"eval_segments.csv": "x,0,1,m\n"}),
    "audiocaps": ("val.csv", "youtube_id,start_time,caption\n{}x,0,A\n", {}),
    "esc10": ("meta/esc50.csv", "filename,fold,category,src_file,esc10\n{}x.wav,1,dog,s,True\n", {}),
    "ucf101": ("classInd.txt", "{}1 A\n", {"testlist01.txt": "A/x.avi\n", "trainlist01.txt": "A/x.avi 1\n"}),
    "folder": ("captions.jsonl", '{}{{"path": "x.wav", "caption": "A"}}\n', {}),
}


def table(path, text):
    """Rows of the good lines of a table, and why the others are none, by line."""
    path.write_text(text, newline="")
    lines = {where.rpartition(":")[2]: line for where, line in read_csv(path, "path", "caption")}
    malformed = {int(number): str(line) for number, line in lines.items() if isinstance(line, ValueError)}
    return [[*line.values()] for line in lines.values() if isinstance(line, dict)], malformed


# Quotes


@pytest.mark.parametrize(
    "cell, text", [('"A cat, meowing"', "A cat, meowing"), ('A cat"', 'A cat"'), ('"A ""cat"""', 'A "cat"')]
)
def test_a_quote_that_is_not_closed_takes_its_own_line_alone(tmp_path, cell, text):
    lines = [f"{i}.wav,A dog" for i in range(2, 501)]
    lines[100], lines[400] = '102.wav,"A dog', f"402.wav,{cell}"
    rows, malformed = table(tmp_path / "a.csv", "\n".join(["path,caption", *lines]))
    assert [row[0] for row in rows] == [f"{i}.wav" for i in range(2, 501) if i != 102]
    assert malformed == {102: UNCLOSED} and dict(rows)["402.wav"] == text


def test_what_stands_after_a_closed_quote_is_not_joined_to_it(tmp_path):
    lines = ['a.wav,"A dog" barks', r'b.wav,"He says \"hi\", then"', 'c.wav,"A dog,"x"', 'd.wav,"A cat" ']
    rows, malformed = table(tmp_path / "a.csv", "\n".join(["path,caption", *lines]))
    assert rows == [["d.wav", "A cat"]]
    assert [*malformed] == [2, 3, 4] and all("',' expected after '\"'" in why for why in malformed.values())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_writes_them(tmp_path, end):
    rows, malformed = table(
        tmp_path / "a.csv", end.join(["path,caption", 'a.wav, "A, dog"', "", ",", "b.wav,x,y", "c"])
    )
    assert rows == [["a.wav", "A, dog"], ["c", ""]] and malformed == {5: "more cells than the header has columns"}


@pytest.mark.parametrize("dataset", ["howto100m", "audioset", "audiocaps", "esc10"])
def test_an_unclosed_quote_is_counted_in_every_table(prepare, dataset):
    """Also in those that say which videos are wanted and what classes are called, and where a cell chooses the lines."""
    name, text, others = TABLES[dataset]
    rows, skipped = prepare(dataset, others | {name: text.format('y,"b,C\n')}, ["x.wav"])
    assert len(rows) == 1 and reasons(skipped) == {f"{name.rpartition('/')[2]}:2": f"malformed: {UNCLOSED}"}


@pytest.mark.parametrize("head", ["path,caption,label,caption", ' path, "caption", path'])
def test_a_column_that_is_named_twice_stops(prepare, head):
    with pytest.raises(UserError, match="captions.csv: the first line names column (caption|path) twice; rename or"):
        prepare("folder", {"captions.csv": f"{head}\na.wav,x,y,z\n"}, ["a.wav"])
    rows, _ = prepare("folder", {"captions.csv": "path,caption,,\na.wav,x,,\n"}, ["a.wav"])  # as spreadsheets write
    assert len(rows) == 1


# Bytes


@pytest.mark.parametrize("text", ["Käfer".encode("latin-1"), "甲虫".encode("gbk"), "Käfer".encode()[:2], b"a\0b"])
@pytest.mark.parametrize("dataset", TABLES)
def test_a_line_that_is_not_utf8_is_counted_with_its_place(prepare, dataset, text):
    name, lines, others = TABLES[dataset]
    data = lines.format("@\n").encode()
    rows, skipped = prepare(dataset, others | {name: data.replace(b"@", text)}, ["x.wav"])
    where = f"{name.rpartition('/')[2]}:{1 + data[: data.index(b'@')].count(10)}"
    assert len(rows) == 1 and reasons(skipped) == {where: f"malformed: {NOT_UTF8}"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_table_in_utf16_stops(prepare, tmp_path, encoding):
    with pytest.raises(UserError, match="captions.csv: the first line is malformed: not UTF-8 text; convert the file"):
        prepare("folder", {"captions.csv": "path,caption\na.wav,Käfer\n".encode(encoding)}, ["a.wav"])
    files = {"captions.jsonl": '{"path": "a.wav", "caption": "Käfer"}\n'.encode(encoding)}
    with pytest.raises(UserError, match="captions.jsonl:1: not UTF-8 text; convert the file"):
        prepare("folder", files, annotations=str(tmp_path / "annotations/captions.jsonl"))


def test_marks_of_utf8_are_no_text(prepare):
    """Where files were joined, they stand in the middle."""
    csv = "\ufeffpath,caption\na.wav,x\n\ufeffb.wav,y\n"
    rows, skipped = prepare("folder", {"captions.csv": csv}, ["a.wav", "b.wav"])
    assert [row.id for row in rows] == ["a.wav", "b.wav"] and not skipped


def test_json_that_is_not_utf8_stops_with_its_line(prepare):
    text = '{"videos": [],\n"sentences": [{"caption": "Käfer"}]}'.encode("latin-1")
    with pytest.raises(
        UserError, match="MSRVTT_data.json: not valid JSON: line 2 is not UTF-8 text; convert the file: iconv"
    ):
        prepare("msrvtt", {"MSRVTT_data.json": text})


def test_a_narration_that_is_not_utf8_is_counted_and_the_others_stay(prepare):
    text = json.dumps({"x": TALK | {"text": ["a b c d ä"]}, "y": TALK}, ensure_ascii=False)
    files = {"HowTo100M_v1.csv": "video_id,category_1\nx,\ny,\n", "caption.json": text.encode("latin-1")}
    rows, skipped = prepare("howto100m", files, ["x.mp4", "y.mp4"])
    assert [row.item for row in rows] == ["y"] and reasons(skipped) == {
        "x_0": "malformed: its text or path is not valid Unicode"
    }
    with pytest.raises(UserError, match="caption.json: not valid JSON, perhaps cut short: not UTF-8 text"):
        prepare("howto100m", files | {"caption.json": text.encode("utf-16")}, ["x.mp4"])


def test_a_stamp_whose_text_is_not_utf8_is_malformed(prepare):
    texts = {"../media/a.txt": "\ufeffA cat.\n", "../media/b.txt": "A dog.\nfr.utf8=Un zèbre\n".encode("latin-1")}
    rows, skipped = prepare("stamps", texts, ["a.png", "b.png"])
    assert [row.captions for row in rows] == [["A cat."]] and reasons(skipped) == {"b.txt": f"malformed: {NOT_UTF8}"}


# Numbers and keys of JSON


@pytest.mark.parametrize("empty", ["NaN", "Infinity", "-Infinity", "null"])
def test_what_is_no_number_of_json_is_empty(prepare, empty):
    lines = [
        f'{{"path": "a.wav", "caption": {empty}, "start": null, "label": {empty}}}',
        f'{{"path": "b.wav", "caption": "A cat", "start": {empty}, "end": {empty}, "label": {empty}, "lang": {empty}, '
        f'"split": {empty}, "audio_type": {empty}}}',
        f'{{"path": {empty}, "caption": "A dog"}}',
        '{"path": "c.wav", "caption": 3, "label": 7}',
    ]
    rows, skipped = prepare("folder", {"captions.jsonl": "\n".join(lines)}, ["a.wav", "b.wav", "c.wav"])
    assert [(row.id, row.captions, row.label, row.split, row.lang, row.start, row.end) for row in rows] == [
        ("b.wav", ["A cat"], None, "train", "en", None, None),
        ("c.wav", ["3"], "7", "train", "en", None, None),
    ]
    assert reasons(skipped) == {f"captions.jsonl:{n}": "malformed: path or caption is empty" for n in (1, 3)}


@pytest.mark.parametrize("empty", ["NaN", "Infinity", "null"])
def test_what_is_no_number_in_the_json_of_videos_is_empty(prepare, empty):
    talk = (
        f'{{"x": {{"start": [12, {empty}, 0, 5], "end": [14, 30, 12, 6], "text": ["f", "g", "a b c d e", {empty}]}}}}'
    )
    rows, skipped = prepare(
        "howto100m", {"HowTo100M_v1.csv": "video_id,category_1\nx,\n", "caption.json": talk}, ["x.mp4"]
    )
    assert [(row.captions, row.start, row.end) for row in rows] == [(["a b c d e f"], 0, 14)]
    assert reasons(skipped) == {"caption.json: x": "malformed: 1 of 4 lines end before they start"}
    clip = f'[{{"videoID": "x_000000_000010", "enCap": ["A.", {empty}], "chCap": {empty}}}]'
    rows, skipped = prepare("vatex", {"vatex_training_v1.0.json": clip}, ["x.mp4"])
    assert [row.captions for row in rows] == [["A."]] and not skipped
    steps = f'[{{"segment": [0, 5], "sentence": {empty}}}, {{"segment": [0, {empty}]}}]'
    video = f'{{"database": {{"x": {{"subset": "training", "recipe_type": {empty}, "annotations": {steps}}}}}}}'
    rows, skipped = prepare("youcook2", {"youcookii_annotations_trainval.json": video}, ["x.mp4"])
    assert [(row.captions, row.label) for row in rows] == [([], None)] and len(skipped) == 1


def test_a_key_that_is_given_twice_loses_nothing_silently(prepare):
    twice = '{"path": "a.wav", "caption": "x", "caption": "y"}\n{"path": "a.wav", "caption": "z"}\n'
    rows, skipped = prepare("folder", {"captions.jsonl": twice}, ["a.wav"])
    assert [row.captions for row in rows] == [["z"]]
    assert reasons(skipped) == {"captions.jsonl:1": "malformed: the key caption is given twice"}
    with pytest.raises(UserError, match="train.json: not valid JSON: the key v_x is given twice"):
        prepare("activitynet", {"train.json": '{"v_x": {"sentences": ["a"]}, "v_x": {"sentences": ["b"]}}'}, ["x.mp4"])
    talks = f'{{"x": {json.dumps(TALK)}, "x": {json.dumps(TALK)}}}'
    rows, skipped = prepare(
        "howto100m", {"HowTo100M_v1.csv": "video_id,category_1\nx,\n", "caption.json": talks}, ["x.mp4"]
    )
    assert len(rows) == 1 and reasons(skipped) == {"caption.json: x": "malformed: duplicate of caption.json: x"}


def test_places_name_the_first_line_of_each_clip():
    """By file and line or id, of each split; also of clips that come after the first that was asked for."""
    places, first_of = Places(), {}
    lines = [
        ("train", "a", "f.csv:3"),
        ("train", "b", "f.csv:4"),
        ("val", "a", "g.json: 007"),
        ("train", "a", "f.csv:9"),
    ]
    lines += [
        ("train", "c", "h.csv:7"),
        ("val", "c", "h.csv:12345678901"),
        ("train", "c", "h.csv:8"),
        ("val", "c", "f.csv:1"),
    ]
    for split, name, where in lines:
        row = ManifestRow(name, name, name, "s", split)
        assert places.is_first(row, where) == ((split, name) not in first_of)
        first_of.setdefault((split, name), where)
        if len(first_of) > 2:
            assert places.first(row) == first_of[split, name]
