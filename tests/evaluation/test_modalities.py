"""Fine-tuning and evaluating retrieval where only sound, only the picture, or only both together tell items apart.

Twelve items differ in two properties, which their captions name ("high buzz"); the other properties are the same in all.
Clips of an item differ in noise, level, position and speed, and all of that is drawn independently of the item.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from running import TINY, ranks
from scipy.stats import binom, norm

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.data.shards import fingerprint, write_index, write_shard
from clip4vla.media.av_reader import MediaClip
from clip4vla.media.images import jpeg
from data_prep.build_shards import fbank

SCRIPTS = ("launch/finetune_retrieval.py", "launch/evaluate.py")
SEED = 0
RATE, SECONDS, SIDE = 16000, 1.5, 64  # Hz, s, pixels
DATA = load(DataConfig, None, [f"frames.size={SIDE}"])
CLIP = TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": SIDE}}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 230), "yellow": (230, 210, 40)}
PATTERNS = {"bars": (0, 1), "columns": (1, 0), "checks": (1, 1)}  # changes along x and y
PITCHES = {"bass": 220, "low": 660, "middle": 1800, "high": 4200}  # Hz
RHYTHMS = {"hum": 0, "beeps": 2.5, "buzz": 16}  # a second
KINDS = [COLOURS, PATTERNS, PITCHES, RHYTHMS]
SETS = {"sound": (2, 3), "picture": (0, 1), "both": (0, 3)}  # the kinds that items differ in
ITEMS, CLIPS = 12, {"train": 10, "test": 6}  # clips of each item
LIKE = {"sound": {"v": 12, "a": 1}, "picture": {"v": 1, "a": 12}, "both": {"v": 3, "a": 4}}  # items alike to a medium
STEPS = {"v": 30, "a": 60, "av": 40}  # what is seen is learned sooner than what is heard
RUNS = [(name, media, "global_global") for name in SETS for media in ("v", "a", "av")]
HEADS = ("global_local", "local_local")


def picture(colour, pattern, rng):
    """RGB stripes or checks of 16 pixels, painted and black."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.integers(0, 8, (2, 1, 1))
    black = (x // 16 * pattern[0] + y // 16 * pattern[1]) % 2
    pixels = np.where(black[..., None], 30, np.array(colour) * rng.uniform(0.7, 1.1))
    return (pixels + rng.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)


def sound(pitch, rate, rng):
    """A tone in noise, switched on and off `rate` times a second."""
    t = np.arange(int(SECONDS * RATE)) / RATE
    on = (t * rate + rng.uniform(0, 0.2)) % 1 < 0.5
    wave = np.sin(2 * np.pi * pitch * rng.uniform(0.99, 1.01) * t) * on + rng.normal(0, 0.05, len(t))
    return torch.from_numpy(wave * rng.uniform(0.05, 0.5)).float()[None]


def clips(name, split, rng):
    """(key, members) of the clips of a set."""
    chosen = [list(KINDS[kind]) for kind in SETS[name]]
    for number, (_, *item) in enumerate(itertools.product(range(CLIPS[split]), *chosen)):
        words = [next(iter(kind)) for kind in KINDS]
        for kind, word in zip(SETS[name], item, strict=True):
            words[kind] = word
        colour, pattern, pitch, rhythm = (kind[word] for kind, word in zip(KINDS, words, strict=True))
        counts, members = fbank(DATA, MediaClip(SECONDS, wave=sound(pitch, rhythm, rng), rate=RATE))
        members["frames.jpg"] = jpeg(picture(colour, pattern, rng), 90)
        caption = " ".join(item)
        about = dict.fromkeys(("start", "end", "label")) | {
            "source": "s",
            "split": split,
            "lang": "en",
            "caption_langs": ["en"],
        }
        meta = about | {"id": f"{split}-{number}", "item": caption, "group": caption, "captions": [caption], "audio_type": "both",
                "n_frames": 1, "has_frames": True, "duration": SECONDS, "media": {"audio": None, "frames": None}}  # fmt: skip
        yield f"{number:07d}", {"json": json.dumps(meta | counts).encode()} | members


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The folder of SET/SPLIT."""
    out = tmp_path_factory.mktemp("sets")
    for number, (name, split) in enumerate(itertools.product(SETS, ("train", "test"))):
        folder, n = out / name / split, ITEMS * CLIPS[split]
        folder.mkdir(parents=True)
        shard = write_shard(folder / "clips-000000.tar", clips(name, split, np.random.default_rng((SEED, number))))
        counts = {"samples": n, "with_audio": n, "with_frames": n, "seconds": n * SECONDS, "quarantined": 0}
        about = {"fingerprint": fingerprint(DATA), "media_root": ".", "source": name, "split": split}
        write_index(folder, **about, counts=counts, shards=[shard])
    return out


@pytest.fixture(scope="module")
def metrics(shards, tmp_path_factory):
    """{(set, modalities, fusion): metrics on held-out clips}; the heads with weights start from Global to Global's towers."""
    out = tmp_path_factory.mktemp("runs")
    (out / "tiny.json").write_text(json.dumps(CLIP))
    runs = [*RUNS, *(("both", "av", head) for head in HEADS)]
    jobs = [[script, *words(shards, out, *run)] for run in runs for script in SCRIPTS]
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = ranks(1, "tests/helpers/several.py", out / "jobs.json", timeout=600)
    assert done.returncode == 0, done.stderr
    return {run: json.loads((out / "-".join(run) / "eval/test/metrics.json").read_text()) for run in runs}


def words(shards, out, name, media, head):
    """Of a run that learns a set in seconds. Random token embeddings tell few words apart as well as trained ones."""
    towers = {"v": "text+vision", "a": "text+audio", "av": "text+vision+audio"}[media]
    more = [f"train.max_steps={STEPS[media]}", "model.temperature=0.05", "init_from=[]"]
    if head != "global_global":
        start = f"init_from={out}/{name}-{media}-global_global"
        more += [start, "model.head_layers=2", "model.head_dropout=0"]
    if head == "local_local":
        more += ["model.temperature=1", "model.text_tokens=eos"]
    return [
        "configs/pretrain/sample.yaml", f"run_dir={out}/{name}-{media}-{head}", f"model.clip={out}/tiny.json", f"seed={SEED}",
        "model.audio_patch=[32,32]",
        f"model.modalities={media}", f"model.head={head}", f"model.trainable_towers={towers}", "model.max_tokens=8",
        "model.freeze_layers={text: 0}", "loss={tm: 1, at: 0, av: 0, aa: 0, exclude_same_group: true}",
        f"data.train={shards}/{name}/train", f"data.test={shards}/{name}/test", "data.decode_threads=1",
        "train.batch_size=24", "train.precision=fp32", *more,
        "eval.task=retrieval", "eval.bootstrap=0", "eval.report_queries=0", "track.wandb=off",
    ]  # fmt: skip


def bound(alike, queries):
    """R@1 in percent that guessing among that many items exceeds once in ten thousand times."""
    return 100 * binom.ppf(1 - 1e-4, queries, 1 / alike) / queries


def check(found, ending, alike, learned=90.0):
    """R@1 of a medium to which that many items are alike, both ways; queries are independent by caption, and by clip."""
    for way, queries in (("text_to_video", ITEMS), ("video_to_text", ITEMS * CLIPS["test"])):
        row = found[way + ending]
        assert row["n_queries"] == row["n_gallery"] == ITEMS * CLIPS["test"]
        if alike == 1:
            assert row["R@1"] >= learned and row["p_value"] <= 0.001, way
        else:
            assert row["R@1"] <= bound(alike, queries), way
        if alike == ITEMS:
            assert row["p_value"] > 0.001, way
    if ending and 1 < alike < ITEMS:
        # beside the other it learned its half of the answer; R@1 of a half is itself a draw, the mean rank hardly
        places = 1 + CLIPS["test"] * np.arange(ITEMS)  # of the right text among groups of equal ones
        assert found["video_to_text" + ending]["MeanR"] <= norm(places.mean(), places.std() / ITEMS**0.5).ppf(0.01)


@pytest.mark.parametrize("name, media, head", RUNS)
def test_only_media_that_tell_items_apart_find_them(metrics, name, media, head):
    found = metrics[name, media, head]
    check(found, "", LIKE[name].get(media, 1))
    if media == "av":
        for kind, alike in LIKE[name].items():
            check(found, f"/{kind}", alike, learned=bound(ITEMS, ITEMS))  # it was trained beside the other, not alone


@pytest.mark.parametrize("head", HEADS)
def test_every_head_joins_sound_and_picture(metrics, head):
    found = metrics["both", "av", head]
    check(found, "", 1)
    for kind, alike in LIKE["both"].items():
        check(found, f"/{kind}", alike)
