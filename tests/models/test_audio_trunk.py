"""The audio tower of every family of vision transformers, against the vision towers of open_clip and timm themselves."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import TimmModel
from running import TINY
from safetensors.torch import load_file, save_file, save_model

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.models.audio_encoder import AudioEncoder, audio_reading, type_token_weights
from clip4vla.models.audio_trunk import build_tower, tower_config
from clip4vla.models.model import Model
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers.build import build_clip, freeze_first
from clip4vla.training.engine import parameter_groups

timm = import_for_open_clip("timm")  # which clip4vla.cli, in tests before, keeps out

SIZE, PATCH = 32, 8
SPECTROGRAM = SpectrogramConfig(segment_rows=SIZE, n_mels=SIZE, max_segments=3)
VIT = {"image_size": SIZE, "patch_size": PATCH}
CLIPA = VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
OPEN_CLIP = {"ViT": VIT, "CLIPA": CLIPA, "averaged": VIT | {"pool_type": "avg"}}
TIMM = {
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "EVA-02": ("eva02_base_patch16_clip_224", {}),
    "PE-Core": ("vit_pe_core_base_patch16_224", {}),
    "registers": ("vit_base_patch16_224", {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5, "global_pool": "avg"}),
    "rotary": ("vit_small_patch16_rope_224", {}),
}
FAMILIES = [*OPEN_CLIP, *TIMM]


def vision_tower(family):
    """A tiny tower of a family; what timm starts at 0, or nearly, is drawn too."""
    torch.manual_seed(FAMILIES.index(family))
    if family in OPEN_CLIP:
        return build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | OPEN_CLIP[family]}).visual.eval()
    name, changes = TIMM[family]
    tower = TimmModel("vit_tiny_patch16_224", 24, image_size=SIZE, pool="", proj="linear")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": PATCH, "num_classes": 0}
    tower.trunk, tower.head = timm.create_model(name, **sizes | changes), torch.nn.Linear(32, 24, bias=False)
    for parameter in tower.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


@pytest.fixture(params=FAMILIES)
def vision(request):
    return vision_tower(request.param)


def in_a_row(tower, vision, rows):
    """The vision tower itself, for pictures of `rows` rows, with the audio tower's positions: (B, C, rows, mels) -> (B, D)."""
    twin = copy.deepcopy(tower.trunk)
    if not isinstance(twin, TimmModel):
        twin.positional_embedding.data = twin.positional_embedding[: 1 + rows // PATCH * (SIZE // PATCH)]
        return twin
    vit, rope = twin.trunk, getattr(twin.trunk, "rope", None)
    if rope is not None:
        if rope.ref_feat_shape:
            high, wide = (
                vision.trunk.rope.ref_feat_shape
            )  # of a picture: a row of patches is as far from the next as there
            rope.ref_feat_shape = (high * rows / SIZE, wide)
        rope.update_feat_shape((rows // PATCH, SIZE // PATCH))
    if vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        vit.pos_embed.data = vit.pos_embed[:, : prefix + rows // PATCH * (SIZE // PATCH)]
    vit.patch_embed.strict_img_size, vit.patch_embed.img_size = False, (rows, SIZE)
    return twin


def test_a_picture_as_sound_gives_the_vision_towers_vector_where_the_type_token_is_hidden(vision, monkeypatch):
    tower, picture = AudioEncoder(vision, ModelConfig(), SPECTROGRAM).eval(), torch.randn(3, 3, SIZE, SIZE)
    wanted = vision(picture)
    torch.testing.assert_close(tower(picture, type_token_weights("none")), wanted, rtol=1e-5, atol=1e-5)
    assert (tower(picture, type_token_weights("both")) - wanted).abs().max() > 1e-3
    length = tower.vit.prefix().shape[0] + (SIZE // PATCH) ** 2
    attention, calls = F.scaled_dot_product_attention, []

    def hidden(q, k, v, attn_mask=None, *others, **named):
        if k.shape[2] == length + 2:
            attn_mask = torch.zeros(q.shape[2], length + 2)
            attn_mask[:, length:] = -torch.inf
            calls.append(q.shape)
        return attention(q, k, v, attn_mask, *others, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", hidden)
    torch.testing.assert_close(tower(picture, type_token_weights("both")), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # of both blocks; pooling is not over type tokens


@pytest.mark.parametrize("family", ["EVA-02", "rotary"])
def test_a_type_token_is_what_timm_makes_of_one_more_register(family):
    """Which it does not rotate either."""
    vision, picture = vision_tower(family), torch.randn(2, 3, SIZE, SIZE)
    vision.trunk.fc_norm, vision.trunk.global_pool = torch.nn.Identity(), "token"
    tower, twin = AudioEncoder(vision, ModelConfig(), SPECTROGRAM).eval(), copy.deepcopy(vision)
    token, rows = tower.type_embedding[:1], tower.vit.positions
    if rows is not None:
        token, rows = token + rows[-1], torch.cat([rows[:1], torch.zeros_like(rows[:1]), rows[1:-1]])
        twin.trunk.pos_embed = torch.nn.Parameter(rows[None])
    twin.trunk.reg_token, twin.trunk.num_prefix_tokens = torch.nn.Parameter(token[None]), 2
    for block in twin.trunk.blocks:
        block.attn.num_prefix_tokens = 2
    torch.testing.assert_close(tower(picture, type_token_weights("vb")), twin(picture), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_clip_is_one_sequence_of_its_valid_patches(vision, recompute):
    """Of 3 segments, of one and a half, of none: as the vision tower reads a picture as long; gradients are finite."""
    tower = AudioEncoder(vision, ModelConfig(audio_span="clip"), SPECTROGRAM).eval()
    tower.trunk.set_grad_checkpointing(recompute)
    view, counts, rows = torch.randn(5, 3, SIZE, SIZE), torch.tensor([3, 2, 0]), torch.tensor([SIZE] * 4 + [SIZE // 2])
    (vectors,) = tower.encode_clips([view], rows, counts, type_token_weights("none"))
    for clip, own in enumerate((view[:3], view[3:])):
        length = (3 * SIZE, SIZE + SIZE // 2)[clip]
        picture = own.transpose(0, 1).flatten(1, 2)[None, :, :length]
        torch.testing.assert_close(
            vectors[clip : clip + 1], in_a_row(tower, vision, length)(picture), rtol=1e-4, atol=1e-5
        )
    (typed,) = tower.encode_clips([view], rows, counts, type_token_weights("nb"))
    assert (typed[:2] - vectors[:2]).abs().amax(1).min() > 1e-3
    typed[:2].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    assert not missing and all(gradient.any() for name, gradient in gradients.items())


@pytest.mark.parametrize("family", [name for name in TIMM if name != "registers"])
def test_segments_of_another_size_have_timms_own_positions_of_it(family):
    vision, sound = vision_tower(family), dataclasses.replace(SPECTROGRAM, segment_rows=64, n_mels=24)
    tower, twin = AudioEncoder(vision, ModelConfig(), sound).eval(), copy.deepcopy(vision)
    twin.trunk.set_input_size((64, 24))
    picture = torch.randn(2, 3, 64, 24)
    torch.testing.assert_close(tower(picture, type_token_weights("none")), twin(picture), rtol=1e-5, atol=1e-5)
    assert vision.trunk.patch_embed.grid_size == (4, 4)  # as it was


def test_patches_of_its_own_the_mean_over_them_and_no_segments(vision):
    cfg = ModelConfig(audio_patch=[16, 4], audio_pool="mean")
    tower = AudioEncoder(vision, cfg, SPECTROGRAM, 7).eval()
    assert tower.vit.grid == (2, 8) and tower(torch.zeros(0, 1, SIZE, SIZE), torch.zeros(0, 1, 2)).shape == (0, 7)
    tower(torch.randn(2, 1, SIZE, SIZE), type_token_weights("both")).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("patch, size", [([], 36), ([3, 224], 32)])
def test_patches_that_do_not_fill_a_segment_are_refused(patch, size):
    sound = dataclasses.replace(SPECTROGRAM, n_mels=size)
    with pytest.raises(UserError, match=r"model.audio_patch=\[.*two numbers, of rows and mels, that divide"):
        AudioEncoder(vision_tower("ViT"), ModelConfig(audio_patch=patch), sound)


def test_first_blocks_freeze_and_positions_do_not_decay(vision):
    tower = AudioEncoder(vision, ModelConfig(), SPECTROGRAM)
    freeze_first(tower.trunk, 1, "audio")
    trained = {name.split("blocks.")[-1][:2] for name, p in tower.named_parameters() if p.requires_grad}
    assert "1." in trained and "0." not in trained
    assert not tower.vit.kernel.weight.requires_grad
    tower.requires_grad_(True)
    plain = [p for group in parameter_groups(tower, {}) if "weight_decay" in group for p in group["params"]]
    names = [name for name, p in tower.named_parameters() if any(p is other for other in plain)]
    kinds = ("pos_embed", "cls_token", "reg_token", "positional_embedding", "latent", "type_embedding")
    assert {name for name, p in tower.named_parameters() if name.endswith(kinds)} <= set(names)
    assert not any(name.endswith("proj.weight") for name in names)


def small_model(tmp_path, **settings):
    """A model whose audio tower is a file's: a ViT of 48 numbers in a space of 64."""
    vision = TINY["vision_cfg"] | {"width": 48, "head_width": 24, "image_size": 64, "patch_size": 16}
    (tmp_path / "ears.json").write_text(json.dumps(TINY | {"embed_dim": 40, "vision_cfg": vision}))
    cfg = ModelConfig(clip="t.json", audio_tower=str(tmp_path / "ears.json"), **settings)
    return Model(TINY, cfg, SPECTROGRAM)


def test_a_checkpoint_holds_the_audio_tower_of_its_own(tmp_path):
    model = small_model(tmp_path, audio_patch=[8, 8]).eval()
    assert model.audio.projection.weight.shape == (64, 40) and model.audio.trunk.output_dim == 40
    save_model(model, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    (tmp_path / "ears.json").unlink()
    again, segments = Model.from_checkpoint(tmp_path), torch.randn(2, 1, SIZE, SIZE)
    mix = type_token_weights("both")
    assert torch.equal(again.encode_segments(segments, mix), model.encode_segments(segments, mix))
    assert again.config() == model.config() and again.config()["audio"]["embed_dim"] == 40
    assert audio_reading(again.cfg, again.audio_config) == [model.audio_config]


@pytest.mark.parametrize("change", ["larger", "missing", "unasked"])
def test_a_checkpoint_of_an_audio_tower_it_does_not_hold_is_refused(tmp_path, change):
    model = small_model(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = model.config()
    if change == "larger":
        config["audio"]["vision_cfg"]["width"] = 96_000
    elif change == "missing":
        del config["audio"]
    else:
        config["model"]["audio_tower"] = "vision"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Model.from_checkpoint(tmp_path)


def test_a_file_of_weights_starts_the_audio_tower_where_audio_init_says_so(tmp_path):
    clip = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | {"head_width": 64}, "quick_gelu": False})
    file = tmp_path / "ears.safetensors"
    save_file({f"{k}": v.contiguous() for k, v in clip.state_dict().items()}, file)
    for start in ("vision", "scratch"):
        model = Model(TINY, ModelConfig(clip="t.json", audio_tower=str(file), audio_init=start), SpectrogramConfig())
        model.start_audio()
        same = torch.equal(model.audio.trunk.conv1.weight, load_file(file)["visual.conv1.weight"])
        assert same == (start == "vision")


def test_names_of_open_clip_and_timm_give_towers(monkeypatch):
    assert tower_config("vision", 64) is None
    assert tower_config("ViT-S-16", 64)["vision_cfg"]["width"] == 384
    small = tower_config("vit_small_patch16_224.tag", 1152)
    with torch.device("meta"):
        tower = build_tower(small)
    assert tower.trunk.embed_dim == 384 and tower.head.proj.weight.shape == (1152, 384)
    with pytest.raises(UserError, match="model.audio_tower=vit_smal: neither vision, nor .*nearest: "):
        tower_config("vit_smal", 64)

    def fetch(name, **others):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fetch)
    with pytest.raises(UserError, match="model.audio_tower=vit_tiny.x: cannot get these weights"):
        from clip4vla.models.audio_trunk import _timm_weights

        _timm_weights("vit_tiny.x")


@pytest.mark.parametrize(
    "vision, kind",
    [
        ({"layers": [1, 1, 1, 1], "width": 16}, "ModifiedResNet"),
        ({"timm_model_name": "test_convnext"}, "ConvNeXt"),
        ({"timm_model_name": "vit_base_mci_224"}, "HybridEmbed"),
    ],
)
def test_vision_towers_without_patches_are_no_audio_towers(vision, kind):
    tower = build_clip(TINY | {"vision_cfg": {"image_size": 64} | vision}).visual
    with pytest.raises(UserError, match=f"model.audio_tower=vision: with a {kind} it is no plain ViT.*name one"):
        AudioEncoder(tower)


def test_pooling_that_cannot_leave_out_padding_reads_segments_alone():
    pooling = VIT | {"attentional_pool": True, "attn_pooler_heads": 2}
    tower = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | pooling}).visual
    with pytest.raises(UserError, match="model.audio_span=clip: needs an audio tower whose attention and pooling"):
        AudioEncoder(tower, ModelConfig(audio_span="clip"), SPECTROGRAM)
    with pytest.raises(UserError, match="model.audio_pool=mean: the attention pooling of this audio tower"):
        AudioEncoder(tower, ModelConfig(audio_pool="mean"), SPECTROGRAM)


@pytest.mark.parametrize("name", ["vit_small_patch16_384", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_256"])
def test_a_vit_of_any_picture_size_can_be_the_audio_tower(name):
    with torch.device("meta"):
        assert build_tower(tower_config(name, 64)).image_size[0] == timm.get_pretrained_cfg(name).input_size[-1]
