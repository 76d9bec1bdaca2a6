"""Stand for the towers of a frozen space that is known by vectors alone, model.clip=vectors:NAME.

Its configuration has `embed_dim`, D, and `space`, its name and identity.
"""

import sys
from typing import Any

from torch import Tensor, nn

from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.errors import UserError
from clip4vla.towers.build import build_clip
from clip4vla.towers.weights import check_size_claims


def is_space(clip: str) -> bool:
    """Tell whether `model.clip` names a space of vectors."""
    return clip.startswith(SPACE)


class NoTower(nn.Module):
    """Stands where a tower would be, `kind` text or vision, and refuses to encode."""

    context_length = sys.maxsize
    gives_words = False

    def __init__(self, kind: str, name: str):
        super().__init__()
        self.kind, self.name = kind, name

    def encode(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Raise UserError: texts have vectors only where they were computed elsewhere."""
        raise self._refusal()

    def forward(self, images: Tensor) -> Tensor:
        """Raise UserError: pictures have vectors only where they were computed elsewhere."""
        raise self._refusal()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do nothing: there are no activations."""

    def _refusal(self) -> UserError:
        return UserError(
            f"model.clip={self.name}: has no {self.kind} tower: only sounds can be encoded here; give vectors of what encodes "
            f"{self.kind} there"
        )


def build_towers(config: dict[str, Any], audio_tower: str) -> tuple[Any, Any]:
    """Build (text, vision), with random weights; a space has NoTower for both, so that model.audio_tower must name another."""
    if "space" not in config:
        built = build_clip(config)
        return built.text, built.visual
    name = config["space"]["name"]
    if audio_tower == "vision":
        raise UserError(f"model.audio_tower=vision: {name} has no vision tower to copy: name a ViT, as ViT-B-16")
    return NoTower("text", name), NoTower("vision", name)


def must_have_text(text: nn.Module, head: str) -> None:
    """Raise UserError for a head that would start from the text tower of a space."""
    if isinstance(text, NoTower):
        raise UserError(f"model.head={head}: starts from a text tower, and {text.name} has none: set global_global")


def check_claims(config: dict[str, Any], state: dict[str, Tensor], blocks: int, positions: int) -> None:
    """Raise ValueError for a configuration of more weights than there are (check_size_claims), or of a space of another width."""
    if "space" not in config:
        check_size_claims(config, state, blocks, positions)
    elif not any(config["embed_dim"] in value.shape for value in state.values()):
        raise ValueError(f"a space of width {config['embed_dim']!r:.20}, which none of its weights has")
