"""Take text and vision towers from a model of transformers that has get_text_features and get_image_features: `hf:`."""

import contextlib
import copy
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils.rnn import pad_sequence

from clip4vla.errors import UserError, one_line
from clip4vla.towers.text import recompute_blocks
from clip4vla.towers.transformers_folder import (
    PREFIX,
    SMALL,
    cleaned,
    find_folder,
    model_class,
    read_json,
    read_pictures,
    read_state,
    read_tokenizer,
    weights_bytes,
)

TEXT = ("text_model", "text_projection")  # the parts of a model that its get_text_features runs
VISION = ("vision_model", "image_model", "visual_projection", "image_projection")
FULL_LENGTH = ("siglip", "siglip2")  # trained with captions padded to one length, and no mask: they pool the last place
TENSORS = 20_000  # most of a model


class TransformersText(nn.Module):
    """Encodes texts as the get_text_features of a transformers model does; holds that model's text parts alone.

    pad, end: the numbers of the padding token and of the one that ends a text; end None: the tokenizer has none.
    """

    def __init__(self, model: Any, pad: int, end: int | None, most: int):
        super().__init__()
        self.model = _part(model, TEXT)
        self.pad, self.end = pad, end
        self.full_length = model.config.model_type in FULL_LENGTH
        self.context_length = min(most, _positions(self.model.text_model))
        self.vocab_size: int = model.config.text_config.vocab_size

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode token numbers (B, L) to (sentence vectors (B, D), outputs of all tokens (B, L, D) or None).

        None: the model has no linear projection, which could be of each token.
        """
        length = tokens.shape[1]
        if self.full_length:
            tokens = F.pad(tokens, (0, self.context_length - length), value=self.pad)
            outputs = self.model.get_text_features(input_ids=tokens)
        else:
            mask = self.word_mask(tokens).long()
            if tokens.is_meta:  # a mask of tokens is read, which has no numbers here; of pairs of tokens it is not
                mask = mask.to(next(self.model.parameters()).dtype)[:, None, None].expand(-1, -1, length, -1)
            outputs = self.model.get_text_features(input_ids=tokens, attention_mask=mask)
        project = self.projection()
        words = project(outputs.last_hidden_state[:, :length]) if project is not None else None
        return _vectors(outputs), words

    @property
    def gives_words(self) -> bool:
        """Tell whether encode gives the outputs of all tokens."""
        return self.projection() is not None

    def projection(self) -> nn.Linear | None:
        """Return the layer that projects a token's output to D, if it is one that can be run on each token."""
        layer = getattr(self.model, "text_projection", getattr(self.model.text_model, "head", None))
        return layer if isinstance(layer, nn.Linear) else None

    def word_mask(self, tokens: Tensor) -> Tensor:
        """Mark which of token numbers (B, L) are words, the first end token included, (B, L) bool."""
        if self.end is None:
            return tokens != self.pad
        ends = tokens == self.end
        return (ends.cumsum(1) - ends.long() == 0) & ((tokens != self.pad) | ends | ends.any(1, keepdim=True))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, or keep them."""
        recompute_blocks(self.model, enable)


class TransformersVision(nn.Module):
    """Encodes pictures as the get_image_features of a transformers model does; holds that model's vision parts alone."""

    def __init__(self, model: Any, image_size: tuple[int, int]):
        super().__init__()
        self.model = _part(model, VISION)
        self.image_size = image_size
        self.patch: int | None = model.config.vision_config.patch_size if model.config.model_type == "siglip2" else None

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised pictures (F, 3, H, W) to vectors (F, D), not normalised."""
        if self.patch is None:
            return _vectors(self.model.get_image_features(pixel_values=images))
        count, channels, *size = images.shape  # SigLIP 2's of any aspect ratio takes patches, and how many there are
        rows, columns = (edge // self.patch for edge in size)
        patches = images.reshape(count, channels, rows, self.patch, columns, self.patch).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(count, rows * columns, -1)  # F P (patch patch 3)
        there = torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device)
        if images.is_meta:
            there = there.to(images.dtype)[:, None, None]  # as of the text's
        shapes = torch.tensor([[rows, columns]] * count)  # on the CPU, where it is read
        words = {"pixel_values": patches, "pixel_attention_mask": there, "spatial_shapes": shapes}
        return _vectors(self.model.get_image_features(**words))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, or keep them."""
        recompute_blocks(self.model, enable)


class Towers(nn.Module):
    """Holds both towers of a transformers model, as `.text` and `.visual`."""

    def __init__(self, model: Any, config: dict[str, Any]):
        super().__init__()
        height, width = config["pictures"]["size"]
        self.text = TransformersText(model, **config["tokens"])
        self.visual = TransformersVision(model, (height, width))


def _part(model: nn.Module, names: tuple[str, ...]) -> Any:
    """Copy a model with those of its parts, which are shared, that are named, and without parameters of its own."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model.named_children() if name in names}
    part._parameters = {}  # logit_scale, logit_bias
    return part


def _vectors(outputs: Any) -> Tensor:
    """Return the vectors (n, D) among what get_*_features gives; FLAVA projects all places: its vector is the first."""
    vectors = outputs.pooler_output
    return vectors[:, 0] if vectors.ndim == 3 else vectors


def _positions(text: nn.Module) -> int:
    """Count the tokens that a text model has positions for; RoBERTa's begin after its padding number."""
    for name, module in text.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"position_embeddings?$", name):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return sys.maxsize  # relative positions: the tokenizer's limit alone


def is_named(clip: str) -> bool:
    """Tell whether `model.clip` names a folder or hub id of transformers: hf:FOLDER_OR_ID."""
    return clip.startswith(PREFIX)


def resolve(clip: str) -> dict[str, Any]:
    """Collect all that the towers of hf:FOLDER_OR_ID are built from: its configuration, token numbers, pictures, D."""
    with _in_one_line(clip):
        folder = find_folder(clip, SMALL)
        tree = cleaned(read_json(folder, "config.json"))
        full = read_tokenizer(clip)
        end = full.eos_token_id
        pad = full.pad_token_id if full.pad_token_id is not None else end
        if pad is None:
            raise ValueError("its tokenizer has no padding token")
        config = {"transformers": tree, "tokens": {"pad": pad, "end": end, "most": full.model_max_length}}
        config["pictures"] = read_pictures(folder)
        with torch.device("meta"):
            towers = build(config)
            if len(full) > towers.text.vocab_size:
                raise ValueError(f"its tokenizer has {len(full)} tokens, its text tower {towers.text.vocab_size}")
            wanted, room = sum(value.numel() for value in towers.parameters()), weights_bytes(folder)
            if room and wanted > room:
                raise ValueError(f"its configuration is of {wanted} weights, its files have {room} bytes")
            config["tokens"]["most"] = towers.text.context_length
            config["embed_dim"] = _dim(towers.eval())
        return config


def _dim(towers: Towers) -> int:
    """Run a tower on torch's meta device for D; ValueError if the vectors of texts and pictures differ in size."""
    text = towers.text.projection()
    if towers.visual.patch is None:
        dim = towers.visual(torch.zeros(1, 3, *towers.visual.image_size)).shape[1]
    else:  # SigLIP 2's of any aspect ratio wants to read how many patches there are, which that device does not hold
        dim = _vectors(towers.text.model.get_text_features(torch.ones(1, 2, dtype=torch.int64))).shape[1]
    if text is not None and text.out_features != dim:
        raise ValueError(f"its vectors of texts have {text.out_features} numbers, of pictures {dim}")
    return dim


def build(config: dict[str, Any]) -> Towers:
    """Build randomly initialised towers of what `resolve` collected; ValueError for what is no such model."""
    with _at_most(TENSORS):
        kind, made = model_class(config["transformers"])
        return Towers(kind(made), config)


def check_size_claims(config: dict[str, Any], state: dict[str, Tensor], blocks: int = 0, positions: int = 0) -> None:
    """Raise ValueError for towers of more weights than there are; blocks, positions: of a head of width D."""
    with torch.device("meta"):
        towers = build(config)
    dim = config["embed_dim"]
    wanted = dim * (12 * dim * blocks + positions) + sum(value.numel() for value in towers.parameters())
    numbers = sum(value.numel() for value in state.values())
    if wanted > numbers or blocks > len(state):
        raise ValueError(f"towers of {wanted} weights, the file has {numbers}")


def load_weights(towers: Towers, clip: str) -> None:
    """Fill towers, which may be on torch's meta device, with the weights of hf:FOLDER_OR_ID; no code in them is run."""
    with _in_one_line(clip):
        folder = find_folder(clip, SMALL)
        kind, made = model_class(cleaned(read_json(folder, "config.json")))
        model, account = kind.from_pretrained(
            None, config=made, state_dict=read_state(clip), dtype=torch.float32, output_loading_info=True
        )
        ours = {*_part(model, TEXT).state_dict(), *_part(model, VISION).state_dict()}
        missing = sorted(ours & {*account["missing_keys"]})
        if missing:
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
        towers.text.model.load_state_dict(_part(model, TEXT).state_dict(), assign=True)
        towers.visual.model.load_state_dict(_part(model, VISION).state_dict(), assign=True)


@functools.cache  # one for each length: the tokenizer of a library holds the length that it cuts at
def tokenizer(clip: str, max_tokens: int, fixed: bool = False) -> Callable[[list[str]], Tensor]:
    """Make a function of B strings to token numbers (B, L); captions are cut to max_tokens, and keep their end token.

    L is that of the longest, or max_tokens if `fixed`.
    """
    with _in_one_line(clip):
        full = read_tokenizer(clip)
    pad = full.pad_token_id if full.pad_token_id is not None else full.eos_token_id

    def tokenize(texts: list[str]) -> Tensor:
        rows = full(texts, truncation=True, max_length=max_tokens)["input_ids"]
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
        return F.pad(tokens, (0, (max_tokens - tokens.shape[1]) * fixed), value=pad)

    tokenize([""])  # sets the length to cut at: later calls, from several threads, then change nothing in it
    return tokenize


@contextlib.contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Raise ValueError as soon as more parameters are made in the block: a million blocks would fill the memory."""
    made = itertools.count(1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(made) > tensors:
            raise ValueError(f"more than {tensors} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _in_one_line(clip: str) -> Iterator[None]:
    """Turn what transformers, tokenizers, the hub and torch raise in the block into a UserError that names `clip`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.clip={clip}: {one_line(error, 300)}") from None
