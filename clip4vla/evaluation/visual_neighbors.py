"""Find the training clip that looks most like a held-out one, whose sound silent clips take (paper), or its caption.

Likeness is the cosine of y^g; exact, in tiles, the same on all ranks, each of which embeds its part of the training clips.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.sample_metadata import keep_languages
from clip4vla.data.sampler import EvalSampler, SampleIndex
from clip4vla.data.shards import CorruptSample
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError
from clip4vla.evaluation import retrieval_metrics
from clip4vla.models import fusion
from clip4vla.models.model import Model


def sounds(model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor]) -> dict[int, tuple[str, Tensor]]:
    """Find for each silent clip, given by y^g (D,), its nearest clip with sound in data.train.

    Returns (id, segment vectors (S, D) fp32) by number of the silent clip.
    """
    if not looks:
        return {}
    donors = _nearest(
        model, loader, cfg, looks, lambda clip: clip.get("has_audio", False), "eval.missing_audio=nearest: sound"
    )
    folders, order = _training(cfg)
    order.places = sorted({place for place, _ in donors.values()})
    segments = _sounds(model, loader.for_folders(folders, order, ["fbank"]), cfg)
    numbers = {i: order.places.index(place) for i, (place, _) in donors.items()}
    return {i: segments[n] for i, n in numbers.items() if n in segments}  # a corrupt donor is listed, and gives nothing


def captions(model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor]) -> dict[int, tuple[str, float]]:
    """Find for each clip, given by y^g (D,), (first caption, cosine) of the nearest captioned clip in data.train."""
    if not looks:
        return {}
    donors = _nearest(
        model, loader, cfg, looks, lambda clip: bool(clip["captions"]), "decode.method=nearest: a caption"
    )
    first_captions: dict[SampleIndex, str] = {}
    for source, folder in enumerate(_training(cfg)[0]):
        places = sorted({place for place, _ in donors.values() if place.source == source})
        for place, sample in zip(places, folder.read([(p.shard, p.entry) for p in places], ("json",)), strict=True):
            if not isinstance(sample, CorruptSample):  # corrupt after it was embedded
                first_captions[place] = keep_languages(json.loads(sample["json"]), loader.cfg.languages)["captions"][0]
    return {i: (first_captions[place], cosine) for i, (place, cosine) in donors.items() if place in first_captions}


def _training(cfg: RunConfig) -> tuple[list, EvalSampler]:
    folders = open_folders(cfg.data.train, "data.train, where the nearest clips are looked for,", cfg.data)
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    return folders, EvalSampler.for_ranks(sizes, cfg.eval.batch_size, collectives.world_size())


def _nearest(
    model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor], wanted: Callable[[dict], bool], what: str
) -> dict[int, tuple[SampleIndex, float]]:
    """Find (place in data.train, cosine) of the clip nearest to each of looks, of those with frames and wanted json."""
    folders, order = _training(cfg)
    mine: dict[int, Tensor] = {}
    training = loader.for_folders(folders, order, ["frames"])
    for k, batch in enumerate(training.batches(0, len(order))):
        watch.progress(f"evaluation: looks of training clips, batch {k}")
        vectors = model.pooled_frames(batch.to(loader.device)).cpu()
        rows = zip(training.sample_numbers(k), batch.meta, batch.has_frames.tolist(), vectors, strict=True)
        mine |= {i: v.clone() for i, clip, has_frames, v in rows if has_frames and wanted(clip)}
    candidates = collectives.all_gather_dicts({"looks": mine})["looks"]
    if not candidates:
        setting, _, missing = what.partition(": ")
        raise UserError(
            f"{setting}: no clip of data.train has both frames and {missing}: take another {setting.split('=')[0]}"
        )
    cosines, best = retrieval_metrics.top_k(
        torch.stack(list(looks.values())), torch.stack(list(candidates.values())), 1
    )
    places = [order.places[i] for i in candidates]
    matches = zip(looks, best[:, 0].tolist(), cosines[:, 0].tolist(), strict=True)
    return {i: (places[row], cosine) for i, row, cosine in matches}


def _sounds(model: Model, loader: Loader, cfg: RunConfig) -> dict[int, tuple[str, Tensor]]:
    """Embed the sounds of a loader's clips; map their place in its order to (id, segment vectors (S, D) fp32)."""
    mine: dict[int, tuple[str, Tensor]] = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: sounds for silent clips, batch {k}")
        batch, index = batch.to(loader.device), loader.sample_numbers(k)
        vectors, _ = model.audio_vectors(batch, cfg.model.audio_type)
        part = fusion.pad_packed(fusion.AUDIO, vectors.float(), model.audio_counts(batch))
        rows = zip(index, batch.ids, part.vectors.cpu(), part.mask.cpu(), strict=True)
        mine |= {i: (name, v[there]) for i, name, v, there in rows if name}
    return collectives.all_gather_dicts({"sounds": mine})["sounds"]
