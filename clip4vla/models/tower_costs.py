"""Measure what a tower costs, by passes on torch's meta device, which compute and hold nothing.

So it is for towers of which training/flops.py and training/memory.py know no formula: all but plain ViTs, and open_clip's own
transformers of text.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from clip4vla.data.batch import Batch
from clip4vla.models.audio_encoder import AudioEncoder
from clip4vla.models.audio_trunk import build_tower
from clip4vla.models.model import Model
from clip4vla.towers.space import build_towers
from clip4vla.towers.text import encode_text
from clip4vla.towers.vision import encode_images

LONGEST = 48  # tokens of the longest of three texts that are measured
aten = torch.ops.aten


class PassMemory(NamedTuple):
    """Holds bytes of a tower's passes, without its weights and their gradients."""

    kept: float  # from the forward pass to the backward pass
    forward: float  # most in the forward pass
    backward: float  # most in the backward pass beside `kept`


def picture_flops(model: Model) -> float:
    """Count FLOPs of the vision tower for one picture, with those of the gradient if it trains."""
    tower = _on_meta(model, "vision", torch.float32)
    return _flops(tower, lambda: encode_images(tower, _pictures(model, 1, torch.float32)))


def text_flops(model: Model) -> tuple[float, float, float]:
    """Count FLOPs of the text tower for a text of L tokens, a + b L + c L^2: (a, b, c), with the gradient if it trains."""
    tower = _on_meta(model, "text", torch.float32)
    third = min(LONGEST, tower.context_length) // 3
    lengths = [third, 2 * third, 3 * third]
    counts = [_flops(tower, functools.partial(_sentences, tower, 1, length)) for length in lengths]
    powers = torch.tensor(lengths, dtype=torch.float64)[:, None] ** torch.arange(3)
    a, b, c = torch.linalg.solve(powers, torch.tensor(counts, dtype=torch.float64)).tolist()
    return a, b, c


def picture_memory(model: Model, count: int, dtype: torch.dtype, recompute: bool) -> PassMemory:
    """Measure the vision tower's memory for `count` pictures, which are given in dtype; recompute: its blocks' activations."""
    tower = _on_meta(model, "vision", dtype, recompute)
    return _memory(tower, lambda: encode_images(tower, _pictures(model, count, dtype)))


def text_memory(model: Model, count: int, length: int, dtype: torch.dtype, recompute: bool) -> PassMemory:
    """Measure the text tower's memory for tokens (count, length); recompute: its blocks' activations."""
    tower = _on_meta(model, "text", dtype, recompute)
    return _memory(tower, functools.partial(_sentences, tower, count, length))


def audio_memory(model: Model, batch: Batch, types: list[int], dtype: torch.dtype, recompute: bool) -> PassMemory:
    """Measure the audio tower's memory for a batch's segments, once for each number of type tokens in `types`, side by side."""
    audio = _on_meta(model, "audio", dtype, recompute)
    sizes, views, tokens = batch.segments.shape, len(types), max(types)

    def run() -> Tensor:
        if model.cfg.audio_span == "segment":
            return audio(
                _empty(views * sizes[0], *sizes[1:], dtype=dtype), _empty(views * sizes[0], tokens, 2, dtype=dtype)
            )
        given = [_empty(*sizes, dtype=dtype) for _ in types]
        mix = _empty(len(batch), tokens, 2, dtype=dtype)
        return torch.cat(audio.encode_clips(given, batch.on_host.segment_rows, batch.segment_counts, mix))

    return _memory(audio, run)


def _on_meta(model: Model, name: str, dtype: torch.dtype, recompute: bool = False) -> Any:
    """Build a model's tower again, without memory: what trains there, trains."""
    with torch.device("meta"):
        if name == "audio":
            own = (
                build_tower(model.audio_config) if model.audio_config else build_towers(model.clip_config, "vision")[1]
            )
            tower: Any = AudioEncoder(own, model.cfg, model.spectrogram, model.clip_config["embed_dim"])
        else:
            tower = build_towers(model.clip_config, model.cfg.audio_tower)[name == "vision"]
    tower = tower.to(dtype).eval()
    trains = {key: p.requires_grad for key, p in getattr(model, name).named_parameters()}
    for key, parameter in tower.named_parameters():
        parameter.requires_grad_(trains[key])
    if recompute:
        tower.train()
        (tower.trunk if name == "audio" else tower).set_grad_checkpointing(True)
    return tower


def _pictures(model: Model, count: int, dtype: torch.dtype) -> Tensor:
    return _empty(count, 3, *model.pictures.size, dtype=dtype)


def _empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _sentences(tower: Any, count: int, length: int) -> Tensor:
    return encode_text(tower, _empty(count, length, dtype=torch.int64))[0]


def _flops(tower: nn.Module, run: Callable[[], Tensor]) -> float:
    """Count FLOPs of run() of a tower, and of the gradient of its sum.

    Three times the forward pass where convolutions have groups: of their gradients torch counts those of all pairs of channels.
    """
    groups = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in tower.modules())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = run()
        if out.requires_grad and not groups:
            out.sum().backward()
    return float(counter.get_total_flops()) * (3 if out.requires_grad and groups else 1)


def _memory(tower: nn.Module, run: Callable[[], Tensor]) -> PassMemory:
    """Measure run() of a tower, and the gradient of its sum."""
    trains = [p for p in tower.parameters() if p.requires_grad]
    with (
        _no_gradients_stay(trains),
        torch.set_grad_enabled(bool(trains)),
        _Storages() as held,
        _Kernels(),
    ):
        out = run()
        kept = forward = held.peak
        if not trains:
            return PassMemory(0, forward, 0)
        kept = held.peak = held.now
        out.sum().backward()
        return PassMemory(kept, forward, held.peak - kept)


@contextlib.contextmanager
def _no_gradients_stay(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Drop each gradient, in the block, as soon as it is there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Storages(TorchDispatchMode):
    """Counts bytes of the storages that operations in the block make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.alive | given:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size


class _Kernels(TorchFunctionMode):
    """Attends, in the block, by CUDA's memory-efficient kernel, which keeps no scores; flash attention takes as much."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn.scaled_dot_product_attention:
            return _efficient(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the arguments of torch's scaled_dot_product_attention."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    more = torch.is_grad_enabled(), dropout_p, is_causal
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, *more, scale=scale)[0]
