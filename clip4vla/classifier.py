"""The head that names a clip's class: a linear layer on what it shows and sounds like (fine-tuning of Table 6's task)."""

from typing import Any

import torch
from torch import Tensor, nn

from clip4vla import fusion
from clip4vla.config import ModelConfig, UserError


def label_of(clip: dict[str, Any]) -> str:
    """The class that a clip's json names, "" if none; UserError if it names several (AudioSet's, joined by ;)."""
    label = clip.get("label") or ""
    if ";" in label:
        raise UserError(
            f"{clip['id']}: its label {label!r} names several classes: classification knows one for each clip"
        )
    return label


class Classifier(nn.Module):
    """y^g and z^g beside each other, as cfg.modalities says, zero where a clip lacks one; K classes, those of cfg.labels."""

    def __init__(self, cfg: ModelConfig, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim * len(cfg.modalities), len(cfg.labels))

    def forward(self, parts: list[fusion.Sequence]) -> Tensor:
        """Logits (B, K). Unit vectors are scaled to entries of unit variance: those of length 1 would learn slowly."""
        pooled = [fusion.pooled(part) * part.vectors.shape[-1] ** 0.5 for part in parts]
        return self.linear(torch.cat(pooled, 1).to(self.linear.weight.dtype)).float()
