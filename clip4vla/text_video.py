"""Text-video retrieval of held-out clips with the model's head, fused and by modality.

All ranks embed, and score pairs where the head does that; what they find is ranked on rank 0. A video is a clip with the
media of model.modalities. Every caption of a clip is a query of its own (eval.captions=all), or its first one; the other way
round the best-ranked caption of a clip counts. C captions, B clips, D width.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla import distributed, exhibits, fusion, nearest, retrieval
from clip4vla.config import RunConfig, UserError
from clip4vla.fusion import AUDIO, TEXT, VISION, LocalToLocal, Sequence
from clip4vla.loader import Loader, number
from clip4vla.model import Model
from clip4vla.queries_page import Hit, Query
from clip4vla.watchdog import watch

KINDS = {"v": VISION, "a": AUDIO}  # in the order in which heads read them
NAMES = {kind: name for name, kind in KINDS.items()}
CAPTIONS = 32  # that a rank compares with all clips at a time
CLIPS = 256  # that go through a head at a time
HITS = 5  # shown of a query
THREADS = 4  # that make exhibits, whose decoding leaves Python's lock


class Compared(NamedTuple):
    """Captions and clips as retrieval.py ranks them: vectors (C, D) and (B, D), or scores (C, B) and their columns (B,)."""

    query: Tensor
    gallery: Tensor

    def turned(self) -> "Compared":
        """Clips as queries."""
        if self.gallery.ndim == 1:
            return Compared(self.query.T.contiguous(), torch.arange(len(self.query)))
        return Compared(self.gallery, self.query)


class Found(NamedTuple):
    """What the ranks found, on the CPU; clips are numbered by their place in the loader's order."""

    clips: dict[int, dict]  # their json, of those that take part
    captions: list[tuple[int, int]]  # (clip, number of the caption) of each query
    compared: dict[str, Compared]  # by modalities, model.modalities first
    silent: int  # clips without sound, whatever became of them; 0 where sound takes no part
    left_out: dict[str, list[str]]  # ids by reason
    filled: dict[str, str]  # id of a silent clip: id of the training clip whose sound it takes


def embed(model: Model, loader: Loader, cfg: RunConfig) -> Found:
    """Embed the loader's clips, give silent ones a sound as cfg.eval.silent says, and compare clips with captions."""
    found = distributed.merge(_embed(model, loader, cfg))
    clips, modalities = found["clips"], cfg.model.modalities
    lacking = [i for i in clips if "a" in modalities and i not in found["a"]]
    filled: dict[str, str] = {}
    if lacking and cfg.eval.silent == "nearest":
        donors = nearest.sounds(model, loader, cfg, found["looks"])
        found["a"] |= {i: vectors for i, (_, vectors) in donors.items()}
        filled = {clips[i]["id"]: name for i, (name, _) in donors.items()}
    nothing = [i for i in clips if not any(i in found[kind] for kind in modalities)]
    gone = {"silent": lacking if cfg.eval.silent == "exclude" else [], "no media": nothing}
    names = {reason: [clips[i]["id"] for i in rows] for reason, rows in gone.items()}
    clips = {i: meta for i, meta in clips.items() if not any(i in rows for rows in gone.values())}
    if not clips:
        raise UserError(
            f"no clip has anything of model.modalities={modalities}, or eval.silent={cfg.eval.silent} left out all"
        )
    text = {name: caption for name, caption in found["text"].items() if name[0] in clips}
    compared = {
        kinds: _compare(model, list(text.values()), {kind: [found[kind].get(i) for i in clips] for kind in kinds})
        for kinds in dict.fromkeys([modalities, *modalities])
        if any(found[kind].keys() & clips.keys() for kind in kinds)
    }
    return Found(clips, list(text), compared, len(lacking), names, filled)


def _embed(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """Of this rank's clips, by number: `clips` their json, `v` frame vectors (F, D), `a` segment vectors (S, D), `looks` y^g (D,)
    of those without sound; `text` by (clip, caption): (sentence (D,), words (L, D))."""
    mine: dict[str, dict] = {"clips": {}, "v": {}, "a": {}, "looks": {}, "text": {}}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: batch {k}")
        batch, index = batch.to(loader.device), loader.numbers(k)
        described = dict(zip(index, batch.meta, strict=True))
        mine["clips"] |= {i: meta for i, meta in described.items() if meta["id"]}
        mine["text"] |= _captions(model, loader, described, 1 if cfg.eval.captions == "first" else None)
        parts = model.media(batch)
        for part in parts:
            mine[NAMES[part.kind]] |= {
                i: vectors for i, vectors in zip(index, _rows(part), strict=True) if len(vectors)
            }
        if "a" in cfg.model.modalities and cfg.eval.silent == "nearest":
            there = (batch.has_frames & ~batch.has_audio).tolist()
            seen = next((fusion.pooled(part) for part in parts if part.kind == VISION), None)
            looks = (
                model.pooled_frames(batch) if seen is None else seen
            ).cpu()  # on all ranks, whoever is silent: ZeRO-3
            mine["looks"] |= {i: look.clone() for i, look, ok in zip(index, looks, there, strict=True) if ok}
    return mine


def _captions(model: Model, loader: Loader, clips: dict[int, dict], most: int | None) -> dict[tuple[int, int], tuple]:
    """(sentence (D,), words (L, D), none for heads that read the sentence alone) of captions, by (clip, caption)."""
    texts = {(i, j): text for i, clip in clips.items() for j, text in enumerate(clip["captions"][:most])}
    keep = None if isinstance(model.head, LocalToLocal) else 0
    read = [
        (one.clone(), own[:keep].clone())
        for sentence, words in model.read_texts([*texts.values()], loader.tokenize, together=True)
        for one, own in zip(sentence.float().cpu(), _rows(words), strict=True)
    ]
    return dict(zip(texts, read, strict=True))


def _rows(part: Sequence) -> list[Tensor]:
    """What is there of each row, (n, D) on the CPU, in fp32, each with memory of its own."""
    vectors = part.vectors.float().cpu()
    return [v[there] for v, there in zip(vectors, part.there.cpu(), strict=True)]


def _stacked(kind: int, vectors: list[Tensor | None], dim: int) -> Sequence:
    """The opposite of _rows; None: nothing is there."""
    counts = torch.tensor([0 if v is None else len(v) for v in vectors])
    packed = torch.cat([torch.zeros(0, dim), *(v for v in vectors if v is not None)])
    return fusion.sequence(kind, packed, torch.repeat_interleave(counts), len(vectors))


def _compare(model: Model, text: list[tuple[Tensor, Tensor]], media: dict[str, list[Tensor | None]]) -> Compared:
    """Captions (sentence, words) and clips as the head compares them."""
    dim, device = model.clip_config["embed_dim"], model.log_scale.device
    sentence = torch.stack([s for s, _ in text]) if text else torch.zeros(0, dim)
    parts = [_stacked(KINDS[name], media[name], dim) for name in KINDS if name in media]
    if isinstance(model.head, LocalToLocal):
        words = model.head.words(sentence, _stacked(TEXT, [w for _, w in text], dim))
        return Compared(_scores(model.head, words, parts, device), torch.arange(len(parts[0].there)))
    chunks = torch.arange(len(parts[0].there)).split(CLIPS)
    vectors = [model.head([_to(part.pick(chunk), device) for part in parts]).float().cpu() for chunk in chunks]
    return Compared(F.normalize(sentence, dim=-1), torch.cat(vectors))


def _scores(head: LocalToLocal, words: Sequence, parts: list[Sequence], device: torch.device) -> Tensor:
    """Scores (C, B); a rank computes every W-th group of captions, whose bounds do not depend on the number of ranks."""
    order = words.there.sum(1).argsort(stable=True)
    groups = [
        *order.split(CAPTIONS)[:-1],
        order[-CAPTIONS:],
    ]  # of one size, some captions twice: as many tiles, for ZeRO-3
    parts, mine = [_to(part, device) for part in parts], {}
    for first in range(0, len(groups), distributed.world()):
        watch.at(f"evaluation: captions {first * CAPTIONS} of {len(words.there)}")
        k = min(first + distributed.rank(), len(groups) - 1)  # the last ones twice: all ranks run the head, for ZeRO-3
        mine[k] = head(_to(words.pick(groups[k]), device), parts).cpu()
    found = distributed.merge({"scores": mine})["scores"]
    out = torch.empty(len(words.there), len(parts[0].there))
    for k, group in enumerate(groups):
        out[group] = found[k]
    return out


def _to(part: Sequence, device: torch.device) -> Sequence:
    return Sequence(part.kind, part.vectors.to(device), part.there.to(device))


def ranked(found: Found, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """{type token: metrics by direction}: text_to_video, video_to_text, and with /v and /a those of one medium alone."""
    metrics = {}
    for kinds, compared in found.compared.items():
        ending = "" if kinds == cfg.model.modalities else f"/{kinds}"
        groups = _groups(found, [i for i, _ in found.captions]), _groups(found, found.clips)
        limits = cfg.eval.permutations, cfg.seed, cfg.eval.bootstrap
        metrics[f"text_to_video{ending}"] = retrieval.evaluate(*compared, *groups, *limits)
        metrics[f"video_to_text{ending}"] = retrieval.evaluate(*compared.turned(), *groups[::-1], *limits)
    return {cfg.model.audio_type: metrics}


def _groups(found: Found, rows: Any) -> Tensor:
    return torch.tensor([number(found.clips[i]["group"]) for i in rows], dtype=torch.int64)


def account(found: Found, cfg: RunConfig) -> dict[str, Any]:
    """For the manifest: how captions count, and what became of clips without sound."""
    each = len(found.captions) / len(found.clips)
    which = "the first caption of a clip is" if cfg.eval.captions == "first" else "every caption of a clip is"
    words = f"{which} a query of its own ({len(found.captions)} for {len(found.clips)} clips, {each:.3g} each)"
    words += "; a right answer is any clip of the query's group; video to text: the best-ranked right caption counts"
    silent = {"policy": cfg.eval.silent, "clips": found.silent, "filled": len(found.filled), "donors": found.filled}
    return {"protocol": words, "silent": silent, "left_out": found.left_out}


def examples(found: Found, loader: Loader, cfg: RunConfig) -> tuple[list[exhibits.Exhibit], list[Query]]:
    """(clips, text queries spread over all of them): the best hits and the right one, their scores by modality."""
    kinds, rows = list(found.compared), [i for i, _ in found.captions]
    chosen = torch.linspace(0, len(rows) - 1, min(cfg.eval.report_queries, len(rows))).long()
    groups = _groups(found, rows)[chosen], _groups(found, found.clips)
    scores = {k: retrieval.scores(c.query[chosen], c.gallery) for k, c in found.compared.items()}
    columns = torch.arange(len(found.clips))
    ranks = {k: retrieval.best_rank(s, columns, *groups) for k, s in scores.items()}
    numbers: dict[int, int] = {}  # of exhibits, by clip
    clips, queries = list(found.clips), []
    for q, row in enumerate(chosen.tolist()):
        clip, caption = found.captions[row]
        right = groups[1] == groups[0][q]
        main = scores[kinds[0]][q]
        shown = main.topk(min(HITS, len(main))).indices.tolist()
        if right.any() and not right[shown].any():
            shown.append(int(main.masked_fill(~right, -torch.inf).argmax()))
        hits = [
            Hit(
                numbers.setdefault(clips[g], len(numbers)),
                {k: float(s[q, g]) for k, s in scores.items()},
                bool(right[g]),
            )
            for g in shown
        ]
        text = found.clips[clip]["captions"][caption]
        asked = numbers.setdefault(clip, len(numbers))
        by_kind = {k: float(r[q]) for k, r in ranks.items()}
        queries.append(Query("text_to_video", asked, text, by_kind[kinds[0]], by_kind, hits))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda clip: _exhibit(loader, found, clip, cfg.model.modalities), numbers)), queries


def _exhibit(loader: Loader, found: Found, clip: int, modalities: str) -> exhibits.Exhibit:
    """The clip; its title says whose sound a silent one was given."""
    shown = exhibits.of_clip(loader, clip, found.clips, modalities)
    if found.clips[clip]["id"] in found.filled:
        shown.title += f" (silent: sound of {found.filled[found.clips[clip]['id']]})"
    return shown
