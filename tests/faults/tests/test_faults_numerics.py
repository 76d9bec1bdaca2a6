"""A slice of the campaign of numerical trouble: every kind of end, and what must go on, on two ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from faults import numerics
from running import TINY, ranks, trace
from safetensors.torch import save_file

from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.data.loader import open_folders
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.training.run_setup import build_model

SLICE = (
    "vector fp32 ZeRO-3", "gradient fp32 ZeRO-0", "gradient bf16 ZeRO-1", "gradient accumulated", "explodes fp32 ZeRO-1",
    "no audio on all x1", "no text on one x3", "silence fp32", "one clip a rank",
)  # fmt: skip


def test_spoilt_numbers_end_in_one_line_or_give_the_right_loss(sample_shards, tmp_path):
    some = [case for case in numerics.cases() if case.name in SLICE]
    assert len(some) == len(SLICE)
    numerics.ended(tmp_path, sample_shards, some, seed=1)
    _goes_on(tmp_path, sample_shards, next(case for case in some if case.name == "gradient bf16 ZeRO-1"))


def _goes_on(folder, shards, case):
    """The run that ended, without the fault: from its last checkpoint, whose optimizer state is sound too."""
    spoilt = numerics._run(folder, shards, case, seed=1)
    (folder / "ds.json").write_text(json.dumps(spoilt["ds"]))
    done = ranks(2, "launch/pretrain.py", *spoilt["words"], "--deepspeed_config", folder / "ds.json")
    assert done.returncode == 0 and f"2 done of {case.steps}" in done.stdout, done.stderr
    (run_dir,) = (word.removeprefix("run_dir=") for word in spoilt["words"] if word.startswith("run_dir="))
    losses = trace(Path(run_dir))
    assert len(losses) == case.steps and all(map(math.isfinite, sum(losses.values(), ())))


def test_a_wrong_end_is_seen():
    case = numerics.cases()[0]
    with pytest.raises(AssertionError, match="seed 1"):
        numerics._must_be_right(case, {"said": "", "saved": [2, 4, 6], "finite": True}, "seed 1")


def test_weights_that_are_not_finite_are_refused_at_the_start(sample_shards, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    cfg = load(RunConfig, None, [f"model.clip={tmp_path}/tiny.json", f"init_from=[{tmp_path}]"])
    (folder,) = open_folders({str(sample_shards / "sounds/train"): 1.0}, "data.train")
    model = build_model(load(RunConfig, None, [f"model.clip={tmp_path}/tiny.json"]), folder.fingerprint, None)[0]
    assert isinstance(model, Model)
    model.audio.trunk.proj.data[3, 4] = torch.nan
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    with pytest.raises(UserError, match=r"the weights of audio.trunk.proj are not finite"):
        build_model(cfg, folder.fingerprint, None)
