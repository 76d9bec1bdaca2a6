"""Join the ranks that the deepspeed launcher, torchrun, SLURM or mpirun started, and run collectives on them."""

import datetime
import math
import os
import resource
import threading

import torch
import torch.distributed as dist
from torch import Tensor

from clip4vla.distributed import network
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError

LATE = 30  # s that torch may take longer than its time-out
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SIZES = (
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)  # ranks on this machine: deepspeed, torchrun, mpirun
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),  # srun; the batch script itself has no step
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def setup(minutes: float = math.inf) -> torch.device:
    """Join the process group that the launcher announced (none: a single process) and return this rank's device.

    From here on a rank that dies, or that many minutes in which no rank moves, ends the job (watchdog.py). Raises UserError
    if the launcher left something out, if not all ranks come within that time, or cannot reach rank 0.
    """
    _take_names()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # gloo keeps sockets to all ranks, DeepSpeed several sets
    device = _device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", minutes if math.isfinite(minutes) else 30.0)
    if watch.enabled and watch.link is None:
        word = all_gather_objects(watch.start_server(world_size()) if rank() == 0 else "")[0]
        try:
            watch.join(
                word, os.environ["MASTER_ADDR"] if world_size() > 1 else "127.0.0.1", rank(), world_size(), minutes
            )
        except ConnectionError as error:
            raise UserError(str(error)) from None
    return device


def _take_names() -> None:
    """Set rank, local rank and world size in the environment under torch's names, if the launcher uses others or none.

    A single rank needs none of them: PyTorchJob gives it no LOCAL_RANK.
    """
    if not (os.environ.get("RANK") or os.environ.get("WORLD_SIZE")):
        names = next((names for names in LAUNCHERS if os.environ.get(names[2], "1") != "1"), None)
        values = [os.environ.get(name, "") for name in names] if names else ["0", "0", "1"]
        os.environ.update(zip(NAMES, values, strict=True))
    if os.environ.get("WORLD_SIZE") == "1":
        os.environ.update((name, "0") for name in NAMES[:2] if not os.environ.get(name))
    missing = [name for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and os.environ.get("WORLD_SIZE") != "1":
        raise UserError(
            f"{', '.join(missing)} not set: start the ranks with deepspeed, torchrun or launch/slurm/pretrain.sbatch; by hand, "
            "MASTER_ADDR and MASTER_PORT are rank 0's host and a free port there, the same for all ranks"
        )
    given = {name: os.environ.get(name, "") for name in (*NAMES, *SIZES, "MASTER_PORT")}
    wrong = [f"{name}={value}" for name, value in given.items() if value and not value.isdecimal()]
    if wrong:
        raise UserError(f"{wrong[0]}: launchers set it to a whole number: set it so, or unset it")


def _device(local: int) -> torch.device:
    """Take the GPU with the rank's number on this machine, or the only one visible, and this rank's share of the cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _ranks_here()))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local >= count > 1:
            raise UserError(
                f"local rank {local} has no GPU of its own, there are {count} here: start one rank for each GPU"
            )
        os.environ["LOCAL_RANK"] = str(local % count)  # DeepSpeed takes its device from it
        torch.cuda.set_device(local % count)
        return torch.device("cuda", local % count)
    torch.backends.cuda.enable_flash_sdp(False)  # at 50 tokens the CPU's flash attention is slower than plain products
    return torch.device("cpu")


def _ranks_here() -> int:
    """Count the ranks on this machine; all of them if the launcher does not say."""
    return int(next(filter(None, map(os.environ.get, SIZES)), os.environ["WORLD_SIZE"]))


def _several_hosts() -> bool:
    return os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1" or _ranks_here() < int(os.environ["WORLD_SIZE"])


def _join(backend: str, minutes: float) -> None:
    if os.environ["WORLD_SIZE"] == "1":  # no port to agree on, so that any number of single runs fit on a machine
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    network.prepare_gloo(os.environ["MASTER_ADDR"], int(os.environ["WORLD_SIZE"]), _several_hosts())
    patience = timeout(minutes)
    failed = f"the ranks did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    why = f"error: {failed}: rank 0 is there, and does not answer (stopped?)"
    late = threading.Timer(patience.total_seconds() + LATE, watch.abort, (why, 2))  # torch's store never gives up then
    late.daemon = True
    late.start()
    try:
        dist.init_process_group(backend, timeout=patience)
    except (dist.DistError, ValueError) as error:  # the second: a port or a rank that cannot be
        raise UserError(f"{failed}: {str(error).splitlines()[0]}") from None
    finally:
        late.cancel()


def timeout(minutes: float) -> datetime.timedelta:
    """Return the time-out of a process group: a little more than the watchdog's minutes, which has more to say."""
    return datetime.timedelta(minutes=minutes + 1)


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """Gather rows of all ranks, (world * b, ...) from (b, ...), in rank order; no gradient flows through it."""
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    if x.dtype == torch.bool:
        return all_gather(x.to(torch.uint8)).bool()
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return out


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather rows (world * b, ...) from (b, ...), with gradient: a rank's rows get the sum of what all ranks have for them."""
    return _Gather.apply(x) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad).split(ctx.rows)[rank()]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks, by element; same shape."""
    return _reduced(x, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor) -> Tensor:
    """Take the largest of the ranks' values, by element; same shape."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, how)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average a tensor over the ranks, by element; same shape."""
    return all_reduce_sum(x) / world_size()


def all_gather_objects(value: object) -> list:
    """Gather small Python objects of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    out: list = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def all_gather_dicts(mine: dict[str, dict]) -> dict[str, dict]:
    """Merge the small dictionaries of all ranks, name by name, in the order of their keys."""
    parts = all_gather_objects(mine)
    joined = {name: {key: value for part in parts for key, value in part[name].items()} for name in mine}
    return {name: {key: values[key] for key in sorted(values)} for name, values in joined.items()}


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


class AsyncAnyFlag:
    """Tells whether any rank raised a flag, without a wait: each call posts this step's flag and reads the last step's.

    Flags lie in host memory and take the default group's gloo: one more group would be one more socket for each rank.
    """

    def __init__(self) -> None:
        self.pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, flag: bool) -> bool:
        if world_size() == 1:
            return flag
        raised = False
        if self.pending is not None:
            tensor, work = self.pending
            work.wait()
            raised = bool(tensor.item())
        tensor = torch.tensor([int(flag)])
        self.pending = (tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True))
        return raised
