"""Checkpoints that are complete or do not exist, and how a run goes on from one."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from clip4vla import distributed
from clip4vla.config import RunConfig, UserError
from clip4vla.shards import write_text


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run: folders get their name step-N only when all of it is on the disk."""
    found = sorted(Path(run_dir, "checkpoints").glob("step-*"))
    return found[-1] if found else None


class Checkpoints:
    """Writes and reads the checkpoints of one run: DeepSpeed's state, model.safetensors in fp32 and config.json."""

    def __init__(self, engine: Any, cfg: RunConfig, frozen: dict[str, Tensor], samples: list[list[int]]):
        self.engine, self.frozen = engine, frozen
        engine.checkpoint_engine.load = load_tensors
        self.folder, self.keep = Path(cfg.run_dir, "checkpoints"), cfg.train.keep
        self.layout = {"ranks": distributed.world(), "zero_stage": engine.zero_optimization_stage()}
        order = [samples, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.window]
        self.layout["sample order"] = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:12]

    def save(self, step: int) -> None:
        """Write aside, fsync, rename, then `latest`: a checkpoint is complete or it does not exist."""
        try:
            self._save(step)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({reason}); those already there are whole"
            ) from None

    def _save(self, step: int) -> None:
        aside, final = self.folder / f"partial-{step:08d}", self.folder / f"step-{step:08d}"
        if distributed.rank() == 0:
            for half_written in self.folder.glob("partial-*"):
                shutil.rmtree(half_written, ignore_errors=True)
        distributed.barrier()
        self.engine.save_checkpoint(str(self.folder), tag=aside.name, save_latest=False, exclude_frozen_parameters=True)
        weights = self._weights()
        if distributed.rank() == 0:
            save_file(weights, aside / "model.safetensors")
            meta = self.engine.module.config() | {"step": step, **self.layout}
            (aside / "config.json").write_text(json.dumps(meta, indent=1))
        distributed.barrier()
        if distributed.rank() == 0:
            self._publish(aside, final)
        distributed.barrier()

    def load(self, folder: Path) -> int:
        """Continue from a checkpoint of this run; returns the steps done."""
        meta = json.loads((folder / "config.json").read_text())
        theirs = {key: meta.get(key) for key in self.layout}
        for key, ours in self.layout.items():
            if theirs[key] != ours:
                what = "train.batch_size, seed, data.train or data.window" if key == "sample order" else key
                raise UserError(
                    f"{folder}: {what} differs: {key} {theirs[key]} there and {ours} here; resume with the same, "
                    "or start a new run_dir with init_from"
                )
        try:
            self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        except Exception as error:  # torch, pickle and DeepSpeed raise many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: cannot be continued from ({reason}); remove it to go on from the one before"
            ) from None
        return meta["step"]

    def _weights(self) -> dict[str, Tensor]:
        """All weights in fp32 on rank 0's CPU: master copies of what is trained, untouched originals of what is frozen."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        weights = dict(self.frozen)
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                master = safe_get_full_fp32_param(parameter)  # a collective: every rank takes part
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    full = (parameter if master is None else master).detach().float().cpu()
                if distributed.rank() == 0:
                    weights[name] = full.reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
        return weights

    def _publish(self, aside: Path, final: Path) -> None:
        for file in [*aside.iterdir(), aside]:
            _fsync(file)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _fsync(self.folder)
        write_text(self.folder / "latest", final.name)  # for people and for DeepSpeed's own tools
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on rank 0, of everything that will not be trained, before DeepSpeed rounds it to the run's precision."""
    if distributed.rank():
        return {}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items() if name not in trained}


def load_tensors(path: str, map_location: Any = None) -> Any:
    """DeepSpeed's files without unpickling code: only tensors, containers and the classes named here."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
