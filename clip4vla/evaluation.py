"""Zero-shot retrieval over shard folders: embed every clip once, rank in every direction, by type token and subset."""

import concurrent.futures
import io
import json
import mimetypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip4vla import distributed, report, retrieval
from clip4vla.audio_encoder import type_mix
from clip4vla.config import RunConfig, UserError
from clip4vla.loader import EvalOrder, Loader, check_fingerprint, number, open_folders
from clip4vla.model import CLIP4VLA
from clip4vla.towers import tokenizer
from clip4vla.tracking import read_rows
from clip4vla.watchdog import watch

Say = Callable[[str], None]
PLAYED = 4 << 20  # bytes of the largest file that goes into a page to be played
SHOWN = ("text_to_audio/nb", "text_to_audio/vb", "text_to_video", "audio_to_video", "audio_to_text", "video_to_audio")


@dataclass
class Side:
    """Things of one kind to rank or to rank for: n unit vectors, answer groups, names that make them unique, subset tags."""

    kind: str  # text, video or audio
    vectors: Tensor  # n D
    group: Tensor  # n
    clip: list[int]
    text: list[str]
    tags: list[tuple[str, ...]]

    def pick(self, keep: list[int]) -> "Side":
        """The rows numbered in keep."""
        parts = [[values[i] for i in keep] for values in (self.clip, self.text, self.tags)]
        return Side(self.kind, self.vectors[keep], self.group[keep], *parts)

    def tagged(self, tag: str) -> "Side":
        """The rows of a subset; pictures belong to all of them."""
        return self.pick([i for i, tags in enumerate(self.tags) if not tag or self.kind == "video" or tag in tags])


def evaluate(
    model: CLIP4VLA, cfg: RunConfig, sources: dict[str, float], name: str, say: Say, with_examples: bool = False
) -> tuple[dict[str, dict], list[report.Query]] | None:
    """Metrics by direction for every type token of _types(cfg), written to run_dir/eval/NAME/metrics[-TYPE].json.

    All ranks embed; rank 0 ranks, and returns the main token's metrics, with_examples also queries for the report page.
    """
    loader, found = embedded(model, cfg, sources, "data.test" if with_examples else "data.val")
    return None if distributed.rank() else ranked(loader, found, cfg, name, say, with_examples)


class HeldOut:
    """Evaluations on data.val while training goes on: all ranks embed, and rank 0 ranks in a thread."""

    def __init__(self, cfg: RunConfig, say: Say):
        self.cfg, self.say = cfg, say
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "evaluation")
        self.ranking: concurrent.futures.Future | None = None

    def start(self, model: CLIP4VLA, name: str) -> None:
        """Embed, then rank in the background, eval.clips of each folder at most."""
        self.finish()
        loader, found = embedded(model, self.cfg, self.cfg.data.val, "data.val", self.cfg.eval.clips)
        if distributed.rank() == 0:
            self.ranking = self.pool.submit(ranked, loader, found, self.cfg, name, self.say)

    def finish(self) -> None:
        """Wait for the last one; raises what it raised."""
        if self.ranking:
            self.ranking.result()
            self.ranking = None


def embedded(
    model: CLIP4VLA, cfg: RunConfig, sources: dict[str, float], key: str, most: int = 0
) -> tuple[Loader, tuple[dict[int, dict], dict[str, dict]]]:
    """(loader, what embed() gives) of the clips of these folders, the first `most` of each unless that is 0."""
    folders = open_folders(sources, key, cfg.data)
    check_fingerprint(model.config(), folders[0].fingerprint, "the model", folders[0].url)
    loader = eval_loader(cfg, folders, next(model.parameters()).device, most)
    training = model.training
    with torch.no_grad():
        found = embed(model.eval(), loader, cfg)
    model.train(training)
    return loader, found


def ranked(
    loader: Loader, found: tuple[dict, dict], cfg: RunConfig, name: str, say: Say, with_examples: bool = False
) -> tuple[dict[str, dict], list[report.Query]]:
    """See evaluate; found: what embed() gave."""
    folder = Path(cfg.run_dir, "eval", name)
    folder.mkdir(parents=True, exist_ok=True)
    results, shown = {}, []
    for audio_type in _types(cfg):
        pairs = list(directions(*found, audio_type))
        results[audio_type] = {title: rank(query, gallery, cfg) for title, query, gallery in pairs}
        suffix = "" if audio_type == _types(cfg)[0] else f"-{audio_type}"
        (folder / f"metrics{suffix}.json").write_text(json.dumps(results[audio_type], indent=1))
        if not suffix:
            say(f"{name}, type token {audio_type}:\n{table(results[audio_type])}")
            shown = examples(pairs, found[0], loader, cfg) if with_examples else []
    return results[_types(cfg)[0]], shown


def _types(cfg: RunConfig) -> list[str]:
    return cfg.eval.types or [cfg.model.audio_type]


def check_evaluation(cfg: RunConfig) -> None:
    """UserError at the start of a run for what would stop its first evaluation."""
    for audio_type in _types(cfg):
        if audio_type != "data":
            type_mix(audio_type, key="eval.types")
    if cfg.eval.batch_size % distributed.world():
        raise UserError(f"eval.batch_size={cfg.eval.batch_size} does not divide by {distributed.world()} ranks")
    if cfg.eval.every:
        open_folders(cfg.data.val, "data.val", cfg.data)


def eval_loader(cfg: RunConfig, folders: list, device: torch.device, most: int = 0) -> Loader:
    """Every clip of the folders once, in order; the first `most` of each folder, unless that is 0."""
    order = EvalOrder([[shard.samples for shard in folder.shards] for folder in folders], cfg.eval.batch_size, most)
    return Loader(
        folders, order, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=("frames", "fbank"), device=device, damage_log=Path(cfg.run_dir, f"damaged-{distributed.rank()}.jsonl"),
    )  # fmt: skip


def embed(model: CLIP4VLA, loader: Loader, cfg: RunConfig) -> tuple[dict[int, dict], dict[str, dict]]:
    """(metadata, vectors), on rank 0's CPU. Clips are numbered by their place in the loader's order: `video` and
    `audio/TYPE` map clip numbers to vectors (D,), `text` maps (clip number, caption number) to them."""
    mine: dict[str, dict] = {name: {} for name in ("clips", "video", "text", *(f"audio/{t}" for t in _types(cfg)))}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: batch {k}")
        batch = batch.to(loader.device)
        index = [k * loader.order.batch_size + distributed.rank() + i * distributed.world() for i in range(len(batch))]
        captions = [c["captions"][:1] if cfg.eval.captions == "first" else c["captions"] for c in batch.meta]
        flat = [(i, j) for i, texts in zip(index, captions, strict=True) for j in range(len(texts))]
        tokens = loader.tokenize([text for texts in captions for text in texts] or [""]).to(loader.device)
        texts = F.normalize(model.encode_text(tokens)[0].float(), dim=-1)
        mine["clips"] |= {i: meta for i, meta in zip(index, batch.meta, strict=True) if meta["id"]}
        mine["text"] |= {name: vector.clone() for name, vector in zip(flat, texts.cpu(), strict=False)}
        mine["video"] |= _where(batch.has_frames, index, model.encode_vision(batch))
        for audio_type in _types(cfg):
            mine[f"audio/{audio_type}"] |= _where(batch.has_audio, index, model.encode_audio(batch, audio_type))
    parts = distributed.gather_objects(mine)
    if distributed.rank():
        return {}, {}
    merged = {name: dict(sorted(row for part in parts for row in part[name].items())) for name in mine}
    return merged.pop("clips"), merged


def directions(clips: dict[int, dict], vectors: dict[str, dict], audio_type: str) -> Iterator[tuple[str, Side, Side]]:
    """(name, queries, gallery): six directions, and their subsets by audio type and language, e.g. text_to_audio/vb-fr.

    A picture or caption of one item counts once, however many clips carry it. Directions without an answer are left out.
    """
    video, audio = (
        _media(kind, clips, vectors[key]) for kind, key in (("video", "video"), ("audio", f"audio/{audio_type}"))
    )
    text = _texts(clips, vectors["text"], video, lambda clip, j: tuple(clip.get("caption_langs", [])[j : j + 1]))
    spoken = _texts(clips, vectors["text"], audio, lambda clip, _: _tags(clip))
    for a, b in ((text, video), (spoken, audio), (video, audio)):
        seen = []
        for tag in ("", *sorted({tag for tags in a.tags + b.tags for tag in tags})):
            few = [_once(side.tagged(tag), clips) for side in (a, b)]
            rows = [side.clip for side in few]
            if rows in seen or not set(few[0].group.tolist()) & set(few[1].group.tolist()):
                continue  # the same things under another name, or nothing to find
            seen.append(rows)
            ending = f"/{tag}" if tag else ""
            yield f"{a.kind}_to_{b.kind}{ending}", *few
            yield f"{b.kind}_to_{a.kind}{ending}", *reversed(few)


def _media(kind: str, clips: dict[int, dict], vectors: dict[int, Tensor]) -> Side:
    tags = [_tags(clips[i]) if kind == "audio" else () for i in vectors]
    return Side(kind, _stack(vectors), _groups(clips, vectors), list(vectors), [""] * len(vectors), tags)


def _texts(clips: dict[int, dict], vectors: dict, media: Side, tags: Callable[[dict, int], tuple[str, ...]]) -> Side:
    """The captions of the clips that have this medium."""
    rows = {(i, j): vector for (i, j), vector in vectors.items() if i in set(media.clip)}
    index = [i for i, _ in rows]
    text = [clips[i]["captions"][j] for i, j in rows]
    return Side("text", _stack(rows), _groups(clips, index), index, text, [tags(clips[i], j) for i, j in rows])


def _stack(vectors: dict[Any, Tensor]) -> Tensor:
    return torch.stack(list(vectors.values())) if vectors else torch.zeros(0, 1)


def _groups(clips: dict[int, dict], index: Any) -> Tensor:
    return torch.tensor([number(clips[i]["group"]) for i in index], dtype=torch.int64)


def _once(side: Side, clips: dict[int, dict]) -> Side:
    """Each sound, and the first of equal pictures or captions of one item; clips of one video are groups of their own."""
    names = [
        (i, i, text) if side.kind == "audio" else (clips[i].get("item"), clips[i]["group"], text)
        for i, text in zip(side.clip, side.text, strict=True)
    ]
    return side.pick(list({name: row for row, name in reversed(list(enumerate(names)))}.values())[::-1])


def _tags(clip: dict) -> tuple[str, ...]:
    return (clip["audio_type"], *([f"{clip['audio_type']}-{clip['lang']}"] if clip.get("lang") else []))


def _where(there: Tensor, index: list[int], vectors: Tensor) -> dict[int, Tensor]:
    """The vectors that are there, each with memory of its own: a view would be pickled with its whole batch."""
    return {i: v.clone() for i, v, ok in zip(index, vectors.cpu(), there.tolist(), strict=True) if ok}


def rank(query: Side, gallery: Side, cfg: RunConfig) -> dict[str, Any]:
    """R@1, R@5, R@10, MedR, MeanR, n_queries, n_gallery, p of one direction."""
    return retrieval.evaluate(
        query.vectors, gallery.vectors, query.group, gallery.group, cfg.eval.permutations, cfg.seed
    )


def table(metrics: dict[str, dict]) -> str:
    """The metrics as text, one direction a line."""
    head = (
        f"{'direction':<24}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MedR':>8}{'MeanR':>8}{'queries':>9}{'gallery':>9}{'p':>9}"
    )
    return "\n".join([head, *(
        f"{name:<24}{m['R@1']:>7.1f}{m['R@5']:>7.1f}{m['R@10']:>7.1f}{m['MedR']:>8.1f}{m['MeanR']:>8.1f}"
        f"{m['n_queries']:>9}{m['n_gallery']:>9}{'' if m['p'] is None else format(m['p'], '.4f'):>9}"
        for name, m in metrics.items()
    )])  # fmt: skip


def examples(
    pairs: list[tuple[str, Side, Side]], clips: dict[int, dict], loader: Loader, cfg: RunConfig
) -> list[report.Query]:
    """Queries spread over the directions, each with its five best results, their pictures and sounds."""
    chosen = [pair for title in SHOWN for pair in pairs if pair[0] == title] or pairs
    shown = []
    for n, (title, query, gallery) in enumerate(chosen):
        count = len(range(n, cfg.eval.report_queries, len(chosen)))
        answered = torch.isin(query.group, gallery.group).nonzero()[:, 0]
        spread = answered[torch.linspace(0, len(answered) - 1, min(count, len(answered))).long()]
        scores, found = retrieval.top_k(query.vectors[spread], gallery.vectors, min(5, len(gallery.clip)))
        ranks = retrieval.best_rank(query.vectors[spread], gallery.vectors, query.group[spread], gallery.group)
        for q, row_scores, row, place in zip(
            spread.tolist(), scores.tolist(), found.tolist(), ranks.tolist(), strict=True
        ):
            hits = [
                report.Hit(exhibit(loader, clips, gallery, g), score, bool(gallery.group[g] == query.group[q]))
                for score, g in zip(row_scores, row, strict=True)
            ]
            shown.append(report.Query(title, exhibit(loader, clips, query, q), place, hits))
    return shown


def exhibit(loader: Loader, clips: dict[int, dict], side: Side, row: int) -> report.Exhibit:
    """What a person sees and hears of one row: its captions, picture, spectrogram and sound, as far as its kind has them."""
    meta, place = clips[side.clip[row]], loader.order.places[side.clip[row]]
    folder = loader.folders[place.source]
    sample = folder.read([(place.shard, place.entry)])[0]
    shown = report.Exhibit(meta["item"], [side.text[row]] if side.kind == "text" else meta["captions"])
    shown.picture = sample.get("frames")
    if side.kind == "audio":
        shown.spectrogram = _without_padding(sample["fbank"], meta["n_rows"])
        root = Path(folder.media_root).resolve()
        file = (root / (meta["media"]["audio"] or "")).resolve()
        whole = meta["start"] is None and meta["end"] is None  # what is cut out of a film has no file of its own
        if whole and file.is_file() and root in file.parents and file.stat().st_size < PLAYED:
            shown.audio, shown.audio_mime = file.read_bytes(), mimetypes.guess_type(file.name)[0] or "audio/wav"
    return shown


def _without_padding(picture: bytes, rows: int) -> bytes:
    image, out = Image.open(io.BytesIO(picture)), io.BytesIO()
    image.crop((0, 0, image.width, rows)).save(out, "png")
    return out.getvalue()


def write_report(cfg: RunConfig, checkpoint: Path, metrics: dict[str, dict], queries: list[report.Query]) -> Path:
    """run_dir/report.html: loss curves of this run and of the one it started from, the metrics, and the examples."""
    places = {Path(place).name: read_rows(place) for place in [*cfg.init_from, cfg.run_dir]}
    page = Path(cfg.run_dir, "report.html")
    data = f"{next(iter(cfg.data.test))} and {len(cfg.data.test) - 1} more"
    settings = {"run": cfg.run_dir, "checkpoint": checkpoint.name, "data": data}
    settings |= {"clip": cfg.model.clip, "type token": _types(cfg)[0], "preset": cfg.preset}
    report.write(
        page,
        f"{Path(cfg.run_dir).name}: test split",
        settings,
        {k: v for k, v in places.items() if v},
        metrics,
        queries,
    )
    return page
