"""Checkpoints of the authors' code: every reference value from imported weights, the account of keys, and the way back."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from released import POSITIONS, SEGMENTS, checkpoint, imported, reference, same
from running import ONE_HEAD, run
from safetensors.torch import load_file, save_file

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.export import model_folder, official
from clip4vla.losses.contrastive import info_nce
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.model import Model, pool

FUSIONS = ("global_global", "global_local", "local_local", "captioner")
EMBEDDED, DECODER = "clip.token_embedding.weight", "cls.predictions.decoder.weight"


@pytest.fixture
def towers_only():
    """(reference values, the model without a head)."""
    return reference()[0], imported("model.head=global_global")


def pooled(vectors, mask):
    mask = mask.bool()
    index = torch.arange(len(mask))[:, None].expand_as(mask)
    return pool(vectors[mask], index[mask], len(mask)).to(vectors.dtype)


def audio(model, ref, audio_type, which="in.segments"):
    own = ref["in.audio_type"].repeat_interleave(3)
    segments = ref[which].to(model.audio.type_embedding.dtype).flatten(0, 1)
    return model.encode_segments(segments, type_token_weights(audio_type, own)).view(5, 3, -1)


def test_reference_text_and_vision(towers_only):
    ref, model = towers_only
    sentence, tokens = model.encode_tokens(ref["in.tokens"])
    same(tokens, ref["text.tokens"])
    end = (ref["in.tokens"] == 99).int().argmax(1)
    assert torch.equal(sentence, tokens[torch.arange(5), end])
    same(model.vision(ref["in.frames"].float().flatten(0, 1)).view(5, 3, -1), ref["vision.frames"])


@pytest.mark.parametrize(
    "key, audio_type", [("by_type", "data"), ("ratio_0", "0"), ("ratio_1", "1"), ("half", "0.5"), ("both", "both")]
)
def test_reference_audio_with_every_type_token(towers_only, key, audio_type):
    ref, model = towers_only
    same(audio(model, ref, audio_type), ref[f"audio.{key}"])


def test_reference_logits_losses_and_gradients(towers_only):
    """In float64: logits are 100 times a cosine, so that fp32's rounding alone is half of the tolerance, on some CPUs more."""
    ref, model = towers_only[0], copy.deepcopy(towers_only[1]).double()
    text = F.normalize(model.encode_tokens(ref["in.tokens"])[0], dim=-1)
    vision = pooled(model.vision(ref["in.frames"].double().flatten(0, 1)).view(5, 3, -1), ref["in.frame_mask"])
    heard = pooled(audio(model, ref, "data"), ref["in.segment_mask"])
    masked = pooled(audio(model, ref, "data", "in.masked_segments"), ref["in.segment_mask"])
    same(100 * text @ heard.T, ref["logits.global_global.t_a"])
    same(100 * text @ vision.T, ref["logits.global_global.t_v"])
    same(100 * vision @ heard.T, ref["logits.global_global.a_v"])
    same(100 * text @ ((vision + heard) / 2).T, ref["logits.global_global.t_va"])
    scale, valid = torch.tensor([100.0]), torch.ones(5).bool()
    losses = {
        "at": info_nce(text, heard, scale, valid),
        "av": info_nce(vision, heard, scale, valid),
        "aa": info_nce(heard, masked, scale, valid, intra=True),
    }
    for name, loss in losses.items():
        same(loss, ref[f"loss.{name}"])
    sum(losses.values()).backward()
    tower = model.audio
    for got, name in (
        (tower.type_embedding, "control_embedding"),
        (tower.trunk.conv1.weight, "conv1.weight"),
        (tower.trunk.positional_embedding, "positional_embedding"),
        (tower.trunk.proj, "proj"),
    ):
        same(got.grad, ref[f"grad.audio.visual.{name}"])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_key_is_accounted_for(fusion, tmp_path):
    state = reference()[1]
    cfg = official.settings(state, [*POSITIONS, f"model.head={fusion}"], "x")
    model, account = official.from_official(state, cfg, "x")
    assert account.used.keys() | account.left.keys() == state.keys() and not account.unknown
    assert not account.used.keys() & account.left.keys()
    heads = {"cross": fusion != "global_global", "similarity_dense": fusion == "local_local"}
    want = {key for key in state if heads.get(key.split(".")[0], fusion == "captioner" or not key.startswith("cls."))}
    tied = EMBEDDED if fusion == "captioner" else DECODER
    assert account.used.keys() == want - {tied, "clip.logit_scale"}
    ours = {name.split(" ")[0] for name in account.used.values()}
    assert ours == model.state_dict().keys() - {"logit_scale"}
    assert str(account).count("\n") == len(state)


def test_it_is_set_up_as_the_authors_code_runs(tmp_path):
    model, said, origin = model_folder.import_weights(
        checkpoint(tmp_path, similarity_dense__weight=None, similarity_dense__bias=None), SEGMENTS
    )
    assert model.cfg.head == "captioner" and model.cfg.head_layers == 2
    assert (model.cfg.audio_type, model.cfg.spectrogram_norm, model.cfg.media_mean) == ("0.5", "padded", "raw")
    assert (model.spectrogram.window, model.spectrogram.n_fft, model.spectrogram.channels) == ("hann", 512, "lmr")
    assert model.spectrogram.extra_segment and model.spectrogram.max_segments == 6 and model.clip_config["quick_gelu"]
    assert "pytorch_model.bin.7: 125 keys used" in origin and str(tmp_path) not in origin
    towers_alone = {key: None for key in reference()[1] if not key.startswith(("clip.", "audio."))}
    model, _, _ = model_folder.import_weights(
        checkpoint(tmp_path, **towers_alone), ["model.audio_type=both", *SEGMENTS]
    )
    assert (model.cfg.head, model.spectrogram.max_segments, model.cfg.audio_type) == ("global_global", 10, "both")


def test_the_rows_that_the_authors_added_to_clips_are_left():
    """The imported towers are then those of model.clip, which init_from asks for."""
    quick = ONE_HEAD | {"quick_gelu": True}
    cfg = ModelConfig(clip="tiny.json", head="captioner", head_layers=2)
    state, _ = official.to_official(Model(quick, cfg, SpectrogramConfig()))
    assert len(state[EMBEDDED]) == len(state["cls.predictions.bias"]) == 49411 and not state[EMBEDDED][49408:].any()
    assert state["clip.logit_scale"].shape == () and len(state["cross.positional_embedding"]) == 77
    back, account = official.from_official(state, official.settings(state, [], "x"), "x")
    assert back.clip_config == quick
    assert "(the first 49408 of 49411 rows: the others are no words of the tokenizer)" in account.used[DECODER]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_round_trip_gives_the_same_tensors(fusion, tmp_path):
    theirs = reference()[1] | ({EMBEDDED: reference()[1][DECODER]} if fusion == "captioner" else {})
    model, words = imported(f"model.head={fusion}"), [*POSITIONS, f"model.head={fusion}"]
    alone, account = official.to_official(model)
    for key in set(account.used.values()):
        rows = len(model.head.encoder.positional_embedding) if key == "cross.positional_embedding" else None
        assert torch.equal(alone[key][:rows], theirs[key][:rows].float()), key
    model_folder.save_model_folder(model, tmp_path / "ours")
    model_folder.export_official(tmp_path / "ours", tmp_path / "back.safetensors", "fp16", checkpoint(tmp_path))
    whole = load_file(tmp_path / "back.safetensors")
    assert whole.keys() == theirs.keys() and all(torch.equal(whole[key], theirs[key]) for key in theirs)
    again, _, _ = model_folder.import_weights(str(tmp_path / "back.safetensors"), words)
    assert again.config() == model.config()
    ref = reference()[0]
    assert torch.equal(again.encode_tokens(ref["in.tokens"])[1], model.encode_tokens(ref["in.tokens"])[1])
    assert torch.equal(audio(again, ref, "both"), audio(model, ref, "both"))
    ours = again.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


WRONG = [
    ({"audio__visual__proj": None}, [], "lacks 1 of the keys of model.head=local_local: audio.visual.proj"),
    (
        {"audio__visual__proj": torch.zeros(128, 64)},
        [],
        r"audio.visual.proj is \(128, 64\), the model needs \(128, 128\)",
    ),
    ({"clip__visual__conv1__weight": None}, [], "not the weights of a CLIP with a vision transformer"),
    ({"extra__weight": torch.zeros(1)}, [], "1 keys have no place: extra.weight.*--allow-unknown"),
    ({"audio__projection": torch.zeros(1)}, [], "1 keys have no place: audio.projection"),
    ({}, ["model.head="], "model.head must be"),
    ({}, ["model.head=classifier"], "cls_linear"),
    ({}, ["model.head_layers=1"], "12 keys have no place: cross.transformer.resblocks.1"),
    ({}, ["model.max_frames=70"], r"cross.positional_embedding is \(77, 128\).* lower model.max_tokens"),
    ({}, ["model.max_tokens=78"], "the text tower of model.clip reads 77 at most"),
    ({"optimizer": {"lr": 1}}, [], "not one flat dictionary of weights"),
]


@pytest.mark.parametrize("changes, words, said", WRONG, ids=[said[:30] for *_, said in WRONG])
def test_what_does_not_fit_is_one_clear_line(changes, words, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        model_folder.import_weights(checkpoint(tmp_path, **changes), ["model.head=local_local", *POSITIONS, *words])
    assert "\n" not in str(caught.value)


def test_two_heads_and_none_named_are_refused_and_unknown_keys_can_be_left(tmp_path):
    with pytest.raises(UserError, match="several heads: choose model.head=local_local"):
        model_folder.import_weights(checkpoint(tmp_path), SEGMENTS)
    file = checkpoint(tmp_path, extra__weight=torch.zeros(1), cls_linear__0__weight=torch.zeros(4, 128))
    _, said, _ = model_folder.import_weights(file, ["model.head=local_local", *SEGMENTS], allow_unknown=True)
    assert "not placed extra.weight" in said and "left       cls_linear.0.weight: the authors' classifier" in said
    assert said.endswith("1 not placed")


def test_what_the_authors_code_cannot_run_does_not_go_out():
    heads = ONE_HEAD | {"quick_gelu": True, "text_cfg": ONE_HEAD["text_cfg"] | {"heads": 2}}
    spectrogram = SpectrogramConfig()
    for clip, fusion, said in ((ONE_HEAD, "global_global", "QuickGELU"), (heads, "global_global", "not as OpenAI's")):
        with pytest.raises(UserError, match=said):
            official.to_official(Model(clip, ModelConfig(clip="t.json", head=fusion), spectrogram))
    classifier = Model(
        ONE_HEAD | {"quick_gelu": True}, ModelConfig(clip="t.json", head="classifier", labels=["a"]), spectrogram
    )
    state, account = official.to_official(classifier)
    assert {
        "logit_scale",
        "head.linear.weight",
        "head.linear.bias",
    } == account.left.keys() and "clip.logit_scale" in state


def test_a_clip_gets_ears_that_are_copies_of_its_eyes(tmp_path):
    torch.manual_seed(1)
    clip = open_clip.CLIP(**ONE_HEAD, quick_gelu=True).eval()
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, tmp_path / "my.safetensors")
    model, _, origin = model_folder.import_weights(
        str(tmp_path / "my.safetensors"), ["model.quick_gelu=yes", "spectrogram.channels=lmr"]
    )
    assert (
        origin.startswith("Text and vision have the weights of my.safetensors") and model.cfg.clip == "my.safetensors"
    )
    assert model.cfg.trainable_towers == "text+vision" and model.spectrogram.channels == "lmr"
    picture = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model.vision(picture), clip.encode_image(picture))
    torch.testing.assert_close(model.audio(picture, type_token_weights("none")), model.vision(picture))
    again, _, _ = model_folder.import_weights(str(tmp_path / "my.safetensors"), ["model.quick_gelu=yes"])
    assert torch.equal(again.audio.type_embedding, model.audio.type_embedding)  # what is fresh is the same each time


def test_the_command_on_both_ways(tmp_path):
    file, ours, back = checkpoint(tmp_path), tmp_path / "deep/ours", tmp_path / "back.bin"
    done = run("launch/convert.py", file, ours, "model.head=local_local", *SEGMENTS, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "used       similarity_dense.weight -> head.score.weight" in done.stdout and "in bf16" in done.stdout
    assert sorted(path.name for path in ours.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "pytorch\\_model.bin.7\\: 122 keys used" in (ours / "README.md").read_text()
    assert json.loads((ours / "config.json").read_text())["clip"]["quick_gelu"]
    done = run("launch/convert.py", ours, back, "--to-official", "--base-checkpoint", file)
    assert done.returncode == 0 and "head.score.weight -> similarity_dense.weight" in done.stdout, done.stderr
    state = torch.load(back, weights_only=True)
    assert state.keys() == reference()[1].keys() and state["clip.text_projection"].dtype == torch.float32
    for words in (
        (file, ours),
        (file, tmp_path / "x", "model.head=nothing"),
        (ours, tmp_path / "deep", "--to-official"),
    ):
        done = run("launch/convert.py", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.bin", "deep", "pytorch_model.bin.7"]
