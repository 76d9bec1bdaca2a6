"""Find the open_clip configuration of the towers that `model.clip` names."""

import difflib
from pathlib import Path
from typing import Any

import open_clip

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError
from clip4vla.towers import transformers_clip
from clip4vla.towers.weights import WEIGHTS, infer_config, read_weights

TOWER_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")


def resolve_clip_config(clip: str, quick_gelu: str = "auto") -> dict[str, Any]:
    """Find open_clip's configuration of a CLIP named as in `model.clip`; raises UserError if there is no such model."""
    if transformers_clip.is_named(clip):
        return transformers_clip.resolve(clip)
    if clip.endswith(WEIGHTS):
        state, jit = read_weights(clip)
        config = infer_config(state, clip)
        config["quick_gelu"] = jit if quick_gelu == "auto" else quick_gelu == "yes"
        return config
    if clip.endswith(".json"):
        try:
            return {key: value for key, value in parse_json(Path(clip).read_bytes()).items() if key in TOWER_KEYS}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"model.clip: {clip}: not a readable open_clip config ({error})") from None
    config = open_clip.get_model_config(clip.partition("/")[0])
    if config is None:
        near = difflib.get_close_matches(clip, open_clip.list_models(), n=1, cutoff=0)
        raise UserError(f"model.clip: open_clip knows no model {clip!r} (nearest: {near[0]}), and no such file exists")
    trained_with = open_clip.get_pretrained_cfg(*clip.partition("/")[::2]).get("quick_gelu")  # OpenAI's: yes
    if quick_gelu != "auto" or trained_with is not None:
        config["quick_gelu"] = trained_with if quick_gelu == "auto" else quick_gelu == "yes"
    return {key: config[key] for key in TOWER_KEYS if key in config}
