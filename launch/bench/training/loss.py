"""Benchmark `loss`: InfoNCE forward and backward, ours against open_clip's ClipLoss.

On one process (--world 1): both losses of the same two sets of N vectors, alternated; time_ratio is ours to theirs from the
medians of the wall clock (cpu_ratio: of CPU time), memory_ratio of the most that each holds above its inputs, with the
gradients it returns, each in a process of its own that has run a small loss before.

On two gloo ranks (--world 2): NCE_at + NCE_av + NCE_aa of one step against three ClipLoss(local_loss=True,
gather_with_grad=True) on the same features (its NCE_aa is its plain loss), text and vision frozen as in pre-training, or all
towers trained. Bytes are counted at the collectives: those of the tensors that a rank puts in (`put_in`, as in
losses.bytes_sent), and those that it sends if each collective is the ring algorithm (`on_the_wire`; a gather of b rows sends
them W - 1 times). gather_with_grad sums gradients by scatters on gloo; with NCCL it reduce-scatters the same bytes.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip4vla.config import LossConfig
from clip4vla.data.batch import Labels
from clip4vla.distributed import collectives
from clip4vla.losses.contrastive import info_nce
from clip4vla.losses.objective import bytes_sent, compute_losses
from launch.bench.common import count, free_port

SCALE = 50.0
FEATURES = ("text", "vision", "audio", "masked")
TRAINED = {"frozen_clip": ("audio", "masked"), "all_towers": FEATURES}
RING = {  # what a rank of W sends for each byte that it puts in
    "allreduce_": lambda w: 2 * (w - 1) / w,
    "allgather_": lambda w: w - 1,
    "_allgather_base_": lambda w: w - 1,
    "scatter_": lambda w: (w - 1) / w,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--n", type=count, help="vectors in a set, of all ranks: 16384, or with ranks 4096")
    parser.add_argument("--dim", type=count, default=512, help="their width")
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument("--world", type=count, default=1, metavar="W", help="from 2: bytes between W gloo ranks")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    if args.world > 1:
        return traffic((args.n or 4096) // args.world, args.dim, args.world)  # all bytes are proportional to N
    return alone(args.n or 16384, args.dim, args.rounds)


# One process


def alone(n: int, dim: int, rounds: int) -> dict[str, Any]:
    """Time, memory and agreement of both sides."""
    peaks = {side: _apart(1, peak, side, n, dim)[0] for side in SIDES}  # first: this process is still small
    vectors = inputs(n, dim)
    made = {side: step(side, vectors) for side in SIDES}  # and warms up
    spent: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            spent[side].append(step(side, vectors)[0])
    wall, cpu = ({side: [t[clock] for t in times] for side, times in spent.items()} for clock in (0, 1))
    head = {"time_ratio": _ratio(wall), "cpu_ratio": _ratio(cpu), "memory_ratio": peaks["ours"] / peaks["peer"]}
    sizes = {"n": n, "dim": dim, "device": vectors[0].device.type, "threads": torch.get_num_threads(), "rounds": rounds}
    figures = {"rounds_s": wall, "rounds_cpu_s": cpu, "peak_bytes": peaks}
    return head | sizes | figures | agreement(made["ours"][1], made["peer"][1])


def inputs(n: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of unit vectors that belong together weakly, and the scale: leaves that want gradients."""
    generator, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    a = F.normalize(torch.randn(n, dim, generator=generator), dim=-1)
    b = F.normalize(torch.randn(n, dim, generator=generator).div_(dim**0.5).add_(a, alpha=0.3), dim=-1)
    a, b, scale = (x.to(device).requires_grad_() for x in (a, b, torch.tensor(SCALE)))
    return a, b, scale


def _ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce(a, b, scale, torch.ones(len(a), dtype=torch.bool, device=a.device))


def _peer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(a, b, scale)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": _ours, "peer": _peer}


def step(side: str, vectors: tuple[Tensor, ...]) -> tuple[tuple[float, float], list[Tensor]]:
    """((wall, CPU seconds) of forward and backward, [value, gradients])."""
    for x in vectors:
        x.grad = None
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    value = SIDES[side](*vectors)
    value.backward()
    _wait()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return spent, [value.detach(), *(x.grad for x in vectors if x.grad is not None)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(side: str, n: int, dim: int) -> int:
    """Bytes that one step holds at most above what was there before it; in a fresh process."""
    step(side, inputs(256, dim))
    vectors = inputs(n, dim)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(side, vectors)
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # VmHWM starts again at VmRSS
    before = _status("VmRSS")
    step(side, vectors)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def agreement(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, Any]:
    """Both values, and the largest difference of each gradient relative to its largest element."""
    names = ("by_a", "by_b", "by_scale")
    far = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    value = {"ours": float(ours[0]), "peer": float(theirs[0]), "difference": float((ours[0] - theirs[0]).abs())}
    return {"value": value, "gradient_difference": dict(zip(names, far, strict=True))}


def _ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(times["ours"]) / statistics.median(times["peer"])


def _apart(processes: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what the work returns in fresh processes; with several, their number comes before the other arguments."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        numbers = [(rank,) if processes > 1 else () for rank in range(processes)]
        return [job.result() for job in [pool.submit(work, *number, *args) for number in numbers]]


# Several ranks


def traffic(b: int, dim: int, world: int) -> dict[str, Any]:
    """Bytes of one step of both sides; the ranks' are equal, or it is an error."""
    ranks = _apart(world, count_bytes, world, free_port(), b, dim)
    assert all(rank == ranks[0] for rank in ranks), ranks
    counted = ranks[0]
    ours, peer = counted["ours"]["put_in"], {name: counted[name] for name in TRAINED}
    ratios = {
        name: {how: counted["ours"][how] / bytes_[how] for how in ("put_in", "on_the_wire")}
        for name, bytes_ in peer.items()
    }
    error = ours - bytes_sent(LossConfig(), b, b * world, dim)
    head = {"bytes_ratio": ratios["frozen_clip"]["put_in"], "bytes_formula_error": error}
    return head | {"ratios": ratios, "bytes": counted, "n": b * world, "dim": dim, "world": world}


def count_bytes(rank: int, world: int, port: int, b: int, dim: int) -> dict[str, dict[str, float]]:
    """Count what this rank puts into collectives and sends in one step, by side."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    collectives.setup()
    generator = torch.Generator().manual_seed(rank)
    rows = {name: F.normalize(torch.randn(b, dim, generator=generator), dim=-1) for name in FEATURES}
    counted = {"ours": _counted(_our_terms, rows, FEATURES)}
    for name, trained in TRAINED.items():
        counted[name] = _counted(_their_terms, rows, trained)
    torch.distributed.destroy_process_group()
    return counted


def _counted(work: Callable[[dict[str, Tensor]], Tensor], rows: dict[str, Tensor], trained: tuple[str, ...]) -> dict:
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in rows.items()}
    with Traffic() as counter:
        work(leaves | {"scale": torch.tensor(SCALE, requires_grad=True)}).backward()
    return {"put_in": counter.put_in, "on_the_wire": round(counter.on_the_wire), "collectives": counter.collectives}


def _our_terms(features: dict[str, Tensor]) -> Tensor:
    b = len(features["audio"])
    yes = torch.ones(b, dtype=torch.bool)
    return compute_losses(features, Labels(torch.arange(b), yes, yes, yes), LossConfig())["loss"]


def _their_terms(features: dict[str, Tensor]) -> Tensor:
    from open_clip.loss import ClipLoss

    how = {"rank": collectives.rank(), "world_size": collectives.world_size()}
    loss = ClipLoss(local_loss=True, gather_with_grad=True, **how)
    pairs = (("text", "audio"), ("vision", "audio"), ("audio", "masked"))
    return sum(loss(features[a], features[b], features["scale"]) for a, b in pairs)


class Traffic(TorchDispatchMode):
    """Counts bytes at the collectives of c10d, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.put_in, self.on_the_wire = 0, 0.0
        self.collectives: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            size = _size(args[0] if name == "allreduce_" else args[1])
            self.put_in += size
            self.on_the_wire += size * RING[name](collectives.world_size())
            self.collectives[name] = self.collectives.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))
