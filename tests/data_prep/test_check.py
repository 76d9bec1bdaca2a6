"""data_prep/check.py on the shipped sample's shards: damage of every kind is named and repaired, and the page opens."""

import json
import re
import shutil
import statistics
import sys
import tarfile
from pathlib import Path

import indexes
import numpy as np
import pytest
import s3
import torch
from browser import EVIL, browse
from damage import (
    a_picture_of_another_size,
    a_terabyte,
    damaged_header,
    edit,
    empty,
    endless,
    flip,
    flipped_bit,
    half_a_picture,
    index,
    malformed_entry,
    member_missing,
    member_not_in_index,
    member_not_in_tar,
    no_tar,
    not_json,
    pax_of_digits,
    place,
    rewrite,
    rubbish,
    sample_not_in_index,
    samples,
    tar,
    truncated,
    wrong_counts,
    wrong_crc32,
    wrong_offset,
    wrong_sha256,
)
from s3fs import S3FileSystem
from sample_prep import contents

from clip4vla.config import SpectrogramConfig
from clip4vla.data.shards import INDEX, ShardFolder, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.media.spectrogram import log_mel
from data_prep.check import main
from data_prep.checks.folders import inspect
from data_prep.checks.page import griffin_lim, remarks, summary
from data_prep.checks.shard import ClipStats, ShardCheckJob, check_shard


@pytest.fixture
def command(monkeypatch, capfd):
    """The command in this process (importing torch again takes seconds): exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["check.py", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return call


def findings(folder, decode=None, repair=False):
    """What is still found, as text; without the page, which takes seconds."""
    return [str(finding) for report in inspect([str(folder)], decode, repair) for finding in report.findings]


@pytest.fixture
def folder(sample_shards, tmp_path):
    """A copy of a folder of two shards with sound and pictures."""
    return Path(shutil.copytree(sample_shards / "speech_es/train", tmp_path / "out/speech_es/train"))


def test_an_intact_tree_is_well_and_its_numbers_are_those_of_the_jsons(sample_shards):
    reports = inspect([str(sample_shards)], None, False)
    assert not any(report.findings for report in reports)
    out = summary(reports, ClipStats.sum([report.tally for report in reports]))
    metas = []
    for path in sample_shards.rglob("*.tar"):
        with tarfile.open(path) as file:
            metas += [json.load(file.extractfile(name)) for name in file.getnames() if name.endswith(".json")]
    line = next(line.split() for line in out.splitlines() if line.startswith("all "))
    seconds = [meta["duration"] for meta in metas if meta["duration"]]
    size = sum(path.stat().st_size for path in sample_shards.rglob("*.tar"))
    silent = 100 * sum(not meta["has_audio"] for meta in metas) / len(metas)
    assert line[1:5] == [str(len(metas)), f"{sum(seconds) / 3600:.3f}", "18", f"{size / 1e6:.1f}"]
    assert line[5:7] == [f"{silent:.3g}", "%"]
    words = [len(caption.split()) for meta in metas for caption in meta["captions"]]
    for name, values in {
        "seconds": seconds,
        "segments": [meta["n_segments"] for meta in metas if meta["has_audio"]],
        "frames": [meta["n_frames"] for meta in metas],
        "captions a clip": [len(meta["captions"]) for meta in metas],
        "words a caption": words,
    }.items():
        shown = re.search(rf"^{name} +(\S+) +(\S+) +(\S+) +(\S+)$", out, re.M).groups()
        exact = (min(values), statistics.median(values), statistics.fmean(values), max(values))
        assert [float(number) for number in shown] == pytest.approx(exact, rel=6e-4)
    types = re.search(r"^audio types: (.*)$", out, re.M)[1]
    for kind in ("vb", "nb", "both"):
        assert f"{kind} {sum(meta['audio_type'] == kind for meta in metas)}" in types


DAMAGE = [  # what is done, what is found, and how many samples go in a repair
    (flipped_bit, r"0000002-\S+: fbank.jpg: CRC-32 differs", 1),
    (truncated, r"0000009-\S+: .*frames.jpg: no [\d,]+ bytes there", 7),
    (damaged_header, r"0000004-\S+: json is in entries.jsonl, not in the tar", 0),
    (no_tar, r"000000.tar: unreadable: No such file", 16),
    (rubbish, r"000000.tar: .*unreadable tar", 16),
    (empty, r"000000.tar: .*unreadable tar", 16),
    (endless, r"000000.tar: unreadable: no regular file", 16),
    (a_terabyte, r"000000.tar: 1,099,511,627,776 bytes, \d+ in index.json", 0),
    (pax_of_digits, r"000000.tar: .*sha256 differs", 0),
    (wrong_sha256, r"000000.tar: sha256 differs", 0),
    (wrong_crc32, r"0000005-\S+: json: CRC-32 differs", 0),
    (wrong_offset, r"0000005-\S+: frames.jpg is at \d+\+\d+, by index.json at", 0),
    (member_not_in_index, r"0000001-\S+: frames.jpg is in the tar, not in entries.jsonl", 0),
    (sample_not_in_index, r"0000001-\S+: json is in the tar, not in entries.jsonl", 0),
    (malformed_entry, r"000000.tar: .*entry 1 in entries.jsonl is malformed", 0),
    (member_not_in_tar, r"0000006-\S+: fbank.jpg is in entries.jsonl, not in the tar", 1),
    (member_missing, r"0000006-\S+: members \['fbank.jpg', 'json'\], by its json", 1),
    (not_json, r"0000000-\S+: json is not JSON", 1),
    (half_a_picture, r"0000007-\S+: frames.jpg cannot be decoded: .*truncated", 1),
    (a_picture_of_another_size, r"0000007-\S+: frames.jpg is RGB \(224, 100\), by its json RGB \(224, 224\)", 1),
    (wrong_counts, r"train: counts: seconds is \S+, the clips have", 0),
]


@pytest.mark.parametrize("damage, message, lost", DAMAGE, ids=[row[0].__name__ for row in DAMAGE])
def test_damage_is_named_and_repaired(folder, capfd, damage, message, lost):
    before = {key: members for number in (0, 1) for key, members in samples(folder, number).items()}
    damage(folder)
    assert any(re.search(message, finding) for finding in findings(folder))
    assert findings(folder, repair=True) == []
    assert len(re.findall("^dropped: ", capfd.readouterr().out, re.M)) == lost
    opened = ShardFolder.open(str(folder))
    left = opened.read([(s, e) for s, shard in enumerate(opened.shards) for e in range(shard.samples)])
    assert len(left) == 18 - lost == opened.counts["samples"]
    keys = [key for number in range(len(opened.shards)) for key in opened.entries(number).keys()]
    for key, sample in zip(keys, left, strict=True):  # what stays is what was
        assert sample == {ext.partition(".")[0]: data for ext, data in before[key].items()}
    seconds = sum(json.loads(sample["json"])["duration"] for sample in left)
    assert opened.counts["seconds"] == pytest.approx(seconds, abs=1e-3) and opened.counts["quarantined"] == lost
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == set(before) - set(keys) and all(line["reason"] for line in lines)


CONTRADICTIONS = [
    ({"n_rows": 9000}, "n_segments is 1, n_rows 9000"),
    ({"n_segments": 2}, "n_segments is 2"),
    ({"n_frames": 0}, "has_frames is True, n_frames 0"),
    ({"n_frames": 10**400}, "frames.jpg is RGB"),
    ({"has_audio": False}, "has_audio is False, n_segments 1"),
    ({"duration": 0.0}, "duration 0.0"),
    ({"duration": float("nan")}, "duration nan"),
    ({"captions": ["a"]}, "captions and caption_langs"),
    ({"captions": [1, 2]}, "captions and caption_langs"),
    ({"captions": "ab"}, "captions is 'ab'"),
    ({"id": "\ud800"}, "not JSON"),
    ({"group": ...}, r"lacks \['group'\]"),
    ({"audio_type": "x"}, "audio_type is 'x'"),
    ({"split": "test"}, "speech_es/test in the folder of speech_es/train"),
    ({"media": {"audio": 1}}, "media is not"),
]


def test_metadata_that_contradict_the_sample_are_named(folder):
    for entry, (fields, _) in enumerate(CONTRADICTIONS):
        edit(folder, entry, **fields)
    found = findings(folder, 0)
    assert len(found) == len(CONTRADICTIONS)
    for entry, ((_, message), finding) in enumerate(zip(CONTRADICTIONS, found, strict=True)):
        assert re.search(rf"{entry:07d}-\S+: .*{message}", finding), finding


def test_captions_that_are_too_many_or_too_long_are_named(folder):
    edit(folder, 0, captions=["a"] * 1000, caption_langs=["en"] * 1000)
    edit(folder, 1, captions=["a"] * 1001, caption_langs=["en"] * 1001)
    edit(folder, 2, captions=["a" * 100_000], caption_langs=["en"])
    edit(folder, 3, captions=["a" * 100_001], caption_langs=["en"])
    many, long = findings(folder, 0)
    assert re.search(r"0000001-\S+: json: 1001 captions, 1000 at most", many)
    assert re.search(r"0000003-\S+: json: a caption of 100001 characters, 100000 at most", long)


def test_a_repair_killed_between_tar_and_index_is_finished_by_the_next(folder):
    flipped_bit(folder)
    old = index(folder)
    findings(folder, repair=True)
    done = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    indexes.write(folder, old)
    assert findings(folder)
    assert findings(folder, repair=True) == [] and len(ShardFolder.open(str(folder))) == 17
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == done


def test_only_the_chosen_number_of_clips_is_decoded(folder):
    half_a_picture(folder)
    assert findings(folder, 0) == [] and len(findings(folder, 18)) == 1


def test_leakage_between_splits_is_found_and_left_alone(sample_shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sample_shards / "speech_es", out / "speech_es")
    train, test = out / "speech_es/train", out / "speech_es/test"
    key, members = list(samples(train).items())[3]
    meta = json.loads(members["json"]) | {"split": "test"}

    def leak(content):
        content["0000099-leaked"] = members | {"json": json.dumps(meta).encode()}

    rewrite(test, leak)
    tree = index(test)
    for name, value in {"samples": 1, "with_audio": 1, "with_frames": 1, "seconds": meta["duration"]}.items():
        tree["counts"][name] += value
    indexes.write(test, tree)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found = findings(out, repair=True)
    for kind, line in zip(("id", "group", "item", "audio", "picture"), found, strict=True):
        assert f"leakage: 1 {kind}(s) also in {train}" in line and "0000099-leaked" in line and key in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_repeated_sounds_and_pictures_are_remarks(folder):
    def copy(content):
        one, two = list(content.values())[2:4]
        two["frames.jpg"] = one["frames.jpg"]

    rewrite(folder, copy)
    (report,) = inspect([str(folder)], 0, False)
    (remark,) = remarks([report])
    assert report.findings == [] and "1 clips repeat another's picture" in remark
    assert re.search(r"2 with that of 0000002-\S+ and 0000003-", remark)


def vectors(folder):
    """Vectors as data_prep/embed.py lays them out."""
    (folder / "clip").mkdir()
    shards = []
    for number, shard in enumerate(index(folder)["shards"]):
        content = [(key, {"clip.f16": np.full((2, 8), number, "<f2").tobytes()}) for key, _ in shard["entries"]]
        shards.append(write_shard(folder / "clip" / shard["name"], content) | {"of": shard["sha256"]})
    names = {"media_root": ".", "source": "speech_es", "split": "train", "counts": {"samples": 18}}
    write_index(folder / "clip", fingerprint={"clip": {"dim": 8}}, shards=shards, **names)


def test_vectors_are_checked_beside_their_shards(folder):
    vectors(folder)
    assert findings(folder) == []
    flip(tar(folder / "clip"), place(folder / "clip", 2, "clip.f16")[0])
    assert any(re.search(r"clip/\S+.tar 0000002-\S+: clip.f16: CRC-32 differs", text) for text in findings(folder))
    assert findings(folder, repair=True) == []
    assert not (folder / "clip" / INDEX).exists() and not (folder / "clip" / tar(folder).name).exists()


def test_vectors_of_other_shards_are_found_and_go_with_a_repaired_shard(folder):
    vectors(folder)
    edit(folder, label="new")
    (finding,) = findings(folder)
    assert "clip/speech_es-train-000000.tar: its keys or sha256" in finding
    shutil.rmtree(folder / "clip")
    vectors(folder)
    flipped_bit(folder)
    assert findings(folder, repair=True) == [] and not (folder / "clip" / INDEX).exists()


def test_users_mistakes_are_one_line_and_exit_2(folder, command, tmp_path):
    for words, message in [
        ([tmp_path / "nowhere"], "no index.json in it or below; run data_prep/shard.py"),
        ([folder, "--decode", "some"], "--decode takes a number or all, not 'some'"),
    ]:
        code, _, err = command(*words)
        assert code == 2 and message in err and err.count("\n") == 1
    (folder / INDEX).write_text("{")
    code, _, err = command(folder, "--repair")
    assert code == 2 and "not a readable index" in err and "run data_prep/shard.py again" in err


def test_the_page_shows_twenty_clips_and_original_sounds(sample_shards, command, tmp_path):
    page = tmp_path / "page.html"
    assert command(sample_shards, "--report", page)[0] == 0
    found, console = browse(page, tmp_path)
    assert console == [] and found["outside"] == 0 and not found["wide"]
    assert found["cards"] == 20 and 10 < found["players"] <= 20
    assert found["images"] == found["loaded"] == 6 + 20 + found["players"]  # plots, pictures, spectrograms
    assert found["text"].count("the original sound") == found["players"]
    assert "all is well" in found["text"] and "rebuilt" not in found["text"]
    narrow, console = browse(page, tmp_path, 500)
    assert console == [] and not narrow["wide"]


def test_a_damaged_folder_without_its_media_gets_a_page_with_rebuilt_sounds(folder, command, tmp_path):
    edit(folder, captions=[EVIL, "x"], label=EVIL)
    half_a_picture(folder)  # sample 7, and not one that is decoded
    truncated(folder)  # from sample 9 of 16 on
    code, out, _ = command(folder, "--decode", "0")
    assert code == 1 and re.search(r"^finding: \S+000000.tar: .*sha256 differs", out, re.M)
    found, console = browse(folder / "check.html", tmp_path)
    assert console == [] and found["images"] == found["loaded"]
    assert found["cards"] == found["players"] == 8 + 2
    assert found["text"].count("rebuilt from the spectrogram: what the model receives") == 10
    assert f"{EVIL} [es]" in found["captions"] and found["scripts"] == 1  # the probe
    assert "sha256 differs from index.json" in found["text"]


def test_a_rebuilt_sound_has_the_spectrogram_it_is_from():
    cfg, seconds = SpectrogramConfig(), np.arange(24000) / 16000
    wave = np.sin(2 * np.pi * (300 + 900 * seconds) * seconds) * 0.3 + np.random.default_rng(0).normal(0, 0.01, 24000)
    heard = log_mel(torch.tensor(wave)[None], 16000, cfg)[0]
    again = log_mel(griffin_lim(heard, cfg)[None], 16000, cfg)[0][: len(heard)]
    assert np.corrcoef(heard[: len(again)].flatten(), again.flatten())[0, 1] > 0.95
    assert len(griffin_lim(heard[:1], cfg)) == cfg.hop_length


def at_url(name):
    """Bytes of everything at a URL of the bucket, by name."""
    fs, root = S3FileSystem(skip_instance_cache=True), f"{s3.BUCKET}/{name}/"
    return {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}


def test_folders_at_a_url_are_checked_and_repaired_like_local_ones(server, folder, capfd):
    url = f"s3://{s3.BUCKET}/damaged"
    (folder / "quarantine.jsonl").write_text('{"id": "before"}\n')
    vectors(folder)
    flip(tar(folder, 1), tar(folder, 1).stat().st_size // 2)
    no_tar(folder)
    s3.put(folder, "damaged", server.port)
    local = [text.replace(str(folder), url) for text in findings(folder)]
    with server.faults(fail=0.1, cut=0.1):
        assert findings(url) == local and len(local) > 2
        capfd.readouterr()
        findings(folder, repair=True)
        wanted = capfd.readouterr().out.replace(str(folder), url)
        assert findings(url, repair=True) == [] and capfd.readouterr().out == wanted
    assert at_url("damaged") == contents(folder)


def test_a_url_that_does_not_answer_loses_no_clip(server, folder, command, monkeypatch, tmp_path):
    s3.put(folder, "silent/train", server.port)
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(f"s3://{s3.BUCKET}/silent/")
    assert code == 0 and "page: check.html\n" in out and (tmp_path / "check.html").is_file()
    before = at_url("silent")
    with server.faults(fail=1.0):
        jobs = [ShardCheckJob(f"s3://{s3.BUCKET}/silent/train", 0, ShardFolder.open(str(folder)).shards[0], None, None)]
        with pytest.raises(
            UserError, match="silent/train/entries.jsonl: cannot be checked: .*start again when it answers"
        ):
            check_shard(*jobs)
        code, _, err = command(f"s3://{s3.BUCKET}/silent", "--repair")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and at_url("silent") == before
    for words, message in [
        ([f"s3://{s3.BUCKET}/nowhere"], f"s3://{s3.BUCKET}/nowhere: no index.json in it or below"),
        ([folder, "--report", f"s3://{s3.BUCKET}/page.html"], "--report takes a local file"),
    ]:
        code, _, err = command(*words)
        assert code == 2 and message in err and err.count("\n") == 1
