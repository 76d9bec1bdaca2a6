"""Count the bytes that a loss's operations read and write: as they run, and as inductor fuses them for a GPU, without one."""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils._triton import has_triton

GPU = torch.device("cuda:0")
HOPPER = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_block_optin=232448,
)  # fmt: skip
ANSWERS = {  # what inductor asks a driver for
    "torch.cuda._lazy_init": None,
    "torch.cuda._get_device_properties": HOPPER,
    "torch.cuda.get_device_capability": (9, 0),
    "torch.cuda._exchange_device": 0,
    "torch.cuda._maybe_exchange_device": 0,
    "torch.cuda.get_rng_state": torch.zeros(1),
    "torch.cuda.set_rng_state": None,
    "torch.cuda.current_device": 0,
    "torch.cuda.device_count": 1,
    "torch.cuda.is_available": True,
    "torch.utils._triton.triton_hash_with_backend": "",
}


class Passes(TorchDispatchMode):
    """Counts bytes of inputs and outputs: those of matrix products, and those of all other operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.elementwise = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        returns = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not (self.paused or view or "empty" in name):
            moved = sum(map(size, tree_leaves((args, kwargs, out))))
            if name in ("mm", "addmm", "addmm_", "bmm"):
                self.products += moved
            else:
                self.elementwise += moved
        return out


def size(x: object) -> int:
    """Count the bytes of a tensor, without those that it repeats."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) if isinstance(x, torch.Tensor) else 0


class Lowered(Exception):
    """Carries the bytes of a graph's kernels out of the compiler, before it compiles them."""


def fused_bytes(function: Callable[..., None], *args: object) -> int:
    """Count the bytes that the kernels read and write into which inductor fuses a function for a GPU.

    args: tensors on the CPU, of which only the shapes count, and tuples of them; the function works in place.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    leaves, spec = tree_flatten(args)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def flat(*tensors):
        all_leaves = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            all_leaves[i] = tensor
        function(*tree_unflatten(all_leaves, spec))

    with FakeTensorMode() as mode:
        fakes = [torch.empty(leaves[i].shape, dtype=leaves[i].dtype) for i in where]
        traced = make_fx(torch.func.functionalize(flat, remove="mutations_and_views"), select_decomp_table())(*fakes)

        def on_gpu(x):
            return FakeTensor(mode, torch.empty_like(x, device="meta"), GPU)

        for node in traced.graph.nodes:
            node.kwargs = {name: GPU if name == "device" else value for name, value in node.kwargs.items()}
            node.meta = tree_map_only(FakeTensor, on_gpu, node.meta)
            if node.op == "output":  # as AOTAutograd has it: what a function changes in place is written there
                node.args = (tuple(n for n in traced.graph.nodes if n.target == torch.ops.aten.copy_.default),)
        traced.recompile()
        fakes = [on_gpu(x) for x in fakes]

    def lowered(graph):
        kernels = graph.codegen()[0].value.split("@triton.jit")[1:]
        loops = [max(1, kernel.count(" in tl.range(")) for kernel in kernels]  # each reads what its kernel reads
        moved = [node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes]
        raise Lowered(sum(n * size for n, size in zip(loops, moved, strict=True)))

    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer, create=True))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", lowered))
        for answers in (DeviceProperties.create, has_triton):  # are kept
            answers.cache_clear()
            stack.callback(answers.cache_clear)
        try:
            compile_fx_inner(traced, fakes)
        except Exception as error:  # inductor wraps it
            while not isinstance(error, Lowered):
                if error.__cause__ is None and error.__context__ is None:
                    raise
                error = error.__cause__ or error.__context__
            return error.args[0]
    raise AssertionError("inductor lowered nothing")
