"""python -m clip4vla.search on real media and shards: what is found, what a change does, a real kill, and every mistake."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from forks import ROOT
from PIL import Image
from running import TINY
from search_library import RATE, WINDOW, call, library, saved

from clip4vla import CLIP4VLA
from clip4vla.data import preprocessing
from clip4vla.data.shards import ShardFolder
from clip4vla.media.av_reader import read_clip
from clip4vla.search.builder import opened
from clip4vla.search.index import Index

PARTS = ("v", "vb", "nb", "both")
CLOSE = 3e-4  # of a cosine: fp16


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(model_folder):
    return CLIP4VLA.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def built(model_folder, sample_shards, tmp_path_factory):
    """(index folder, library, shards): one index of both."""
    where = tmp_path_factory.mktemp("search")
    call("build", library(where / "library"), sample_shards, "--model", model_folder, "--out", where / "idx")
    return where / "idx", where / "library", sample_shards


def pictures_of(lib):
    """Those that can be read."""
    return sorted(path for path in lib.glob("*.png") if path.name[:3] not in ("bad", "bro", "els"))


def expected(model, lib, shards):
    """Vectors (P, D) by name, each from the file, the waveform or the sample itself."""
    none, found = torch.zeros(TINY["embed_dim"]), {}
    for path in pictures_of(lib):
        found[path.name] = [model.encode_video(path)[0], none, none, none]
    sounds = {f"sub/{path.name}": path for path in (lib / "sub").iterdir()}
    wave = soundfile.read(lib / "long.wav", dtype="float32")[0]
    edges = [round(WINDOW * i * RATE) for i in range(3)] + [len(wave)]
    sounds |= {f"long.wav {WINDOW * i:.2f}": (wave[edges[i] : edges[i + 1]], RATE) for i in range(3)}
    for name, sound in sounds.items():
        found[name] = [none, *(model.encode_audio(sound, audio_type=token)[0] for token in PARTS[1:])]
    film = lib / "film.mp4"
    clip = read_clip(film, 0, 5.28, None)  # as long as its pictures
    heard = (model.encode_audio((clip.wave, clip.rate), audio_type=token)[0] for token in PARTS[1:])
    found["film.mp4"] = [model.encode_video(film)[0], *heard]
    for index in shards.glob("*/*/index.json"):
        folder = ShardFolder.open(str(index.parent))
        for i, shard in enumerate(folder.shards):
            for members in folder.read([(i, n) for n in range(shard.samples)]):
                meta = json.loads(members["json"])
                vectors = model.encode([preprocessing.of_shard(meta, members, model.spectrogram)], PARTS[1:])
                found[f"{index.parent} {meta['id']}"] = [vectors[part][0] for part in PARTS]
    return {name: torch.stack(vectors).double().numpy() for name, vectors in found.items()}


def label(hit):
    """The name that `expected` gives it."""
    if hit["key"]:
        return f"{Path(hit['place']).parent} {hit['name']}"
    return f"{hit['name']} {hit['start']:.2f}" if hit["name"] == "long.wav" else hit["name"]


def asked(capsys, *words):
    """Hits of a query of everything."""
    capsys.readouterr()
    call("query", *words, "--json", "-k", 1000)
    return json.loads(capsys.readouterr().out)


def test_scores_of_every_hit_are_those_of_the_files_themselves(built, model, capsys):
    idx, lib, shards = built
    truth = expected(model, lib, shards)
    sound, picture = lib / "sub" / os.listdir(lib / "sub")[0], pictures_of(lib)[0]
    queries = {
        ("a dog",): model.encode_text("a dog"),
        ("--sound", sound): model.encode_audio(sound),
        ("--picture", picture): model.encode_video(picture),
    }
    settings = {(): [0.5, 0, 0, 0.5], ("--audio-weight", 0.8, "--nb-ratio", 0.3): [0.2, 0.56, 0.24, 0]}
    for words, vector in queries.items():
        for more, weights in settings.items():
            hits = asked(capsys, *words, "--index", idx, *more)
            scores = {label(hit): hit["score"] for hit in hits}
            right = {name: float(np.dot(weights, v @ vector[0].double().numpy())) for name, v in truth.items()}
            assert len(scores) == len(hits) and scores == pytest.approx(right, abs=CLOSE)
            assert np.std(list(right.values())) > 30 * CLOSE  # so another item's would show
            assert [hit["score"] for hit in hits] == sorted(scores.values(), reverse=True)
    best = asked(capsys, "--picture", picture, "--audio-weight", 0, "--index", idx)
    own = next(i for i, hit in enumerate(best) if hit["name"] == picture.name)
    assert best[own]["score"] == pytest.approx(1, abs=CLOSE)  # before it at most the same picture in shards
    assert all(picture.stem in hit["name"] for hit in best[:own])
    assert all("v" in hit["scores"] for hit in best)  # sounds alone are not pictures of anything
    heard = [hit for hit in asked(capsys, "--sound", sound, "--audio-weight", 1, "--index", idx)]
    assert label(heard[0]) == f"sub/{sound.name}" and all("both" in hit["scores"] for hit in heard)


def test_a_hit_tells_where_it_comes_from(built, capsys):
    idx, lib, shards = built
    hits = asked(capsys, "a", "--index", idx)
    long = sorted((hit["start"], hit["end"]) for hit in hits if hit["name"] == "long.wav")
    assert np.array(long) == pytest.approx(np.array([(0, WINDOW), (WINDOW, 2 * WINDOW), (2 * WINDOW, 40)]))
    film = next(hit for hit in hits if hit["name"] == "film.mp4")
    assert (film["place"], film["key"], film["captions"]) == (str(lib / "film.mp4"), "", []) and set(
        film["scores"]
    ) == set(PARTS)
    candy = [hit for hit in hits if hit["name"].endswith("sounds/seasonal/christmas/hard_candy")]
    assert candy[0]["captions"] == ["Hard candy—yum!"] and candy[0]["place"].endswith(".tar")
    call("query", "a", "--index", idx, "-k", 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(hit["name"] in line for hit, line in zip(hits, lines, strict=False))


def test_damage_is_counted_and_listed(built, capsys):
    idx, lib, _ = built
    rows = [json.loads(line) for line in (idx / "corrupt.jsonl").read_text().splitlines()]
    assert {row["name"]: row["place"] for row in rows} == {
        n: str(lib / n) for n in ("broken.mp4", "broken.png", "silence.wav")
    }
    assert next(row["reason"] for row in rows if row["name"] == "broken.png").startswith("not a picture")
    capsys.readouterr()
    call("info", idx)
    info = json.loads(capsys.readouterr().out)
    assert (info["corrupt"], info["unfinished"], info["parts"]) == (3, 0, list(PARTS))
    kinds = [set(hit["scores"]) for hit in asked(capsys, "a", "--index", idx)]
    assert info["items"] == len(kinds) and info["with_pictures"] == sum("v" in kind for kind in kinds)
    assert info["with_sound"] == sum("vb" in kind for kind in kinds)


def test_hits_are_shown_from_their_shard_or_file_and_nothing_else(built, tmp_path):
    idx, lib, _ = built
    index = Index.open(idx)
    hits = {label(dataclasses.asdict(hit)): hit for hit in index.search(np.ones(TINY["embed_dim"]), 1000)}

    def size(data):
        with Image.open(io.BytesIO(data)) as image:
            return image.size

    film = index.exhibit(hits["film.mp4"])
    assert size(film.picture) == (5 * 96, 96) and size(film.spectrogram) == (448, 112)
    wave, rate = soundfile.read(io.BytesIO(film.audio))
    assert abs(len(wave) / rate - 5.3) < 0.1
    still = index.exhibit(next(hit for name, hit in hits.items() if name.endswith(".png")))
    assert size(still.picture) == (224, 224) and still.audio is None and still.spectrogram is None
    part = index.exhibit(hits[f"long.wav {2 * WINDOW:.2f}"])
    played, rate = soundfile.read(io.BytesIO(part.audio))
    assert abs(len(played) / rate - (40 - 2 * WINDOW)) < 0.1 and part.picture is None
    sample = index.exhibit(
        next(hit for hit in hits.values() if hit.name.endswith("hard_candy") and "sounds" in hit.place)
    )
    assert sample.captions == ["Hard candy—yum!"] and sample.audio and size(sample.spectrogram)[0] == 36
    forged = dataclasses.replace(hits["film.mp4"], place=str(lib / "elsewhere.png"), key="")
    assert index.exhibit(forged).picture == film.picture  # what it says of its place is not asked
    assert index.exhibit(dataclasses.replace(forged, id=10**9)).picture is None
    (lib / "film.mp4").rename(tmp_path / "film.mp4")
    try:
        assert (
            (gone := index.exhibit(hits["film.mp4"])).picture is None
            and gone.audio is None
            and gone.title == "film.mp4"
        )
        shutil.copy(pictures_of(lib)[0], lib / "film.mp4")  # another file of that name
        assert index.exhibit(hits["film.mp4"]).picture is None
    finally:
        (tmp_path / "film.mp4").replace(lib / "film.mp4")


def test_a_build_again_takes_what_changed_and_only_that(built, model, model_folder, tmp_path, capsys):
    lib, other = shutil.copytree(built[1], tmp_path / "lib", symlinks=True), tmp_path / "other"
    pictures = pictures_of(lib)
    other.mkdir()
    shutil.copy(pictures[3], other / "kept.png")
    shards = shutil.copytree(built[2] / "speech_fr", tmp_path / "shards/speech_fr")
    places, idx = (lib, other, shards.parent), tmp_path / "idx"

    def build(*where):
        capsys.readouterr()
        call("build", *where, "--model", model_folder, "--out", idx)
        return capsys.readouterr().out.splitlines()[0].removesuffix(" files or shards")

    count = sum(len(json.loads(path.read_text())["shards"]) for path in shards.glob("*/index.json"))
    assert build(*places) == f"{16 + count} new, 0 changed, 0 continued, 0 unchanged, 0 gone"
    before = {hit["id"]: hit["name"] for hit in asked(capsys, "a", "--index", idx)}
    pictures[0].unlink()
    shutil.copy(pictures[2], pictures[1])  # changed
    shutil.copy(pictures[3], lib / "new.png")
    shutil.copy(pictures[3], lib / "broken.png")  # repaired
    shutil.rmtree(other)
    shutil.rmtree(shards / "val")
    fewer = count - sum(1 for _ in (built[2] / "speech_fr/val").glob("*.tar"))
    assert (
        build(lib, shards.parent) == f"1 new, 2 changed, 0 continued, {12 + fewer} unchanged, {1 + count - fewer} gone"
    )
    hits = asked(capsys, "a", "--index", idx)
    text = model.encode_text("a")[0].double().numpy()
    truth = {name: float(v @ text @ [0.5, 0, 0, 0.5]) for name, v in expected(model, lib, shards.parent).items()}
    truth |= {"broken.png": truth[pictures[3].name], "kept.png": truth[pictures[3].name]}
    assert {label(hit) for hit in hits} == set(truth) and "kept.png" in before.values()
    truth.pop("kept.png")  # it is in no folder that was named: left alone
    assert {label(hit): hit["score"] for hit in hits if label(hit) in truth} == pytest.approx(truth, abs=CLOSE)
    fresh = {hit["name"] for hit in hits if hit["id"] not in before}
    assert fresh == {pictures[1].name, "new.png", "broken.png"}  # the others were not embedded again
    call("remove", other, "--index", idx)
    assert "1 files or shards dropped" in capsys.readouterr().out
    assert {label(hit) for hit in asked(capsys, "a", "--index", idx)} == set(truth)


def test_a_killed_build_loses_nothing_and_goes_on(built, model_folder, tmp_path, capsys):
    words = ["build", built[1], built[2], "--model", model_folder, "--out", tmp_path]
    slow = "import sys; from clip4vla.search import __main__, builder; builder.TOGETHER = 2; sys.argv[0] = 'x'; __main__.main()"
    build = subprocess.Popen([sys.executable, "-c", slow, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)
    there: list[tuple[int, bytes]] = []
    while len(there) < 9 and build.poll() is None:
        time.sleep(0.01)
        try:
            database = sqlite3.connect(f"file:{tmp_path}/items.sqlite?mode=ro", uri=True)
            there = database.execute("SELECT id, vector FROM items").fetchall()
        except sqlite3.OperationalError:
            pass
    build.send_signal(signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL and len(there) < 40
    with pytest.raises(SystemExit):
        call("query", "a dog", "--index", tmp_path)
    assert "its first build was interrupted: run the same build again" in capsys.readouterr().err
    call(*words)
    counted = capsys.readouterr().out
    assert counted.startswith("0 new, 0 changed, ") and ", 0 continued" not in counted
    database = sqlite3.connect(tmp_path / "items.sqlite")
    assert dict(there).items() <= dict(database.execute("SELECT id, vector FROM items").fetchall()).items()
    ours, theirs = (asked(capsys, "a dog", "--index", idx) for idx in (tmp_path, built[0]))
    assert {label(hit): hit["score"] for hit in ours} == pytest.approx(
        {label(h): h["score"] for h in theirs}, abs=CLOSE
    )


def test_a_long_file_goes_on_within_itself(built, model_folder, model, tmp_path):
    """However far it had come: windows that are there are not embedded again, and none is missing."""
    from clip4vla.search import sources

    _, (source,) = sources.find(str(built[1] / "long.wav"), model)
    whole = [(clip.number, clip.shown["start"], last, clip.input.segments) for clip, last in source.clips(0, model)]
    assert [row[:3] for row in whole] == [
        (0, 0, False),
        (1, pytest.approx(WINDOW), False),
        (2, pytest.approx(2 * WINDOW), True),
    ]
    for first in (1, 2):
        rest = [
            (clip.number, clip.shown["start"], last, clip.input.segments) for clip, last in source.clips(first, model)
        ]
        assert [row[:3] for row in rest] == [pytest.approx(row[:3]) for row in whole[first:]]
        for ours, theirs in zip(rest, whole[first:], strict=True):
            assert (ours[3].int() - theirs[3].int()).abs().max() <= 1


def test_mistakes_are_one_line(built, model_folder, tmp_path, capsys):
    idx, lib, shards = built
    other, empty, locked = saved(tmp_path / "other", seed=1), tmp_path / "empty", tmp_path / "locked"
    empty.mkdir(), locked.mkdir()
    lock, begun = open(locked / "lock", "w", encoding="utf-8"), tmp_path / "begun"
    with opened(begun):
        pass
    fcntl.flock(lock, fcntl.LOCK_EX)
    build, query = ("build", "--model", model_folder, "--out"), ("query", "--index", idx)
    for words, said in (
        ((*query, "a", "--model", other), "an index of another model"),
        (("build", "--model", other, "--out", idx, lib), "an index of another model"),
        ((*build, idx, lib, "--audio-types", "vb"), "has vb nb both: leave it out"),
        ((*build, tmp_path / "new", empty), "neither videos, sounds, pictures nor shards in it"),
        (("query", "--index", tmp_path / "new", "a"), "no index there"),
        (("query", "--index", begun, "a"), "its first build did not begin"),
        (("remove", "--index", begun, lib), "its first build did not begin"),
        ((*build, tmp_path / "new", tmp_path / "absent"), "no such file or folder"),
        ((*build, tmp_path / "new", lib / "notes.txt"), "neither a video, a sound nor a picture by its name (.txt)"),
        ((*build, locked, lib), "another build writes to it"),
        (("build", "--model", tmp_path / "absent", "--out", idx, lib), "absent"),
        (("query", "--index", tmp_path, "a"), "no index there"),
        (("remove", "--index", tmp_path, lib), "no index there"),
        ((*query, "a", "-k", 0), "at least 1 hit"),
        ((*query, "a", "--audio-weight", 2), "within 0..1"),
        ((*query, "--sound", lib / "silence.wav"), "nothing to search with"),
        ((*query, "--sound", lib / "absent.wav"), "absent.wav"),
        ((*build, tmp_path / "new", "memory://absent"), "no shards found in memory://absent"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(*words)
        error = "".join(
            x for x in capsys.readouterr().err.splitlines(True) if not x.startswith("left out, its name is not UTF-8")
        )
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, (
            error
        )
    assert not (tmp_path / "new" / "items.sqlite").exists() or not list((tmp_path / "new").glob("index-*"))


def test_a_missing_disk_takes_nothing_out_and_damage_is_read_again_when_asked(model_folder, tmp_path, capsys):
    disk, idx = tmp_path / "disk", tmp_path / "idx"
    disk.mkdir()
    shutil.copy(sorted((ROOT / "tests/sample").rglob("*.png"))[0], disk / "good.png")
    (disk / "away.png").write_bytes(b"")
    build = ("build", "--model", model_folder, "--out", idx, disk)
    call(*build)
    state, stat = Index.open(idx).store.sources(str(disk)), (disk / "away.png").stat()
    assert len(state) == 2 and len(Index.open(idx)) == 1
    (disk / "away.png").write_bytes(
        (disk / "good.png").read_bytes()
    )  # as if it had been there: its state is what it was
    with sqlite3.connect(idx / "items.sqlite") as db:
        size = (disk / "good.png").stat().st_size
        db.execute("UPDATE sources SET state = ? WHERE place LIKE '%away.png'", (f"{size} {stat.st_mtime_ns}",))
    os.utime(disk / "away.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    call(*build)
    assert len(Index.open(idx)) == 1
    call(*build, "--retry-failed")
    index = Index.open(idx)
    assert len(index) == 2 and not index.store.counts()["corrupt"]
    assert len(index.search(torch.ones(64, requires_grad=True, dtype=torch.bfloat16), 5)) == 2
    for file in disk.iterdir():
        file.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(*build)
    assert "is a disk missing?" in capsys.readouterr().err and len(Index.open(idx)) == 2


def test_a_run_is_indexed_with_the_checkpoint_that_was_its_newest(model_folder, tmp_path, capsys):
    steps = tmp_path / "run/checkpoints"
    shutil.copytree(model_folder, steps / "step-00000001")
    picture = sorted((ROOT / "tests/sample").rglob("*.png"))[0]
    call("build", picture, "--model", tmp_path / "run", "--out", tmp_path / "idx")
    saved(steps / "step-00000002", seed=1)
    capsys.readouterr()
    call("query", "a dog", "--index", tmp_path / "idx")
    assert picture.name in capsys.readouterr().out


def test_info_names_a_faiss_file_that_is_gone(built, tmp_path, capsys):
    shutil.copytree(built[0], tmp_path / "idx")
    (file,) = (tmp_path / "idx").glob("index-*.faiss")
    file.unlink()
    with pytest.raises(SystemExit):
        call("info", tmp_path / "idx")
    assert capsys.readouterr().err == f"error: {file}: No such file or directory: run the build again\n"


def test_the_plan_prints_its_formula_and_marks_what_is_taken(capsys):
    call("plan", "--items", 10**6, 10**8, "--dim", 512, "--parts", 3)
    out = capsys.readouterr().out
    assert "n (2 d + 8)" in out and "1000000 items: *flat 3.08 GB" in out and "none fits --memory-gb 4" in out


def test_neither_dali_nor_the_loader_is_needed_to_search_and_to_show():
    blocked = ("nvidia", "deepspeed", "wandb", "webdataset", "clip4vla.data.loader")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "import clip4vla.search.builder, clip4vla.search.hit_preview"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
