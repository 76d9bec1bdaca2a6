"""Classify clips by a linear layer on their visual and audio vectors (fine-tuning of Table 6's task); names of classes."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip4vla.config import ModelConfig
from clip4vla.data.batch import Batch, upload
from clip4vla.data.sample_metadata import labels_of
from clip4vla.errors import UserError
from clip4vla.models import fusion


def label_of(clip: dict[str, Any]) -> str:
    """Return the class that a clip's json names, "" if none; UserError if it names several."""
    labels = labels_of(clip)
    if len(labels) > 1:
        raise UserError(
            f"{clip['id']}: its labels {'; '.join(labels)!r} are several classes: a trained head and a baseline know one for "
            "each clip; classify.method=probe and zero_shot take several"
        )
    return labels[0] if labels else ""


def in_words(label: str) -> str:
    """Spell a class such as door_wood_knock or ApplyEyeMakeup as a caption would."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


class Classifier(nn.Module):
    """Classifies y^g and z^g, concatenated as cfg.modalities says, zero where a clip lacks one, into the K cfg.labels."""

    def __init__(self, cfg: ModelConfig, dim: int):
        super().__init__()
        self.modalities, self.numbers = cfg.modalities, {label: i for i, label in enumerate(cfg.labels)}
        self.linear = nn.Linear(dim * len(cfg.modalities), len(cfg.labels))

    def forward(self, parts: list[fusion.PaddedSequence]) -> Tensor:
        """Compute logits (B, K) of parts (B, n, D).

        Unit vectors are scaled to entries of unit variance: those of length 1 would learn slowly.
        """
        pooled = [fusion.mean_pool_padded(part) * part.vectors.shape[-1] ** 0.5 for part in parts]
        return self.linear(torch.cat(pooled, 1).to(self.linear.weight.dtype)).float()

    def targets(self, batch: Batch, clips: list[dict[str, Any]]) -> Tensor:
        """Number the class that these json name, (B,) on the CPU; -1: none of cfg.labels, or a clip has nothing to classify."""
        batch = batch.on_host
        there = (batch.has_frames & ("v" in self.modalities)) | (batch.has_audio & ("a" in self.modalities))
        named = torch.tensor([self.numbers.get(label_of(clip), -1) for clip in clips])
        return named.masked_fill(~there, -1)

    def nll(self, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """Compute the negative log-likelihood (B,) of the clips' labels; of mixed sounds, of both labels by their shares."""

        def of(clips: list[dict[str, Any]]) -> Tensor:
            right = upload(self.targets(batch, clips), logits.device)
            return F.cross_entropy(logits, right, reduction="none", label_smoothing=smoothing, ignore_index=-1)

        if batch.share is None:
            return of(batch.meta)
        return batch.share * of(batch.meta) + (1 - batch.share) * of(batch.others)
