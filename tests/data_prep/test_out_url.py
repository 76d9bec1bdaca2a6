"""data_prep/shard.py with `out` at a URL: the bytes that a local folder gets, through kills, faults and parts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import s3
from forks import ROOT
from s3fs import S3FileSystem
from sample_prep import contents, settings, tones

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.data.shards import ShardFolder
from clip4vla.io import remote
from data_prep.build_shards import shard

NAMES = [f"t{i}" for i in range(14)]  # four shards of at most four


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Fourteen tones, and a file that is none."""
    folder = tmp_path_factory.mktemp("tones") / "media"
    tones(folder, *NAMES)
    (folder / "t99.wav").write_bytes(b"no sound")
    with (folder / "captions.csv").open("a") as file:
        file.write("t99.wav,noise\n")
    return folder


WORDS = ("max_failed_fraction=0.1",)


@pytest.fixture(scope="module")
def local(media, tmp_path_factory):
    """What a run leaves in a local folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    config, *words = settings(out, *WORDS, media=media, dataset="folder")
    shard(load(DataConfig, config, words))
    return without_root(contents(out))


def command(out, media):
    return [sys.executable, "data_prep/shard.py", *settings(out, *WORDS, media=media, dataset="folder")]


def without_root(files):
    return {
        name: json.loads(data) | {"media_root": None} if name.endswith("index.json") else data
        for name, data in files.items()
    }


def at(url):
    """Bytes of everything at a URL, by name."""
    S3FileSystem.clear_instance_cache()
    fs, root = remote.open_folder(url)
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def uploads(server, begin=0):
    """The names of files that were uploaded since, with how often; parts of a file are one."""
    return Counter(path.partition("?")[0].split("/")[-1] for verb, path, _ in server.seen[begin:] if verb == "PUT")


@pytest.mark.parametrize("where", ["s3", "disk"])
def test_the_files_are_those_of_a_local_folder(server, run, media, local, tmp_path, where):
    url = f"s3://{s3.BUCKET}/plain" if where == "s3" else f"file://{tmp_path}/plain"
    with server.faults(fail=0.1, cut=0.1):
        code, text = run(url + "/", *WORDS, media=media, dataset="folder")
    assert code == 0 and f"{url}/media/train {{'samples': 14" in text and "clip4vla-out" not in text
    assert without_root(at(url)) == local
    assert ShardFolder.open(f"{url}/media/train").media_root == str(media)
    begin = len(server.seen)
    assert run(url, *WORDS, media=media, dataset="folder")[0] == 0  # a second run has nothing to do
    assert without_root(at(url)) == local and not [name for name in uploads(server, begin) if name.endswith(".tar")]


def test_killed_in_the_middle_it_goes_on_without_what_is_there(server, run, media, local, tmp_path):
    url, begin = f"s3://{s3.BUCKET}/killed", len(server.seen)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # what a killed run leaves stays in the test's folder
    process = subprocess.Popen(command(url, media), cwd=ROOT, env=env, **quiet)
    while not any(name.endswith("000001.json") for name in uploads(server, begin)) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    time.sleep(0.5)  # the workers notice and go
    kept, begin = at(url), len(server.seen)
    finished = [name.split("/")[-1] for name in kept if "/.parts/" in name]
    assert finished and "media/train/index.json" not in kept
    assert run(url, *WORDS, media=media, dataset="folder")[0] == 0
    assert without_root(at(url)) == local
    again = uploads(server, begin)
    assert not {name.replace(".json", ".tar") for name in finished} & {*again}
    assert {*again.values()} == {1}


def test_whatever_upload_fails_the_next_run_makes_up_for_it(server, run, media, local):
    url = f"s3://{s3.BUCKET}/failing"
    for done in (0, 5, 4, 8):  # fails at the list of what was skipped, the second note, the third tar, index.json
        with server.faults(puts=done):
            code, text = run(url, *WORDS, "workers=1", media=media, dataset="folder")
        assert code == 2 and text.startswith(f"error: {url}/") and text.count("\n") == 1, text
        assert "cannot be written: " in text and "start again when it answers" in text
        assert "media/train/index.json" not in at(url)
    assert run(url, *WORDS, media=media, dataset="folder")[0] == 0
    assert without_root(at(url)) == local


def test_parts_and_merge(server, run, media, local):
    url = f"s3://{s3.BUCKET}/parts"
    code, text = run(url, *WORDS, "--merge", media=media, dataset="folder")
    assert code == 2 and f"--merge: no manifest in {url}: make the parts first" in text
    for part in (1, 0):
        assert run(url, *WORDS, "--part", f"{part}/2", media=media, dataset="folder")[0] == 0
        code, text = run(url, *WORDS, "--merge", media=media, dataset="folder")
        assert (code, f"error: {url}/media/train/media-train-000000.tar is not finished" in text) == (
            2 * part,
            part == 1,
        )
    assert without_root(at(url)) == local


def test_what_is_new_or_gone_is_so_at_the_url(server, run, tmp_path):
    url, media, words = (
        f"s3://{s3.BUCKET}/changed",
        tmp_path / "media",
        {"media": tmp_path / "media", "dataset": "folder"},
    )
    tones(media, *NAMES[:9])
    assert run(url, **words)[0] == 0
    with server.faults(puts=3):  # one shard of other settings, which the index would not describe
        assert run(url, "spectrogram.quality=50", "workers=1", **words)[0] == 2
    assert "media/train/index.json" not in at(url)
    assert run(url, **words)[0] == 0
    before, begin = at(url), len(server.seen)
    tones(media, *NAMES[:11])
    assert run(url, **words)[0] == 0
    assert {name: at(url)[name] for name in before if name.endswith("0.tar")} == {
        n: d for n, d in before.items() if n.endswith("0.tar")
    }
    assert [name for name in uploads(server, begin) if name.endswith(".tar")] == ["media-train-000003.tar"]
    assert run(url, "samples_per_shard=99", **words)[0] == 0
    assert [name for name in at(url) if "00000" in name] == [
        "media/train/.parts/media-train-000000.json", "media/train/media-train-000000.tar",
    ]  # fmt: skip
    tones(media, *NAMES[11:])
    (media / "captions.csv").write_text(
        (media / "captions.csv").read_text().replace("path,", "split,path,").replace("\nt", "\nval,t")
    )
    code, text = run(url, **words)
    assert code == 0 and f"{url}/media/train: the annotations have nothing of it any more" in text


def test_names_at_the_url_leave_no_trace_elsewhere(server, run, media, tmp_path, monkeypatch):
    (tmp_path / "b/c").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "b/c"))
    fs = S3FileSystem()
    for name in ("../../evil.json", "a/../../evil.json", "a//evil.json", "a/b/c/d/evil.json", "a/b/evil.txt"):
        fs.pipe_file(f"{s3.BUCKET}/names/{name}", b"evil")
    fs.pipe_file(f"{s3.BUCKET}/names/manifest.jsonl", b"evil")
    url = f"s3://{s3.BUCKET}/names"
    code, text = run(url, *WORDS, "--merge", media=media, dataset="folder")
    assert code == 2 and text.startswith(f"error: {url}/manifest.jsonl: not a manifest of shard.py: delete it"), text
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["b", "c"]


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://no-such-bucket/out", "cannot be written"),
        ("nonsense://there/out", "nonsense://there/out: cannot be opened: Protocol not known: nonsense"),
    ],
)
def test_a_url_that_cannot_be_written_is_one_line(server, run, media, url, message):
    code, text = run(url, *WORDS, media=media, dataset="folder")
    assert code == 2 and message in text and text.count("\n") == 1, text


def test_a_server_that_is_not_there_is_one_line(run, media, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    S3FileSystem.clear_instance_cache()
    code, text = run("s3://bucket/away", *WORDS, media=media, dataset="folder")
    assert code == 2 and text.startswith("error: s3://bucket/away: cannot be listed: ") and text.count("\n") == 1
