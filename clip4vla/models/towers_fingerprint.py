"""Identify the frozen towers of a model by the fingerprint that precomputed embeddings are kept under."""

import hashlib
import json
from typing import Any

import torch

from clip4vla.models.model import Model


def embeddings_fingerprint(model: Model) -> dict[str, Any]:
    """Make the fingerprint of the vectors that a model's text and vision towers give."""
    made = {"identity": towers_sha256(model), "name": model.cfg.clip, "dim": model.clip_config["embed_dim"]}
    return {"clip": made | {"max_tokens": model.cfg.max_tokens}}


def towers_sha256(model: Model) -> str:
    """Hash all that decides the vectors, by sha256: both towers' structure and weights (fp32), image statistics, max_tokens.

    Of a space of vectors it is the identity that data_prep/embed.py --from gave it.
    """
    if "space" in model.clip_config:
        return model.clip_config["space"]["identity"]
    settings = [model.clip_config, model.pictures.identity(), model.cfg.max_tokens]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tower in (model.text, model.vision):
        for name, value in tower.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
