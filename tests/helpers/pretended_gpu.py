"""A pretended GPU: tensors whose values lie in the CPU's memory and which say that they are on cuda:0, to any Python that asks.

In a `with PretendedGPU() as gpu` block an operation on tensors of both devices raises Mismatch, as CUDA does, and `gpu.waits`
collects every place of the package at which the host would wait for the device. Values are real and autograd works; C++ takes
the device for `meta`, so the backward pass runs in the caller's thread. Neither a GPU nor a driver is needed.
"""

import contextlib
import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from clip4vla.data import loader

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
THERE = ("cuda", "meta")
ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("clip4vla", "data_prep"))  # not .venv/, which may lie beside them
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SIZED_BY_VALUES = {  # whose result's size, or Python value, depends on numbers on the device
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten.bincount.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class Mismatch(RuntimeError):
    """Tensors of both devices in one operation."""


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `held` holds its values."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="meta", requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner, requires_grad=False):
        assert not isinstance(inner, OnGPU)
        self.held = inner.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGPU.current.call(func, args, kwargs or {})

    @property
    def device(self):
        return CUDA

    def __repr__(self, **_):
        return f"OnGPU({self.held})"

    def __setitem__(
        self, where, value
    ):  # torch fills with a number on the device; for `meta` it would copy one to there
        number = isinstance(value, bool | int | float)
        super().__setitem__(where, OnGPU(torch.full((), value, dtype=self.dtype)) if number else value)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


class PretendedGPU(TorchDispatchMode):
    """Makes tensors on CUDA, in its block, OnGPU; one at a time. Build models before it: torch's meta device is CUDA there."""

    current: "PretendedGPU | None" = None

    def __init__(self):
        super().__init__()
        self.waits: dict[str, set[str]] = defaultdict(set)  # what for, by "file function"
        self.pinned: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        PretendedGPU.current = self
        self.patches = contextlib.ExitStack()
        attention, tensor, native = F.scaled_dot_product_attention, torch.tensor, loader.Decoder

        def refusing(query, *args, **kwargs):  # flash attention: "batch size must be positive"
            if isinstance(query, OnGPU) and not query.numel():
                raise RuntimeError("attention over a batch of 0")
            return attention(query, *args, **kwargs)

        def made(data, *, device=None, **kwargs):  # torch.tensor moves in C++, where no mode sees it
            out = tensor(data, **kwargs)
            return out if device is None or torch.device(device).type == "cpu" else out.to(CUDA)

        def new_tensor(x, data, **kwargs):
            return made(data, **{"dtype": x.dtype, "device": x.device} | kwargs)

        class Decoder(native):
            def __init__(self, most, channels, threads, device, *fit):
                super().__init__(most, channels, threads, CPU, *fit)
                self.there = device.type == "cuda"

            def joined(self, pictures):
                return OnGPU(super().joined(pictures)) if self.there else super().joined(pictures)

        for home, name, stand_in in (
            (F, "scaled_dot_product_attention", refusing), (torch, "tensor", made), (loader, "Decoder", Decoder),
            (torch.Tensor, "new_tensor", new_tensor), (torch.Tensor, "pin_memory", lambda x: self._pin(x)),
            (torch.cuda, "_lazy_init", lambda: None), (torch.cuda, "set_device", lambda _: None),
            (torch.cuda, "synchronize", lambda *_: self.note("synchronize")),
        ):  # fmt: skip
            self.patches.enter_context(patch.object(home, name, stand_in))
        self.lifts_cpu_only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        PretendedGPU.current = None
        torch._C._set_only_lift_cpu_tensors(self.lifts_cpu_only)
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def note(self, what):
        """Note that the host waits, at the function of the package that is at work."""
        frame = sys._getframe(1)
        while frame:
            code = frame.f_code
            folder = next((name for name in PACKAGES if code.co_filename.startswith(name)), None)
            if folder:
                function = code.co_qualname.partition(".<locals>")[0]
                self.waits[f"{code.co_filename.removeprefix(folder)} {function}"].add(what)
                return
            frame = frame.f_back

    def call(self, func, args, kwargs):
        """Run one operation of torch on the values, as CUDA would: refuse it, or note what it waits for."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, OnGPU)]
        asked = kwargs.get("device")
        made_there = bool(there) if asked is None else torch.device(asked).type in THERE
        if asked is not None and made_there:
            kwargs = kwargs | {"device": CPU}
        if func is aten._to_copy.default:
            return self._moved(func, args, kwargs, made_there)
        if there:
            self._check(func, args, kwargs, tensors)
        out = func(*tree_map_only(OnGPU, values, args), **tree_map_only(OnGPU, values, kwargs))
        if not made_there:
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, OnGPU, out))

    def _check(self, func, args, kwargs, tensors):
        here = [x for x in tensors if not isinstance(x, OnGPU)]
        if func is aten.copy_.default:
            if here and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.note("a copy between the devices")
        elif func in INDEXING and isinstance(args[0], OnGPU):
            indices = [x for x in args[1] if x is not None]
            if any(x.ndim and not any(x is index for index in indices) for x in here):
                raise Mismatch(_described(func, tensors))
            if any(not isinstance(index, OnGPU) for index in indices):
                self.note("indices on the CPU")
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.note("a mask as index")
        elif any(x.ndim for x in here):
            raise Mismatch(_described(func, tensors))
        if func in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self.note(func._schema.name.removeprefix("aten::"))
        # https://github.com/pytorch/pytorch/pull/192651
        if func is aten._native_multi_head_attention.default and not args[0].numel():
            raise RuntimeError(
                f"cannot reshape tensor of 0 elements into shape [0, -1, {args[4]}, {args[3] // args[4]}]"
            )

    def _moved(self, func, args, kwargs, target):
        """Copy a tensor to the other device, or to another type."""
        x = args[0]
        if target != isinstance(x, OnGPU):
            if not kwargs.get("non_blocking"):
                self.note("a copy to the GPU" if target else "a copy to the CPU")
            elif not target:
                self.note("a copy to the CPU")  # that nobody waits for gives what happens to lie there
            elif x.numel() and x.untyped_storage().data_ptr() not in self.pinned:
                self.note("a copy to the GPU that is not pinned")
        out = func(values(x), *args[1:], **kwargs)
        return OnGPU(out) if target else out

    def _pin(self, x):
        assert not isinstance(x, OnGPU), "only dense CPU tensors can be pinned"
        if x.untyped_storage().data_ptr() in self.pinned:
            return x
        out = x.clone()
        self.pinned[out.untyped_storage().data_ptr()] = out.untyped_storage()  # kept: its address is no other's
        return out


def values(x):
    """The values of a tensor of either device, on the CPU; no wait is noted."""
    return x.held if isinstance(x, OnGPU) else x


def _described(func, tensors):
    return f"{func}: " + ", ".join(f"{x.device.type} {(*x.shape,)}" for x in tensors)


def move(model, dtype=None):
    """Move all weights and buffers of a module to the pretended GPU, in place; those that are floats in `dtype`, if given."""
    model._apply(lambda x: x.to(dtype) if dtype and x.is_floating_point() else x)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = OnGPU(parameter.detach().clone())
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGPU(buffer.detach().clone())
    return model


class Engine:
    """As much of DeepSpeed's engine as train_step.step uses."""

    def __init__(self, model, device):
        self.module, self.device = model, device

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass
