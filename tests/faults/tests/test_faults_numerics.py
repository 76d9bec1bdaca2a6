"""A slice of the campaign of numerical trouble: every kind of end, and what must go on, on two ranks."""

import json

import pytest
import torch
from faults import numerics
from running import TINY
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
