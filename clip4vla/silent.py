"""The sound of silent clips at test time: that of the training clip that looks most like them (paper, fine-tuning)."""

import torch
from torch import Tensor

from clip4vla import distributed, fusion, retrieval
from clip4vla.config import RunConfig, UserError
from clip4vla.loader import EvalOrder, Loader, Place, open_folders
from clip4vla.model import CLIP4VLA
from clip4vla.watchdog import watch


def nearest(model: CLIP4VLA, loader: Loader, cfg: RunConfig, looks: dict[int, Tensor]) -> dict[int, tuple[str, Tensor]]:
    """For y^g (D,) of silent clips by number: (id, segment vectors (S, D)) of the clip with sound in data.train with the largest
    cosine; exact, in tiles, the same on all ranks. Every rank embeds its part of the training clips' frames."""
    if not looks:
        return {}
    folders = open_folders(cfg.data.train, "data.train (eval.silent=nearest takes sounds from there)", cfg.data)
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    places, seen = _looks(model, loader.over(folders, EvalOrder(sizes, cfg.eval.batch_size), ["frames"]))
    _, best = retrieval.top_k(torch.stack(list(looks.values())), seen, 1)
    donors = dict(zip(looks, [places[i] for i in best[:, 0].tolist()], strict=True))
    order = EvalOrder(sizes, cfg.eval.batch_size)
    order.places = sorted(set(donors.values()))
    heard = _sounds(model, loader.over(folders, order, ["fbank"]), cfg)
    numbers = {i: order.places.index(place) for i, place in donors.items()}
    return {i: heard[n] for i, n in numbers.items() if n in heard}  # a damaged donor is listed, and gives nothing


def _looks(model: CLIP4VLA, loader: Loader) -> tuple[list[Place], Tensor]:
    """(places, y^g (n, D)) of the clips that have frames and sound."""
    mine = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: looks of training clips, batch {k}")
        batch, index = batch.to(loader.device), loader.numbers(k)
        vectors = model.encode_vision(batch).cpu()
        both = [
            seen and meta.get("has_audio", False)
            for seen, meta in zip(batch.has_frames.tolist(), batch.meta, strict=True)
        ]
        mine |= {i: v.clone() for i, v, ok in zip(index, vectors, both, strict=True) if ok}
    found = distributed.merge({"looks": mine})["looks"]
    if not found:
        raise UserError("eval.silent=nearest: no clip of data.train has both frames and sound: take zero or exclude")
    return [loader.order.places[i] for i in found], torch.stack(list(found.values()))


def _sounds(model: CLIP4VLA, loader: Loader, cfg: RunConfig) -> dict[int, tuple[str, Tensor]]:
    """(id, segment vectors) of the clips of a loader, by their place in its order."""
    mine = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: sounds for silent clips, batch {k}")
        batch, index = batch.to(loader.device), loader.numbers(k)
        vectors = model.segment_vectors(batch, cfg.model.audio_type).float()
        part = fusion.sequence(fusion.AUDIO, vectors, batch.segment_clip, len(batch))
        rows = zip(index, batch.ids, part.vectors.cpu(), part.there.cpu(), strict=True)
        mine |= {i: (name, v[there]) for i, name, v, there in rows if name}
    return distributed.merge({"sounds": mine})["sounds"]
