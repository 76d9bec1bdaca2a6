"""A small run on real shards: what the parts of the campaign start, break and compare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch
from forks import ROOT
from running import TINY, job, ranks, run, trace
from safetensors.torch import save_file

from clip4vla.towers.build import build_clip
from faults._disk import well

SPLITS = ("speech_fr/train", "sounds/train", "speech_fr/val", "sounds/val")
SEARCH = "import sys\nfrom clip4vla.search.__main__ import main\nmain()\n"
Command = Callable[[], CompletedProcess]


class Small:
    """Shards of tests/sample, weights of a tiny CLIP, and words that make any config small; all below `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.shards = folder, folder / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "search.py").write_text(SEARCH)
        torch.manual_seed(0)
        self.clip = folder / "tiny.safetensors"
        save_file(build_clip(TINY).state_dict(), self.clip)
        well(self.shard(self.shards), "shards")

    def shard(self, out: Path, *words: str) -> CompletedProcess:
        """data_prep/shard.py."""
        return run("data_prep/shard.py", "configs/data/sample.yaml", f"out={out}", *words)

    def words(self, run_dir: Path, *words: object, shards: Path | None = None) -> list[object]:
        """The config of a run of six steps of a dozen clips, with checkpoints every other step."""
        train, val = ([(shards or self.shards) / split for split in part] for part in (SPLITS[:2], SPLITS[2:]))
        return [
            "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={self.clip}", "train.precision=fp32",
            "track.wandb=off", f"data.train=[{train[0]}, {train[1]}]", "train.batch_size=12", "train.max_steps=6",
            "train.log_every=1", "train.save_every=2", "data.decode_threads=1", f"data.val=[{val[0]}, {val[1]}]",
            f"data.test=[{val[0]}, {val[1]}]", "eval.permutations=0", "eval.bootstrap=0", "data.precomputed_embeddings=off",
            f"run_dir={run_dir}", *words,
        ]  # fmt: skip

    def train(self, run_dir: Path, *words: object, count: int = 1, shards: Path | None = None) -> CompletedProcess:
        """launch/pretrain.py."""
        return ranks(count, "launch/pretrain.py", *self.words(run_dir, *words, shards=shards))

    def training(self, run_dir: Path, *words: object, shards: Path | None = None):
        """The same, begun."""
        return job(1, "launch/pretrain.py", *self.words(run_dir, *words, shards=shards))

    def search(self, *words: object) -> CompletedProcess:
        """python -m clip4vla.search, with the seconds of its imports saved."""
        return run(self.folder / "search.py", *words)

    def build(self, index: Path, model: Path) -> CompletedProcess:
        """An index of some shards and of loose files."""
        sounds = ROOT / "tests/sample/animals"
        return self.search("build", self.shards / SPLITS[0], sounds, "--model", model, "--out", index)

    def model(self) -> Path:
        """A model folder, untrained."""
        if not (self.folder / "model").is_dir():
            well(run("launch/convert.py", self.clip, self.folder / "model"), "model")
        return self.folder / "model"

    def copy(self, to: Path) -> Path:
        """Shards to damage."""
        for split in SPLITS:
            shutil.copytree(self.shards / split, to / split)
        return to


def losses(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """By step."""
    return trace(run_dir)


def damage(run_dir: Path) -> list[dict[str, str]]:
    """What the run has listed as corrupt."""
    file = run_dir / "corrupt-0.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
