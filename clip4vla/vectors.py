"""Frozen vectors: what the text and vision towers give for a shard folder, made once by data_prep/embed.py.

FOLDER/clip/ is a shard folder itself: a tar for each shard, of the same name, with the same keys in the same order. Its only
member KEY.clip.f16 is little-endian float16, (captions + n_frames) x D: every caption's vector, then every frame's, of unit
length. index.json names the towers (their identity) and, for each tar, the shard it belongs to (`of`, that one's sha256).
"""

import hashlib
import itertools
import json
from typing import Any

import torch

from clip4vla import storage
from clip4vla.config import RunConfig, UserError
from clip4vla.model import Model
from clip4vla.shards import INDEX, ShardFolder

FOLDER = "clip"
MEMBER = "clip.f16"
REMEDY = "run data_prep/embed.py again, or set data.vectors=off"


def describe(model: Model) -> dict[str, Any]:
    """The fingerprint of the vectors that a model's text and vision towers give."""
    made = {"identity": identity(model), "name": model.cfg.clip, "dim": model.clip_config["embed_dim"]}
    return {"clip": made | {"max_tokens": model.cfg.max_tokens}}


def identity(model: Model) -> str:
    """sha256 over all that decides the vectors: both towers' structure and weights (as fp32), image statistics, max_tokens."""
    settings = [model.clip_config, model.image_statistics, model.cfg.max_tokens]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tower in (model.text, model.vision):
        for name, value in tower.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def open_vectors(folders: list[ShardFolder], cfg: RunConfig, model: Model) -> list[ShardFolder] | None:
    """The vectors of each folder, or None where data.vectors and the towers of this run say that they are not used.

    The model's weights must not be rounded yet. Raises UserError for vectors of other towers or of other shards.
    """
    reason = obstacle(folders, cfg, model)
    if reason and cfg.data.vectors == "use":
        raise UserError(f"data.vectors=use: {reason}, or take auto")
    if reason:
        return None
    found = [ShardFolder.open(f"{folder.url}/{FOLDER}", folder.cfg) for folder in folders]
    ours = identity(model)
    for folder, vectors in zip(folders, found, strict=True):
        _must_fit(folder, vectors, ours)
    return found


def obstacle(folders: list[ShardFolder], cfg: RunConfig, model: Model) -> str:
    """Why this run cannot use vectors; empty if it can."""
    if cfg.data.vectors == "off":
        return "data.vectors=off"
    for tower in ("text", "vision"):
        if tower in model.cfg.train_towers.split("+"):
            return f"the {tower} tower trains (model.train_towers={model.cfg.train_towers}), so its vectors change"
    if cfg.loss.caption:
        return "loss.caption reads every word, and vectors are of whole captions"
    if cfg.data.languages:
        return f"data.languages={cfg.data.languages} takes some captions, and vectors are of all"
    if cfg.loss.tm and (cfg.model.fusion, cfg.model.words) == ("local_local", "all"):
        return "model.fusion=local_local reads every word, and vectors are of whole captions"
    if not (cfg.loss.at or cfg.loss.av or cfg.loss.tv or cfg.loss.tm):
        return "no loss needs text or vision"
    for folder in folders:
        try:
            there = storage.exists(folder.fs, f"{folder.path}/{FOLDER}/{INDEX}", folder.cfg)
        except OSError as error:
            raise UserError(f"cannot read {folder.url}/{FOLDER}/{INDEX}: {error}; or set data.vectors=off") from None
        if not there:
            return f"{folder.url} has none: run data_prep/embed.py"
    return ""


def _must_fit(folder: ShardFolder, vectors: ShardFolder, ours: str) -> None:
    """UserError unless the vectors are those of these towers for these very shards."""
    theirs = vectors.fingerprint["clip"]
    if theirs["identity"] != ours:
        raise UserError(
            f"{vectors.url}: vectors of other towers: {theirs['identity'][:8]} ({theirs['name']}, max_tokens "
            f"{theirs['max_tokens']}) there and {ours[:8]} in this run; {REMEDY}"
        )
    for shard, made in itertools.zip_longest(folder.shards, vectors.shards):
        if not shard or not made or (shard.name, shard.sha256) != (made.name, made.of):
            there = f"{made.name}, {made.of[:8]}" if made else "none"
            here = f"{shard.name}, {shard.sha256[:8]}" if shard else "none"
            raise UserError(
                f"{vectors.url}: vectors of other shards: made for {there}; the folder has {here}; {REMEDY}"
            )
