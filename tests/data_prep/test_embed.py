"""embed.py and the frozen vectors in pre-training: against open_clip itself, against a run without them, and through kills."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import indexes
import numpy as np
import open_clip
import pytest
import running
import torch
import webdataset
from forks import ROOT
from PIL import Image
from rank_scripts import DRIVER
from running import ONE_HEAD, TINY, run
from safetensors.torch import save_file
from stand_ins import OneBatch, Towers

from clip4vla.config import DataSources, LossConfig, MaskConfig, ModelConfig, RunConfig
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.sampler import EvalSampler, TrainSampler
from clip4vla.data.shards import CorruptSample, ShardFolder, write_index, write_shard
from clip4vla.models.model import TEXTS, Model
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.towers.weights import load_clip_weights
from data_prep import embed_shards

SOURCES = ("speech_fr", "sounds", "odd")
STEPS = 4


def commands(folder: Path, *lines: list, ranks: int = 1) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of commands run one after the other in one process, or in each of several ranks."""
    (folder / "driver.py").write_text(DRIVER)
    words = [folder / "driver.py", json.dumps([[str(word) for word in line] for line in lines])]
    done = run(*words) if ranks == 1 else running.ranks(ranks, *words)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert done.returncode == 0 and len(found) == ranks, done.stderr
    return max(found, key=lambda results: len(results[0][1]))  # rank 0 is the one that talks


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Weights of a tiny CLIP."""
    return weights(tmp_path_factory.mktemp("clip") / "tiny.safetensors", 0)


def weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(build_clip(ONE_HEAD).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def plain(sample_shards, tmp_path_factory) -> Path:
    """The shipped sample, without vectors, and a source of odd clips: one of them has a corrupt picture."""
    out = tmp_path_factory.mktemp("plain")
    for source in SOURCES[:2]:
        shutil.copytree(sample_shards / source / "train", out / source)
    odd(ShardFolder.open(str(out / "speech_fr")), out / "odd")
    flip(out / "odd", "frames.jpg", entry=2)
    return out


def odd(source: ShardFolder, out: Path) -> None:
    """Clips with 0 to 3 captions and 0 to 3 frames, in eight shards of 3 and one of more than a batch."""
    out.mkdir()
    samples, cuts = [], [*range(0, 25, 3), 94]
    for i, sample in enumerate(source.read([(0, e % 8) for e in range(94)])):
        captions, frames = [f"caption {c} of {i}" for c in range(i % 4)], (i // 4 + 1) % 4
        meta = json.loads(sample["json"]) | {"id": f"odd{i}", "captions": captions, "n_frames": frames}
        meta |= {"caption_langs": ["en"] * len(captions)}
        members = {"json": json.dumps(meta | {"has_frames": frames > 0}).encode(), "fbank.jpg": sample["fbank"]}
        strip = Image.fromarray(np.concatenate([np.roll(picture(sample), 40 * f, 1) for f in range(frames or 1)]))
        strip.save(data := io.BytesIO(), "jpeg")
        samples.append((f"{i:07d}-odd", members | ({"frames.jpg": data.getvalue()} if frames else {})))
    shards = [write_shard(out / f"odd-train-{s:06d}.tar", samples[cuts[s] : cuts[s + 1]]) for s in range(9)]
    names = {"media_root": ".", "source": "odd", "split": "train", "counts": {}}
    write_index(out, fingerprint=source.fingerprint, shards=shards, **names)


def picture(sample: dict[str, bytes]) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(sample["frames"])).convert("RGB"))


def flip(folder: Path, ext: str, entry: int) -> str:
    """Damage one member of the first shard; returns the sample's key."""
    opened = ShardFolder.open(str(folder))
    shard, (key, members) = opened.shards[0], opened.entries(0)[entry]
    tar = bytearray((folder / shard.name).read_bytes())
    tar[members[ext].offset + members[ext].size // 2] ^= 0xFF
    (folder / shard.name).write_bytes(tar)
    return key


def words(root: Path, clip: Path, **run_dir: Path) -> list[str]:
    """A tiny run on the folders of a root."""
    shares = ", ".join(f"{root}/{source}: 1" for source in SOURCES)
    return [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={clip}", "train.precision=fp32", "track.wandb=off",
        f"data.train={{{shares}}}", "data.val=[]", "train.batch_size=12", f"train.max_steps={STEPS}",
        "train.log_every=1", "data.decode_threads=1", *(f"{k}={v}" for k, v in run_dir.items()),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(plain, clip, tmp_path_factory):
    """(folders with vectors, folder of runs, what the commands said).

    One process: embeds, trains with vectors where no picture can be read, and without vectors where they can.
    """
    out, runs = tmp_path_factory.mktemp("made") / "s", tmp_path_factory.mktemp("runs")
    shutil.copytree(plain, out)
    shutil.copytree(plain, blank := runs / "blank")
    without_pictures(blank)
    for source in SOURCES:
        (blank / source / "clip").symlink_to(out / source / "clip")
    results = commands(
        runs,
        ["data_prep/embed.py", *words(out, clip, run_dir=runs / "none")],
        ["launch/pretrain.py", *words(blank, clip, run_dir=runs / "with"), "data.precomputed_embeddings=require"],
        ["launch/pretrain.py", *words(plain, clip, run_dir=runs / "without")],
    )
    assert [code for code, _, _ in results] == [0] * 3, results
    return out, runs, results


def not_finite(folder: Path, entry: int) -> str:
    """A NaN in the vectors of one sample of the first shard, with right checksums; returns its key."""
    opened, tree = ShardFolder.open(str(folder)), indexes.read(folder)
    keys = opened.entries(0).keys()
    content = {
        key: sample["clip"]
        for key, sample in zip(keys, opened.read([(0, e) for e in range(len(keys))], ("clip",)), strict=True)
    }
    content[keys[entry]] = b"\0\x7e" + content[keys[entry]][2:]
    rewritten = write_shard(
        folder / opened.shards[0].name, [(key, {"clip.f16": data}) for key, data in content.items()]
    )
    tree["shards"][0] |= rewritten
    indexes.write(folder, tree)
    return keys[entry]


def without_pictures(root: Path) -> None:
    """Overwrite every film strip with zeros."""
    for source in SOURCES:
        folder = root / source
        opened = ShardFolder.open(str(folder))
        for number, shard in enumerate(opened.shards):
            tar = bytearray((folder / shard.name).read_bytes())
            for _, members in opened.entries(number):
                if member := members.get("frames.jpg"):
                    tar[member.offset : member.offset + member.size] = bytes(member.size)
            (folder / shard.name).write_bytes(tar)


def trace(run_dir: Path) -> np.ndarray:
    """Losses (steps, names)."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[v for k, v in sorted(row.items()) if k.startswith("loss")] for row in rows])


def test_vectors_are_open_clips_own(made, plain, clip):
    reference = build_clip(ONE_HEAD).eval()
    load_clip_weights(reference, str(clip))
    mean, std = (
        255 * torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    seen = set()
    for source in SOURCES:
        media, made_of = ShardFolder.open(str(plain / source)), ShardFolder.open(str(made[0] / source / "clip"))
        places = [(s, e) for s, shard in enumerate(media.shards) for e in range(shard.samples)]
        for sample, found in zip(media.read(places), made_of.read(places, ("clip",)), strict=True):
            got = torch.from_numpy(np.frombuffer(found.get("clip", b""), "<f2").astype(np.float32)).view(-1, 64)
            if isinstance(sample, CorruptSample):
                assert not len(got) and sample.key == "0000002-odd"
                continue
            captions = json.loads(sample["json"])["captions"]
            frames = torch.from_numpy(picture(sample)).view(-1, 224, 224, 3) if "frames" in sample else torch.zeros(0)
            seen.add((len(captions), len(frames)))
            assert len(got) == len(captions) + len(frames)
            with torch.no_grad():
                want = [reference.encode_text(open_clip.tokenize(text), normalize=True) for text in captions]
                want += [
                    reference.encode_image((f.permute(2, 0, 1)[None] - mean) / std, normalize=True) for f in frames
                ]
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs[0], atol=2e-3, rtol=0)  # JPEG decoders differ by rounding
    assert {(0, 0), (0, 1), (1, 0), (2, 1), (3, 3)} <= seen


@torch.no_grad()
def test_captions_are_read_a_few_at_a_time():
    model, loader = Towers(), OneBatch(2, 2 * TEXTS, 0)
    made = embed_shards.vectors(model, loader, next(loader.batches(0, 1)))
    assert model.passes == [TEXTS, TEXTS, 2] and [len(texts) for texts, _ in made] == [2, 2 * TEXTS, 0]
    tokens = loader.tokenize([text for meta in loader.meta for text in meta["captions"]])
    want = torch.nn.functional.normalize(model.encode_tokens(tokens)[0], dim=-1).half()
    torch.testing.assert_close(torch.cat([texts for texts, _ in made]), want, atol=1e-3, rtol=0)


def test_plain_webdataset_reads_them(made, plain):
    for source in SOURCES:
        opened = ShardFolder.open(str(plain / source))
        for number, shard in enumerate(opened.shards):
            tar = str(made[0] / source / "clip" / shard.name)
            got = list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))
            assert [sample["__key__"] for sample in got] == opened.entries(number).keys()
            assert all("clip.f16" in sample and len(sample["clip.f16"]) % 128 == 0 for sample in got)


def test_the_losses_agree_to_fp16_precision_though_no_frame_is_read(made):
    out, runs, results = made
    ours, theirs = trace(runs / "with"), trace(runs / "without")
    assert ours.shape == (STEPS, 4) and np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, rtol=5e-4)  # 4e-5 were seen; a float16 is good to 5e-4
    assert "vectors    of text and frames" in results[1][1] and "vectors    not used" in results[2][1]
    assert "odd/clip: 94 clips (1 corrupt), 137 captions, 143 frames" in results[0][1]
    assert not list(runs.glob("none"))  # embedding starts no run


def loader(root: Path, clip: Path, with_vectors: bool, order=None) -> Loader:
    folders = open_folders({str(root / source): 1.0 for source in SOURCES}, "data.train")
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    found = [ShardFolder.open(f"{folder.url}/clip") for folder in folders] if with_vectors else None
    return Loader(folders, order or TrainSampler(sizes, [1, 1, 1], 12, 0, 2), DataSources(), vectors=found, seed=0,
                  tokenize=tokenizer(str(clip), 24), mask=MaskConfig(), device=torch.device("cpu"),
                  needs=("fbank",) if with_vectors else ("fbank", "frames"), damage_log=root / "corrupt.jsonl")  # fmt: skip


def test_a_batch_with_vectors_is_the_same_batch(made, plain, clip):
    """Captions drawn, masks, order and what is there; and the model makes the same features of it."""
    cfg = ModelConfig(clip=str(clip), max_tokens=24)
    model = Model(resolve_clip_config(str(clip)), cfg, loader(plain, clip, False).spectrogram)
    model.load_clip()
    for k in range(5):
        ours, theirs = loader(made[0], clip, True).batch(k), loader(plain, clip, False).batch(k)
        for name in ("ids", "captions", "meta"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in (
            "frame_clip",
            "segments",
            "segment_rows",
            "hidden_rows",
            "hidden_channels",
            "has_text",
            "has_frames",
        ):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert not len(ours.frames) and not ours.tokens.numel()
        with torch.no_grad():
            got, want = (model(batch, LossConfig(), MaskConfig()) for batch in (ours, theirs))
        assert torch.equal(got["audio"], want["audio"])
        torch.testing.assert_close(got["vision"], want["vision"], atol=5e-4, rtol=0)
        there = ours.has_text
        torch.testing.assert_close(got["text"][there], want["text"][there], atol=5e-4, rtol=0)


def test_damaged_vectors_are_damage_of_the_sample(made, clip, tmp_path):
    shutil.copytree(made[0], tmp_path / "s")
    bad = not_finite(tmp_path / "s/sounds/clip", entry=5)
    key = flip(tmp_path / "s/sounds/clip", "clip.f16", entry=3)
    (tmp_path / "s/corrupt.jsonl").unlink(missing_ok=True)
    ours = loader(tmp_path / "s", clip, True)
    ours.order = EvalSampler([[shard.samples for shard in folder.shards] for folder in ours.folders], 16)
    for batch in ours.batches(0, len(ours.order)):
        assert torch.equal(batch.has_audio, torch.tensor([bool(clip_id) for clip_id in batch.ids]))
    listed = [json.loads(line) for line in (tmp_path / "s/corrupt.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in listed] == [
        (key, "clip: CRC-32 differs from index.json"),
        (bad, "clip: vectors that are not finite"),
        ("0000002-odd", "clip: 0 bytes, not 3 vectors of 128"),
    ]


def test_killed_and_finished_by_two_ranks_the_bytes_are_those_of_one_undisturbed_process(made, plain, clip, tmp_path):
    """Also with a finished tar cut short and a note lost; what was finished stays; two ranks then train as one did."""
    root, runs = tmp_path / "s", made[1]
    shutil.copytree(plain, root)
    command = [sys.executable, "data_prep/embed.py", *words(root, clip, run_dir=tmp_path / "none")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while len(notes := sorted(root.glob("*/clip/.parts/*.json"))) < 3 and time.time() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert 3 <= len(notes) < 13 and not list(root.glob("*/clip/index.json")), "killed too early or too late"
    tars = [root / note.parts[-4] / "clip" / note.stem for note in notes]
    notes[0].unlink()
    os.truncate(tars[1], 1000)
    kept = tars[2].stat().st_mtime_ns
    lines = [["data_prep/embed.py", *words(root, clip, run_dir=tmp_path / "none")]]
    lines += [["launch/pretrain.py", *words(root, clip, run_dir=tmp_path / "two")]]
    results = commands(tmp_path, *lines, ranks=2)
    assert [code for code, _, _ in results] == [0, 0], results
    assert tars[2].stat().st_mtime_ns == kept
    for path in [p.relative_to(root) for p in root.glob("*/clip/*") if p.suffix in (".tar", ".json")]:
        assert (root / path).read_bytes() == (made[0] / path).read_bytes(), path
    assert len(list(root.glob("*/clip/*.tar"))) == 13
    np.testing.assert_allclose(trace(tmp_path / "two"), trace(runs / "with"), rtol=1e-5)


def rewrite(folder: Path) -> Path:
    """Make the first shard of a folder again, without its last sample; returns it."""
    opened = ShardFolder.open(str(folder))
    tree = indexes.read(folder)
    first, *others = tree["shards"]
    samples = opened.read([(0, entry) for entry in range(first["samples"] - 1)], ("json", "fbank"))
    metas = [json.loads(s["json"]) | {"n_frames": 0, "has_frames": False} for s in samples]
    keys = [key for key, _ in first["entries"]]
    content = [
        (key, {"json": json.dumps(meta).encode(), "fbank.jpg": s["fbank"]})
        for key, meta, s in zip(keys, metas, samples, strict=False)
    ]
    entry = write_shard(folder / first["name"], content)
    indexes.write(folder, tree | {"shards": [entry, *others]})
    return folder / first["name"]


@pytest.fixture(scope="module")
def refused(made, plain, clip, tmp_path_factory):
    """What commands say that cannot, or must not, use the vectors that are there; then embed.py repairs what is stale."""
    out, tmp = made[0], tmp_path_factory.mktemp("refused")
    for name in ("rewritten", "others"):
        shutil.copytree(out, tmp / name)
    shutil.copytree(plain, tmp / "corrupt")
    rewrite(tmp / "rewritten/sounds")
    (tmp / "tiny.json").write_text(json.dumps(TINY))
    other = weights(tmp / "other.safetensors", 1)
    times = {path: path.stat().st_mtime_ns for path in tmp.glob("*/*/clip/*.tar")}
    pretrain, embed, run_dir = "launch/pretrain.py", "data_prep/embed.py", tmp / "run"
    return tmp, times, commands(
        tmp,
        [pretrain, *words(tmp / "others", other, run_dir=run_dir)],
        [pretrain, *words(tmp / "others", clip, run_dir=run_dir), "model.max_tokens=20"],
        [pretrain, *words(tmp / "rewritten", clip, run_dir=run_dir)],
        [pretrain, *words(plain, clip, run_dir=run_dir), "data.precomputed_embeddings=require"],
        [pretrain, *words(out, clip, run_dir=run_dir), "data.precomputed_embeddings=require",
         "model.trainable_towers=text+audio"],
        [embed, *words(out, tmp / "tiny.json", run_dir=run_dir)],
        [embed, *words(out, clip, run_dir=run_dir), "model.trainable_towers=vision+audio"],
        [embed, *words(tmp / "corrupt", clip, run_dir=run_dir), "data.max_corrupt_fraction=0"],
        [embed, *words(tmp / "rewritten", clip, run_dir=run_dir)],
        [embed, *words(tmp / "others", other, run_dir=run_dir)],
    )  # fmt: skip


SAID = [
    "others/speech_fr/clip: vectors of other towers: ",
    "max_tokens 24) there and ",
    "rewritten/sounds/clip: vectors of other shards: made for sounds-train-000000.tar, ",
    "speech_fr has none: run data_prep/embed.py",
    "data.precomputed_embeddings=require: the text tower trains",
    "towers without weights: name weights there or in init_from",
    "model.trainable_towers=vision+audio: vision trains",
    "were corrupt, more than data.max_corrupt_fraction=0.0",
]


@pytest.mark.parametrize("number", range(len(SAID)), ids=SAID)
def test_what_cannot_be_is_one_line_and_exit_code_2(refused, number):
    code, _, said = refused[2][number]
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and SAID[number] in said
    if "vectors of other" in said:
        assert said.endswith("run data_prep/embed.py again, or set data.precomputed_embeddings=off\n")


def test_only_what_is_stale_is_made_anew(refused, made):
    tmp, times, results = refused
    assert [code for code, _, _ in results[len(SAID) :]] == [0, 0], results[len(SAID) :]
    changed = {str(path.relative_to(tmp)) for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert {path for path in changed if "rewritten" in path} == {"rewritten/sounds/clip/sounds-train-000000.tar"}
    assert len([path for path in changed if "others" in path]) == 13  # all of another model's
    ours, theirs = (ShardFolder.open(str(root / "odd/clip")).fingerprint["clip"] for root in (tmp / "others", made[0]))
    assert ours["identity"] != theirs["identity"] and (ours["dim"], ours["max_tokens"]) == (64, 24)
    folders = open_folders({str(tmp / "rewritten/sounds"): 1.0}, "data.train")
    assert ShardFolder.open(f"{folders[0].url}/clip").shards[0].of == folders[0].shards[0].sha256


def test_a_gpu_may_round_products_to_tf32(monkeypatch):
    monkeypatch.setattr(embed_shards, "open_folders", lambda *args: [])
    torch.backends.cuda.matmul.allow_tf32 = False
    pytest.raises(IndexError, embed_shards.run, RunConfig())  # there is nothing to embed
    assert torch.backends.cuda.matmul.allow_tf32
