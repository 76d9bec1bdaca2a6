"""A loader of one batch, a model that counts its passes, and what a model sees in a folder."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from running import TINY

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.data.batch import Batch
from clip4vla.models.model import Model
from clip4vla.towers.tokenizer import tokenizer


class Towers(Model):
    """A tiny model that keeps how many texts each pass read."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(TINY, ModelConfig(), SpectrogramConfig())
        self.passes = []

    def encode_tokens(self, tokens):
        self.passes.append(len(tokens))
        return super().encode_tokens(tokens)


class OneBatch:
    """A loader of a single batch without media: clips with that many captions each."""

    device, order = torch.device("cpu"), [0]

    def __init__(self, *counts):
        self.meta = [{"id": str(i), "captions": [f"text {i} {j}" for j in range(n)]} for i, n in enumerate(counts)]
        self.tokenize = tokenizer("x.json", 12)

    def batches(self, start, stop):
        clips, nothing = len(self.meta), torch.zeros(0, dtype=torch.int64)
        none, pixels = torch.zeros(clips, dtype=torch.bool), torch.zeros(0, 3, 224, 224, dtype=torch.uint8)
        rows = torch.zeros(0, 224, dtype=torch.bool)
        yield Batch(
            ids=[meta["id"] for meta in self.meta], captions=[""] * clips, tokens=torch.zeros(clips, 0, dtype=torch.int64),
            frames=pixels, frame_clip=nothing, segments=pixels[:, :1], segment_clip=nothing, segment_rows=nothing,
            hidden_rows=rows, hidden_channels=rows, audio_type=torch.zeros(clips, dtype=torch.int64), has_text=none,
            group=torch.arange(clips), has_frames=none, has_audio=none, meta=self.meta,
        )  # fmt: skip

    def sample_numbers(self, k):
        return list(range(len(self.meta)))


def looks(folder, model):
    """{id: y^g} of a shard folder's clips, one by one, by PIL: independent of the loader, DALI and packing."""
    import io

    from PIL import Image

    from clip4vla.data.shards import ShardFolder

    shards, found, heard = ShardFolder.open(str(folder)), {}, set()
    for s, shard in enumerate(shards.shards):
        for e in range(shard.samples):
            sample = shards.read([(s, e)])[0]
            meta = json.loads(sample["json"])
            strip = np.array(Image.open(io.BytesIO(sample["frames"])).convert("RGB"))
            frames = torch.from_numpy(strip).view(-1, 224, 224, 3).permute(0, 3, 1, 2)
            with torch.no_grad():
                unit = F.normalize(model.encode_frames(frames), dim=-1)
            found[meta["id"]] = F.normalize(unit.mean(0), dim=0).numpy()
            heard |= {meta["id"]} if meta["has_audio"] else set()
    return found, heard
