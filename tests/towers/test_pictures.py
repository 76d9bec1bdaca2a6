"""Pictures of each family of CLIPs against open_clip's own preprocess: arrays, files, and shards resized by DALI.

Errors are of pixels in 0..1: the bounds are a little more than the worst family that was measured (pytest -s prints each).
"""

import dataclasses
import io
import json

import numpy as np
import open_clip
import pytest
import torch
from loading import loader
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clip4vla.config import DataConfig, FramesConfig, SpectrogramConfig
from clip4vla.data import preprocessing
from clip4vla.data.dali_decoder import Decoder
from clip4vla.data.shards import fingerprint
from clip4vla.media.images import Fit, fitted, jpeg, resized, stored
from clip4vla.towers.pictures import Pictures, pictures_of

FAMILIES = (
    "ViT-B-32-quickgelu/openai", "ViT-L-14-336/openai", "ViT-B-16-SigLIP/webli", "ViT-B-16-SigLIP2-256/webli",
    "ViT-B-16-SigLIP2-384/webli", "MobileCLIP2-S2/dfndr2b", "MobileCLIP-B/datacompdr", "ViT-L-14-CLIPA-336/datacomp1b",
    "PE-Core-B-16/meta", "PE-Core-S-16-384/meta", "EVA02-L-14-336/merged2b_s6b_b61k",
)  # fmt: skip
# largest and mean error of a shard's frame, resized by DALI, beside open_clip's resize of the very same frame
DALI_MAX, DALI_MEAN = 3.5 / 255, 0.3 / 255
# of frames of a shard beside the original at the size of the CLIP: JPEG 90 and two resizes
WHOLE_MAX, WHOLE_MEAN = 0.6, 0.025


def photo(width=500, height=330, seed=0):
    """A picture with edges, gradients and a little noise, (height, width, 3) uint8."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / a + y / b) for a, b in ((17, 40), (9, -23), (60, 11))]
    picture = np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
    picture[80:200, 90:260] = (220, 40, 60)
    return picture.clip(0, 255).astype(np.uint8)


def preprocess(clip):
    """open_clip's own: (Pictures of ours, its transform)."""
    name, _, tag = clip.partition("/")
    config, listed = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    names = {field.name for field in dataclasses.fields(PreprocessCfg)}
    cfg = {key: value for key, value in listed.items() if key in names} | {"size": config["vision_cfg"]["image_size"]}
    return pictures_of(clip, config), image_transform_v2(PreprocessCfg(**cfg), is_train=False)


def normalised(frames, pictures):
    """(F, 3, H, W) uint8 as Model.encode_frames gives it to the tower."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pictures.mean, pictures.std))
    return (frames / 255 - mean) / std, std


@pytest.mark.parametrize("clip", FAMILIES)
@pytest.mark.parametrize("size", [(500, 330), (211, 400), (260, 260)])
def test_frames_are_what_open_clip_makes_of_them(clip, size):
    pictures, theirs = preprocess(clip)
    picture = photo(*size)
    ours, std = normalised(preprocessing.of_frames(picture[None], pictures).frames, pictures)
    error = (ours[0] - theirs(Image.fromarray(picture))).abs() * std
    assert error.max() < 1e-6


@pytest.mark.parametrize("clip", FAMILIES)
def test_still_files_are_what_open_clip_makes_of_them(clip, tmp_path):
    pictures, theirs = preprocess(clip)
    size = (300, 300) if pictures.resize_mode == "shortest" else (500, 330)  # shortest would cut a still's sides off
    Image.fromarray(photo(*size)).save(tmp_path / "a.png")
    read = preprocessing.read(tmp_path / "a.png", SpectrogramConfig(), FramesConfig(), "v", fit=pictures)
    ours, std = normalised(read.frames, pictures)
    assert ((ours[0] - theirs(Image.open(tmp_path / "a.png"))).abs() * std).max() < 1e-6


@pytest.mark.parametrize("clip", FAMILIES)
def test_frames_of_shards_are_resized_as_open_clip_would(clip):
    pictures, theirs = preprocess(clip)
    originals = [Image.fromarray(photo(500, 330, seed)) for seed in range(2)]
    kept = Fit((224, 224), resize_mode=pictures.resize_mode)
    frames = [resized(picture, kept) for picture in originals]
    strip = jpeg(np.concatenate(frames), 90)
    decoded = np.asarray(Image.open(io.BytesIO(strip))).reshape(2, 224, 224, 3)
    fit = None if pictures.size == kept.size else pictures
    decoder = Decoder(1, 3, 1, torch.device("cpu"), 224, fit)
    strips, out = decoder.run([strip])
    assert strips.shape() == [(448, 224, 3)]
    made = decoder.joined(out).view(-1, *pictures.size, 3).permute(0, 3, 1, 2)
    ours, std = normalised(made, pictures)
    errors = [[], []]
    for i, original in enumerate(originals):
        for of, picture in enumerate((Image.fromarray(decoded[i]), original)):
            errors[of].append((ours[i] - theirs(picture)).abs() * std)
    resize, whole = (torch.stack(x) for x in errors)
    print(f"{clip}: resize {resize.max():.4f} {resize.mean():.5f} whole {whole.max():.4f} {whole.mean():.5f}")
    assert resize.max() < DALI_MAX and resize.mean() < DALI_MEAN
    assert whole.max() < WHOLE_MAX and whole.mean() < WHOLE_MEAN


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(160, 288), (288, 160)])
def test_sizes_that_are_no_squares(mode, size):
    pictures = Pictures(size, resize_mode=mode)
    theirs = image_transform_v2(PreprocessCfg(size=size, resize_mode=mode), is_train=False)
    frame = photo(224, 224)
    want = theirs(Image.fromarray(frame))
    ours, std = normalised(preprocessing.of_frames(frame[None], pictures).frames, pictures)
    assert ((ours[0] - want).abs() * std).max() < 1e-6
    strip = io.BytesIO()
    Image.fromarray(frame).save(strip, "PNG")
    decoder = Decoder(1, 3, 1, torch.device("cpu"), 224, pictures)
    made = decoder.joined(decoder.run([strip.getvalue()])[1]).permute(0, 3, 1, 2)
    assert made.shape == (1, 3, *size)
    assert ((normalised(made, pictures)[0][0] - want).abs() * std).max() < DALI_MAX


def test_frames_of_one_strip_do_not_mix():
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    strip = io.BytesIO()
    Image.fromarray(np.concatenate([black, white]).reshape(128, 64, 3)).save(strip, "PNG")
    decoder = Decoder(1, 3, 1, torch.device("cpu"), 64, Pictures((96, 96)))
    made = decoder.joined(decoder.run([strip.getvalue()])[1])
    assert not made[0].any() and bool((made[1] == 255).all())


def test_a_config_that_says_its_own_pictures():
    own = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "longest"}
    config = {"vision_cfg": {"image_size": [160, 288]}, "preprocess_cfg": own}
    want = Pictures((160, 288), "bilinear", "longest", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert pictures_of("local-dir:anywhere", config) == want


def test_identities_from_before_there_was_a_choice_stay():
    own = {key: open_clip.get_pretrained_cfg("ViT-B-32", "openai")[key] for key in ("mean", "std")}
    for clip in ("ViT-B-32-quickgelu/openai", "ViT-B-16", "weights.pt", "x.json", "ViT-H-14-quickgelu/dfn5b"):
        assert pictures_of(clip, {"vision_cfg": {}}).identity() == [own["mean"], own["std"]]
    siglip, mobile = ("ViT-B-16-SigLIP/webli", "MobileCLIP-B/datacompdr")
    assert pictures_of(siglip, {"vision_cfg": {}}).identity() == [(0.5,) * 3, (0.5,) * 3]
    assert pictures_of(mobile, {"vision_cfg": {}}).identity()[1] == {"interpolation": "bilinear"}


def test_fingerprints_of_shards_name_a_resize_mode_only_where_it_is_chosen():
    default, squash = DataConfig(), DataConfig(frames=FramesConfig(resize_mode="squash"))
    assert set(fingerprint(default)["frames"]) == {"size", "fps", "max_frames", "quality"}
    assert json.dumps(fingerprint(squash)["frames"]).count("squash") == 1
    assert stored(squash.frames) == Fit((224, 224), resize_mode="squash")


def test_a_still_is_squashed_where_shards_are():
    wide = Image.fromarray(photo(448, 224))
    squashed = fitted(wide, Fit((224, 224), resize_mode="squash"))
    assert np.array_equal(squashed, np.asarray(wide.resize((224, 224), Image.Resampling.BICUBIC)))


def test_a_dry_run_says_how_frames_come_to_the_tower():
    assert Pictures((384, 384)).resizing(224, "shortest") == "frames resized 224 -> 384 by DALI, bicubic"
    assert Pictures((224, 224)).resizing(224, "shortest") == "frames of 224, as stored"
    assert Pictures((256, 256), "bilinear", "squash").resizing(224, "shortest") == (
        "frames resized 224 -> 256 by DALI, bilinear; stored as shortest, this CLIP wants squash; "
        "set frames.resize_mode=squash in data_prep/shard.py"
    )


def test_frames_are_resized_for_a_tower_of_another_size_in_the_same_order(sample_shards):
    plain, large = loader(sample_shards), loader(sample_shards)
    large.fit = Pictures((256, 256), "bilinear", "squash")
    batches = list(large.batches(0, 2))
    for k, large_batch in enumerate(batches):
        stored, alone = plain.batch(k), large.batch(k)  # alone: as after a resume
        assert large_batch.ids == stored.ids and torch.equal(large_batch.frame_clip, stored.frame_clip)
        assert torch.equal(large_batch.segments, stored.segments) and torch.equal(large_batch.frames, alone.frames)
        want = preprocessing.of_frames(stored.frames.permute(0, 2, 3, 1).numpy(), large.fit).frames
        assert len(want) and (large_batch.frames.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "PE-Core-B-16", "MobileCLIP2-S2", "ViT-B-32"])
def test_a_file_for_an_architecture_has_the_pictures_that_all_its_tags_share(name):
    config, tag = open_clip.get_model_config(name), open_clip.list_pretrained_tags_by_model(name)[0]
    wanted = pictures_of(f"{name}/{tag}", config)
    assert pictures_of(f"{name}/weights.safetensors", config) == pictures_of(name, config) == wanted
