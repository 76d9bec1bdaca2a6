"""Set up DeepSpeed: merge the user's ds.json with the YAML, choose the precision, and make the engine around the model."""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clip4vla.config import RunConfig, TrainConfig
from clip4vla.config_io import parse_json
from clip4vla.distributed import collectives
from clip4vla.errors import UserError, one_line
from clip4vla.models.model import Model
from clip4vla.quick_imports import quick_imports
from clip4vla.training.zero_optimizer import spare_launches_and_waits

AUTO = "auto"
SHIPPED = Path(__file__).parents[2] / "configs/deepspeed/ds.json"
NO_DECAY = ("embedding", "token_embedding.weight", "logit_scale", "pos_embed", "cls_token", "reg_token", "latent")
PARTS = ("text", "vision", "audio", "head")
BUCKET = 25_000_000  # gradients sent at once: DeepSpeed's 500 million would be all of ViT-B/32's, when the backward pass is over
SUMMED, REDUCED = 16, 256  # micro-batches, and ranks, from which on gradients are added in fp32: bf16 has 8 bits
GIB = 2**30


def read_ds_config(path: str | None) -> tuple[dict[str, Any], str]:
    """Read (DeepSpeed settings, their file): the file named, else ./ds.json, else configs/deepspeed/ds.json."""
    if path and not Path(path).is_file() and path != "ds.json":
        raise UserError(f"--deepspeed_config {path}: no such file; the shipped ones are in configs/deepspeed/")
    file = Path(path) if path and Path(path).is_file() else Path("ds.json") if Path("ds.json").is_file() else SHIPPED
    try:
        tree = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a JSON object with DeepSpeed settings")
    return tree, str(file)


def merge_ds_config(ds: dict[str, Any], where: str, cfg: RunConfig) -> dict[str, Any]:
    """Fill "auto" and missing keys of ds.json from the YAML; UserError naming both places where they contradict."""
    ds, train, world = json.loads(json.dumps(ds)), cfg.train, collectives.world_size()
    if train.batch_size % (world * train.gradient_accumulation_steps):
        raise UserError(
            f"train.batch_size={train.batch_size} must be a multiple of the {world} ranks times "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}"
        )
    precision = choose_precision(ds, where, train)
    decided = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": (
            "train.batch_size / ranks / train.gradient_accumulation_steps",
            train.batch_size // (world * train.gradient_accumulation_steps),
        ),
        "gradient_accumulation_steps": ("train.gradient_accumulation_steps", train.gradient_accumulation_steps),
        "gradient_clipping": ("train.grad_clip_norm", train.grad_clip_norm),
        "bf16.enabled": ("train.precision", precision == "bf16"),
        "fp16.enabled": ("train.precision", precision == "fp16"),
    }
    if "scheduler" in ds:
        raise UserError(
            f"{where}: scheduler contradicts train.lr and train.warmup_ratio of the YAML, which decide the learning rate"
        )
    ds.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True, "fused": True}})
    for name in ("lr", "betas", "eps", "weight_decay"):
        decided[f"optimizer.params.{name}"] = (f"train.{name}", getattr(train, name))
    for key, (source, value) in decided.items():
        _decide(ds, key, value, where, source)
    _set_defaults(ds, where, train, precision)
    if train.compile != "off" and ds.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"{where}: zero_optimization.stage=3 contradicts train.compile={train.compile}: take stage 1 or 2"
        )
    left = [key for key, value in _leaves(ds) if value == AUTO]
    if left:
        raise UserError(f'{where}: {left[0]} cannot be "auto", the YAML does not decide it: give a value')
    return ds


def _set_defaults(ds: dict[str, Any], where: str, train: TrainConfig, precision: str) -> None:
    """Set what DeepSpeed's own defaults would make slow, where ds.json lacks it or has "auto"."""
    from deepspeed.accelerator import get_accelerator

    world, micros = collectives.world_size(), train.gradient_accumulation_steps
    defaults: dict[str, Any] = {
        "steps_per_print": 10**12,  # clip4vla logs
        "timers.throughput.enabled": False,  # waits for the device in each pass and step
        "bf16.check_grad_overflow": False,  # so does this; Meter.rows stops the run before such a state is saved
    }
    if "zero_optimization" in ds:
        # alone, a rank has nothing to send, and no bucket to copy gradients into; gloo does not overlap
        defaults["zero_optimization.overlap_comm"] = world > 1 and not get_accelerator().is_synchronized_device()
        defaults["zero_optimization.contiguous_gradients"] = world > 1
        defaults["zero_optimization.reduce_bucket_size"] = BUCKET
        if precision != "fp32" and micros >= SUMMED:
            defaults["data_types.grad_accum_dtype"] = "fp32"
    if precision != "fp32" and (micros >= SUMMED or world >= REDUCED):
        defaults["communication_data_type"] = "fp32"
    for key, value in defaults.items():
        parent, leaf = _parent(ds, key, where)
        if parent.get(leaf, AUTO) == AUTO:
            parent[leaf] = value


def choose_precision(ds: dict[str, Any], where: str, train: TrainConfig) -> str:
    """Choose fp32, bf16 or fp16, after asking the device; `auto` follows ds.json, else takes bf16 where it is fast."""
    from deepspeed.accelerator import get_accelerator

    for kind in ("bf16", "fp16", "optimizer", "zero_optimization"):
        if not isinstance(ds.get(kind, {}), dict):
            raise UserError(f"{where}: {kind} must be a JSON object, not {ds[kind]!r}")
    asked = [kind for kind in ("bf16", "fp16") if ds.get(kind, {}).get("enabled") is True]
    wanted = train.precision if train.precision != AUTO else asked[0] if asked else ""
    device = get_accelerator()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    wanted = wanted or ("bf16" if _bf16_is_fast() and dtypes["bf16"] in device.supported_dtypes() else "fp32")
    if dtypes[wanted] not in device.supported_dtypes():
        source = where if train.precision == AUTO else "train.precision"
        raise UserError(
            f"{source}: {wanted} is not supported on {device.device_name()}; set train.precision to fp32 or bf16"
        )
    return wanted


def _bf16_is_fast() -> bool:
    """Tell whether bf16 products beat fp32: on a GPU, with AMX, and with AVX512-BF16 on AMD, where MKL's fp32 is AVX2."""
    cpu = torch.cpu.get_capabilities()
    amd = "AMD" in cpu.get("cpu_name", "")
    return torch.cuda.is_available() or cpu.get("amx_bf16", False) or (amd and cpu.get("avx512_bf16", False))


def start(model: Model, ds: dict[str, Any], train: TrainConfig) -> Any:
    """Make the DeepSpeed engine around the model, which recomputes activations and is compiled where `train` says so."""
    with quick_imports():
        import deepspeed
        from deepspeed.utils import groups

    # set as a whole: reading it runs a compiler for each op. This one would be compiled for a minute, for inference only
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon(ds)
    if groups._WORLD_GROUP is None:  # else DeepSpeed makes it with torch's time-out: 10 minutes with NCCL
        groups._WORLD_GROUP = dist.new_group(timeout=collectives.timeout(train.hang_timeout_minutes))
    deepspeed.utils.logging.logger.setLevel("WARNING")
    # fp32 products of the losses: features that were rounded to bf16 or fp16 have no more bits than TF32 keeps
    torch.backends.cuda.matmul.allow_tf32 = ds["bf16"]["enabled"] or ds["fp16"]["enabled"]
    towers: list[Any] = [model.text, model.vision, model.audio.trunk]
    for tower in towers:
        tower.set_grad_checkpointing(train.activation_checkpointing)
    try:
        with contextlib.redirect_stdout(None):  # its BF16_Optimizer prints the memory at each of its steps
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=parameter_groups(model, train.lr_scale), config=ds
            )
    except (deepspeed.DeepSpeedConfigError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"DeepSpeed refuses its settings: {type(error).__name__}: {one_line(error, 300)}") from None
    spare_launches_and_waits(engine)
    if train.compile != "off":
        torch._dynamo.config.recompile_limit = 64  # sizes of padded batches, with and without gradient
        engine.compile(backend=train.compile, compile_kwargs={"dynamic": False})
    return engine


def _import_muon(ds: dict[str, Any]) -> None:
    """Import what every DeepSpeed engine imports; its torch.compile is skipped where Muon does not train: it takes a second."""
    if str(ds["optimizer"].get("type")).lower() != "muon" and "TORCHDYNAMO_DISABLE" not in os.environ:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        with quick_imports():
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        del os.environ["TORCHDYNAMO_DISABLE"]


def parameter_groups(model: nn.Module, lr_scale: dict[str, float]) -> list[dict[str, Any]]:
    """Group trainable parameters by tower, with weight decay, and without: biases, norms, embeddings, temperature."""
    for name in set(lr_scale) - set(PARTS):
        raise UserError(f"train.lr_scale: {name!r} is none of {', '.join(PARTS)}")
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}  # not by rate: a run may go on with other rates
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(NO_DECAY)
            groups.setdefault((name.split(".")[0], plain), []).append(parameter)
    return [
        {"params": groups[part, plain], "lr_scale": lr_scale.get(part, 1.0)} | ({"weight_decay": 0.0} if plain else {})
        for part, plain in sorted(groups)
    ]


def learning_rate(step: int, train: TrainConfig) -> float:
    """Compute the learning rate of a step: linear warm-up, then a cosine to 0 at max_steps; resuming needs no state."""
    warmup = max(1, round(train.warmup_ratio * train.max_steps))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, train.max_steps - warmup)))


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of the next step, in each group times its lr_scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def get_learning_rate(engine: Any) -> float:
    """Read from the optimizer what set_learning_rate gave it; 0 if no group learns."""
    groups = engine.optimizer.param_groups
    return next((group["lr"] / group["lr_scale"] for group in groups if group["lr_scale"]), 0.0)


@contextlib.contextmanager
def gathered_parameters(engine: Any) -> Iterator[None]:
    """Gather all weights on every rank for the block, also under ZeRO-3: for passes that do not go through engine.forward."""
    import deepspeed

    split = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(split, enabled=bool(split)):
        yield


def _decide(ds: dict[str, Any], key: str, value: Any, where: str, source: str) -> None:
    ds, leaf = _parent(ds, key, where)
    if ds.get(leaf, AUTO) != AUTO and ds[leaf] != value:
        raise UserError(
            f'{where}: {key}={ds[leaf]!r} contradicts {source}={value!r} of the YAML; set one of them to the other, or "auto"'
        )
    ds[leaf] = value


def _parent(ds: dict[str, Any], key: str, where: str) -> tuple[dict[str, Any], str]:
    """Find (the object that holds a dotted key, its last part); objects that are missing are made."""
    *parents, leaf = key.split(".")
    for parent in parents:
        ds = ds.setdefault(parent, {})
        if not isinstance(ds, dict):
            raise UserError(f"{where}: {parent} must be a JSON object, not {ds!r}")
    return ds, leaf


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        row
        for key, value in tree.items()
        for row in (_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    ]
