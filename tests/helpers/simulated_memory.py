"""One training step of one rank at full size, without its memory: tensors of floats are fake, whole numbers are real.

The real train_step.step runs. Fake tensors have a shape and a storage of no bytes; since indices, masks and lengths are real,
code whose shapes depend on them runs as on a GPU. The device is called cpu, as autograd's CUDA threads need a driver; settings
of DeepSpeed, tile sizes, masks and attention kernels are those of CUDA. The losses run uncompiled, which takes more than what
torch.compile makes of them. Counted are the bytes of the storages that are alive, in blocks of 512 as CUDA's allocator has them,
FLOPs by torch's formulas, and the bytes that the rank passes into collectives.
"""

import contextlib
import weakref
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from forks import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from clip4vla.config import FramesConfig, RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data.batch import Batch
from clip4vla.losses import contrastive
from clip4vla.models import fusion
from clip4vla.models.model import Model
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training import train_step
from clip4vla.training.engine import merge_ds_config, parameter_groups, read_ds_config
from clip4vla.training.run_setup import RunSetup

CLIP = "ViT-B-32-quickgelu/openai"
BLOCK = 512  # bytes that CUDA's allocator rounds up to
aten = torch.ops.aten


class Fake(FakeTensorMode):
    """Asks once, not before each operation, whether there is a GPU that must not be started: that loads a library."""

    avoid_device_init = not torch.cuda.is_available()


class Simulation(TorchDispatchMode):
    """Runs torch's operations on fake floats and real whole numbers, and counts."""

    def __init__(self):
        super().__init__()
        self.fake = Fake(allow_non_fake_inputs=True)
        self.phase, self.alive, self.now, self.flops, self.sent = "start", {}, 0, 0, 0
        self.peaks, self.largest = {}, {}  # bytes that are alive, numbers of one tensor; by phase

    @property
    def peak(self):
        return max(self.peaks.values())

    def track(self, tree):
        """Count the storages of these tensors as alive until they are gone."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    size = -(-storage.nbytes() // BLOCK) * BLOCK
                    self.alive[storage._cdata] = weakref.finalize(storage, self._gone, storage._cdata, size)
                    self.now += size
                    self.largest[self.phase] = max(self.largest.get(self.phase, 0), tensor.numel())
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def _gone(self, key, size):
        del self.alive[key]
        self.now -= size

    def empty(self, *shape, dtype=torch.float32):
        """Make a fake tensor."""
        with self.fake:
            made = torch.empty(*shape, dtype=dtype)
        self.track(made)
        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count_sent(func, args)
        out = self._run(func, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.track(out)
        return out

    def _run(self, func, args, kwargs):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) for x in inputs):
            if func in (
                aten.index.Tensor,
                aten.index_put.default,
                aten.index_put_.default,
                aten._index_put_impl_.default,
            ):
                args = (args[0], _positions(args[1]), *args[2:])
            return self.fake.dispatch(func, (), args, kwargs)
        out = func(*args, **kwargs)  # of real numbers, or of none
        if func is torch.ops.c10d._allgather_base_.default:  # the fake process group sends nothing
            args[0].copy_(args[1].repeat(len(args[0]) // len(args[1]), *[1] * (args[1].ndim - 1)))

        def hide(x):
            with self.fake:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

        return tree_map_only(torch.Tensor, lambda x: hide(x) if x.is_floating_point() else x, out)

    def _count_sent(self, func, args):
        """Count the input of a collective: all of what is reduced, the own part of what is gathered."""
        name = func._schema.name.removeprefix("c10d::")
        sent = args[1] if name == "_allgather_base_" else args[0]
        self.sent += sum(x.numel() * x.element_size() for x in tree_leaves(sent) if isinstance(x, torch.Tensor))


def _positions(indices):
    """Replace masks among indices by the positions that are True, as CUDA's kernels do."""
    out = []
    for index in indices:
        masks = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        out.extend(index.nonzero().unbind(1) if masks else [index])
    return out


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    """Attend as CUDA does: by flash attention, or with a mask, or in fp32, by the memory-efficient kernel."""
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    logsumexp = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, logsumexp, dropout_p, is_causal)[
        0
    ]


@contextlib.contextmanager
def as_on_cuda():
    """Give the CPU, in the block, the tile sizes and attention kernels of CUDA, and what tells engine.py that it is one."""
    with contextlib.ExitStack() as patches:
        for part, name, value in (
            (contrastive, "TILE", {"cpu": contrastive.TILE["cuda"]}),
            (fusion, "TOKENS", {"cpu": fusion.TOKENS["cuda"]}),
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (type(get_accelerator()), "is_synchronized_device", lambda self: False),
        ):
            patches.enter_context(patch.object(part, name, value))
        yield


@contextlib.contextmanager
def fake_ranks(world):
    """Be rank 0 of `world` ranks, in the block, of which the others send nothing."""
    if dist.is_initialized():  # by an engine of another test in this process: its next one joins again
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = groups._WORLD_GROUP = None
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()


class Engine:
    """Stands in for DeepSpeed 0.19's engine as far as a device's memory goes: runtime/zero/stage_1_and_2.py, stage3.py."""

    def __init__(self, sim, setup, cfg):
        self.sim, self.module, self.device, self.cfg = sim, setup.model, torch.device("cpu"), cfg
        zero = setup.ds["zero_optimization"]
        self.stage, self.world = setup.stage, dist.get_world_size() if dist.is_initialized() else 1
        self.bucket_size, self.overlap = int(zero.get("reduce_bucket_size", 5e8)), zero.get("overlap_comm", False)
        self.contiguous = zero.get("contiguous_gradients", True)
        self.offload, self.micro, self.micros = "offload_optimizer" in zero, 0, cfg.train.gradient_accumulation_steps
        self.groups = [group["params"] for group in parameter_groups(self.module, {})]
        self.trained = [p for group in self.groups for p in group]
        self.dtype = self.trained[0].dtype
        self.sent_as = torch.float32 if setup.ds.get("communication_data_type") == "fp32" else self.dtype
        self.buckets, self.filled, self.partition, self.accumulated = [], 0, None, None
        # DeepSpeed's BF16_Optimizer: each rank has whole gradients, and their sums in fp32; no hooks, no buckets
        whole = self.stage == 1 and setup.ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        self.sums = [sim.empty(sum(p.numel() for p in group)) for group in self.groups * whole]
        for parameter in self.trained * (not whole):
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        share = self._share(self.trained) if self.stage else sum(p.numel() for p in self.trained)
        self.state = [] if self.offload else [sim.empty(share) for _ in range(3)]
        largest = max(p.numel() for p in self.trained)
        self.staged = sim.empty(largest, dtype=self.dtype) if self.offload else None
        if self.stage == 3:
            self.weights = sim.empty(self._share(list(self.module.parameters())), dtype=self.dtype)
            self.partition = sim.empty(self._share(self.trained), dtype=self.dtype)
            self._make_buckets(1)

    def _share(self, parameters):
        return -(-sum(p.numel() for p in parameters) // self.world)

    def __call__(self, *args):
        self.sim.phase = "forward" if torch.is_grad_enabled() else "embedding"
        out = self.module(*args)
        self.sim.phase = "loss"
        return out

    def backward(self, loss):
        self.sim.phase = "backward"
        loss.backward()
        if self.sums:
            if self.at_boundary():
                self.sim.empty(min(sum(x.numel() for x in self.sums), 500_000_000))  # reduced in a copy
            return
        if self.stage == 1 and not self.overlap and self.at_boundary():
            for parameter in self.trained:
                self._into_bucket(parameter)
        self._reduce()
        if self.stage in (1, 2) and (self.stage == 2 or self.at_boundary()):
            self.buckets = []
        if self.stage == 2:  # the next micro-batch has a partition of its own, which is added
            self.accumulated = self.partition if self.accumulated is None else self.accumulated
            self.partition = None

    def at_boundary(self):
        """Tell whether the optimizer steps after this micro-batch."""
        return self.micro == self.micros - 1

    def _make_buckets(self, count):
        if self.contiguous:
            self.buckets = [self.sim.empty(self.bucket_size, dtype=self.dtype) for _ in range(count)]

    def _on_gradient(self, parameter):
        if self.stage in (1, 2) and not self.buckets:
            self._make_buckets(2 if self.overlap else 1)
        if self.stage >= 2 or (self.stage == 1 and self.overlap and self.at_boundary()):
            self._into_bucket(parameter)

    def _into_bucket(self, parameter):
        if parameter.grad is None:
            return
        if self.filled + parameter.numel() > self.bucket_size:
            self._reduce()
        self.filled += parameter.numel()
        if parameter.numel() > self.bucket_size:
            self._reduce()  # a gradient that no bucket holds is reduced where it is
        if self.contiguous:
            parameter.grad = None

    def _reduce(self):
        """Reduce the bucket's gradients in a copy (one rank needs none), and keep the rank's part of them."""
        if self.filled and (self.world > 1 or not self.contiguous):
            sent = min(self.filled, self.bucket_size)
            copies = [self.sim.empty(sent, dtype=dtype) for dtype in {self.dtype, self.sent_as}]
            del copies
        if self.filled and self.partition is None and self.contiguous and not self.offload:
            self.partition = self.sim.empty(sum(map(self._touched, self.groups)), dtype=self.dtype)
        self.filled = 0

    def _touched(self, group):
        """Count the elements of the parameters that rank 0's part of a group touches."""
        share, start, touched = self._share(group), 0, 0
        for parameter in group:
            touched += parameter.numel() * (start < share)
            start += parameter.numel()
        return touched

    def step(self):
        self.micro += 1
        if self.micro < self.micros:
            return
        self.sim.phase = "step"
        if self.sums:  # which stay, and so do the gradients: both are set to 0
            return
        if self.stage == 0 and self.world > 1:  # gradients are all-reduced in copies
            self.sim.empty(min(sum(p.numel() for p in self.trained), 500_000_000), dtype=self.dtype)
        for group in self.groups:
            if self.stage and not self.offload:
                flat = self.sim.empty(self._share(group), dtype=self.dtype)
                gradient = self.sim.empty(self._share(group))
                del flat, gradient
        if self.stage == 0:
            gradients = [self.sim.empty(p.numel()) for p in self.trained]
            del gradients
        self.partition = self.accumulated = None
        for parameter in self.trained:
            parameter.grad = None


def made_batch(sim, clips, dim, vectors, even):
    """Make a micro-batch of clips with 1 to 6 segments (3.25 on average), 5 to 12 frames (6.5) and 12 to 32 tokens.

    even: all have 3, 6 and 32. If not, the first clip says that it lacks all: there are rows that no loss compares.
    """
    numbers = torch.arange(clips)
    segments, frames, tokens = (
        ([3], [6], [32]) if even else ([1, 2, 3, 3, 3, 4, 4, 6], [12, 6, 6, 6, 6, 6, 5, 5], [32, 12, 16, 12])
    )
    segment_clip = numbers.repeat_interleave(torch.tensor(segments)[numbers % len(segments)])
    frame_clip = numbers.repeat_interleave(torch.tensor(frames)[numbers % len(frames)])
    length = torch.tensor(tokens)[numbers % len(tokens)]
    place = torch.arange(0 if vectors else 32)
    tokens = (place < length[:, None] - 1) + 49407 * (place == length[:, None] - 1)
    s, f = len(segment_clip), len(frame_clip)
    there = numbers >= (not even)
    return Batch(
        ids=[str(i) for i in range(clips)], captions=[""] * clips, tokens=tokens,
        frames=sim.empty(0 if vectors else f, 3, 224, 224, dtype=torch.uint8), frame_clip=frame_clip,
        segments=sim.empty(s, 1, 224, 224, dtype=torch.uint8), segment_clip=segment_clip,
        segment_rows=torch.full((s,), 224), hidden_rows=torch.zeros(s, 224, dtype=torch.bool),
        hidden_channels=torch.zeros(s, 224, dtype=torch.bool), audio_type=torch.zeros(clips, dtype=torch.int64),
        group=numbers, has_text=there, has_frames=there, has_audio=there, meta=[{"id": "", "label": "a"}] * clips,
        text_vectors=sim.empty(clips, dim, dtype=torch.float16) if vectors else None,
        frame_vectors=sim.empty(f, dim, dtype=torch.float16) if vectors else None,
    )  # fmt: skip


def built_model(sim, cfg, dtype, layers):
    """Build the model that cfg names, of `layers` blocks a tower (0: all), with fake weights, which are not counted yet."""
    clip = resolve_clip_config(cfg.model.clip)
    if layers:
        clip |= {name: clip[name] | {"layers": layers} for name in ("vision_cfg", "text_cfg")}
    with torch.device("meta"):
        model = Model(clip, cfg.model, SpectrogramConfig(), FramesConfig()).train()
    model.freeze()
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                with sim.fake:
                    empty = torch.empty(value.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                kind = dtype if value.is_floating_point() else value.dtype
                module._buffers[name] = sim.empty(value.shape, dtype=kind)
    for tower in (model.text, model.vision, model.audio.trunk):
        tower.set_grad_checkpointing(cfg.train.activation_checkpointing)
    return model


class Step:
    """Holds a simulated step: what was set up, its micro-batches, and what was counted."""

    def __init__(self, clips, world, *words, vectors=True, even=False, ds="ds", zero=None, layers=0, dtype="bf16"):
        """Simulate rank 0 of `world`, each with `clips` clips.

        words: settings. even: clips of equal lengths. ds: of configs/deepspeed; zero: settings of ZeRO beside those there.
        """
        self.cfg = load(
            RunConfig,
            None,
            [f"model.clip={CLIP}", f"train.batch_size={clips * world}", f"train.precision={dtype}", *words],
        )
        self.cfg.model.labels = ["a", "b"] if self.cfg.model.head == "classifier" else []
        self.world, self.sim, parts = world, Simulation(), self.cfg.train.gradient_accumulation_steps
        settings, _ = read_ds_config(str(ROOT / f"configs/deepspeed/{ds}.json"))
        settings["zero_optimization"] |= zero or {}
        model = built_model(self.sim, self.cfg, torch.float32 if dtype == "fp32" else torch.bfloat16, layers)
        with self.as_rank():
            ds = merge_ds_config(settings, ds, self.cfg)
        self.setup = RunSetup(torch.device("cpu"), [], ds, None, model, "", [object()] if vectors else None)
        with self.as_rank(), self.sim:
            self.sim.track(list(model.parameters()))
            dim = model.clip_config["embed_dim"]
            self.micros = [made_batch(self.sim, clips // parts, dim, vectors, even) for _ in range(parts)]
            engine = Engine(self.sim, self.setup, self.cfg)
            self.losses, self.features = train_step.step(engine, self.micros, self.cfg)

    @contextlib.contextmanager
    def as_rank(self):
        """Be rank 0 of the step's ranks, on CUDA, in the block."""
        with fake_ranks(self.world), as_on_cuda():
            yield
