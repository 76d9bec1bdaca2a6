"""Take one optimizer step from several micro-batches, whose negatives are those of the whole global batch.

All micro-batches are embedded without gradient; the loss over all of them gives the gradient by each feature; then each
micro-batch runs again, with gradient, and its features' gradients go into the towers: the gradient of the one whole batch,
with the activations of one micro-batch in memory (GradCache, Gao et al. 2021). Masks are part of a Batch, so both passes
have the same. Costs a forward pass more; `train.negatives=micro` saves it and takes the negatives of a micro-batch alone.
Losses without negatives (caption, label) do without it.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch, Labels
from clip4vla.distributed import collectives
from clip4vla.losses.objective import compute_losses, required_features


def step(run: Any, micros: list[Batch], cfg: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one step of the DeepSpeed engine: (losses by name, features (b, D) of this rank's clips by name), detached."""
    micros = [micro.to(run.device) for micro in micros]
    taught = _count_targets(run, micros, cfg) if cfg.loss.caption or cfg.loss.label else None
    if len(micros) == 1 or not embeds_first(cfg):
        return _step_per_micro_batch(run, micros, cfg, taught)
    with torch.no_grad():
        features = _joined([_embed(run, micro, cfg) for micro in micros])
    losses, pulls = _grads_wrt_features(features, micros, cfg, taught)
    for micro, pull in zip(micros, pulls, strict=True):
        again = _embed(run, micro, cfg)
        inner = [(again[name] * pull[name]).sum() for name in again if again[name].requires_grad]
        run.backward(sum(inner) * len(micros))  # the engine takes the mean over micro-batches
        run.step()
    return losses, features


def embeds_first(cfg: RunConfig) -> bool:
    """Tell whether several micro-batches are all embedded, for their common negatives, before one runs with gradient."""
    return cfg.train.negatives == "global" and bool(required_features(cfg.loss))


def _count_targets(run: Any, micros: list[Batch], cfg: RunConfig) -> Tensor:
    """Count the words, or labels, that the global batch teaches, over all ranks; a scalar, 1 at least."""
    count = sum(int(run.module.num_targets(micro, cfg.loss)) for micro in micros)
    return collectives.all_reduce_sum(torch.full((), count, device=run.device)).clamp(min=1)


def _step_per_micro_batch(
    run: Any, micros: list[Batch], cfg: RunConfig, taught: Tensor | None
) -> tuple[dict, dict[str, Tensor]]:
    """Step on each micro-batch with its own negatives, if its losses have any; the losses are their mean."""
    taught = None if taught is None else taught / len(micros)
    parts, losses = [], []
    for micro in micros:
        features = _embed(run, micro, cfg)
        values = compute_losses(features, micro.labels(), cfg.loss, cfg.model.modalities, taught)
        run.backward(values["loss"])
        run.step()
        losses.append({name: value.detach() for name, value in values.items()})
        parts.append({name: value.detach() for name, value in features.items()})
        del features, values  # and their graph, before the next is made
    return {name: torch.stack([x[name] for x in losses]).mean(0) for name in losses[0]}, _joined(parts)


def _embed(run: Any, micro: Batch, cfg: RunConfig) -> dict[str, Tensor]:
    names = "\n".join([*micro.ids, *micro.captions]).encode()
    torch.manual_seed(cfg.seed + zlib.crc32(names))  # dropout: again the same
    return run(micro, cfg.loss, cfg.mask)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the features (b, D) of all micro-batches; `scale` is the same in all."""
    return {name: value if name == "scale" else torch.cat([p[name] for p in parts]) for name, value in parts[0].items()}


def _grads_wrt_features(
    features: dict[str, Tensor], micros: list[Batch], cfg: RunConfig, taught: Tensor | None
) -> tuple[dict, list[dict]]:
    """Compute (losses, for each micro-batch the gradient by its features (b, D), of which shared `scale` gets a part)."""
    leaves = {name: value.detach().requires_grad_() for name, value in features.items()}
    labels = Labels(*map(torch.cat, zip(*(micro.labels() for micro in micros), strict=True)))
    losses = compute_losses(leaves, labels, cfg.loss, cfg.model.modalities, taught)
    grads = dict(zip(leaves, torch.autograd.grad(losses["loss"], list(leaves.values())), strict=True))
    shares: dict[str, Sequence[Tensor]] = {name: g.chunk(len(micros)) for name, g in grads.items() if name != "scale"}
    shares["scale"] = [grads["scale"] / len(micros)] * len(micros)
    pulls = [{name: share[i] for name, share in shares.items()} for i in range(len(micros))]
    return {name: value.detach() for name, value in losses.items()}, pulls
