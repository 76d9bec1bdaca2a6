"""The training clip that looks most like a held-out one: silent clips take its sound (paper), a baseline its caption.

Likeness is the cosine of y^g; exact, in tiles, the same on all ranks, each of which embeds its part of the training clips.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from clip4vla import distributed, fusion, retrieval
from clip4vla.config import RunConfig, UserError
from clip4vla.loader import Loader, open_folders, spoken
from clip4vla.model import Model
from clip4vla.order import EvalOrder, Place
from clip4vla.shards import Damaged
from clip4vla.watchdog import watch


def sounds(model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor]) -> dict[int, tuple[str, Tensor]]:
    """For y^g (D,) of silent clips by number: (id, segment vectors (S, D)) of the nearest clip with sound in data.train."""
    if not looks:
        return {}
    donors = _nearest(
        model, loader, cfg, looks, lambda clip: clip.get("has_audio", False), "eval.silent=nearest: sound"
    )
    folders, order = _training(cfg)
    order.places = sorted({place for place, _ in donors.values()})
    heard = _sounds(model, loader.over(folders, order, ["fbank"]), cfg)
    numbers = {i: order.places.index(place) for i, (place, _) in donors.items()}
    return {i: heard[n] for i, n in numbers.items() if n in heard}  # a damaged donor is listed, and gives nothing


def captions(model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor]) -> dict[int, tuple[str, float]]:
    """For y^g (D,) of clips by number: (first caption, cosine) of the nearest clip with a caption in data.train."""
    if not looks:
        return {}
    found = _nearest(model, loader, cfg, looks, lambda clip: bool(clip["captions"]), "decode.method=nearest: a caption")
    told: dict[Place, str] = {}
    for source, folder in enumerate(_training(cfg)[0]):
        places = sorted({place for place, _ in found.values() if place.source == source})
        for place, sample in zip(places, folder.read([(p.shard, p.entry) for p in places], ("json",)), strict=True):
            if not isinstance(sample, Damaged):  # since it was looked at
                told[place] = spoken(json.loads(sample["json"]), loader.cfg.languages)["captions"][0]
    return {i: (told[place], cosine) for i, (place, cosine) in found.items() if place in told}


def _training(cfg: RunConfig) -> tuple[list, EvalOrder]:
    folders = open_folders(cfg.data.train, "data.train, where the nearest clips are looked for,", cfg.data)
    return folders, EvalOrder([[shard.samples for shard in folder.shards] for folder in folders], cfg.eval.batch_size)


def _nearest(
    model: Model, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor], wanted: Callable[[dict], bool], what: str
) -> dict[int, tuple[Place, float]]:
    """(place in data.train, cosine) for each of the looks, among clips with frames that are wanted by their json."""
    folders, order = _training(cfg)
    mine: dict[int, Tensor] = {}
    training = loader.over(folders, order, ["frames"])
    for k, batch in enumerate(training.batches(0, len(order))):
        watch.at(f"evaluation: looks of training clips, batch {k}")
        vectors = model.pooled_frames(batch.to(loader.device)).cpu()
        rows = zip(training.numbers(k), batch.meta, batch.has_frames.tolist(), vectors, strict=True)
        mine |= {i: v.clone() for i, clip, seen, v in rows if seen and wanted(clip)}
    found = distributed.merge({"looks": mine})["looks"]
    if not found:
        setting, _, missing = what.partition(": ")
        raise UserError(
            f"{setting}: no clip of data.train has both frames and {missing}: take another {setting.split('=')[0]}"
        )
    cosines, best = retrieval.top_k(torch.stack(list(looks.values())), torch.stack(list(found.values())), 1)
    places = [order.places[i] for i in found]
    found_for = zip(looks, best[:, 0].tolist(), cosines[:, 0].tolist(), strict=True)
    return {i: (places[row], cosine) for i, row, cosine in found_for}


def _sounds(model: Model, loader: Loader, cfg: RunConfig) -> dict[int, tuple[str, Tensor]]:
    """(id, segment vectors) of the clips of a loader, by their place in its order."""
    mine: dict[int, tuple[str, Tensor]] = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: sounds for silent clips, batch {k}")
        batch, index = batch.to(loader.device), loader.numbers(k)
        vectors = model.segment_vectors(batch, cfg.model.audio_type).float()
        part = fusion.sequence(fusion.AUDIO, vectors, batch.segment_clip, len(batch))
        rows = zip(index, batch.ids, part.vectors.cpu(), part.there.cpu(), strict=True)
        mine |= {i: (name, v[there]) for i, name, v, there in rows if name}
    return distributed.merge({"sounds": mine})["sounds"]
