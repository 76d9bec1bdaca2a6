"""Ranks that join with a time-out, as training does: tests/helpers/group_timeouts.py OUT MINUTES.

Writes the sum of their numbers from 1, and the minutes after which the first group, and DeepSpeed's, give up.
"""

import json
import sys
from pathlib import Path

import reduced_gradients
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.distributed import collectives
from clip4vla.training import engine

if __name__ == "__main__":
    collectives.setup(float(sys.argv[2]))
    words = [f"train.hang_timeout_minutes={sys.argv[2]}", f"train.batch_size={collectives.world_size()}"]
    cfg = load(RunConfig, None, words)
    engine.start(reduced_gradients.Given(), engine.merge_ds_config({}, "ds.json", cfg), cfg.train)
    total = collectives.all_reduce_sum(torch.tensor(collectives.rank() + 1))
    found = [dist.group.WORLD, groups._get_data_parallel_group()]
    minutes = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for group in found]
    if collectives.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"sum": int(total), "minutes": minutes}), encoding="utf-8")
