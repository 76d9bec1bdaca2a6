"""Every model of open_clip as text and vision towers: shapes and gradients of all, values of each family against open_clip's."""

import json
import subprocess
import sys

import hf_models
import open_clip
import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP
from running import ONE_HEAD, TINY
from safetensors.torch import save_file

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.export.model_card import _model as card
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import towers_sha256
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers.build import build_clip, freeze_first, hold_still
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.text import HFText, encode_text, token_mask
from clip4vla.towers.tokenizer import _made, tokenizer
from clip4vla.towers.vision import encode_images
from clip4vla.towers.weights import check_size_claims, load_clip_weights

timm = import_for_open_clip("timm")  # which clip4vla.cli, in tests before, keeps out
transformers = import_for_open_clip("transformers")  # which clip4vla.cli, in tests before, keeps out

SMALL_TEXT = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 600}
OPENAI_TEXT = SMALL_TEXT | {"vocab_size": 49408}
FAMILIES = {  # its towers at another depth and width
    "ViT-B-16-SigLIP": SMALL_TEXT,
    "ViT-B-16-SigLIP2": SMALL_TEXT,
    "EVA02-B-16": OPENAI_TEXT,
    "PE-Core-T-16-384": OPENAI_TEXT,
    "MobileCLIP2-S0": OPENAI_TEXT,
    "convnext_tiny": OPENAI_TEXT,
    "swin_base_patch4_window7_224": OPENAI_TEXT,
    "ViTamin-S": OPENAI_TEXT,
    "RN50-quickgelu": OPENAI_TEXT,
    "coca_ViT-B-32": OPENAI_TEXT,
    "ViT-L-14-CLIPA": SMALL_TEXT,
    "ViT-H-14-worldwide": SMALL_TEXT,
    "ViT-L-14-worldwide": SMALL_TEXT,
    "roberta-ViT-B-32": {},
    "coca_roberta-ViT-B-32": {},
    "xlm-roberta-base-ViT-B-32": {},
    "mt5-base-ViT-B-32": {},
    "nllb-clip-base": {},
}
TEXTS = ["a crow", "two dogs that play and a crow that looks at the red fire engine", "the red fire engine sits"]


@pytest.fixture
def hub(monkeypatch):
    """Models of transformers as they are published, and timm's with one block, or one of each stage."""
    yield hf_models.published(monkeypatch)
    _made.cache_clear()


def shallow(name, text=None):
    """The configuration of a model with one block a tower; text: of its text tower."""
    config = resolve_clip_config(name)
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = [1] * 4 if isinstance(config["vision_cfg"]["layers"], list) else 1
    config["text_cfg"] |= {"layers": 1} if text is None else text
    return config


def test_all_models_give_vectors_words_and_gradients(hub):
    """On torch's meta device, at a depth of one block. open_clip 4 has more, of which those of other kinds are refused."""
    refused = []
    for name in open_clip.list_models():
        try:
            config = shallow(name)
            with torch.device("meta"):
                towers = build_clip(config)
        except UserError as error:
            refused.append(str(error))
            continue
        with torch.device("meta"):
            vectors = encode_images(towers.visual, torch.zeros(2, 3, *towers.visual.image_size))
            tokens = torch.zeros(3, towers.text.context_length, dtype=torch.int64)
            sentence, words = encode_text(towers.text, tokens)
        dim = config["embed_dim"]
        assert (vectors.shape, sentence.shape, words.shape) == ((2, dim), (3, dim), (*tokens.shape, dim)), name
        assert token_mask(towers.text, tokens).shape == tokens.shape
        (vectors.sum() + sentence.sum()).backward()
        assert [key for key, p in towers.named_parameters() if p.grad is None] == ["logit_scale"], name
    assert len(open_clip.list_models()) - len(refused) >= 144 and not any("\n" in line for line in refused)


def test_a_model_of_another_kind_is_refused_in_one_line(monkeypatch):
    """As open_clip 4 has them: without pictures, or with a text tower that is no TextTransformer."""
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: {key: TINY[key] for key in ("embed_dim", "text_cfg")}
    )
    with pytest.raises(UserError, match="has no vision_cfg: a CLIP of texts and pictures is required"):
        resolve_clip_config("CLAP-x")

    class Modern(torch.nn.Module):
        context_length, vocab_size = 8, 600

    monkeypatch.setattr("open_clip.model._build_text_tower", lambda *_, **__: Modern())
    with pytest.raises(UserError, match="makes a Modern: a TextTransformer"):
        build_clip(TINY)


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_open_clip(hub, name):
    """Of captions at the length of the training, and cut to 8 tokens; and words are what is no padding."""
    hub["small"] = True
    torch.manual_seed(0)
    config = shallow(name, FAMILIES[name])
    ours = build_clip(config).eval()
    kind = CoCa if name.startswith("coca_ViT") else CustomTextCLIP
    more = {"multimodal_cfg": SMALL_TEXT | {"context_length": 76}} if kind is CoCa else {}
    config["text_cfg"] |= {"hf_model_pretrained": False, "output_tokens": kind is CoCa}
    config["vision_cfg"] |= {"output_tokens": kind is CoCa}
    theirs = kind(**config | more).eval()
    given = ours.state_dict()
    theirs.load_state_dict(given | {k: v for k, v in theirs.state_dict().items() if k.startswith("text_decoder")})
    whole = {} if kind is CustomTextCLIP else {"normalize": False}
    with torch.no_grad():
        pictures = torch.randn(2, 3, *ours.visual.image_size)
        torch.testing.assert_close(
            encode_images(ours.visual, pictures), theirs.encode_image(pictures, **whole), atol=1e-5, rtol=1e-5
        )
        room = config["text_cfg"].get("context_length", 77)
        for most in (room, 8):
            tokens = open_clip.get_tokenizer(name, context_length=most)(TEXTS)
            full = F.pad(tokens, (0, room - most), value=int(tokens[0, -1]))
            own = tokenizer(name, most)(TEXTS)
            sentence, words = encode_text(ours.text, own)
            torch.testing.assert_close(sentence, theirs.encode_text(full, **whole), atol=1e-5, rtol=1e-5)
            special = 1 if "mt5" in name or "SigLIP" in name or name == "ViT-L-14-worldwide" else 2
            special -= "CLIPA" in name  # its [SEP] is stripped
            counted = token_mask(ours.text, own).sum(1).tolist()
            assert counted[0] == 2 + special and counted[1] == min(most - ("CLIPA" in name), 14 + special)
            assert len(words[0]) == own.shape[1]


def test_words_of_a_tower_of_transformers_are_its_projected_outputs(hub):
    hub["small"] = True
    text = build_clip(shallow("xlm-roberta-base-ViT-B-32", {})).text.eval()
    tokens = tokenizer("xlm-roberta-base-ViT-B-32", 9)(TEXTS)
    sentence, words = encode_text(text, tokens)
    assert isinstance(text, HFText)
    outputs = text.transformer(input_ids=tokens, attention_mask=(tokens != 1).long()).last_hidden_state
    torch.testing.assert_close(words, text.proj(outputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head", ["local_local", "global_local", "captioner"])
def test_heads_on_a_tower_of_transformers(hub, head):
    """local_local reads its words; the captioner, which needs a causal one, is refused in one line."""
    hub["small"] = True
    config = shallow("xlm-roberta-base-ViT-B-32", {}) | {"vision_cfg": TINY["vision_cfg"]}
    cfg = ModelConfig(clip="xlm-roberta-base-ViT-B-32", head=head, max_tokens=9)
    if head == "captioner":
        with pytest.raises(UserError, match="captioner: needs a CLIP whose text tower is causal"):
            Model(config, cfg, SpectrogramConfig())
        return
    model = Model(config, cfg, SpectrogramConfig())
    model.freeze()
    model.train()
    assert not model.text.training and model.head.training  # frozen: no dropout, so its vectors are embed.py's
    read = [*model.encode_texts_chunked(TEXTS, tokenizer(cfg.clip, 9))]
    again = [*model.encode_texts_chunked(TEXTS, tokenizer(cfg.clip, 9))]
    assert torch.equal(read[0][0], again[0][0]) and read[0][1].lengths.tolist() == [4, 9, 7]


def test_a_model_folder_names_its_towers(hub, tmp_path):
    """It comes back as it is; embeddings of another tower with the same weights are not its own; claims are checked."""
    hub["small"] = True
    config = shallow("xlm-roberta-base-ViT-B-32", {}) | {"vision_cfg": TINY["vision_cfg"]}
    model = Model(config, ModelConfig(clip="xlm-roberta-base-ViT-B-32", max_tokens=9), SpectrogramConfig()).eval()
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    back = Model.from_checkpoint(tmp_path)
    tokens = tokenizer("x.json", 9, back.clip_config)(TEXTS)
    assert torch.equal(back.encode_tokens(tokens)[0], model.encode_tokens(tokens)[0])
    assert "xlm-roberta-base" in card(back) and towers_sha256(back) == towers_sha256(model)
    back.clip_config["text_cfg"]["hf_model_name"] = "roberta-base"
    assert towers_sha256(back) != towers_sha256(model)
    for words in ("not a readable checkpoint", "'them/theirs': a model of transformers"):
        name = "facebook/nllb-200-distilled-600M" if words.startswith("not") else "them/theirs"
        (tmp_path / "config.json").write_text(json.dumps(model.config()).replace('"xlm-roberta-base"', f'"{name}"'))
        with pytest.raises(UserError, match=words):
            Model.from_checkpoint(tmp_path)


def test_a_command_imports_timm_and_transformers_where_a_tower_of_theirs_is_built():
    code = """
import sys, clip4vla.cli, open_clip, torch
from clip4vla.towers.build import build_clip
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers.config import resolve_clip_config
torch.set_default_device("meta")
plain = resolve_clip_config("ViT-B-32")
build_clip(plain)
assert not sys.modules["timm"] and not sys.modules["transformers"]
towers = build_clip(plain | {"vision_cfg": resolve_clip_config("convnext_tiny")["vision_cfg"]})
assert towers.visual.trunk.num_features == 768 and not sys.modules["transformers"]
transformers = import_for_open_clip("transformers")
assert open_clip.model.HFTextEncoder.__init__.__globals__["AutoConfig"] is transformers.AutoConfig
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_words_of_a_tower_that_reads_padding_are_cut_to_max_tokens(hub):
    config = shallow("ViT-B-16-SigLIP", SMALL_TEXT) | {"vision_cfg": TINY["vision_cfg"], "embed_dim": 64}
    model = Model(config, ModelConfig(clip="ViT-B-16-SigLIP", head="local_local", max_tokens=8), SpectrogramConfig())
    ((_, words),) = model.encode_texts_chunked(TEXTS, tokenizer("ViT-B-16-SigLIP", 8))
    assert words.vectors.shape == (3, 8, 64) and words.lengths.tolist() == [3, 8, 6]


def test_statistics_of_batch_norms_stay_in_training():
    tower = build_clip(
        ONE_HEAD | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64}}
    ).visual.train()
    hold_still(tower)
    before = {name: value.clone() for name, value in tower.named_buffers()}
    tower(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers()) and len(before) > 10


@pytest.mark.parametrize("name, frozen, free", [
    ("ViT-B-16-SigLIP", "trunk.blocks.0.norm1.weight", "trunk.attn_pool.latent"),
    ("EVA02-B-16", "trunk.cls_token", "head"),
    ("convnext_tiny", "trunk.stages.0.blocks.0.norm.weight", "trunk.stages.1.blocks.0.norm.weight"),
])  # fmt: skip
def test_first_blocks_of_timms_towers_freeze(hub, name, frozen, free):
    with torch.device("meta"):
        tower = build_clip(shallow(name)).visual
    freeze_first(tower, 1, "vision")
    trains = {key: p.requires_grad for key, p in tower.named_parameters()}
    assert not trains[frozen] and all(on for key, on in trains.items() if key.startswith(free))
    assert not any(on for key, on in trains.items() if "stem" in key or "patch_embed" in key)


def test_first_blocks_of_a_resnet_cannot_be_frozen():
    tower = build_clip(ONE_HEAD | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64}}).visual
    with pytest.raises(UserError, match="has no list of blocks"):
        freeze_first(tower, 1, "vision")


@pytest.fixture
def siglip(hub, tmp_path, monkeypatch):
    """A folder as open_clip writes it, of a small SigLIP; and its weights."""
    config = shallow("ViT-B-16-SigLIP", SMALL_TEXT)
    state = build_clip(config).state_dict() | {"logit_bias": torch.zeros([])}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return tmp_path, config, state


@pytest.mark.parametrize(
    "how", ["local-dir:{}", "local-dir:folder", "{}/open_clip_model.safetensors", "hf-hub:timm/x", "ViT-tiny/{}/w.pth"]
)
def test_weights_are_named_in_these_ways(siglip, monkeypatch, how):
    folder, config, state = siglip
    monkeypatch.setattr(
        open_clip.pretrained, "download_pretrained_from_hf",
        lambda clip, filename=None: str(folder / (filename or "open_clip_model.safetensors")),
    )  # fmt: skip
    if how.startswith("ViT-tiny"):
        torch.save(state, folder / "w.pth")
        monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-tiny"])
        monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(config)))
    (folder / "folder").symlink_to(folder)
    monkeypatch.chdir(folder)
    clip = how.format(folder)
    assert resolve_clip_config(clip) | {"preprocess_cfg": {}} == config | {"preprocess_cfg": {}}
    with torch.device("meta"):
        towers = build_clip(resolve_clip_config(clip))
    assert load_clip_weights(towers, clip)
    assert all(torch.equal(value, state[key]) for key, value in towers.state_dict().items() if key != "logit_scale")


@pytest.mark.parametrize("part, names, words", [
    ("vision_cfg", {"timm_model_name": "hf-hub:them/theirs"}, "no architecture of timm"),
    ("vision_cfg", {"timm_model_name": "local-dir:/etc"}, "no architecture of timm"),
    ("text_cfg", {"hf_model_name": "them/theirs"}, "'them/theirs': a model of transformers"),
    ("text_cfg", {"hf_tokenizer_name": "them/theirs"}, "'them/theirs': a tokenizer"),
    ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs has 'trust_remote_code'"),
])  # fmt: skip
def test_a_configuration_in_a_file_names_nothing_to_fetch_or_run(monkeypatch, tmp_path, part, names, words):
    fetched = []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda *given, **_: fetched.append(given))
    config = TINY | {part: TINY[part] | names}
    with pytest.raises(UserError, match=words) as caught:
        build_clip(config)
        tokenizer("x.json", 8, config)
    assert "\n" not in str(caught.value) and not fetched


def test_a_model_that_is_not_there_is_one_line(monkeypatch):
    def offline(name, **_):
        raise OSError("We couldn't connect\nto the hub")

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", offline)
    for call in (lambda c: build_clip(c), lambda c: tokenizer("xlm-roberta-base-ViT-B-32", 8)):
        with pytest.raises(UserError, match="hf download xlm-roberta-base") as caught:
            call(resolve_clip_config("xlm-roberta-base-ViT-B-32"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("claim", [
    {"vision_cfg": {"layers": [1, 10**9, 1, 1], "width": 32}},
    {"vision_cfg": {"timm_model_name": "vit_giantopt_patch16_siglip_256", "image_size": 256}},
    {"text_cfg": {"layers": 1, "width": 1, "heads": 1, "context_length": 10**5, "vocab_size": 10}},
])  # fmt: skip
def test_towers_of_any_kind_may_not_claim_more_than_the_weights(hub, claim):
    state = build_clip(ONE_HEAD).state_dict()
    check_size_claims(ONE_HEAD, state)
    with pytest.raises(ValueError, match="the file"):
        check_size_claims(ONE_HEAD | claim, state)


def test_a_tower_of_one_picture_size_is_refused_with_another():
    vision = {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 64, "timm_proj": "linear"}
    with (
        torch.device("meta"),
        pytest.raises(UserError, match="has image_size=64: 224 is required by its timm_model_name"),
    ):
        build_clip({"embed_dim": 64, "vision_cfg": vision, "text_cfg": SMALL_TEXT})


def test_a_frozen_tower_of_open_clips_own_drops_no_patches_in_training():
    vision = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | {"patch_dropout": 0.5}}).visual.requires_grad_(False)
    hold_still(vision.train())
    pictures = torch.randn(1, 3, 224, 224)
    assert torch.equal(encode_images(vision, pictures), encode_images(vision, pictures))
