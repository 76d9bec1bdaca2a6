"""Find the configuration of the towers that `model.clip` names."""

import difflib
from pathlib import Path
from typing import Any

import open_clip

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError, one_line
from clip4vla.towers import transformers_clip
from clip4vla.towers.weights import (
    CONFIG,
    HUB,
    WEIGHTS,
    architecture,
    check_size_claims,
    download,
    infer_config,
    read_weights,
    weights_file,
)

TOWER_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "preprocess_cfg")
PADDED_WITH_EOS = ("timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP-i18n-256")  # tokenizers; SigLIP 2's pads with 0


def resolve_clip_config(clip: str, quick_gelu: str = "auto") -> dict[str, Any]:
    """Find open_clip's configuration of a CLIP named as in `model.clip`; raises UserError if there is no such model."""
    if transformers_clip.is_named(clip):
        return transformers_clip.resolve(clip)
    name, _, tag = clip.partition("/")
    written, path = config_file(clip), weights_file(clip)
    trained_with = None
    if written:
        config = _read_config(written)
        if path:
            _must_hold(path, config)
    elif path and not architecture(clip):
        state, jit = read_weights(path)
        config, trained_with = infer_config(state, path), jit
    else:
        known = open_clip.get_model_config(name)
        if known is None:
            near = difflib.get_close_matches(clip, open_clip.list_models(), n=1, cutoff=0)
            raise UserError(
                f"model.clip: open_clip knows no model {clip!r} (nearest: {near[0]}), and no such file exists"
            )
        if other := {"vision_cfg", "text_cfg"} - {*known}:
            raise UserError(
                f"model.clip={clip}: open_clip's {name} has no {min(other)}: a CLIP of texts and pictures is required"
            )
        config = known
        trained_with = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")  # OpenAI's: yes
    if quick_gelu != "auto" or trained_with is not None:
        config["quick_gelu"] = trained_with if quick_gelu == "auto" else quick_gelu == "yes"
    config = {key: config[key] for key in TOWER_KEYS if key in config}
    if config["text_cfg"].get("hf_tokenizer_name") in PADDED_WITH_EOS:
        config["text_cfg"] |= {"pad_id": 1, "eos_id": 1}
    return config


def text_config(clip: str) -> dict[str, Any]:
    """Find the text tower's part of a CLIP's configuration; {} where its weights alone, or a file that is gone, would say it."""
    written = config_file(clip)
    if written and not clip.endswith(".json"):
        return _read_config(written)["text_cfg"]
    if clip.endswith(".json"):
        return _read_config(written)["text_cfg"] if Path(written).is_file() else {}
    if clip.endswith(WEIGHTS) and not architecture(clip):
        return {}
    return resolve_clip_config(clip)["text_cfg"]


def config_file(clip: str) -> str:
    """Find the file that holds a CLIP's configuration: named, in its folder or on the hub, or beside its weights; "" if none."""
    if clip.endswith(".json"):
        return clip
    if clip.startswith(HUB):
        return download(clip, CONFIG)
    path = weights_file(clip)
    beside = Path(path).with_name(CONFIG) if path and not architecture(clip) else None
    return str(beside) if beside and beside.is_file() else ""


def _read_config(path: str) -> dict[str, Any]:
    try:
        tree = parse_json(Path(path).read_bytes())
        tree = {key: tree[key] for key in ("preprocess_cfg",) if key in tree} | tree.get("model_cfg", tree)
        for key in ("embed_dim", "vision_cfg", "text_cfg"):
            if key not in tree:
                raise ValueError(f"no {key}")
        return tree
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"model.clip: {path}: not a readable open_clip config ({error})") from None


def _must_hold(path: str, config: dict[str, Any]) -> None:
    """Raise UserError for weights that are fewer than a configuration beside them says."""
    try:
        check_size_claims(config, read_weights(path)[0])
    except (ValueError, TypeError) as error:
        raise UserError(f"model.clip: {path}: not the weights of its configuration: {one_line(error)}") from None
