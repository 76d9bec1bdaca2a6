"""A loader over the sample."""

import torch

from clip4vla.config import DataSources, MaskConfig
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.sampler import EvalSampler
from clip4vla.towers.tokenizer import tokenizer


def loader(shards, order=None, needs=("frames", "fbank"), **changes):
    folders = open_folders({str(shards / s / "train"): 1.0 for s in ("speech_fr", "sounds")}, "data.train")
    counts = [[shard.samples for shard in f.shards] for f in folders]
    order = order or EvalSampler(counts, 16)
    cfg = DataSources(**changes)
    return Loader(folders, order, cfg, tokenize=tokenizer("x.json", 32), mask=MaskConfig(), seed=0, needs=needs,
                  device=torch.device("cpu"), damage_log=shards / "corrupt.jsonl")  # fmt: skip
