"""Ranks, as the deepspeed launcher, torchrun or SLURM give them, and the collectives used on them."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from clip4vla.config import UserError


def setup() -> torch.device:
    """Join the process group that the launcher announced (none: a single process) and return this rank's device."""
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    alone = "WORLD_SIZE" not in os.environ
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:  # share the cores; and at 50 tokens the CPU's flash attention is slower than plain products
        ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        torch.backends.cuda.enable_flash_sdp(False)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if alone:  # no port to agree on, so that any number of single runs fit on a machine
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        elif "MASTER_ADDR" not in os.environ:
            raise UserError(
                "MASTER_ADDR and MASTER_PORT are not set: rank 0's host name and a free port, the same for all tasks"
            )
        else:
            dist.init_process_group(backend)
    return device


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, (world * b, ...) from (b, ...), in rank order; no gradient flows through it."""
    x = x.detach().contiguous()
    if world() == 1:
        return x
    if x.dtype == torch.bool:
        return gather(x.to(torch.uint8)).bool()
    out = x.new_empty(world() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return out


def all_sum(x: Tensor) -> Tensor:
    """Sum over the ranks."""
    return _reduced(x, dist.ReduceOp.SUM)


def all_max(x: Tensor) -> Tensor:
    """Largest of the ranks' values, by element."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, how: dist.ReduceOp) -> Tensor:
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x, how)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean over the ranks."""
    return all_sum(x) / world()


def gather_objects(value: object) -> list:
    """Small Python objects of all ranks, in rank order."""
    if world() == 1:
        return [value]
    out: list = [None] * world()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


class AnyRank:
    """Whether any rank raised a flag, agreed on without a wait: each call posts this step's flag and reads the last step's."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if world() > 1 else None
        self.pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, flag: bool) -> bool:
        if self.group is None:
            return flag
        raised = False
        if self.pending is not None:
            tensor, work = self.pending
            work.wait()
            raised = bool(tensor.item())
        tensor = torch.tensor([int(flag)])
        self.pending = (tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True))
        return raised
