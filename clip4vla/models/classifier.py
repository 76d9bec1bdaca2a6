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
            f"{clip['id']}: its labels {'; '.join(labels)!r} are several classes: a baseline takes one for each clip; "
            "a trained head takes several with model.several_labels=true, classify.method=probe and zero_shot always"
        )
    return labels[0] if labels else ""


def known_labels(clip: dict[str, Any], cfg: ModelConfig) -> list[str]:
    """List the classes of cfg.labels that a clip's json names; UserError if it names several without cfg.several_labels."""
    named = labels_of(clip) if cfg.several_labels else [label_of(clip)]
    return [label for label in named if label in cfg.labels]


def in_words(label: str) -> str:
    """Spell a class such as door_wood_knock or ApplyEyeMakeup as a caption would."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


class Classifier(nn.Module):
    """Classifies y^g and z^g, concatenated as cfg.modalities says, zero where a clip lacks one, into the K cfg.labels."""

    def __init__(self, cfg: ModelConfig, dim: int):
        super().__init__()
        self.cfg, self.numbers = cfg, {label: i for i, label in enumerate(cfg.labels)}
        self.linear = nn.Linear(dim * len(cfg.modalities), len(cfg.labels))

    def forward(self, parts: list[fusion.PaddedSequence]) -> Tensor:
        """Compute logits (B, K) of parts (B, n, D).

        Unit vectors are scaled to entries of unit variance: those of length 1 would learn slowly.
        """
        pooled = [fusion.mean_pool_padded(part) * part.vectors.shape[-1] ** 0.5 for part in parts]
        return self.linear(torch.cat(pooled, 1).to(self.linear.weight.dtype)).float()

    def targets(self, batch: Batch, clips: list[dict[str, Any]]) -> Tensor:
        """Mark the classes (B, K) bool, on the CPU, that these json name; none where a clip has nothing to classify."""
        batch, media = batch.on_host, self.cfg.modalities
        there = (batch.has_frames & ("v" in media)) | (batch.has_audio & ("a" in media))
        marks = torch.zeros(len(clips), len(self.numbers), dtype=torch.bool)
        for row, clip in zip(marks, clips, strict=True):
            row[[self.numbers[label] for label in known_labels(clip, self.cfg)]] = True
        return marks & there[:, None]

    def nll(self, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """Compute the negative log-likelihood (B,) of the clips' labels; of mixed sounds, of both labels by their shares.

        Of several classes a clip: the mean over all classes of the binary cross entropies, as AudioSet's models are trained
        (Kong et al. 2020, PANNs). 0 for a clip without any of the classes.
        """

        def of(clips: list[dict[str, Any]]) -> Tensor:
            marks = upload(self.targets(batch, clips), logits.device)
            taught = marks.any(1)
            if self.cfg.several_labels:
                wanted = marks.to(logits.dtype) * (1 - smoothing) + smoothing / 2
                each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
                return each.masked_fill(~taught, 0)
            right = marks.int().argmax(1).masked_fill(~taught, -1)
            return F.cross_entropy(logits, right, reduction="none", label_smoothing=smoothing, ignore_index=-1)

        if batch.share is None:
            return of(batch.meta)
        return batch.share * of(batch.meta) + (1 - batch.share) * of(batch.others)
