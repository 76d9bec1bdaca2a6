"""hf:FOLDER_OR_ID against transformers' own get_text_features, get_image_features and picture preprocessing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from made_batch import batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers_models import equal_to_theirs, made_tokenizer, others

from clip4vla.config import LossConfig, MaskConfig, ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.export.model_folder import save_model_folder
from clip4vla.models import model as model_file
from clip4vla.models.model import Model
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers import transformers_folder
from clip4vla.towers.build import build_clip, freeze_first, hold_still
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.text import encode_text, token_mask
from clip4vla.towers.tokenizer import tokenizer
from clip4vla.towers.vision import encode_images
from clip4vla.towers.weights import check_size_claims, load_clip_weights

transformers = import_for_open_clip("transformers")  # which clip4vla.cli, in tests before, keeps out

LONG = "the big red town in the rain barks at a dog in the rain"
CONFIGS = equal_to_theirs()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for name, (config, kind, pictures) in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
        for parameter in model.parameters():  # some begin at nearly 0: no difference would show
            parameter.data += (0.5 if name == "align" else 0.1) * torch.randn_like(parameter)
        for part in (model, made_tokenizer(kind), pictures):
            part.save_pretrained(root / name)
    return root


def _towers(folder):
    config = resolve_clip_config(f"hf:{folder}")
    towers = build_clip(config)
    assert load_clip_weights(towers, f"hf:{folder}")
    return towers.eval(), config


def _copied(folder, to):
    shutil.copytree(folder, to)
    return to


def _changed(folder, name, change):
    file = folder / name
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("texts, most", [(["a dog barks", ""], 9), (["dog", LONG], 5)], ids=["padded", "cut"])
@torch.no_grad()
def test_texts_are_encoded_as_by_get_text_features(folders, name, texts, most):
    towers, config = _towers(folders / name)
    model = transformers.AutoModel.from_pretrained(folders / name).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folders / name)
    full_length = name in ("siglip", "siglip2")
    inputs = theirs(texts, truncation=True, max_length=most)
    inputs = theirs.pad(
        inputs, **({"padding": "max_length", "max_length": 9} if full_length else {}), return_tensors="pt"
    )
    mask = inputs.pop("attention_mask") if full_length else inputs["attention_mask"]
    tokens = tokenizer(f"hf:{folders / name}", most)(texts)
    length = tokens.shape[1]
    assert length == int(mask.sum(1).max()) and torch.equal(tokens, inputs["input_ids"][:, :length])

    sentence, words = encode_text(towers.text, tokens)
    outputs = model.get_text_features(**inputs)
    torch.testing.assert_close(sentence, outputs.pooler_output, rtol=0, atol=1e-5)
    assert sentence.shape[1] == config["embed_dim"] and words.shape == (2, length, sentence.shape[1])
    assert torch.equal(token_mask(towers.text, tokens), mask[:, :length].bool())
    if full_length:  # the vector is of the last place
        expected = model.text_model.head(outputs.last_hidden_state[:, :length])
        torch.testing.assert_close(words, expected, rtol=0, atol=1e-5)
    else:
        ends = mask.sum(1) - 1 if name in ("clip", "metaclip_2") else torch.zeros(2, dtype=torch.int64)
        torch.testing.assert_close(words[[0, 1], ends], sentence, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_are_encoded_as_by_get_image_features(folders, name):
    towers, config = _towers(folders / name)
    model = transformers.AutoModel.from_pretrained(folders / name).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(folders / name)
    expected = model.get_image_features(**theirs(list(images), return_tensors="pt")).pooler_output
    mean, std = (torch.tensor(config["pictures"][key]).view(3, 1, 1) for key in ("mean", "std"))
    vectors = encode_images(towers.visual, (images / 255 - mean) / std)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert (vectors - vectors[:1]).abs().max() > 1e-3 and towers.visual.image_size == (32, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_towers_hold_their_own_parameters_alone_and_train(folders, name):
    towers, _ = _towers(folders / name)
    towers.train()
    assert not any("logit" in key for key in towers.state_dict())
    assert not {id(p) for p in towers.text.parameters()} & {id(p) for p in towers.visual.parameters()}
    tokens = tokenizer(f"hf:{folders / name}", 9)(["a dog barks", "rain"])
    sentence, words = encode_text(towers.text, tokens)
    (sentence.square().sum() + words.square().sum()).backward()
    encode_images(towers.visual, torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [key for key, value in towers.named_parameters() if value.grad is None]
    assert all("pooler" in key for key in without), without  # BERT's, which these models do not use


@pytest.mark.parametrize("name", ["aimv2", "blip", "clipseg", "flava", "groupvit", "owlvit", "tipsv2", "dual"])
def test_other_models_build_and_give_vectors_of_the_stated_size(name):
    config, edge, dim = others()[name]
    tree = {
        "transformers": transformers_folder.cleaned(json.loads(config.to_json_string())),
        "tokens": {"pad": 0, "end": None, "most": 20},
        "pictures": {"size": [edge, edge]},
    }
    with torch.device("meta"):
        towers = build_clip(tree).eval()
        tokens = torch.ones(2, 5, dtype=torch.int64)
        texts = towers.text.model.get_text_features(tokens).pooler_output
        assert texts.shape[-1] == dim and towers.visual(torch.zeros(2, 3, edge, edge)).shape == (2, dim)
        assert 5 < towers.text.context_length <= 20 and towers.text.gives_words == (name not in ("groupvit", "tipsv2"))


def test_frozen_towers_have_no_dropout_and_keep_their_batch_statistics(folders):
    towers, _ = _towers(folders / "align")
    towers.requires_grad_(False)
    before = {key: value.clone() for key, value in towers.state_dict().items()}
    towers.train()
    for tower in (towers.text, towers.visual):
        hold_still(tower)
    tokens, images = tokenizer(f"hf:{folders / 'align'}", 9)(["a dog"]), torch.randn(2, 3, 32, 32)
    for run in (lambda: towers.text.encode(tokens)[0], lambda: towers.visual(images)):
        assert torch.equal(run(), run())
    assert all(torch.equal(value, before[key]) for key, value in towers.state_dict().items())


@pytest.mark.parametrize(
    "kind, share", [("clip", 0.5), ("siglip", 0.7), ("siglip2", 0.7), ("align", 1)]
)  # its CNN keeps all
def test_activations_are_recomputed_where_it_is_asked_for(folders, kind, share):
    towers, _ = _towers(folders / kind)
    tokens, images = tokenizer(f"hf:{folders / kind}", 9)(["a dog"]), torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)  # of ALIGN's dropout
        for tower in (towers.text, towers.visual):
            tower.set_grad_checkpointing(enable)
            tower.train().zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = towers.text.encode(tokens)[0].square().sum() + towers.visual(images).square().sum()
        loss.backward()
        gradients.append(([p.grad.clone() for p in towers.parameters() if p.grad is not None], sum(kept)))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert gradients[1][1] < gradients[0][1] * share


@torch.no_grad()
def test_towers_are_rebuilt_from_their_configuration_and_weights_alone(folders, tmp_path):
    source = _copied(folders / "metaclip_2", tmp_path / "source")
    towers, config = _towers(source)
    save_file(towers.state_dict(), tmp_path / "towers.safetensors")
    tokens, images = tokenizer(f"hf:{source}", 9)(["a dog"]), torch.randn(1, 3, 32, 32)
    shutil.rmtree(source)
    state = load_file(tmp_path / "towers.safetensors")
    kept = json.loads(json.dumps(config))
    check_size_claims(kept, state)
    other = build_clip(kept).eval()
    other.load_state_dict(state)
    assert torch.equal(other.text.encode(tokens)[0], towers.text.encode(tokens)[0])
    assert torch.equal(other.visual(images), towers.visual(images))


class _Sound(nn.Module):
    """Stands for the audio tower, which has tests of its own."""

    def __init__(self, dim):
        super().__init__()
        self.type_embedding = nn.Parameter(torch.zeros(2, 8))
        self.trunk = nn.Linear(1, dim)

    def forward(self, segments, mix):
        return self.trunk(segments.mean((1, 2, 3))[:, None])


@pytest.fixture
def make_model(monkeypatch):

    def make(folder, **words):
        cfg = ModelConfig(clip=f"hf:{folder}", max_tokens=9, trainable_towers="text+vision+audio", **words)
        config = resolve_clip_config(cfg.clip)
        monkeypatch.setattr(model_file, "AudioEncoder", lambda *_, **__: _Sound(config["embed_dim"]))
        model = Model(config, cfg, SpectrogramConfig())
        assert model.load_clip()
        model.freeze()
        return model

    return make


@pytest.mark.parametrize("name", ["siglip", "siglip2", "align"])
def test_a_model_trains_with_these_towers(folders, make_model, name):
    model = make_model(folders / name)
    made = batch()
    made.tokens = tokenizer(model.cfg.clip, 9)(["a dog", "rain in town", "red", "the big dog"])
    made.frames = made.frames[:, :, :32, :32]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    features = model.train()(made, LossConfig(at=1, tv=1), MaskConfig())
    ((features["text"] * features["vision"]).sum() + (features["text"] * features["audio"]).sum()).backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"text", "vision", "audio"}


@torch.no_grad()
def test_a_model_folder_needs_nothing_of_the_folder_that_its_towers_came_from(folders, make_model, tmp_path):
    source = _copied(folders / "siglip", tmp_path / "source")
    model = make_model(source).eval()
    texts, images = ["a dog", LONG], torch.randint(0, 256, (2, 3, 32, 32))
    expected = model.encode_texts(texts, tokenizer(model.cfg.clip, 9)), model.encode_frames(images)
    save_model_folder(model, tmp_path / "first", ModelCard(""))
    shutil.rmtree(source)
    save_model_folder(Model.from_checkpoint(tmp_path / "first"), tmp_path / "second", ModelCard(""))
    shutil.rmtree(tmp_path / "first")
    again = Model.from_checkpoint(tmp_path / "second")
    assert again.clip_config == model.clip_config and not list(Path(tmp_path, "second", "clip").glob("*.safetensors"))
    assert torch.equal(again.encode_texts(texts, tokenizer(again.cfg.clip, 9)), expected[0])
    assert torch.equal(again.encode_frames(images), expected[1])


@pytest.mark.parametrize("head", ["global_local", "local_local"])
def test_heads_read_frames_and_words_of_these_towers(folders, make_model, head):
    model = make_model(folders / "clip", head=head, head_layers=1)
    made = batch()
    made.tokens = tokenizer(model.cfg.clip, 9)(["a dog", "rain in town", "red", "the big dog"])
    made.frames = made.frames[:, :, :32, :32]
    features = model.train()(made, LossConfig(at=0, tm=1), MaskConfig())
    features.get("scores", features.get("media")).square().sum().backward()
    trained = {
        key.split(".")[0] for key, value in model.named_parameters() if value.grad is not None and value.grad.any()
    }
    assert {"vision", "audio", "head"} <= trained and ("text" in trained) == (head == "local_local")


def test_the_captioner_is_refused_in_one_line(folders, make_model):
    with pytest.raises(UserError, match="model.head=captioner"):
        make_model(folders / "clip", head="captioner", head_layers=1)


def test_the_first_blocks_are_frozen(folders):
    towers, _ = _towers(folders / "siglip")
    for tower, part in ((towers.text, "text_model"), (towers.visual, "vision_model")):
        freeze_first(tower, 1, "x")
        frozen = {
            key.removeprefix(f"model.{part}.") for key, value in tower.named_parameters() if not value.requires_grad
        }
        trained = {key.removeprefix(f"model.{part}.") for key, value in tower.named_parameters() if value.requires_grad}
        assert all(key.startswith(("embeddings.", "encoder.layers.0.")) for key in frozen) and frozen
        assert any(key.startswith("head.") for key in trained) and "encoder.layers.1.layer_norm1.weight" in trained


def test_a_configuration_cannot_claim_more_than_the_weights(folders):
    towers, config = _towers(folders / "clip")
    state = towers.state_dict()
    check_size_claims(config, state)
    with pytest.raises(ValueError, match="the file has"):
        check_size_claims(config, state, blocks=1)
    for key, value in (("hidden_size", 1 << 20), ("num_hidden_layers", 10**9)):
        huge = json.loads(json.dumps(config))
        huge["transformers"]["text_config"][key] = value
        with pytest.raises(ValueError, match="the file has|more than 20000 tensors"):
            check_size_claims(huge, state)


@pytest.mark.parametrize("file, change, message", [
    ("config.json", lambda tree: tree.update(auto_map={"AutoModel": "evil.Model"}), "auto_map .* may name no code"),
    ("config.json", lambda tree: tree["text_config"].update(attn_implementation="a/kernel"), "attn_implementation .* no code"),
    ("config.json", lambda tree: tree["vision_config"].update(model_type="timm_wrapper"), "timm_wrapper .* no code"),
    ("tokenizer_config.json", lambda tree: tree.update(auto_map={"AutoTokenizer": ["evil.T", None]}), "auto_map .* no code"),
    ("preprocessor_config.json", lambda tree: tree.update(auto_map={"AutoImageProcessor": "evil.P"}), "auto_map .* no code"),
    ("config.json", lambda tree: tree["text_config"].update(num_hidden_layers=10**9), "more than 20000 tensors"),
    ("config.json", lambda tree: tree["text_config"].update(intermediate_size=10**7), "weights, its files have"),
    ("config.json", lambda tree: tree.update(model_type="clip9"), "no model_type 'clip9'"),
    ("config.json", lambda tree: tree.update(model_type="bert"), "get_text_features and get_image_features"),
    ("config.json", lambda tree: tree["text_config"].update(vocab_size=5), "12 tokens, its text tower 5"),
    ("preprocessor_config.json", lambda tree: tree.update(size={"shortest_edge": 40}), "then cropped to"),
    ("preprocessor_config.json", lambda tree: tree.update(size={"height": 9999, "width": 9999}, do_center_crop=False),
     "4096 are the most"),
])  # fmt: skip
def test_a_folder_that_is_not_taken_is_one_line(folders, tmp_path, file, change, message):
    folder = _copied(folders / "clip", tmp_path / "x")
    _changed(folder, file, change)
    with pytest.raises(UserError, match=f"^model.clip=hf:{folder}: .*{message}"):
        resolve_clip_config(f"hf:{folder}")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(folders, tmp_path, file):
    folder = _copied(folders / "clip", tmp_path / "x")
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"no {file} there"):
        resolve_clip_config(f"hf:{folder}")


def test_no_folder_and_no_hub_id_is_one_line():
    with pytest.raises(UserError, match="no such folder, nor a hub id"):
        resolve_clip_config("hf:/nowhere/at/all")


def test_torchs_files_of_weights_are_read_and_run_no_code(folders, tmp_path):
    folder = _copied(folders / "clip", tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    towers, _ = _towers(folders / "clip")
    with pytest.raises(UserError, match="no weights there"):
        _towers(folder)
    torch.save(state, folder / "pytorch_model.bin")
    for key, value in _towers(folder)[0].state_dict().items():
        assert torch.equal(value, towers.state_dict()[key])
    torch.save(
        {key: value for key, value in state.items() if "visual_projection" not in key}, folder / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match="its weights lack visual_projection.weight"):
        _towers(folder)
    torch.save({"evil": _Evil(tmp_path / "was-run")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.clip=hf:"):
        _towers(folder)
    assert not (tmp_path / "was-run").exists()


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_of_a_hub_id_no_other_files_are_fetched(folders, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(folders / "clip")

    monkeypatch.setattr(transformers_folder, "snapshot_download", fetch)
    config = resolve_clip_config("hf:openai/some-clip")
    assert load_clip_weights(build_clip(config), "hf:openai/some-clip")
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked) and "model*.safetensors" in asked


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"pip install 'clip4vla\[hf\]'"):
        resolve_clip_config(f"hf:{folders / 'clip'}")
