"""Spare DeepSpeed's ZeRO optimizers what it has no setting for: operations for each parameter, and waits for the device.

Written for DeepSpeed 0.19, whose methods of these names are replaced on one optimizer; the values are theirs to the last bit
(tests/training/test_engine_counts.py). ZeRO-0 and offloading are left as they are.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from clip4vla.distributed import collectives


def spare_launches_and_waits(run: Any) -> None:
    """Replace what launches two operations a parameter (ZeRO-1 to 3), and what makes the host wait (ZeRO-1 and 2)."""
    optimizer, offload = run.optimizer, run.zero_offload_optimizer()
    if not hasattr(optimizer, "get_grad_norm_direct") or (offload and offload.device != "none"):
        return
    if run.zero_optimization_stage() == 3:  # clips without a wait; it has others, which cannot be switched off
        optimizer.get_grad_norm_direct = partial(_grad_norm, torch.float64)
        return
    optimizer.get_grad_norm_direct = partial(_grad_norm, torch.float32)
    optimizer.unscale_and_clip_grads = partial(_unscale_and_clip, optimizer)
    if optimizer.overlap_comm and optimizer.reduction_stream is not None:  # None: a CPU
        optimizer.overlapping_partition_gradients_reduce_epilogue = partial(_reduce_last_bucket, optimizer)


def _grad_norm(dtype: torch.dtype, gradients: list[Tensor], params: list[Tensor], norm_type: int = 2) -> Tensor:
    """Compute the 2-norm () of one group's gradients over all ranks, whose parts they are; -1 if it is not finite.

    dtype: in which the ranks' sums of squares are added.
    """
    squares = torch.stack(torch._foreach_norm([g.detach() for g in gradients], norm_type, dtype=torch.float64)).square()
    norm = collectives.all_reduce_sum(squares.sum().to(dtype)).sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _unscale_and_clip(optimizer: Any, flat_gradients: list[Tensor], norm: Tensor) -> None:
    """Divide flat gradients by the loss scale, and by norm / gradient_clipping if that is more than 1.

    An infinite norm, which stands for one that is not finite, gives zeros and nan: Meter.rows stops the run.
    """
    if optimizer.clip_grad == 0.0 and optimizer.loss_scale == 1.0:
        return
    scale: Tensor | float = optimizer.loss_scale
    if optimizer.clip_grad:
        scale = ((norm / scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0) * scale
    for gradient in flat_gradients:
        gradient.mul_(1.0 / scale)


def _reduce_last_bucket(optimizer: Any) -> None:
    """Reduce what the backward pass left; the step's stream waits for the one of the reductions, where the host would.

    The last bucket has nothing left to overlap with, so it is reduced on the step's own stream.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().current_stream().wait_stream(optimizer.reduction_stream)
    optimizer._clear_previous_reduced_grads()
    optimizer.overlap_comm = False
    try:
        optimizer.independent_gradient_partition_epilogue()
    finally:
        optimizer.overlap_comm = True
