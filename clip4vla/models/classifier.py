"""Classify clips by a linear layer on their visual and audio vectors (fine-tuning of Table 6's task); names of classes."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from clip4vla.config import ModelConfig
from clip4vla.errors import UserError
from clip4vla.models import fusion


def label_of(clip: dict[str, Any]) -> str:
    """Return the class that a clip's json names, "" if none; UserError if it names several (AudioSet's, joined by ;)."""
    label = clip.get("label") or ""
    if ";" in label:
        raise UserError(
            f"{clip['id']}: its label {label!r} names several classes: classification knows one for each clip"
        )
    return label


def in_words(label: str) -> str:
    """Spell a class such as door_wood_knock or ApplyEyeMakeup as a caption would."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


class Classifier(nn.Module):
    """Classifies y^g and z^g, concatenated as cfg.modalities says, zero where a clip lacks one, into the K cfg.labels."""

    def __init__(self, cfg: ModelConfig, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim * len(cfg.modalities), len(cfg.labels))

    def forward(self, parts: list[fusion.PaddedSequence]) -> Tensor:
        """Compute logits (B, K) of parts (B, n, D).

        Unit vectors are scaled to entries of unit variance: those of length 1 would learn slowly.
        """
        pooled = [fusion.mean_pool_padded(part) * part.vectors.shape[-1] ** 0.5 for part in parts]
        return self.linear(torch.cat(pooled, 1).to(self.linear.weight.dtype)).float()
