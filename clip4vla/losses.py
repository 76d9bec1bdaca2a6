"""NCE_at, NCE_av, NCE_aa, equations (1)-(5), exact over the clips of all ranks, in tiles of bounded memory.

Every rank holds b rows of the global batch of N. Features are gathered without gradient; a rank then computes its own rows
of the similarity matrix in tiles and keeps their log-sum-exps. The similarity is symmetric, so the gradient of a rank's own
rows needs only the gathered features and the gathered log-sum-exps: no N x N matrix, no N x D gradient traffic.
The engine averages gradients over ranks, so values are scaled by the world size: their mean over ranks is the loss.
"""

import torch
from torch import Tensor

from clip4vla import distributed
from clip4vla.config import LossConfig

TILE = 1 << 24  # elements of the similarity matrix held at once


def info_nce(
    a: Tensor, b: Tensor, scale: Tensor, valid: Tensor, group: Tensor | None = None, intra: bool = False
) -> Tensor:
    """Symmetric InfoNCE between the rows of a and b, (b, D) unit vectors of this rank; logits are scale * cosine.

    valid (b,) says which rows take part, as row and as negative; the mean is over those of all ranks, 0 without any.
    group (b,) int64: other rows of the same group are no negatives. intra adds exp(a_i . a_k), k != i, to the denominator
    of row a_i and its mirror image to that of b_i (equations (3) and (4)).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    group = torch.arange(len(a), device=a.device) + distributed.rank() * len(a) if group is None else group
    return _InfoNCE.apply(a.to(dtype), b.to(dtype), scale.to(dtype), valid, group, intra)


def objective(features: dict[str, Tensor], batch: "Batch", cfg: LossConfig) -> dict[str, Tensor]:  # noqa: F821
    """The weighted terms of (5) by name, and their sum under `loss`. features: as CLIP4VLA.forward gives them."""
    group = batch.group if cfg.exclude_same_group else None
    terms = {
        "at": ("text", "audio", cfg.at, batch.has_text & batch.has_audio),
        "av": ("vision", "audio", cfg.av, batch.has_frames & batch.has_audio),
        "aa": ("audio", "masked", cfg.aa, batch.has_audio),
        "tv": ("text", "vision", cfg.tv, batch.has_text & batch.has_frames),
    }
    losses = {
        name: info_nce(features[a], features[b], features["scale"], valid, group, intra=name == "aa")
        for name, (a, b, weight, valid) in terms.items()
        if weight
    }
    losses["loss"] = sum(terms[name][2] * value for name, value in losses.items())
    return losses


class _InfoNCE(torch.autograd.Function):
    """info_nce with its own backward pass."""

    @staticmethod
    def forward(ctx, a, b, scale, valid, group, intra):
        with torch.autocast(a.device.type, enabled=False):
            sides = _Sides(a, b, scale, valid, group, intra)
            lse = sides.log_sum_exp(0), sides.log_sum_exp(1)
            rows = lse[0] + lse[1] - 2 * scale * (a * b).sum(1)
            value = distributed.world() * (sides.weight * rows).sum()
        ctx.save_for_backward(a, b, scale, valid, group, sides.all[0], sides.all[1], *lse)
        ctx.intra = intra
        return value

    @staticmethod
    def backward(ctx, grad):
        a, b, scale, valid, group, all_a, all_b, *lse = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            sides = _Sides(a, b, scale, valid, group, ctx.intra, (all_a, all_b))
            grad_a, scale_a = sides.gradient(0, lse)
            grad_b, scale_b = sides.gradient(1, lse)
        factor = grad * distributed.world()
        return factor * grad_a, factor * grad_b, factor * (scale_a + scale_b), None, None, None


class _Sides:
    """Both sides of the loss as this rank sees them: its rows, and the gathered columns."""

    def __init__(self, a, b, scale, valid, group, intra, gathered=None):
        self.own, self.scale, self.intra = (a, b), scale, intra
        self.all = gathered or (distributed.gather(a), distributed.gather(b))
        self.valid, self.group = valid, group
        self.all_valid, self.all_group = distributed.gather(valid), distributed.gather(group)
        self.all_weight = self.all_valid.to(a.dtype) / (2 * self.all_valid.sum().clamp(min=1))
        first = distributed.rank() * len(a)
        self.index = torch.arange(first, first + len(a), device=a.device)
        self.weight = self.all_weight[first : first + len(a)]

    def tiles(self):
        """Row ranges such that a tile of them against all columns holds at most TILE elements."""
        step = max(1, TILE // max(1, len(self.all_valid)))
        return (slice(i, i + step) for i in range(0, len(self.valid), step))

    def logits(self, side: int, rows: slice, keys: int) -> tuple[Tensor, Tensor]:
        """(cosines, logits) of own rows of `side` against all of `keys`; pairs that do not count have logit -inf."""
        cosine = self.own[side][rows] @ self.all[keys].T  # r N
        out = (
            (self.group[rows, None] == self.all_group).logical_or_(~self.all_valid).logical_or_(~self.valid[rows, None])
        )
        if keys != side:  # the row's own partner is its positive
            local = torch.arange(len(out), device=out.device)
            out[local, self.index[rows]] = ~self.valid[rows]
        return cosine, (self.scale * cosine).masked_fill_(out, -torch.inf)

    def log_sum_exp(self, side: int) -> Tensor:
        """Log of each own row's denominator, (b,); 0 for rows that take no part."""
        out = torch.zeros_like(self.weight)
        for rows in self.tiles():
            lse = torch.logsumexp(self.logits(side, rows, 1 - side)[1], 1)
            if self.intra:
                lse = torch.logaddexp(lse, torch.logsumexp(self.logits(side, rows, side)[1], 1))
            out[rows] = lse.masked_fill(~self.valid[rows], 0)
        return out

    def gradient(self, side: int, lse: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(gradient of the global loss by own rows of `side` (b, D), by the scale through the denominators of those rows)."""
        gathered = distributed.gather(lse[0]), distributed.gather(lse[1])
        grad, by_scale = torch.zeros_like(self.own[side]), torch.zeros_like(self.scale)
        for rows in self.tiles():
            for keys in (1 - side, side) if self.intra else (1 - side,):
                cosine, logits = self.logits(side, rows, keys)
                # as a row of its own denominator, and as a column of everybody else's
                as_row = (logits - lse[side][rows, None]).exp_().mul_(self.weight[rows, None])
                as_column = (logits - gathered[keys]).exp_().mul_(self.all_weight)
                by_scale += (as_row * cosine).sum()
                grad[rows] += (as_row + as_column) @ self.all[keys]
        positive = self.weight[:, None] * self.own[1 - side]
        return self.scale * (grad - 2 * positive), by_scale - (positive * self.own[side]).sum()
