"""The audio tower: patches of any size, whole clips as one sequence, against vision towers and sequences made by hand."""

import pytest
import torch
import torch.nn.functional as F
from running import TINY

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.models.audio_encoder import AudioEncoder, type_token_weights
from clip4vla.models.audio_trunk import resized_kernel
from clip4vla.towers.build import build_clip

SPECTROGRAM = SpectrogramConfig(max_segments=3)
OWNER = torch.tensor([0, 0, 0, 1, 3, 3])  # clip 2 has no sound
ROWS = torch.tensor([224, 224, 9, 100, 224, 224])
CLIPS = 4
COUNTS = OWNER.bincount(minlength=CLIPS)


@pytest.fixture(scope="module")
def vision():
    torch.manual_seed(0)
    return build_clip(TINY).visual.eval()


@pytest.mark.parametrize("patch", [(4, 224), (16, 16), (32, 32), (64, 7), (1, 224)])
def test_a_resized_kernel_gives_a_patch_what_the_old_one_gives_the_resized_patch(patch):
    kernel, pixels = torch.randn(5, 3, 32, 32), torch.randn(2, 3, *patch)
    wanted = F.conv2d(F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True), kernel)
    torch.testing.assert_close(F.conv2d(pixels, resized_kernel(kernel, patch)), wanted, rtol=1e-4, atol=1e-4)


def test_patches_of_the_vision_towers_size_change_nothing(vision):
    tower = AudioEncoder(vision, ModelConfig(audio_patch=[32, 32]))
    segments = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(tower(segments, type_token_weights("none")), vision(segments))


def test_small_patches_start_with_the_vision_towers_positions_between(vision):
    tower = AudioEncoder(vision, ModelConfig(audio_patch=[16, 16]))
    places = tower.trunk.positional_embedding[1:-1].view(14, 14, -1)
    wanted = vision.positional_embedding[1:].view(7, 7, -1)
    near = F.cosine_similarity(places[1::2, 1::2], wanted, dim=-1)
    assert near.mean() > 0.8 and (F.cosine_similarity(places[1::2, 1::2], wanted.roll(1, 0), dim=-1) < near).all()


@pytest.mark.parametrize("patch", [[3, 224], [4, 100], [4], [0, 224], [4, 4, 4]])
def test_patches_that_do_not_fill_a_segment_are_refused(vision, patch):
    with pytest.raises(UserError, match=r"model.audio_patch=\[.*two numbers, of rows and mels, that divide"):
        AudioEncoder(vision, ModelConfig(audio_patch=patch))


def clip_tower(vision, patch, pool="tower"):
    torch.manual_seed(1)
    cfg = ModelConfig(audio_patch=patch, audio_span="clip", audio_pool=pool)
    return AudioEncoder(vision, cfg, SPECTROGRAM).eval()


def by_hand(tower, view, clip, mix):
    """The clip's valid patches, one after the other, through open_clip's own transformer, alone."""
    trunk, (height, width) = tower.trunk, tower.trunk.conv1.kernel_size
    position, tokens = trunk.positional_embedding, [trunk.class_embedding + trunk.positional_embedding[0]]
    own, number = (OWNER == clip).nonzero()[:, 0].tolist(), 0
    for segment in own:
        for top in range(0, 224, height):
            for left in range(0, 224, width):
                number += 1
                if top < ROWS[segment]:
                    patch = view[segment, :, top : top + height, left : left + width]
                    tokens.append((trunk.conv1.weight * patch).sum((1, 2, 3)) + position[number])
    tokens += [weights @ tower.type_embedding + position[-1] for weights in mix]
    x = trunk.ln_post(trunk.transformer(trunk.ln_pre(torch.stack(tokens)[None])))[0]
    return (x[1 : len(tokens) - len(mix)].mean(0) if tower.mean_pool else x[0]) @ trunk.proj


@pytest.mark.parametrize("patch", [[], [16, 224], [16, 56]])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pool", ["tower", "mean"])
def test_a_clip_is_one_sequence_of_its_valid_patches(vision, patch, recompute, pool):
    tower = clip_tower(vision, patch, pool)
    tower.trunk.transformer.grad_checkpointing = recompute
    views = [torch.randn(6, 3, 224, 224, requires_grad=True) for _ in range(2)]
    mix = torch.rand(CLIPS, 1, 2)
    vectors = tower.encode_clips(views, ROWS, COUNTS, mix)
    for view, found in zip(views, vectors, strict=True):
        for clip in (0, 1, 3):
            torch.testing.assert_close(found[clip], by_hand(tower, view, clip, mix[clip]), rtol=1e-4, atol=1e-4)
    sum(found[[0, 1, 3]].square().sum() for found in vectors).backward()
    for view in views:
        changed = view.grad.abs().amax((1, 3)) > 0  # S 224: rows that matter
        for segment, rows in enumerate(ROWS.tolist()):
            patches = -(-rows // tower.trunk.conv1.kernel_size[0]) * tower.trunk.conv1.kernel_size[0]
            assert changed[segment, :rows].all() and not changed[segment, patches:].any()


def test_padding_segments_belong_to_no_clip(vision):
    tower, mix = clip_tower(vision, [16, 224]), torch.rand(CLIPS, 1, 2)
    view = torch.randn(6, 1, 224, 224)
    (wanted,) = tower.encode_clips([view], ROWS, COUNTS, mix)
    padded = F.pad(view, (0, 0, 0, 0, 0, 0, 0, 2))
    (found,) = tower.encode_clips([padded], F.pad(ROWS, (0, 2)), COUNTS, mix)
    torch.testing.assert_close(found, wanted)


def test_the_mean_of_a_segments_patches_is_its_vector(vision):
    """Of a vision tower that averages its patches, the same."""
    torch.manual_seed(2)
    averaging = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | {"pool_type": "avg"}}).visual.eval()
    segments = torch.randn(2, 3, 224, 224)
    tower = AudioEncoder(averaging, ModelConfig(audio_pool="mean")).eval()
    wanted = averaging(segments) if not averaging.final_ln_after_pool else None
    torch.testing.assert_close(tower(segments, type_token_weights("none")), wanted)
