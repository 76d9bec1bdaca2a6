"""Evaluate zero-shot retrieval: embed every clip once, and rank in six directions between text, video and audio.

Metrics are by type token and subset."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch
from clip4vla.data.loader import Loader, stable_hash63
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.evaluation import retrieval_metrics
from clip4vla.models.model import Model
from clip4vla.report.preview import ClipPreview, preview
from clip4vla.report.sections.retrieval import Hit, Query

TAGS = 20  # subsets of a direction: each is tested and resampled again, and tags are whatever the data says
SHOWN = ("text_to_audio/nb", "text_to_audio/vb", "text_to_video", "audio_to_video", "audio_to_text", "video_to_audio")


@dataclass
class RetrievalSet:
    """Holds n items of one kind that are queries or a gallery: unit vectors (n, D), answer groups, captions, subset tags."""

    kind: str  # text, video or audio
    vectors: Tensor  # n D
    group: Tensor  # n
    clip: list[int]
    text: list[str]
    tags: list[tuple[str, ...]]

    def select(self, keep: list[int]) -> "RetrievalSet":
        """Return the rows numbered in keep."""
        clip, text, tags = [self.clip[i] for i in keep], [self.text[i] for i in keep], [self.tags[i] for i in keep]
        return RetrievalSet(self.kind, self.vectors[keep], self.group[keep], clip, text, tags)

    def tagged(self, tag: str) -> "RetrievalSet":
        """Return the rows of a subset, all rows for ""; pictures belong to every subset."""
        return self.select([i for i, tags in enumerate(self.tags) if not tag or self.kind == "video" or tag in tags])


class ZeroShotOutputs(NamedTuple):
    """Holds the clips and vectors of all ranks, on rank 0's CPU; empty on the other ranks."""

    clips: dict[int, dict]
    vectors: dict[str, dict]


def types(cfg: RunConfig) -> list[str]:
    """List the type tokens to evaluate, the main one first."""
    return cfg.eval.audio_types or [cfg.model.audio_type]


def embed(model: Model, loader: Loader, cfg: RunConfig) -> ZeroShotOutputs:
    """Embed every clip of a loader once: its frames, its audio under each type token, and its captions.

    Clips are numbered by their place in the loader's order: `video` and `audio/TYPE` map clip numbers to vectors (D,),
    `text` maps (clip number, caption number) to them.
    """
    mine: dict[str, dict] = {name: {} for name in ("clips", "video", "text", *(f"audio/{t}" for t in types(cfg)))}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: batch {k}")
        batch, index = batch.to(loader.device), loader.sample_numbers(k)
        captions = [c["captions"][:1] if cfg.eval.captions == "first" else c["captions"] for c in batch.meta]
        flat = [(i, j) for i, texts in zip(index, captions, strict=True) for j in range(len(texts))]
        read = _caption_vectors(model, batch, captions, loader)
        mine["clips"] |= {i: meta for i, meta in zip(index, batch.meta, strict=True) if meta["id"]}
        mine["text"] |= {name: vector.clone() for name, vector in zip(flat, read.cpu(), strict=True)}
        mine["video"] |= _where(batch.has_frames, index, model.pooled_frames(batch))
        for audio_type in types(cfg):
            mine[f"audio/{audio_type}"] |= _where(batch.has_audio, index, model.pooled_segments(batch, audio_type))
    gathered = collectives.all_gather_dicts(mine)
    return ZeroShotOutputs({}, {}) if collectives.rank() else ZeroShotOutputs(gathered.pop("clips"), gathered)


def _caption_vectors(model: Model, batch: Batch, captions: list[list[str]], loader: Loader) -> Tensor:
    """Encode these captions of a batch's clips, the first ones of each, to unit vectors (C, D), or take embed.py's."""
    if batch.caption_vectors is None:
        return model.encode_texts([text for texts in captions for text in texts], loader.tokenize, together=True)
    rows = zip(
        batch.caption_vectors.float().split([len(clip["captions"]) for clip in batch.meta]), captions, strict=True
    )
    return F.normalize(torch.cat([vectors[: len(texts)] for vectors, texts in rows]), dim=-1)


def directions(
    clips: dict[int, dict], vectors: dict[str, dict], audio_type: str
) -> Iterator[tuple[str, RetrievalSet, RetrievalSet]]:
    """Yield (name, queries, gallery) of six directions and of their subsets by audio type and language (text_to_audio/vb-fr).

    A picture or caption of one item counts once, however many clips carry it. Directions without an answer are left out, and
    subsets beyond the TAGS commonest tags (of equal ones the first by name): those count in the whole direction alone.
    """
    video, (spoken, audio) = _media("video", clips, vectors["video"]), captions_and_audio(clips, vectors, audio_type)
    text = _texts(clips, vectors["text"], video, lambda clip, j: tuple(clip.get("caption_langs", [])[j : j + 1]))
    for a, b in ((text, video), (spoken, audio), (video, audio)):
        yielded = []
        counts = Counter(tag for tags in a.tags + b.tags for tag in tags)
        for tag in ("", *sorted(sorted(counts, key=lambda tag: (-counts[tag], tag))[:TAGS])):
            some, others = (deduplicate(side.tagged(tag), clips) for side in (a, b))
            rows = [some.clip, others.clip]
            if rows in yielded or not set(some.group.tolist()) & set(others.group.tolist()):
                continue  # the same things under another name, or nothing to find
            yielded.append(rows)
            ending = f"/{tag}" if tag else ""
            yield f"{a.kind}_to_{b.kind}{ending}", some, others
            yield f"{b.kind}_to_{a.kind}{ending}", others, some


def captions_and_audio(
    clips: dict[int, dict], vectors: dict[str, dict], audio_type: str
) -> tuple[RetrievalSet, RetrievalSet]:
    """Collect (captions, sounds) of the clips that have sound, under a type token; tagged with type and language."""
    audio = _media("audio", clips, vectors[f"audio/{audio_type}"])
    return _texts(clips, vectors["text"], audio, lambda clip, _: _tags(clip)), audio


def _media(kind: str, clips: dict[int, dict], vectors: dict[int, Tensor]) -> RetrievalSet:
    tags = [_tags(clips[i]) if kind == "audio" else () for i in vectors]
    return RetrievalSet(kind, _stack(vectors), _groups(clips, vectors), list(vectors), [""] * len(vectors), tags)


def _texts(
    clips: dict[int, dict], vectors: dict, media: RetrievalSet, tags: Callable[[dict, int], tuple[str, ...]]
) -> RetrievalSet:
    """Collect the captions of the clips that have this medium."""
    there = set(media.clip)
    rows = {(i, j): vector for (i, j), vector in vectors.items() if i in there}
    index = [i for i, _ in rows]
    text = [clips[i]["captions"][j] for i, j in rows]
    return RetrievalSet("text", _stack(rows), _groups(clips, index), index, text, [tags(clips[i], j) for i, j in rows])


def _stack(vectors: dict[Any, Tensor]) -> Tensor:
    return torch.stack(list(vectors.values())) if vectors else torch.zeros(0, 1)


def _groups(clips: dict[int, dict], index: Any) -> Tensor:
    return torch.tensor([stable_hash63(clips[i]["group"]) for i in index], dtype=torch.int64)


def deduplicate(side: RetrievalSet, clips: dict[int, dict]) -> RetrievalSet:
    """Select every sound, and the first of equal pictures or captions of one item and group.

    Rows are sorted by the last of their equals: random draws of rows (see retrieval_metrics) depend on the order.
    """
    first: dict[tuple, int] = {}
    last: dict[tuple, int] = {}
    for row, (clip, text) in enumerate(zip(side.clip, side.text, strict=True)):
        name: tuple = (clip, text)
        if side.kind != "audio":
            name = (clips[clip].get("item"), clips[clip]["group"], text)
        first.setdefault(name, row)
        last[name] = row
    return side.select([first[name] for name in sorted(last, key=lambda name: last[name])])


def _tags(clip: dict) -> tuple[str, ...]:
    return (clip["audio_type"], *([f"{clip['audio_type']}-{clip['lang']}"] if clip.get("lang") else []))


def _where(there: Tensor, index: list[int], vectors: Tensor) -> dict[int, Tensor]:
    """Map clip numbers to the vectors that are there, each a copy: a view would be pickled with its whole batch."""
    return {i: v.clone() for i, v, ok in zip(index, vectors.cpu(), there.tolist(), strict=True) if ok}


def rank(query: RetrievalSet, gallery: RetrievalSet, cfg: RunConfig) -> dict[str, Any]:
    """Compute the metrics of one direction, see retrieval_metrics.evaluate."""
    return retrieval_metrics.evaluate(
        query.vectors, gallery.vectors, query.group, gallery.group, cfg.eval.permutations, cfg.seed, cfg.eval.bootstrap
    )


def compute_metrics(outputs: ZeroShotOutputs, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """Compute the metrics by type token and direction."""
    return {
        audio_type: {title: rank(query, gallery, cfg) for title, query, gallery in directions(*outputs, audio_type)}
        for audio_type in types(cfg)
    }


def protocol(outputs: ZeroShotOutputs, cfg: RunConfig) -> dict[str, Any]:
    """Describe for the manifest how captions and clips count."""
    which = "the first caption" if cfg.eval.captions == "first" else "every caption"
    words = "equal captions and pictures of one item count once; a right answer is any clip of the query's group"
    return {"protocol": f"{which} of a clip is a query; {words}"}


def examples(outputs: ZeroShotOutputs, loader: Loader, cfg: RunConfig) -> tuple[list[ClipPreview], list[Query]]:
    """Choose queries spread over the directions, each with its five best results and its right one, and preview their clips."""
    pairs = list(directions(*outputs, types(cfg)[0]))
    chosen = [pair for title in SHOWN for pair in pairs if pair[0] == title] or pairs
    numbers: dict[tuple[int, bool], int] = {}  # of exhibits, by clip and whether its sound takes part
    queries = []
    for n, (title, query, gallery) in enumerate(chosen):
        count = len(range(n, cfg.eval.report_queries, len(chosen)))
        answered = torch.isin(query.group, gallery.group).nonzero()[:, 0]
        spread = answered[torch.linspace(0, len(answered) - 1, min(count, len(answered))).long()]
        ranks = retrieval_metrics.best_rank(query.vectors[spread], gallery.vectors, query.group[spread], gallery.group)
        for q, place in zip(spread.tolist(), ranks.tolist(), strict=True):
            hits = [
                Hit(_number(numbers, gallery, g), {"": score}, right, gallery.text[g])
                for g, score, right in _hits(query, q, gallery)
            ]
            queries.append(Query(title, _number(numbers, query, q), query.text[q], place, {}, hits))
    return [_exhibit(loader, outputs.clips, *name) for name in numbers], queries


def _hits(query: RetrievalSet, q: int, gallery: RetrievalSet) -> list[tuple[int, float, bool]]:
    """List (gallery row, score, whether it is right) of the five best, and of the best right one if not among them."""
    vector = query.vectors[q : q + 1]
    scores, rows = retrieval_metrics.top_k(vector, gallery.vectors, 5)
    right = (gallery.group == query.group[q]).nonzero()[:, 0]
    if not torch.isin(rows, right).any():
        score, best = retrieval_metrics.top_k(vector, gallery.vectors[right], 1)
        scores, rows = torch.cat([scores, score], 1), torch.cat([rows, right[best]], 1)
    return list(zip(rows[0].tolist(), scores[0].tolist(), torch.isin(rows[0], right).tolist(), strict=True))


def _number(numbers: dict[tuple[int, bool], int], side: RetrievalSet, row: int) -> int:
    return numbers.setdefault((side.clip[row], side.kind == "audio"), len(numbers))


def _exhibit(loader: Loader, clips: dict[int, dict], clip: int, with_audio: bool) -> ClipPreview:
    """Preview a clip, without its sound where that takes no part."""
    place = loader.order.places[clip]
    shown = preview(loader.folders[place.source], place, clips[clip])
    return shown if with_audio else dataclasses.replace(shown, spectrogram=None, audio=None)
