"""Stand for the towers of a frozen space that is known by vectors alone, model.clip=vectors:NAME, and start its audio tower.

Its configuration has `embed_dim`, D, `space`, its name and identity, and vision_cfg and quick_gelu of the audio tower.
"""

import sys
from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.errors import UserError
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config


def is_space(clip: str) -> bool:
    """Tell whether `model.clip` names a space of vectors."""
    return clip.startswith(SPACE)


class NoTower(nn.Module):
    """Stands where a tower would be, `kind` text or vision, and refuses to encode."""

    context_length = sys.maxsize

    def __init__(self, kind: str, name: str):
        super().__init__()
        self.kind, self.name = kind, name

    def encode(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Raise UserError: texts have vectors only where they were computed elsewhere."""
        raise self._refusal()

    def forward(self, images: Tensor) -> Tensor:
        """Raise UserError: pictures have vectors only where they were computed elsewhere."""
        raise self._refusal()

    def _refusal(self) -> UserError:
        return UserError(
            f"model.clip={self.name}: has no {self.kind} tower: only sounds can be encoded here; give vectors of what encodes "
            f"{self.kind} there"
        )


def build_towers(config: dict[str, Any]) -> tuple[Any, Any, VisionTransformer]:
    """Build (text, vision, what the audio tower starts as), with random weights; a space has NoTower for the first two."""
    if "space" in config:
        name = config["space"]["name"]
        return NoTower("text", name), NoTower("vision", name), build_audio_start(config)
    built = build_clip(config)
    return built.text, built.visual, built.visual


def must_have_text(text: nn.Module, head: str) -> None:
    """Raise UserError for a head that would start from the text tower of a space."""
    if isinstance(text, NoTower):
        raise UserError(f"model.head={head}: starts from a text tower, and {text.name} has none: set global_global")


def with_audio_tower(space: dict[str, Any], audio_tower: str) -> dict[str, Any]:
    """Complete a space's configuration by that of the audio tower, a ViT of open_clip that model.audio_tower names."""
    if audio_tower == "vision":
        raise UserError(
            f"model.audio_tower=vision: {space['space']['name']} has no vision tower to start from: name a ViT, as ViT-B-16"
        )
    config = resolve_clip_config(audio_tower)
    return space | {"vision_cfg": config["vision_cfg"], "quick_gelu": config.get("quick_gelu", False)}


def build_audio_start(config: dict[str, Any]) -> VisionTransformer:
    """Build the vision transformer, with random weights, that a space's audio tower starts as; D is its projection's width."""
    sizes = CLIPVisionCfg(**config["vision_cfg"])
    plain = isinstance(sizes.layers, int) and not sizes.timm_model_name
    tower = _build_vision_tower(config["embed_dim"], sizes, config.get("quick_gelu", False)) if plain else None
    if not isinstance(tower, VisionTransformer):
        raise UserError("model.audio_tower: needs a ViT of open_clip, such as ViT-B-16")
    return tower


def check_space_claims(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raise ValueError for an audio tower of more weights than there are: what is built of it could fill any memory."""
    if CLIPVisionCfg(**config["vision_cfg"]).layers > len(state):
        raise ValueError(f"an audio tower of more blocks than the file's {len(state)} tensors")
    with torch.device("meta"):  # counts without memory
        wanted = sum(value.numel() for value in build_audio_start(config).parameters())
    if wanted > (numbers := sum(value.numel() for value in state.values())):
        raise ValueError(f"towers of {wanted} weights, the file has {numbers}")
