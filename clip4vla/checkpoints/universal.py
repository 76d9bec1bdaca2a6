"""Convert a run's state for any number of ranks, and for any of ZeRO-1, 2 and 3, by DeepSpeed's universal checkpoints.

They lie in the folder `universal` of the checkpoint that they were made from, and go where it goes. DeepSpeed converts
between numbers of ranks; what it lacks to change between ZeRO-1 or 2 and ZeRO-3, and to be exact, is added here.
"""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from clip4vla.io.atomic import fsync

NAME = "universal"


def convert(checkpoint: Path, passed: Callable[[str], object]) -> None:
    """Write CHECKPOINT/universal, unless it is there: aside and renamed, so it is complete or absent. Takes no GPU.

    passed(place) is called at each rank's state, tensor and file, as a sign of life.
    """
    from deepspeed.checkpoint import ds_to_universal

    def one_by_one(work: Callable[[Any], Any], chunks: Iterable[Any], _: int) -> list[Any]:
        return [passed(f"start-up: converting {checkpoint}") or work(chunk) for chunk in chunks]

    ds_to_universal._do_parallel_work = one_by_one  # in this process, held to tensors_only
    aside = checkpoint.parent / f"partial-{NAME}"
    if (checkpoint / NAME).exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with _plain(checkpoint) as source, _plain(aside) as target:
        folders = {"input_folder": source, "output_folder": f"{target}/{NAME}"}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        how = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        with tensors_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(Namespace(**folders, **workers, **how))
            _fit_all_stages(aside / NAME, passed)
    for file in (aside / NAME).rglob("*"):
        passed(f"start-up: syncing {file}")
        fsync(file)
    (aside / NAME).rename(
        checkpoint / NAME
    )  # not atomic_folder: it syncs no folders in folders, and gives no sign of life
    fsync(checkpoint)
    shutil.rmtree(aside)


def load(engine: Any, checkpoint: Path) -> None:
    """Continue from CHECKPOINT/universal, on every rank of an engine of ZeRO-1, 2 or 3."""
    engine._config.load_universal_checkpoint = True
    try:
        with tensors_only():
            engine.load_checkpoint(str(checkpoint), tag=NAME, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    inner = engine.optimizer.optimizer
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for parameter, state in inner.state.items():
        if torch.is_tensor(state.get("step")):  # ZeRO-3 gives all its groups one tensor, which each would count up
            state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)


def load_tensors(path: str, map_location: Any = None) -> Any:
    """Load one of DeepSpeed's files without running code: only tensors, containers and the classes named in tensors_only."""
    with tensors_only():
        return torch.load(path, map_location=map_location, weights_only=True)


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Keep torch.load, in the block, from running code of a file, whatever weights_only its caller asks for."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    force, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", dict(os.environ)
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({force: before[force]} if force in before else {})


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[str]:
    """Give a folder, in the block, a name without + and [, which break the patterns that DeepSpeed makes of paths."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _fit_all_stages(folder: Path, passed: Callable[[str], object]) -> None:
    """Add what ZeRO-1 and 2 want of a conversion from ZeRO-3, and the other way round: names, layout, number of steps."""
    import deepspeed

    common = torch.load(folder / "zero/optimizer_state.pt")
    stage3 = common.get("optimizer_state_dict")
    if stage3:
        step, groups = stage3["state"][0]["step"], stage3["param_groups"]
        for file in (folder / "zero").glob("*/*.pt"):
            passed(f"start-up: converting {file}")
            torch.save({"param": torch.load(file)}, file)
        for parameter in {file.parent for file in (folder / "zero").glob("*/*.pt")}:
            torch.save(step, parameter / "step.pt")
    else:
        step, groups = torch.load(next((folder / "zero").glob("*/step.pt"))), common["param_groups"]
    kept = {key: common[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in common}
    kept |= {"ds_version": deepspeed.__version__, "param_groups": groups}
    kept["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(kept, folder / "zero/optimizer_state.pt")
    states = sorted(folder.glob("*_model_states.pt"))[0]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if not (folder / name).exists():
            shutil.copy2(states, folder / name)
