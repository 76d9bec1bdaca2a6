"""Evaluate text-video retrieval of held-out clips with the model's head, fused and by modality.

All ranks embed, and score pairs where the head does that; rank 0 ranks. A video is a clip with the
media of model.modalities. Every caption of a clip is a query of its own (eval.captions=all), or its first one; the other way
round the best-ranked caption of a clip counts. C captions, B clips, D width.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.batch import upload
from clip4vla.data.loader import Loader, stable_hash63
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError
from clip4vla.evaluation import retrieval_metrics, visual_neighbors
from clip4vla.models import fusion
from clip4vla.models.fusion import AUDIO, TEXT, VISION, LocalToLocal, PaddedSequence
from clip4vla.models.model import Model
from clip4vla.report import preview
from clip4vla.report.sections.retrieval import Hit, Query

KINDS = {"v": VISION, "a": AUDIO}  # in the order in which heads read them
NAMES = {kind: name for name, kind in KINDS.items()}
CAPTIONS = 32  # that a rank compares with all clips at a time
CLIPS = 256  # that go through a head at a time
HITS = 5  # shown of a query
THREADS = 4  # that make exhibits, whose decoding leaves Python's lock


class ScoreInputs(NamedTuple):
    """Holds captions and clips to rank: vectors (C, D) and (B, D), or scores (C, B) and their columns (B,), fp32."""

    query: Tensor
    gallery: Tensor

    def transpose(self) -> "ScoreInputs":
        """Swap queries and gallery: clips become the queries."""
        if self.gallery.ndim == 1:
            return ScoreInputs(self.query.T.contiguous(), torch.arange(len(self.query)))
        return ScoreInputs(self.gallery, self.query)


class TextVideoOutputs(NamedTuple):
    """Holds the clips and scores of all ranks, on the CPU; clips are numbered by their place in the loader's order."""

    clips: dict[int, dict]  # their json, of those that take part
    captions: list[tuple[int, int]]  # (clip, number of the caption) of each query
    compared: dict[str, ScoreInputs]  # by modalities, model.modalities first
    silent: int  # clips without sound, whatever became of them; 0 where sound takes no part
    left_out: dict[str, list[str]]  # ids by reason
    filled: dict[str, str]  # id of a silent clip: id of the training clip whose sound it takes


def embed(model: Model, loader: Loader, cfg: RunConfig) -> TextVideoOutputs:
    """Embed the loader's clips, give silent ones a sound as cfg.eval.missing_audio says, and compare clips with captions."""
    gathered = collectives.all_gather_dicts(_embed(model, loader, cfg))
    clips, modalities = gathered["clips"], cfg.model.modalities
    lacking = [i for i in clips if "a" in modalities and i not in gathered["a"]]
    filled: dict[str, str] = {}
    if lacking and cfg.eval.missing_audio == "nearest":
        donors = visual_neighbors.sounds(model, loader, cfg, gathered["looks"])
        gathered["a"] |= {i: vectors for i, (_, vectors) in donors.items()}
        filled = {clips[i]["id"]: name for i, (name, _) in donors.items()}
    nothing = [i for i in clips if not any(i in gathered[kind] for kind in modalities)]
    gone = {"silent": lacking if cfg.eval.missing_audio == "exclude" else [], "no media": nothing}
    names = {reason: [clips[i]["id"] for i in rows] for reason, rows in gone.items()}
    clips = {i: meta for i, meta in clips.items() if not any(i in rows for rows in gone.values())}
    if not clips:
        raise UserError(
            f"no clip has anything of model.modalities={modalities}, or eval.missing_audio={cfg.eval.missing_audio} left out all"
        )
    text = {name: caption for name, caption in gathered["text"].items() if name[0] in clips}
    compared = {
        kinds: _compare(model, list(text.values()), {kind: [gathered[kind].get(i) for i in clips] for kind in kinds})
        for kinds in dict.fromkeys([modalities, *modalities])
        if any(gathered[kind].keys() & clips.keys() for kind in kinds)
    }
    return TextVideoOutputs(clips, list(text), compared, len(lacking), names, filled)


def _embed(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """Embed this rank's clips; map clip numbers to json (`clips`) and vectors, all fp32 on the CPU.

    `v`: frame vectors (F, D); `a`: segment vectors (S, D); `looks`: y^g (D,) of clips without sound. `text` maps (clip,
    caption) to (sentence (D,), words (L, D)).
    """
    mine: dict[str, dict] = {"clips": {}, "v": {}, "a": {}, "looks": {}, "text": {}}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: batch {k}")
        batch, index = batch.to(loader.device), loader.sample_numbers(k)
        described = dict(zip(index, batch.meta, strict=True))
        mine["clips"] |= {i: meta for i, meta in described.items() if meta["id"]}
        mine["text"] |= _captions(model, loader, described, 1 if cfg.eval.captions == "first" else None)
        parts = model.media(batch)
        for part in parts:
            mine[NAMES[part.kind]] |= {
                i: vectors for i, vectors in zip(index, _rows(part), strict=True) if len(vectors)
            }
        if "a" in cfg.model.modalities and cfg.eval.missing_audio == "nearest":
            there = (batch.has_frames & ~batch.has_audio).tolist()
            pooled = next((fusion.mean_pool_padded(part) for part in parts if part.kind == VISION), None)
            # on all ranks, whichever has silent clips: ZeRO-3
            looks = (model.pooled_frames(batch) if pooled is None else pooled).cpu()
            mine["looks"] |= {i: look.clone() for i, look, ok in zip(index, looks, there, strict=True) if ok}
    return mine


def _captions(model: Model, loader: Loader, clips: dict[int, dict], most: int | None) -> dict[tuple[int, int], tuple]:
    """Embed captions by (clip, caption): (sentence (D,), words (L, D)) fp32; L is 0 if the head uses no words."""
    texts = {(i, j): text for i, clip in clips.items() for j, text in enumerate(clip["captions"][:most])}
    keep = None if isinstance(model.head, LocalToLocal) else 0
    read = [
        (one.clone(), own[:keep].clone())
        for sentence, words in model.encode_texts_chunked([*texts.values()], loader.tokenize, together=True)
        for one, own in zip(sentence.float().cpu(), _rows(words), strict=True)
    ]
    return dict(zip(texts, read, strict=True))


def _rows(part: PaddedSequence) -> list[Tensor]:
    """Split a padded sequence into its rows' unmasked vectors (n, D) fp32 on the CPU, each with memory of its own."""
    vectors = part.vectors.float().cpu()
    return [v[there] for v, there in zip(vectors, part.mask.cpu(), strict=True)]


def _stacked(kind: int, vectors: list[Tensor | None], dim: int) -> PaddedSequence:
    """Pad vectors (n, D) of each row into one sequence, the opposite of _rows; None: an empty row."""
    counts = torch.tensor([0 if v is None else len(v) for v in vectors])
    packed = torch.cat([torch.zeros(0, dim), *(v for v in vectors if v is not None)])
    return fusion.pad_packed(kind, packed, counts)


def _compare(model: Model, text: list[tuple[Tensor, Tensor]], media: dict[str, list[Tensor | None]]) -> ScoreInputs:
    """Run the head on captions (sentence, words) and on the clips' media: vectors or scores to rank."""
    dim, device = model.clip_config["embed_dim"], model.logit_scale.device
    sentence = torch.stack([s for s, _ in text]) if text else torch.zeros(0, dim)
    parts = [_stacked(KINDS[name], media[name], dim) for name in KINDS if name in media]
    if isinstance(model.head, LocalToLocal):
        words = model.head.words(sentence, _stacked(TEXT, [w for _, w in text], dim))
        return ScoreInputs(_scores(model.head, words, parts, device), torch.arange(len(parts[0].mask)))
    chunks = torch.arange(len(parts[0].mask)).split(CLIPS)
    vectors = [model.head([_to(part.select(chunk), device) for part in parts]).float().cpu() for chunk in chunks]
    return ScoreInputs(F.normalize(sentence, dim=-1), torch.cat(vectors))


def _scores(head: LocalToLocal, words: PaddedSequence, parts: list[PaddedSequence], device: torch.device) -> Tensor:
    """Compute scores (C, B) fp32; each of W ranks takes every W-th group of captions; W does not move their bounds."""
    order = words.mask.sum(1).argsort(stable=True)
    # of one size, some captions twice: as many tiles, for ZeRO-3
    groups = [*order.split(CAPTIONS)[:-1], order[-CAPTIONS:]]
    parts, mine = [_to(part, device) for part in parts], {}
    for first in range(0, len(groups), collectives.world_size()):
        watch.progress(f"evaluation: captions {first * CAPTIONS} of {len(words.mask)}")
        k = min(first + collectives.rank(), len(groups) - 1)  # the last ones twice: all ranks run the head, for ZeRO-3
        mine[k] = head(_to(words.select(groups[k]), device), parts).cpu()
    gathered = collectives.all_gather_dicts({"scores": mine})["scores"]
    out = torch.empty(len(words.mask), len(parts[0].mask))
    for k, group in enumerate(groups):
        out[group] = gathered[k]
    return out


def _to(part: PaddedSequence, device: torch.device) -> PaddedSequence:
    return PaddedSequence(part.kind, upload(part.vectors, device), upload(part.mask, device), part.lengths)


def compute_metrics(outputs: TextVideoOutputs, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """Compute {type token: metrics by direction}: text_to_video, video_to_text, with /v and /a for one medium alone."""
    metrics = {}
    for kinds, compared in outputs.compared.items():
        ending = "" if kinds == cfg.model.modalities else f"/{kinds}"
        groups = _groups(outputs, [i for i, _ in outputs.captions]), _groups(outputs, outputs.clips)
        limits = cfg.eval.permutations, cfg.seed, cfg.eval.bootstrap
        metrics[f"text_to_video{ending}"] = retrieval_metrics.evaluate(*compared, *groups, *limits)
        metrics[f"video_to_text{ending}"] = retrieval_metrics.evaluate(*compared.transpose(), *groups[::-1], *limits)
    return {cfg.model.audio_type: metrics}


def _groups(outputs: TextVideoOutputs, rows: Any) -> Tensor:
    return torch.tensor([stable_hash63(outputs.clips[i]["group"]) for i in rows], dtype=torch.int64)


def protocol(outputs: TextVideoOutputs, cfg: RunConfig) -> dict[str, Any]:
    """Describe for the manifest how captions count, and what became of clips without sound."""
    each = len(outputs.captions) / len(outputs.clips)
    which = "the first caption of a clip is" if cfg.eval.captions == "first" else "every caption of a clip is"
    words = f"{which} a query of its own ({len(outputs.captions)} for {len(outputs.clips)} clips, {each:.3g} each)"
    words += "; a right answer is any clip of the query's group; video to text: the best-ranked right caption counts"
    silent = {
        "policy": cfg.eval.missing_audio,
        "clips": outputs.silent,
        "filled": len(outputs.filled),
        "donors": outputs.filled,
    }
    return {"protocol": words, "silent": silent, "excluded": outputs.left_out}


def examples(
    outputs: TextVideoOutputs, loader: Loader, cfg: RunConfig
) -> tuple[list[preview.ClipPreview], list[Query]]:
    """Preview clips for queries spread over all captions: the best hits and the right one, with scores by modality."""
    kinds, rows = list(outputs.compared), [i for i, _ in outputs.captions]
    chosen = torch.linspace(0, len(rows) - 1, min(cfg.eval.report_queries, len(rows))).long()
    groups = _groups(outputs, rows)[chosen], _groups(outputs, outputs.clips)
    scores = {k: retrieval_metrics.scores(c.query[chosen], c.gallery) for k, c in outputs.compared.items()}
    columns = torch.arange(len(outputs.clips))
    ranks = {k: retrieval_metrics.best_rank(s, columns, *groups) for k, s in scores.items()}
    numbers: dict[int, int] = {}  # of exhibits, by clip
    clips, queries = list(outputs.clips), []
    for q, row in enumerate(chosen.tolist()):
        clip, caption = outputs.captions[row]
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
        text = outputs.clips[clip]["captions"][caption]
        asked = numbers.setdefault(clip, len(numbers))
        by_kind = {k: float(r[q]) for k, r in ranks.items()}
        queries.append(Query("text_to_video", asked, text, by_kind[kinds[0]], by_kind, hits))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda clip: _exhibit(loader, outputs, clip, cfg.model.modalities), numbers)), queries


def _exhibit(loader: Loader, outputs: TextVideoOutputs, clip: int, modalities: str) -> preview.ClipPreview:
    """Preview a clip; its title says whose sound a silent one was given."""
    shown = preview.preview_clip(loader, clip, outputs.clips, modalities)
    if outputs.clips[clip]["id"] in outputs.filled:
        shown.title += f" (silent: sound of {outputs.filled[outputs.clips[clip]['id']]})"
    return shown
