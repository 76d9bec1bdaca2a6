"""Convert checkpoints of the authors' code, one flat state dict, to our names and back: docs/weights.md."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from clip4vla.config import ImportConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.towers.weights import check_size_claims, infer_config

State = dict[str, Tensor]
NAMES = {  # beginnings of our keys and of theirs
    "text.": "clip.",
    "vision.": "clip.visual.",
    "audio.type_embedding": "audio.visual.control_embedding",  # row 0 VB, row 1 NB
    "audio.trunk.": "audio.visual.",
    "head.encoder.blocks.": "cross.transformer.resblocks.",
    "head.encoder.positional_embedding": "cross.positional_embedding",
    "head.encoder.type_embedding": "cross.token_type_embeddings.weight",
    "head.score.": "similarity_dense.",
    "head.dense.": "cls.predictions.transform.dense.",
    "head.norm.": "cls.predictions.transform.LayerNorm.",
    "head.bias": "cls.predictions.bias",
}
WORD, EMBEDDED, DECODER = "text.token_embedding.weight", "clip.token_embedding.weight", "cls.predictions.decoder.weight"
SCALE, POSITIONS = "clip.logit_scale", "head.encoder.positional_embedding"
TOKENS, EXTRA = 49408, 3  # of OpenAI's tokenizer, and the rows that the authors added
LONGER = {  # theirs may have more rows than ours
    WORD: "the others are no words of the tokenizer",
    "head.bias": "the others are no words of the tokenizer",
    POSITIONS: "the others lie after model.max_tokens + model.max_frames + spectrogram.max_segments",
}
HEADS = {
    "cross.": ("global_local", "local_local", "captioner"),
    "similarity_dense.": ("local_local",),
    "cls.predictions.": ("captioner",),
}
LEFT = {
    SCALE: "the authors' code multiplies by a fixed 100: model.temperature",
    "clip.input_resolution": "known from the weights",
    "clip.context_length": "known from the weights",
    "clip.vocab_size": "known from the weights",
}


@dataclass
class KeyReport:
    """List what became of every key of a checkpoint."""

    used: dict[str, str] = field(default_factory=dict)  # where it went
    left: dict[str, str] = field(default_factory=dict)  # why
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"used       {key} -> {ours}" for key, ours in self.used.items()]
        lines += [f"left       {key}: {why}" for key, why in self.left.items()]
        lines += [f"not placed {key}" for key in self.unknown]
        return "\n".join([*lines, self.sum()])

    def sum(self) -> str:
        """Return the counts in one line."""
        return f"{len(self.used)} keys used, {len(self.left)} left, {len(self.unknown)} not placed"


def is_official(state: State) -> bool:
    """Tell whether these are the keys of a CLIP4VLA and not of a CLIP."""
    return any(key.startswith(("clip.", "audio.visual.")) for key in state)


def settings(state: State, words: Sequence[str], where: str) -> ImportConfig:
    """Load preset official, the head that is there, and KEY=VALUE words.

    UserError if two heads are there and none is named.
    """
    given = ["preset=official"]
    if blocks := {key.split(".")[3] for key in state if key.startswith("cross.transformer.resblocks.")}:
        given += [f"model.head_layers={len(blocks)}", "spectrogram.max_segments=6"]  # as in their fine-tuning
    if not any(word.startswith("model.head=") for word in words):
        given.append(f"model.head={_head_of(state, where)}")
    return load(ImportConfig, None, [*given, *words])


def _head_of(state: State, where: str) -> str:
    there = [heads[0] for start, heads in HEADS.items() if any(key.startswith(start) for key in state)]
    if {"local_local", "captioner"} <= set(there):
        raise UserError(
            f"{where}: has the weights of several heads: choose model.head=local_local, global_local, captioner or "
            "global_global"
        )
    return there[-1] if there else "global_global"


def from_official(state: State, cfg: ImportConfig, where: str, allow_unknown: bool = False) -> tuple[Model, KeyReport]:
    """Build the model of a state dict in fp32, in evaluation mode; return it and what became of each key.

    Raises UserError, with `where`, for keys that are missing, have another shape, or, unless allowed, are unknown.
    """
    config = infer_config({key[5:]: v for key, v in state.items() if key.startswith("clip.")}, where)
    config["text_cfg"]["vocab_size"] = min(config["text_cfg"]["vocab_size"], TOKENS)
    if cfg.model.head == "classifier":
        raise UserError(
            "model.head=classifier: the authors' cls_linear is on features of their own; import the towers, then train one"
        )
    try:
        check_size_claims(config, state, 0 if cfg.model.head == "global_global" else cfg.model.head_layers)
    except ValueError as error:
        raise UserError(f"{where}: lacks the keys of model.head_layers={cfg.model.head_layers}: {error}") from None
    model = Model(config | {"quick_gelu": True}, cfg.model, cfg.spectrogram, cfg.frames)
    model.must_have_positions()
    table, ours, account = names(model), model.state_dict(), KeyReport()
    if missing := [key for key in table.values() if key not in state]:
        raise UserError(
            f"{where}: lacks {len(missing)} of the keys of model.head={cfg.model.head}: {', '.join(missing[:3])}, ..."
        )
    for key, theirs in table.items():
        ours[key], rows = _fitting(state[theirs], ours[key].shape, key, f"{where}: {theirs}")
        account.used[theirs] = key + rows
    for key in sorted(state.keys() - account.used.keys()):
        if why := _why_left(key, cfg.model.head):
            account.left[key] = why
        else:
            account.unknown.append(key)
    if account.unknown and not allow_unknown:
        raise UserError(
            f"{where}: {len(account.unknown)} keys have no place: {', '.join(account.unknown[:3])}, ...; "
            "leave them out with --allow-unknown"
        )
    model.load_state_dict(ours)
    return model.eval(), account


def names(model: Model) -> dict[str, str]:
    """Return {our key: theirs} of all that theirs hold: not the temperature, nor a classifier."""
    keys = model.state_dict()
    table = {key: key.replace(our, their, 1) for our, their in NAMES.items() for key in keys if key.startswith(our)}
    if model.cfg.head == "captioner":
        table[WORD] = DECODER  # tied: one tensor there, which takes the value that is loaded last
    return table


def to_official(model: Model, like: State | None = None) -> tuple[State, KeyReport]:
    """Return a model under the authors' names, fp32, and a KeyReport; in the report their keys and ours change places.

    like: another state dict, which gives what the model lacks: rows, logit_scale, other heads. Without it the rows are 0.
    Raises UserError for a model that would not come back as it is, such as one without QuickGELU.
    """
    like, account, ours = like or {}, KeyReport(), model.state_dict()
    state = {SCALE: model.logit_scale.detach()[0], **like}
    for key, theirs in names(model).items():
        state[theirs] = _lengthened(ours[key].float(), like.get(theirs), model, key)
        account.used[key] = theirs
    if DECODER in account.used.values():
        state[EMBEDDED] = state[DECODER].clone()
    account.left = {key: "has no place there" for key in ours if key not in account.used}
    _must_come_back(model, state)
    return state, account


def _must_come_back(model: Model, state: State) -> None:
    if model.cfg.audio_tower != "vision":
        raise UserError("these towers are not as OpenAI's: the authors' code cannot run them")
    if not model.clip_config.get("quick_gelu"):
        raise UserError("the authors' code runs QuickGELU, and this model was trained with GELU")
    head = "global_global" if model.cfg.head == "classifier" else model.cfg.head
    cfg = ImportConfig(model=replace(model.cfg, head=head), spectrogram=model.spectrogram, frames=model.frames)
    back, _ = from_official(state, cfg, "under the authors' names", allow_unknown=True)
    there, table = back.state_dict(), names(model)
    same = all(torch.equal(there[key], value.float()) for key, value in model.state_dict().items() if key in table)
    if not same or _heads(back) != _heads(model):
        raise UserError("these towers are not as OpenAI's: the authors' code cannot run them")


def _heads(model: Model) -> list[int]:
    return [part.num_heads for part in model.modules() if isinstance(part, nn.MultiheadAttention)]


def _fitting(theirs: Tensor, shape: torch.Size, key: str, where: str) -> tuple[Tensor, str]:
    """Return (the rows that we have, which those are if not all); UserError for another shape."""
    longer = key in LONGER and theirs.ndim == len(shape) and theirs.shape[1:] == shape[1:] and len(theirs) > shape[0]
    if theirs.shape != shape and not longer:
        hint = "; lower model.max_tokens, model.max_frames or spectrogram.max_segments" * (key == POSITIONS)
        raise UserError(f"{where} is {tuple(theirs.shape)}, the model needs {tuple(shape)}{hint}")
    if not longer:
        return theirs.float(), ""
    return theirs[: shape[0]].float(), f" (the first {shape[0]} of {len(theirs)} rows: {LONGER[key]})"


def _lengthened(value: Tensor, like: Tensor | None, model: Model, key: str) -> Tensor:
    """Append rows until there are as many as the authors' code wants, or as `like` has."""
    if key not in LONGER:
        return value
    extra = torch.zeros(EXTRA if len(value) == TOKENS else 0, *value.shape[1:])
    if key == POSITIONS:
        extra = torch.zeros(max(0, model.text.context_length - len(value)), *value.shape[1:])
    return torch.cat([value, extra if like is None else like[len(value) :].float()])


def _why_left(key: str, fusion: str) -> str:
    """Say why a key that was not used is left, "" if it is unknown."""
    if key.startswith("cls_linear."):
        return "the authors' classifier, on features of their own; launch/finetune_classification.py trains ours"
    if key == EMBEDDED and fusion == "captioner":
        return f"tied to {DECODER}"
    start = next((start for start in HEADS if key.startswith(start)), "")
    if start and fusion not in HEADS[start]:
        return f"of a head that model.head={fusion} has not"
    if key == DECODER:
        return f"tied to {EMBEDDED}"
    return LEFT.get(key, "")
