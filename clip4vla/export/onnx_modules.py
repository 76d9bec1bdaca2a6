"""Give towers and heads the inputs and outputs that they have in ONNX files: plain tensors, with masks in place of lengths.

B clips or captions, F frames, L tokens, n vectors of a kind (the most of any clip), D width of the common space, V tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from clip4vla.models import fusion
from clip4vla.models.captioner import Captioner
from clip4vla.models.fusion import PaddedSequence
from clip4vla.models.model import Model
from clip4vla.towers.text import encode_text
from clip4vla.towers.vision import encode_images

KINDS = {"v": (fusion.VISION, "frames"), "a": (fusion.AUDIO, "segments")}


class TextModule(nn.Module):
    """Encodes tokens (B, L) int64 to sentence vectors (B, D) and, where a head reads them, outputs of all tokens (B, L, D)."""

    def __init__(self, model: Model):
        super().__init__()
        self.tower, self.all_words = model.text, reads_words(model)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode the tokens."""
        sentence, words = encode_text(self.tower, tokens)
        return (sentence,) if words is None or not self.all_words else (sentence, words)


class VisionModule(nn.Module):
    """Encodes pictures (F, 3, H, W), RGB in 0..255, to vectors (F, D); their mean and deviation are in the module."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model):
        super().__init__()
        self.tower = model.vision
        trunk: Any = getattr(model.vision, "trunk", None)
        if getattr(
            trunk, "dynamic_img_size", False
        ):  # its positions are resized in each pass, which ONNX does otherwise
            self.tower = copy.deepcopy(model.vision)
            self.tower.trunk.set_input_size(img_size=model.vision.image_size)
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (model.pictures.mean, model.pictures.std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Encode the pictures."""
        return (encode_images(self.tower, (images - self.mean) / self.std),)


class HeadModule(nn.Module):
    """Runs a head on vectors of frames, segments and words, not normalised, each (B, n, D) with a mask (B, n) bool.

    global_local   frames, segments -> media (B, D)
    local_local    words of C captions, frames and segments of B clips -> scores (C, B), to be divided by the temperature
    captioner      words of B captions, frames and segments of their clips -> logits (B, L, V) of the token after each word
    classifier     frames, segments -> logits (B, K)
    """

    def __init__(self, model: Model):
        super().__init__()
        self.head, self.text = model.head, model.text
        self.kinds = ([(fusion.TEXT, "words")] if model.cfg.head in OF_WORDS else []) + [
            KINDS[kind] for kind in "va" if kind in model.cfg.modalities
        ]
        self.output = {"global_local": "media", "local_local": "scores"}.get(model.cfg.head, "logits")

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """Run the head; inputs: of each of self.kinds vectors and mask."""
        pairs = zip(inputs[::2], inputs[1::2], strict=True)
        parts = [PaddedSequence(kind, *pair) for (kind, _), pair in zip(self.kinds, pairs, strict=True)]
        if isinstance(self.head, fusion.LocalToLocal):
            return (self.head._score_tile(parts[0], parts[1:], first_only=False),)  # torch cannot export the cut
        if isinstance(self.head, Captioner):
            return (self.head.scores(self.head.encode_words(parts[0], parts[1:]), self.text.token_embedding.weight),)
        return (self.head(parts),)


OF_WORDS = ("local_local", "captioner")


def reads_words(model: Model) -> bool:
    """Tell whether the model's head reads the text tower's outputs of all tokens."""
    return model.cfg.head == "captioner" or (model.cfg.head, model.cfg.text_tokens) == ("local_local", "all")
