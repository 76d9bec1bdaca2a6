"""Spaces of vectors that another program computed (embed.py --from, model.clip=vectors:NAME): from files to training, evaluation,
export, the API and search; beside the vectors of data_prep/embed.py for the same CLIP."""

import functools
import hashlib
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rank_scripts import DRIVER
from running import ONE_HEAD, run
from safetensors.torch import save_file
from vector_files import write

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data.loader import open_folders
from clip4vla.data.precomputed_embeddings import open_vectors, space_of
from clip4vla.data.shards import ShardFolder
from clip4vla.errors import UserError
from clip4vla.evaluation.runner import check_evaluation
from clip4vla.losses.objective import compute_losses
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import towers_sha256
from clip4vla.search.builder import build
from clip4vla.search.index import Index
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training.run_setup import build_model, fingerprint_of, train_loader
from data_prep import embed_shards
from data_prep.packed import vector_shards

FOLDERS = ("speech_fr/train", "sounds/train", "speech_fr/val")
SOUND = next((Path(__file__).parents[1] / "sample").rglob("*.ogg"))


def samples(folder: Path) -> list[dict[str, bytes]]:
    """Those of all shards, or all vectors of a folder of these."""
    opened = ShardFolder.open(str(folder))
    places = [(s, e) for s, shard in enumerate(opened.shards) for e in range(shard.samples)]
    return opened.read(places, ("json", "frames", "clip"))


@torch.no_grad()
def outside(weights: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What open_clip alone gives for the captions and frames of each clip, not normalised."""
    clip = build_clip(ONE_HEAD).eval()
    clip.load_state_dict(open_clip.factory.load_state_dict(str(weights)))
    tokenize = open_clip.get_tokenizer("ViT-B-32", context_length=24)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    found = {}
    for sample in samples(folder):
        meta = json.loads(sample["json"])
        strip = np.array(Image.open(io.BytesIO(sample["frames"])).convert("RGB"))
        frames = torch.from_numpy(strip).view(-1, 224, 224, 3).permute(0, 3, 1, 2) / 255
        texts = clip.encode_text(torch.nn.functional.pad(tokenize(meta["captions"]), (0, 53)))
        found[meta["id"]] = {"text": texts, "vision": clip.encode_image((frames - mean) / std)}
    return found


@pytest.fixture(scope="module")
def made(sample_shards, tmp_path_factory) -> tuple[Path, list]:
    """A folder with shards, once with vectors of files and once with embed.py's own, and a run on the first; what was said."""
    root = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    save_file(build_clip(ONE_HEAD).state_dict(), root / "clip.safetensors")
    (root / "same.json").write_text(json.dumps(ONE_HEAD))
    (root / "audio.json").write_text(json.dumps(ONE_HEAD | {"embed_dim": 32}))
    for which in ("files", "own"):
        for folder in FOLDERS:
            shutil.copytree(sample_shards / folder, root / which / folder)
    endings = (".parquet", ".npz", ".safetensors")
    files = [
        write(root / f"{i}{end}", outside(root / "clip.safetensors", root / "own" / folder), "tiny@1")
        for i, (folder, end) in enumerate(zip(FOLDERS, endings, strict=True))
    ]
    space = ["model.clip=vectors:tiny", f"model.audio_tower={root}/audio.json"]
    lines = [
        ["data_prep/embed.py", *words(root, "files"), *space, "--from", *files],
        ["launch/pretrain.py", *words(root, "files"), *space],
        ["launch/evaluate.py", *words(root, "files"), *space],
        ["data_prep/embed.py", *words(root, "own"), f"model.clip={root}/clip.safetensors"],
        ["launch/evaluate.py", *words(root, "own"), f"model.clip={root}/clip.safetensors", "train.max_steps=0"],
        ["launch/export.py", root / "run-files", root / "model"],
    ]  # fmt: skip
    (root / "driver.py").write_text(DRIVER)
    done = run(root / "driver.py", json.dumps([[str(word) for word in line] for line in lines]))
    (results,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert [code for code, *_ in results] == [0] * len(lines), results
    return root, results


def words(root: Path, which: str) -> list[str]:
    train, sounds, test = (root / which / folder for folder in FOLDERS)
    return [
        "configs/pretrain/sample.yaml", "init_from=[]", "train.precision=fp32", "track.wandb=off", f"run_dir={root}/run-{which}",
        f"data.train={{{train}: 1, {sounds}: 1}}", f"data.val=[{test}]", f"data.test=[{test},{train}]", "train.batch_size=12",
        "train.max_steps=3", "train.log_every=1", "data.decode_threads=1", "eval.permutations=0", "eval.bootstrap=0",
        "eval.audio_types=[both]",
    ]  # fmt: skip


def test_vectors_of_files_are_those_of_embed(made):
    root, results = made
    for folder in FOLDERS:
        for pair in zip(*(samples(root / which / folder / "clip") for which in ("files", "own")), strict=True):
            theirs, ours = (np.frombuffer(found["clip"], "<f2").astype(float) for found in pair)
            np.testing.assert_allclose(theirs, ours, atol=2e-3)  # JPEG decoders differ by rounding
    made_with = ShardFolder.open(str(root / "files" / FOLDERS[0] / "clip")).fingerprint["clip"]
    assert (made_with["dim"], made_with["name"], made_with["kinds"]) == (64, "vectors:tiny", ["text", "vision"])
    assert "vectors:tiny: " in results[0][1] and "of width 64 (text and vision)" in results[0][1]


def test_embeds_own_vectors_through_a_file_are_the_same_to_the_last_bit(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "own" / FOLDERS[1], tmp_path / "s")
    vectors = {}
    for sample, found in zip(samples(tmp_path / "s"), samples(tmp_path / "s/clip"), strict=True):
        every = torch.frombuffer(bytearray(found["clip"]), dtype=torch.float16).view(-1, 64)
        meta = json.loads(sample["json"])
        vectors[meta["id"]] = dict(zip(("text", "vision"), every.tensor_split([len(meta["captions"])]), strict=True))
    tars = sorted((tmp_path / "s/clip").glob("*.tar"))
    before = [tar.read_bytes() for tar in tars]
    cfg = load(RunConfig, None, [f"data.train={tmp_path}/s", "model.clip=vectors:own"])
    vector_shards.run(cfg, [str(write(tmp_path / "own.safetensors", vectors))])
    assert [tar.read_bytes() for tar in tars] == before and len(before) > 0


@torch.no_grad()
def test_the_losses_are_those_of_the_clip_that_made_the_vectors(made):
    root, _ = made
    losses, audio = {}, {}
    for which, clip in (("own", f"{root}/clip.safetensors"), ("files", "vectors:tiny")):
        cfg = load(RunConfig, "configs/pretrain/sample.yaml", [*words(root, which)[1:], f"model.clip={clip}"])
        folders = open_folders(cfg.data.train, "data.train")
        own = which == "own"
        config = resolve_clip_config(clip) if own else space_of(folders[0], clip)
        cfg.model.audio_tower = "vision" if own else f"{root}/same.json"
        model = Model(config, cfg.model, SpectrogramConfig(**folders[0].fingerprint["spectrogram"]))
        if own:
            model.load_clip()
            model.start_audio()
            audio = model.audio.state_dict()
        model.audio.load_state_dict(audio)
        vectors = open_vectors(folders, cfg, "audio", functools.partial(towers_sha256, model))
        loader = train_loader(cfg, folders, vectors, torch.device("cpu"))
        batches = [loader.batch(k) for k in range(3)]
        assert vectors and all(batch.frame_vectors is not None for batch in batches)
        losses[which] = [
            list(compute_losses(model(batch, cfg.loss, cfg.mask), batch.labels(), cfg.loss).values())
            for batch in batches
        ]
    assert np.shape(losses["own"]) == (3, 4) and np.isfinite(losses["own"]).all()
    np.testing.assert_allclose(losses["files"], losses["own"], rtol=5e-4)  # a float16 is good to 5e-4


def test_a_run_trains_and_evaluates_in_the_space(made):
    """Text and pictures are ranked as by the CLIP that made their vectors; sounds in the same space, by a tower of their own."""
    root, results = made
    assert "vectors    of text and frames from embed.py" in results[1][1] and "audio.json" in results[1][1]
    ours, theirs = (
        json.loads((root / f"run-{which}/eval/test/metrics.json").read_text()) for which in ("files", "own")
    )
    assert set(ours) >= {f"{a}_to_{b}" for a, b in itertools.permutations(("text", "audio", "video"), 2)}
    ranks = ("R@1", "R@5", "R@10", "MedR", "MeanR")
    for way in ("text_to_video", "video_to_text"):
        assert ours[way]["n_queries"] == theirs[way]["n_queries"] == 20  # fp16 may change the order of two near ones
        assert [ours[way][k] for k in ranks] == pytest.approx([theirs[way][k] for k in ranks], abs=5.1)
    losses = [json.loads(line)["loss"] for line in (root / "run-files/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_the_exported_model_encodes_sounds_alone(made):
    root, _ = made
    config = json.loads((root / "model/config.json").read_text())["clip"]
    identity = ShardFolder.open(str(root / "files" / FOLDERS[0] / "clip")).fingerprint["clip"]["identity"]
    assert config["space"] == {"name": "vectors:tiny", "identity": identity}
    assert identity == hashlib.sha256(b"tiny@1").hexdigest()
    card = (root / "model/README.md").read_text()
    assert identity in card and 'model.encode_audio(["clip.mp4"' in card and "encode_text" not in card
    model = CLIP4VLA.from_pretrained(root / "model")
    sound = model.encode_audio(SOUND)
    assert sound.shape == (1, 64) and float(sound.norm()) == pytest.approx(1, abs=1e-5)
    vectors = torch.randn(3, 64)
    torch.testing.assert_close(
        model.similarity(vectors, sound), torch.nn.functional.normalize(vectors, dim=1) @ sound.T
    )
    for call in (lambda: model.encode_text("a dog"), lambda: model.encode_video(torch.zeros(1, 9, 9, 3)),
                 lambda: model.classify(str(SOUND), ["dog"])):  # fmt: skip
        with pytest.raises(UserError, match=r"vectors:tiny: has no (text|vision) tower: only sounds can be encoded"):
            call()


def test_search_finds_sounds_by_sounds(made, tmp_path):
    root, _ = made
    model = CLIP4VLA.from_pretrained(root / "model")
    build(model, str(root / "model"), [str(root / "files" / FOLDERS[2])], tmp_path / "index")
    index = Index(tmp_path / "index")
    known = samples(root / "files" / FOLDERS[2])
    assert index.store.counts()["items"] == sum(json.loads(sample["json"])["has_audio"] for sample in known) > 1
    (hit, *_) = index.search(model.encode_audio(SOUND)[0], 1, 1.0, None)
    assert hit.score <= 1.01


def test_clips_without_vectors_are_listed_and_left_out(made, tmp_path, capsys):
    root, _ = made
    shutil.copytree(root / "own" / FOLDERS[1], tmp_path / "s")
    clips = [json.loads(sample["json"]) for sample in samples(tmp_path / "s")]
    vectors = {c["id"]: {"text": torch.randn(len(c["captions"]), 4), "vision": torch.randn(1, 4)} for c in clips[1:]}
    vectors[clips[1]["id"]]["vision"][0, 0] = torch.nan
    vectors[clips[2]["id"]]["text"] = torch.randn(len(clips[2]["captions"]) + 1, 4)
    vectors[clips[3]["id"]] |= {"text": torch.zeros(len(clips[3]["captions"]), 4)}
    cfg = load(RunConfig, None, [f"data.train={tmp_path}/s", "model.clip=vectors:four"])
    vector_shards.run(cfg, [str(write(tmp_path / "v.npz", vectors))])
    assert (
        "4 clips left out (2 with vectors that are zero or not finite, 1 without vectors, 1 with another number of text "
        "vectors than of captions): " in capsys.readouterr().out
    )
    lines = [json.loads(line) for line in (tmp_path / "s/clip/corrupt-0.jsonl").read_text().splitlines()]
    assert [line["reason"].split()[0] for line in lines] == ["without", "with", "with", "with"]
    folder = open_folders(cfg.data.train, "data.train")
    loader = train_loader(load(RunConfig, None, [f"data.train={tmp_path}/s", "train.batch_size=16", f"run_dir={tmp_path}"]),
                          folder, [ShardFolder.open(f"{tmp_path}/s/clip")], torch.device("cpu"))  # fmt: skip
    batch = loader.batch(0)
    assert not set(batch.ids) & {clip["id"] for clip in clips[:4]} and batch.frame_vectors.shape[1] == 4
    assert batch.frame_clip.tolist() == batch.has_frames.nonzero()[:, 0].tolist()  # one vector a clip
    cfg.data.max_corrupt_fraction = 0.003
    with pytest.raises(
        UserError, match="4 of .* clips have no vectors to use .*, more than data.max_corrupt_fraction=0.003"
    ):
        vector_shards.run(cfg, [str(tmp_path / "v.npz")])
    assert not (tmp_path / "s/clip/index.json").exists()


def test_a_space_without_text_has_no_captions(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "own" / FOLDERS[1], tmp_path / "s")
    vectors = {json.loads(sample["json"])["id"]: {"vision": torch.randn(1, 4)} for sample in samples(tmp_path / "s")}
    cfg = load(RunConfig, None, [f"data.train={tmp_path}/s", "model.clip=vectors:four", "train.batch_size=4"])
    vector_shards.run(cfg, [str(write(tmp_path / "v.npz", vectors))])
    folders = open_folders(cfg.data.train, "data.train")
    identity = space_of(folders[0], "vectors:four")["space"]["identity"]
    with pytest.raises(UserError, match="loss.at=1: .* has no text vectors"):
        open_vectors(folders, cfg, "audio", lambda: identity)
    cfg.loss.at = 0
    opened = open_vectors(folders, cfg, "audio", lambda: identity)
    batch = train_loader(cfg, folders, opened, torch.device("cpu")).batch(0)
    assert not batch.has_text.any() and batch.has_frames.all() and not batch.text_vectors.any()


def test_another_space_is_refused(made):
    root, _ = made
    cfg = load(RunConfig, "configs/pretrain/sample.yaml", [*words(root, "files")[1:], "model.clip=vectors:tiny"])
    folders = open_folders(cfg.data.train, "data.train")
    with pytest.raises(UserError, match=r"vectors of other towers: .* \(vectors:tiny, max_tokens -\) there and 0000"):
        open_vectors(folders, cfg, "audio", lambda: "0" * 64)
    with pytest.raises(UserError, match="has vectors of vectors:tiny: name that"):
        space_of(folders[0], "vectors:other")
    with pytest.raises(UserError, match="model.audio_tower=vision: vectors:tiny has no vision tower to copy"):
        build_model(cfg, fingerprint_of(cfg, folders[0]), None)
    with pytest.raises(UserError, match="vectors:tiny: run data_prep/embed.py --from FILES first .no shards found in "):
        space_of(ShardFolder.open(str(root / "files" / FOLDERS[0] / "clip")), "vectors:tiny")
    for key, value in {"data.precomputed_embeddings": "off", "model.trainable_towers": "text+audio"}.items():
        other = load(
            RunConfig,
            "configs/pretrain/sample.yaml",
            [*words(root, "files")[1:], "model.clip=vectors:tiny", f"{key}={value}"],
        )
        with pytest.raises(UserError, match="model.clip=vectors:tiny: its vectors are needed, and cannot be used"):
            open_vectors(folders, other, other.model.trainable_towers, lambda: "")
    for head in ("local_local", "captioner"):
        with pytest.raises(UserError, match=f"model.head={head}: starts from a text tower"):
            Model(
                space_of(folders[0], "vectors:tiny"),
                ModelConfig(clip="vectors:tiny", head=head, audio_tower="ViT-S-32-alt"),
                SpectrogramConfig(),
            )  # fmt: skip
    with pytest.raises(UserError, match="--from: model.clip=x is computed here"):
        vector_shards.run(load(RunConfig, None, ["model.clip=x"]), ["y.npz"])
    with pytest.raises(UserError, match="its vectors are computed elsewhere"):
        embed_shards.run(cfg)
    with pytest.raises(UserError, match="eval.task=retrieval: vectors:tiny has no towers for it"):
        check_evaluation(load(RunConfig, None, ["model.clip=vectors:tiny", "eval.task=retrieval"]))


def test_several_ranks_are_refused(monkeypatch):
    """Each would write the same folders."""
    monkeypatch.setattr(embed_shards.collectives, "world_size", lambda: 2)
    cfg = load(RunConfig, None, ["model.clip=vectors:x"])
    with pytest.raises(UserError, match="^--from: 2 ranks would copy the same files: start one process"):
        vector_shards.run(cfg, ["text.npz"])
