"""Towers, audio encoder and model: what must hold by construction (the authors' values: tests/export/test_official.py)."""

import json
import random
import time
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from open_clip.model import CustomTextCLIP
from running import ONE_HEAD, TINY
from safetensors.torch import save_file, save_model

from clip4vla.config import FramesConfig, ModelConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import to_dict
from clip4vla.errors import UserError
from clip4vla.models.audio_encoder import AudioEncoder, type_token_weights
from clip4vla.models.model import Model, pool
from clip4vla.towers.build import LeanQuickGELU, Undrawn, build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.pictures import pictures_of
from clip4vla.towers.text import encode_text
from clip4vla.towers.tokenizer import get_tokenizer, tokenizer
from clip4vla.towers.vision import embed_patches, encode_images, pools_first
from clip4vla.training.run_setup import build_model

TOWERS = ("text", "vision", "audio")


def test_audio_tower_from_vision_gives_the_vision_towers_output_without_type_token():
    vision = build_clip(TINY).visual.eval()
    picture = torch.randn(3, 3, 224, 224)
    tower = AudioEncoder(vision).eval()
    torch.testing.assert_close(tower(picture, type_token_weights("none")), vision(picture))
    assert (tower(picture, type_token_weights("vb")) - vision(picture)).abs().max() > 1e-3


def test_type_token_masked_out_of_attention_changes_nothing(monkeypatch):
    """The token sits behind all others: hidden from them, the tower is the vision tower."""
    vision = build_clip(TINY).visual.eval()
    tower = AudioEncoder(vision).eval()
    seen = torch.ones(51, 51, dtype=torch.bool)
    seen[:50, 50] = False
    for block in tower.trunk.transformer.resblocks:
        whole = block.attn.forward

        def hidden(x, kept, mask=None, past=None, whole=whole):
            return whole(x, kept, seen[:kept].expand(len(x), -1, -1))

        monkeypatch.setattr(block.attn, "forward", hidden)
    picture = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(tower(picture, type_token_weights("nb")), vision(picture))


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2}])
@pytest.mark.parametrize("recompute", [False, True])
def test_vectors_and_gradients_are_those_of_open_clips_vision_tower(vision, recompute):
    """Though the last block gives the output at [CLS] alone where only that is pooled."""
    tower = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | vision}).visual.double()
    tower.transformer.grad_checkpointing = recompute
    pictures, side = torch.randn(3, 3, 224, 224).double(), torch.randn(3, tower.output_dim).double()
    assert pools_first(tower) == (not vision)
    results = []
    for encode in (tower, lambda pictures: encode_images(tower, pictures)):
        tower.zero_grad()
        vectors = encode(pictures)
        (vectors * side).sum().backward()
        results.append((vectors, {name: p.grad.clone() for name, p in tower.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_frozen_first_blocks_keep_nothing_for_the_backward_pass():
    """All that is added below them is frozen too, [CLS], positions and type tokens."""
    model = Model(
        TINY,
        ModelConfig(trainable_towers="text+vision+audio", freeze_layers=dict.fromkeys(TOWERS, 1)),
        SpectrogramConfig(),
    )
    model.freeze()
    reached = []
    for tower in (model.text, model.vision, model.audio.trunk):
        for block in tower.transformer.resblocks:
            block.ln_1.register_forward_hook(lambda norm, inputs, out: reached.append(inputs[0].requires_grad))
    model.encode_tokens(torch.ones(1, 5, dtype=torch.int64))
    model.encode_frames(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    model.encode_segments(torch.zeros(1, 1, 224, 224), type_token_weights("nb"))
    assert reached == [False, False] * 3
    assert all(any(p.requires_grad for p in getattr(model, name).parameters()) for name in TOWERS)


@pytest.mark.parametrize("patch, channels", [((32, 32), 3), ((14, 14), 3), ((16, 224), 1), ((100, 60), 1)])
def test_patches_are_embedded_as_by_a_convolution(patch, channels):
    """To 1e-6 of the largest value, with the gradients of kernel and pictures; what 100 x 60 does not fill is left out."""
    pictures, kernel = torch.randn(3, channels, 224, 224), 0.02 * torch.randn(48, channels, *patch)
    ours, exact = (
        [x.to(dtype).requires_grad_() for x in (pictures, kernel)] for dtype in (torch.float32, torch.float64)
    )
    embedded = embed_patches(*ours)
    wanted = F.conv2d(*exact, stride=patch).flatten(2).transpose(1, 2)
    side = torch.randn(wanted.shape)
    gradients = (torch.autograd.grad((x * side).sum(), leaves) for x, leaves in ((embedded, ours), (wanted, exact)))
    for got, want in zip((embedded, *next(gradients)), (wanted, *next(gradients)), strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert not len(embed_patches(pictures[:0], kernel))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_quick_gelu_keeps_its_input_alone(dtype, error):
    """Values are open_clip's to the last bit, the gradient is that of float64 to the type's precision; compiled, too."""
    x, side, kept = (3 * torch.randn(2, 50, 64)).to(dtype).requires_grad_(), torch.randn(2, 50, 64).to(dtype), []
    ours, theirs = LeanQuickGELU(), open_clip.transformer.QuickGELU()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ours(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()] and torch.equal(y, theirs(x))
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(theirs(exact), exact, side.double())
    for run in (ours, torch.compile(ours, backend="aot_eager")):
        (gradient,) = torch.autograd.grad(run(x), x, side)
        assert (gradient - wanted).norm() <= error * wanted.norm()


def test_towers_have_the_lean_quick_gelu_wherever_open_clip_has_its_own():
    clip = TINY | {"quick_gelu": True}
    model = Model(clip, ModelConfig(clip="t.json", head="captioner", head_layers=3), SpectrogramConfig())
    kinds = [type(m) for m in model.modules() if "GELU" in type(m).__name__]
    assert set(kinds) == {LeanQuickGELU} and len(kinds) == 2 + 2 + 2 + 3 + 1  # blocks, and the captioner's own
    assert model.text.state_dict().keys() == CustomTextCLIP(**clip).text.state_dict().keys()


def test_extra_position_is_distributed_as_the_others():
    torch.manual_seed(0)
    vision = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | {"width": 512, "layers": 1}}).visual
    vision.positional_embedding.data.mul_(0.1).add_(0.5)
    rows = vision.positional_embedding
    for how, mean, deviation in (("matched", rows.mean(), rows.std()), ("unit", 0.0, 1.0)):
        extra = AudioEncoder(vision, ModelConfig(position_init=how)).trunk.positional_embedding[-1]
        assert abs(extra.mean() - mean) < 0.15 * max(deviation, 0.1) and abs(extra.std() - deviation) < 0.15 * deviation


def test_mono_equals_three_equal_channels():
    tower = AudioEncoder(build_clip(TINY).visual).eval()
    mono = torch.randn(2, 1, 224, 224)
    torch.testing.assert_close(
        tower(mono, type_token_weights("both")), tower(mono.repeat(1, 3, 1, 1), type_token_weights("both"))
    )


@pytest.mark.parametrize("word", ["loud", "-0.1", "1.5"])
def test_unknown_audio_type_is_refused(word):
    with pytest.raises(UserError, match="model.audio_type"):
        type_token_weights(word)


def test_pool_is_a_mean_of_unit_vectors_and_zero_without_any():
    vectors, clip = torch.randn(5, 8), torch.tensor([0, 0, 2, 2, 2])
    got = pool(vectors, clip, 3)
    want = F.normalize(F.normalize(vectors, dim=-1)[2:].mean(0), dim=-1)
    torch.testing.assert_close(got[2], want)
    assert got[1].abs().max() == 0


@pytest.mark.parametrize("form", ["openai.safetensors", "openai.pt", "open_clip.pt", "archive.pt"])
def test_towers_from_a_weights_file(tmp_path, form):
    """The same small CLIP saved as people have it: OpenAI's names, open_clip's checkpoint, OpenAI's TorchScript archive."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**ONE_HEAD, quick_gelu=True).eval()
    state, file = {k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / form
    if form == "openai.safetensors":
        save_file(state, file)
    elif form == "openai.pt":
        torch.save(state, file)
    elif form == "open_clip.pt":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    else:
        tokens = torch.zeros(1, 77, dtype=torch.int64)
        torch.jit.save(torch.jit.trace(clip, (torch.zeros(1, 3, 224, 224), tokens)), file)
    cfg = ModelConfig(clip=str(file), quick_gelu="auto" if form == "archive.pt" else "yes")
    model = Model(resolve_clip_config(str(file), cfg.quick_gelu), cfg, SpectrogramConfig()).eval()
    assert model.load_clip()
    model.start_audio()
    texts = tokenizer(str(file), 77)(["a dog barks", "rain"])
    full = F.pad(texts, (0, 77 - texts.shape[1]))
    torch.testing.assert_close(model.encode_tokens(texts)[0], clip.encode_text(full), atol=1e-5, rtol=1e-4)
    picture = torch.randint(0, 256, (2, 3, 224, 224))
    pictures = pictures_of(str(file), model.clip_config)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pictures.mean, pictures.std))
    torch.testing.assert_close(
        model.encode_frames(picture), clip.encode_image((picture / 255 - mean) / std), atol=1e-4, rtol=1e-4
    )


def test_any_vit_of_open_clip_by_name():
    config = resolve_clip_config("ViT-B-16")
    assert config["vision_cfg"]["patch_size"] == 16
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    model = Model(config, ModelConfig(clip="ViT-B-16"), SpectrogramConfig())
    assert model.encode_segments(torch.zeros(2, 1, 224, 224), type_token_weights("both")).shape == (
        2,
        config["embed_dim"],
    )


@pytest.mark.parametrize(
    "clip, setting, quick", [("ViT-B-32/openai", "auto", True), ("ViT-B-32", "auto", None), ("ViT-B-32", "yes", True)]
)
def test_activation_is_the_one_the_weights_were_trained_with(clip, setting, quick):
    assert resolve_clip_config(clip, setting).get("quick_gelu") is quick


@pytest.mark.parametrize(
    "clip, words",
    [("ViT-B-33", "nearest: ViT-B-32"), ("none.json", "none.json"), ("none.pt", "no weights file none.pt")],
)
def test_wrong_clip_is_one_clear_line(clip, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve_clip_config(clip)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 nonsense")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, words in (("broken.pt", "unreadable"), ("other.safetensors", "not the weights of a CLIP")):
        with pytest.raises(UserError, match=words):
            resolve_clip_config(str(tmp_path / name))


def test_a_pickle_in_a_weights_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError):
        resolve_clip_config(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "pwned").exists()


def test_towers_equal_open_clips_own():
    """Our text pass, which keeps all tokens, gives what open_clip's own forward gives."""
    torch.manual_seed(0)
    clip = CustomTextCLIP(**TINY).eval()
    tokens = tokenizer("x.json", 77)(["a crow", "a big red fire engine"])
    torch.testing.assert_close(encode_text(clip.text, tokens)[0], clip.text(F.pad(tokens, (0, 77 - tokens.shape[1]))))


def test_marks_of_exclamation_are_no_padding():
    """Token 0 is "!" as well as padding: the longest caption of a batch must keep its [EOS]."""
    tokenize = tokenizer("x.json", 77)
    for texts in (["what!?) a cat"], ["!", "a crow!!!"], ["x " * 100, "!"]):
        tokens = tokenize(texts)
        assert (tokens.max(1).values == 49407).all() and tokens.shape[1] == 1 + tokens.argmax(1).max()


LETTERS = ["abcdefghijklmnopqrstuvwxyz", "".join(map(chr, range(0x4E00, 0x6E00))), "\U0001f602\u2764"]


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("spaces", [0, 0.2])
def test_texts_without_end_or_spaces_cost_little_and_keep_their_tokens(letters, spaces):
    """open_clip's own takes minutes for 100,000 letters in a row: what max_tokens cannot hold is left out."""
    draw = random.Random(3)
    text = "".join(" " if draw.random() < spaces else draw.choice(letters) for _ in range(100_000))
    start = time.process_time()
    tokens = get_tokenizer("x.json", 32)([text])
    assert time.process_time() - start < 5
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32", context_length=32)([text[:2000]]))


@pytest.mark.parametrize("text", ["&amp;#" + "9" * 5000 + ";", "a dog &amp;#" + "&#57;" * 900 + ";", "\ud800\0"])
def test_a_text_that_opens_clip_cannot_clean_has_tokens(text):
    """html.unescape raises for the number of a character that has more than 4,300 digits."""
    tokens = tokenizer("x.json", 32)([text])
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407


def test_one_vocabulary_is_shared_and_remembers_so_many_words(monkeypatch):
    found = get_tokenizer("x.json", 33)
    assert found is get_tokenizer("x.json", 33) is not get_tokenizer("x.json", 34)
    monkeypatch.setattr("clip4vla.towers.tokenizer.WORDS", 10)
    texts = [f"{word} {word[::-1]}" for word in "rain snow storm thunder brook cricket organ whistle".split()]
    assert torch.equal(found(texts), open_clip.get_tokenizer("ViT-B-32", context_length=33)(texts))
    assert len(found.cache) == 10 and "rain" in found.cache and "whistle" not in found.cache
    monkeypatch.undo()
    found(["x" * 65, "snowstorm " + "y" * 64])
    assert {"snowstorm", "y" * 64} < found.cache.keys() and "x" * 65 not in found.cache


def test_a_fixed_temperature_is_exact_in_bf16():
    from clip4vla.config import LossConfig, MaskConfig

    model = Model(TINY, ModelConfig(clip="tiny.json", temperature=0.01), SpectrogramConfig()).to(torch.bfloat16)
    scale = model.forward(None, LossConfig(at=0, av=0, aa=0), MaskConfig())["scale"]
    assert scale.item() == 100 and scale.dtype == torch.float32


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # which fills it so
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head", ["global_global", "global_local", "local_local", "captioner"])
def test_every_weight_that_is_not_drawn_is_loaded(tmp_path, fresh_memory_is_nan, head):
    save_file(open_clip.CLIP(**TINY).state_dict(), tmp_path / "clip.safetensors")
    cfg = RunConfig(model=ModelConfig(clip=str(tmp_path / "clip.safetensors"), head=head))
    shards = {"spectrogram": to_dict(SpectrogramConfig()), "frames": to_dict(FramesConfig())}
    model, _ = build_model(cfg, shards, None)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_undrawn_weights_keep_what_the_memory_holds(fresh_memory_is_nan):
    with Undrawn():
        assert all(value.isnan().all() for value in torch.nn.Linear(3, 3).parameters())


def test_a_folder_of_format_1_loads_under_todays_names(tmp_path):
    """It was written by version 0.1.0 before its settings and the scale of logits were renamed."""
    model = Model.from_checkpoint(ROOT / "tests/reference/format_1")
    cfg = model.cfg
    assert (cfg.head, cfg.head_layers, cfg.text_tokens, cfg.media_mean) == ("local_local", 1, "eos", "raw")
    assert (cfg.spectrogram_norm, cfg.pretrain_audio_type, cfg.trainable_towers) == ("padded", "none", "text+audio")
    assert model.logit_scale.item() == 1.25 and model.config()["format"] == 2
    save_model(model, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    again = Model.from_checkpoint(tmp_path)
    assert again.cfg == cfg and all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    (tmp_path / "config.json").write_text(json.dumps(model.config() | {"format": 3}))
    with pytest.raises(UserError, match=r"config.json: format=3: this version reads 2 at most"):
        Model.from_checkpoint(tmp_path)
