"""Open frozen vectors: the embeddings of a shard folder's texts and frames, made once by data_prep/embed.py.

FOLDER/clip/ is a shard folder itself: a tar for each shard, of the same name, with the same keys in the same order. Its only
member KEY.clip.f16 is little-endian float16, (captions + n_frames) x D: every caption's vector, then every frame's, of unit
length. index.json names the towers (their identity) and, for each tar, the shard it belongs to (`of`, that one's sha256).
Vectors from elsewhere (embed.py --from) are of a space, model.clip=vectors:NAME, and of the `kinds` that index.json names:
without text the captions' are left out; those of vision are any number, of frames or of the clip as a whole.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.shards import INDEX, ShardFolder
from clip4vla.errors import UserError
from clip4vla.io import remote

FOLDER = "clip"
UNNEEDED = "no loss needs text or vision"
SPACE = "vectors:"  # before the name of a space in model.clip
MEMBER = "clip.f16"
INFINITY = 0x7C00  # bits of the least float16 that is not finite
REMEDY = "run data_prep/embed.py again, or set data.precomputed_embeddings=off"


def described(clip: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return a clip's json without what its vectors, of fingerprint `made`, leave out: captions, where there is no text."""
    return clip if "text" in made.get("kinds", ["text"]) else clip | {"captions": [], "caption_langs": []}


def damage(vectors: bytes, clip: dict[str, Any], made: dict[str, Any]) -> str:
    """Say what is wrong with the vectors, of fingerprint `made`, of a clip with this json, or ""."""
    rows, width = len(clip["captions"]) + clip["n_frames"], made["dim"]
    if "kinds" in made:  # of pictures any number
        rows = max(len(clip["captions"]), len(vectors) // (2 * width), 1)
    if len(vectors) != 2 * rows * width:
        return f"clip: {len(vectors)} bytes, not {rows} vectors of {2 * width}"
    magnitudes = (
        np.frombuffer(vectors, "<u2") & 0x7FFF
    )  # whose order is that of their bits; isfinite is slow for float16
    return "clip: vectors that are not finite" if magnitudes.max(initial=0) >= INFINITY else ""


def packed(vectors: Sequence[bytes], captions: Sequence[int], drawn: Sequence[int], width: int) -> dict[str, Tensor]:
    """Pack the vectors of B clips, captions first, to text_vectors (B, D), frame_vectors (F, D) and frame_clip (F,).

    captions: how many each clip has. drawn: the number of the one that it takes; without captions it gets zeros.
    """
    every = np.frombuffer(bytearray().join(vectors), "<f2").astype(np.float16, copy=False).reshape(-1, width)
    texts, counts = np.array(captions, np.int64), np.array([len(part) for part in vectors], np.int64) // (2 * width)
    first = counts.cumsum() - counts
    text = np.zeros((len(vectors), width), np.float16)
    text[texts > 0] = every[(first + drawn)[texts > 0]]
    is_frame = np.arange(len(every)) >= (first + texts).repeat(counts)
    clip = np.arange(len(vectors)).repeat(counts - texts)
    return {
        "text_vectors": torch.from_numpy(text),
        "frame_vectors": torch.from_numpy(every[is_frame]),
        "frame_clip": torch.from_numpy(clip),
    }


def every_caption(vectors: Sequence[bytes], captions: Sequence[int], width: int) -> Tensor:
    """Collect the vectors of all captions of B clips, clip by clip: (C, D) float16; captions: how many each clip has."""
    parts = (part[: 2 * count * width] for part, count in zip(vectors, captions, strict=True))
    return torch.from_numpy(np.frombuffer(bytearray().join(parts), "<f2").astype(np.float16).reshape(-1, width))


def space_of(folder: ShardFolder, clip: str) -> dict[str, Any]:
    """Read from a folder's vectors the space that model.clip=vectors:NAME names: `embed_dim`, and its name and identity."""
    try:
        made = ShardFolder.open(f"{folder.url}/{FOLDER}", folder.cfg).fingerprint.get("clip", {})
    except UserError as error:
        raise UserError(f"model.clip={clip}: run data_prep/embed.py --from FILES first ({error})") from None
    if made.get("name") != clip:
        raise UserError(
            f"model.clip={clip}: {folder.url}/{FOLDER} has vectors of {made.get('name')}: name that, or run data_prep/embed.py "
            "--from FILES"
        )
    return {"embed_dim": made["dim"], "space": {"name": clip, "identity": made["identity"]}}


def open_vectors(
    folders: list[ShardFolder], cfg: RunConfig, trained: str, towers_sha256: Callable[[], str]
) -> list[ShardFolder] | None:
    """Open the vectors of each folder, or return None where data.precomputed_embeddings or this run's towers rule them out.

    trained: the towers that train, joined by +. towers_sha256 gives the towers' hash, of weights that are not rounded yet.
    Raises UserError for vectors of other towers or of other shards.
    """
    reason = obstacle(folders, cfg, trained)
    if reason and cfg.model.clip.startswith(SPACE) and reason != UNNEEDED:
        raise UserError(f"model.clip={cfg.model.clip}: its vectors are needed, and cannot be used: {reason}")
    if reason and cfg.data.precomputed_embeddings == "require":
        raise UserError(f"data.precomputed_embeddings=require: {reason}, or take auto")
    if reason:
        return None
    opened = open_fitting(folders, towers_sha256())
    for name, kind in (("at", "text"), ("tm", "text"), ("av", "vision")):
        if getattr(cfg.loss, name) and kind not in opened[0].fingerprint["clip"].get("kinds", [kind]):
            raise UserError(
                f"loss.{name}={getattr(cfg.loss, name):g}: {opened[0].url} has no {kind} vectors: set it to 0"
            )
    return opened


def open_fitting(folders: list[ShardFolder], identity: str) -> list[ShardFolder]:
    """Open the vectors of each folder; UserError unless they are of towers, or a space, of this identity, and of its shards."""
    opened = [ShardFolder.open(f"{folder.url}/{FOLDER}", folder.cfg) for folder in folders]
    for folder, vectors in zip(folders, opened, strict=True):
        _must_fit(folder, vectors, identity)
    return opened


def obstacle(folders: list[ShardFolder], cfg: RunConfig, trained: str) -> str:
    """Say why this run cannot use vectors; "" if it can."""
    if cfg.data.precomputed_embeddings == "off":
        return "data.precomputed_embeddings=off"
    for tower in ("text", "vision"):
        if tower in trained.split("+"):
            return f"the {tower} tower trains (model.trainable_towers={trained}), so its vectors change"
    if cfg.loss.caption:
        return "loss.caption reads every word, and vectors are of whole captions"
    if cfg.data.languages:
        return f"data.languages={cfg.data.languages} takes some captions, and vectors are of all"
    if cfg.loss.tm and (cfg.model.head, cfg.model.text_tokens) == ("local_local", "all"):
        return "model.head=local_local reads every word, and vectors are of whole captions"
    if not (cfg.loss.at or cfg.loss.av or cfg.loss.tv or cfg.loss.tm):
        return UNNEEDED
    for folder in folders:
        try:
            there = remote.exists(folder.fs, f"{folder.path}/{FOLDER}/{INDEX}", folder.cfg)
        except OSError as error:
            raise UserError(
                f"cannot read {folder.url}/{FOLDER}/{INDEX}: {error}; or set data.precomputed_embeddings=off"
            ) from None
        if not there:
            return f"{folder.url} has none: run data_prep/embed.py"
    return ""


def _must_fit(folder: ShardFolder, vectors: ShardFolder, ours: str) -> None:
    """Raise UserError unless the vectors are those of these towers for these very shards."""
    theirs = vectors.fingerprint["clip"]
    if theirs["identity"] != ours:
        raise UserError(
            f"{vectors.url}: vectors of other towers: {theirs['identity'][:8]} ({theirs['name']}, max_tokens "
            f"{theirs.get('max_tokens', '-')}) there and {ours[:8]} in this run; {REMEDY}"
        )
    for shard, made in itertools.zip_longest(folder.shards, vectors.shards):
        if not shard or not made or (shard.name, shard.sha256) != (made.name, made.of):
            there = f"{made.name}, {made.of[:8]}" if made else "none"
            here = f"{shard.name}, {shard.sha256[:8]}" if shard else "none"
            raise UserError(
                f"{vectors.url}: vectors of other shards: made for {there}; the folder has {here}; {REMEDY}"
            )
