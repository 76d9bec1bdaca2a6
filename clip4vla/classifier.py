"""What names a clip's class: a linear layer on what it shows and sounds like (fine-tuning of Table 6's task), or sentences."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip4vla import fusion
from clip4vla.config import ModelConfig, UserError

if TYPE_CHECKING:
    from clip4vla.model import Model


def label_of(clip: dict[str, Any]) -> str:
    """The class that a clip's json names, "" if none; UserError if it names several (AudioSet's, joined by ;)."""
    label = clip.get("label") or ""
    if ";" in label:
        raise UserError(
            f"{clip['id']}: its label {label!r} names several classes: classification knows one for each clip"
        )
    return label


def in_words(label: str) -> str:
    """door_wood_knock and ApplyEyeMakeup as a caption would say them."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


def class_vectors(
    model: "Model", tokenize: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit vectors (K, D): of each class the mean over its sentences, each brought to unit length first."""
    texts = [template.replace("{}", in_words(label)) for label in classes for template in templates]
    sentences = model.sentence_vectors(texts, tokenize)
    return F.normalize(sentences.view(len(classes), len(templates), -1).mean(1), dim=-1)


class Classifier(nn.Module):
    """y^g and z^g beside each other, as cfg.modalities says, zero where a clip lacks one; K classes, those of cfg.labels."""

    def __init__(self, cfg: ModelConfig, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim * len(cfg.modalities), len(cfg.labels))

    def forward(self, parts: list[fusion.Sequence]) -> Tensor:
        """Logits (B, K). Unit vectors are scaled to entries of unit variance: those of length 1 would learn slowly."""
        pooled = [fusion.pooled(part) * part.vectors.shape[-1] ** 0.5 for part in parts]
        return self.linear(torch.cat(pooled, 1).to(self.linear.weight.dtype)).float()
