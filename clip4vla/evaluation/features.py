"""Compute frozen pooled features of shard folders once: y^g and z^g of every clip, kept in run_dir/features/.

The file of a folder is named after what it depends on: towers, type token, normalisation, and the bytes of the shards.
n clips, D width.
"""

import hashlib
import json
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.config_io import parse_json, to_dict
from clip4vla.data.loader import Loader, check_fingerprint
from clip4vla.data.sample_metadata import validate
from clip4vla.data.sampler import EvalSampler
from clip4vla.data.shards import ShardFolder
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.io.safe_load import save_tensors
from clip4vla.models.audio_encoder import audio_reading
from clip4vla.models.model import Model

MEDIA = {"v": "frames", "a": "fbank"}


@dataclass
class Features:
    """Holds pooled features of the n clips of some folders that could be read, on the CPU."""

    number: list[int]  # of each clip: its place in the order of those folders
    clips: list[dict[str, Any]]  # their json
    vectors: dict[str, Tensor]  # by medium, v or a: unit vectors (n, D) fp32, zero where a clip lacks it

    def having(self, kinds: str) -> Tensor:
        """Mark the clips (n,) bool that have any of these media."""
        return torch.stack([self.vectors[kind].any(1) for kind in kinds]).any(0)

    def beside(self, kinds: str) -> Tensor:
        """Concatenate the vectors of these media: (n, D) or (n, 2 D) fp32."""
        return torch.cat([self.vectors[kind] for kind in kinds], 1)

    def among(self, numbers: Container[int]) -> "Features":
        """Select the clips with these numbers."""
        return self._rows([row for row, n in enumerate(self.number) if n in numbers])

    def where(self, wanted: Callable[[dict], bool]) -> "Features":
        """Select the clips whose json is wanted."""
        return self._rows([row for row, clip in enumerate(self.clips) if wanted(clip)])

    def _rows(self, rows: list[int]) -> "Features":
        number, clips = [self.number[row] for row in rows], [self.clips[row] for row in rows]
        return Features(number, clips, {kind: v[rows] for kind, v in self.vectors.items()})


def of_folders(model: Model, loader: Loader, folders: list[ShardFolder], cfg: RunConfig) -> Features:
    """Compute or read the features of cfg.model.modalities under cfg.model.audio_type, on all ranks.

    loader: one of any folders, to be opened on these.
    """
    number, clips, start, made_by = [], [], 0, _features_sha256(model, cfg)
    for folder in folders:
        check_fingerprint(model.config(), folder.fingerprint, "the model", folder.url)
    vectors = {kind: [torch.zeros(0, model.clip_config["embed_dim"])] for kind in cfg.model.modalities}
    for folder in folders:
        one = _of_folder(model, loader, folder, cfg, made_by)
        number += [start + n for n in one.number]
        clips += one.clips
        for kind, parts in vectors.items():
            parts.append(one.vectors[kind])
        start += len(folder)
    return Features(number, clips, {kind: torch.cat(parts) for kind, parts in vectors.items()})


def _of_folder(model: Model, loader: Loader, folder: ShardFolder, cfg: RunConfig, made_by: str) -> Features:
    """Read the features of a folder from run_dir/features/; if not there, all ranks compute and rank 0 writes them."""
    shards = json.dumps([(shard.name, shard.sha256) for shard in folder.shards])
    name = hashlib.sha256(f"{made_by} {shards}".encode()).hexdigest()[:16]
    path = Path(cfg.run_dir, "features", f"{folder.source}-{folder.split}-{name}.safetensors")
    width = model.clip_config["embed_dim"]
    kept = collectives.all_gather_objects(
        _read(path, cfg.model.modalities, width) if collectives.rank() == 0 else None
    )[0]
    if kept:
        return kept
    computed = _computed(model, loader, folder, cfg)
    if collectives.rank() == 0 and len(computed.number) == len(folder):  # corrupt clips may be repaired later
        _write(path, computed)
    return computed


def _computed(model: Model, loader: Loader, folder: ShardFolder, cfg: RunConfig) -> Features:
    sizes = [[shard.samples for shard in folder.shards]]
    order = EvalSampler.for_ranks(sizes, cfg.eval.batch_size, collectives.world_size())
    some = loader.for_folders([folder], order, [MEDIA[kind] for kind in cfg.model.modalities])
    mine: dict[str, dict] = {"clips": {}, **{kind: {} for kind in cfg.model.modalities}}
    for k, batch in enumerate(some.batches(0, len(order))):
        watch.progress(f"evaluation: features of {folder.url}, batch {k}")
        batch, index = batch.to(some.device), some.sample_numbers(k)
        mine["clips"] |= {i: clip for i, clip in zip(index, batch.meta, strict=True) if clip["id"]}
        for kind in cfg.model.modalities:
            pooled = model.pooled_frames(batch) if kind == "v" else model.pooled_segments(batch, cfg.model.audio_type)
            rows = zip(index, pooled.float().cpu(), strict=True)
            mine[kind] |= {i: row.clone() for i, row in rows if i in mine["clips"]}
    gathered = collectives.all_gather_dicts(mine)
    none = torch.zeros(0, model.clip_config["embed_dim"])
    vectors = {k: torch.stack([*gathered[k].values()]) if gathered[k] else none for k in cfg.model.modalities}
    return Features([*gathered["clips"]], [*gathered["clips"].values()], vectors)


def _features_sha256(model: Model, cfg: RunConfig) -> str:
    """Compute the sha256 of all that decides the features of given shards."""
    settings = [model.clip_config, model.pictures.identity(), to_dict(model.spectrogram)]
    settings += [cfg.model.modalities, cfg.model.audio_type, cfg.model.spectrogram_norm, cfg.data.languages]
    settings += audio_reading(model.cfg, model.audio_config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for kind, tower in (("v", model.vision), ("a", model.audio)):
        for name, value in tower.state_dict().items() if kind in cfg.model.modalities else ():
            digest.update(f"{kind}.{name}".encode())
            digest.update(value.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _read(path: Path, kinds: str, width: int) -> Features | None:
    """Read the features of these media; return None if the file is not there, or corrupt."""
    try:
        tensors = load_file(path)
        clips, number = parse_json(tensors.pop("clips").numpy().tobytes(), math.inf), tensors.pop("number").tolist()
        wanted = dict.fromkeys(kinds, ((len(clips), width), torch.float32))
        right = {kind: (tuple(v.shape), v.dtype) for kind, v in tensors.items()} == wanted
        if not right or not len(clips) == len(number) == len(set(number)) > 0:
            return None
        for clip in clips:
            validate(clip)
        return Features(number, clips, tensors)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError):
        return None


def _write(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clips_json = torch.frombuffer(bytearray(json.dumps(features.clips, ensure_ascii=False).encode()), dtype=torch.uint8)
    # not io.atomic: the name's ending decides the format, and _read checks
    aside = path.with_name(f"partial-{path.name}")
    save_tensors(
        {"clips": clips_json, "number": torch.tensor(features.number, dtype=torch.int64)} | features.vectors, aside
    )
    aside.rename(path)
