"""Caption held-out clips: all ranks write, rank 0 scores as the COCO caption challenge does (pycocoevalcap).

Captions and references go through Stanford's PTB tokeniser, which drops punctuation and case; then BLEU-1..4 (Papineni et
al. 2002), METEOR 1.5 (Denkowski & Lavie 2014), ROUGE-L (Lin 2004), CIDEr-D (Vedantam et al. 2015); all times 100, as papers
print them (CIDEr goes to 1000). METEOR and the tokeniser need Java: without it words alone are compared, and METEOR is left out.
The first WORDS words of each text count: ROUGE-L takes time and memory that grow with the product of two lengths.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.loader import Loader, stable_hash63
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError
from clip4vla.evaluation import visual_neighbors
from clip4vla.io.atomic import write_text
from clip4vla.models import generation
from clip4vla.models.model import Model
from clip4vla.report import preview
from clip4vla.report.sections.captioning import CaptionCard

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
NO_JAVA = "no Java here: METEOR and the PTB tokeniser are left out (Debian: apt-get install default-jre-headless)"
WORDS = 250  # of a caption or reference that are compared
THREADS = 4  # that make exhibits


@dataclass
class CaptioningOutputs:
    """Holds the captions that all ranks wrote; clips are numbered by their place in the loader's order."""

    clips: dict[int, dict]  # their json, of those with a reference; "captions" are the references
    captions: dict[int, tuple[str, float]]  # and log-probability (of a beam divided by the length penalty)
    no_media: list[str]  # ids of clips with nothing of model.modalities: their captions were written all the same
    left_out: dict[str, list[str]]  # ids by reason
    scores: dict[str, list[float]] = field(default_factory=dict)  # of each clip, by metric, once they are computed


def embed(model: Model, loader: Loader, cfg: RunConfig) -> CaptioningOutputs:
    """Write a caption for each of the loader's clips with cfg.decode.method, and gather them on all ranks.

    Raises UserError if no clip has a reference.
    """
    write = _nearest if cfg.decode.method == "nearest" else _written
    mine = write(model, loader, cfg)
    gathered = collectives.all_gather_dicts(mine)
    most = 1 if cfg.eval.captions == "first" else None
    clips = {
        i: clip | {"captions": clip["captions"][:most]} for i, clip in gathered["clips"].items() if clip["captions"]
    }
    if not clips:
        raise UserError(f"no clip has a caption to compare with (data.languages={loader.cfg.languages})")
    without = [clip["id"] for i, clip in gathered["clips"].items() if i not in clips]
    no_media = [clips[i]["id"] for i in clips if i in gathered["no_media"]]
    return CaptioningOutputs(clips, {i: gathered["captions"][i] for i in clips}, no_media, {"no reference": without})


def _written(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """Generate captions of this rank's clips, as dicts by clip number.

    `clips`: their json; `captions`: (text, score); `no_media`: True for clips with none of the model's media.
    """
    mine: dict[str, dict] = {"clips": {}, "captions": {}, "no_media": {}}
    decode, (tokens, read) = (
        generation.resolve_max_tokens(cfg.decode, cfg.model.max_tokens),
        generation.special_tokens(cfg.model.clip),
    )
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: batch {k}")
        batch, index = batch.to(loader.device), loader.sample_numbers(k)
        parts = model.media(batch)
        generated = generation.generate(
            functools.partial(model.start_decoding, parts), batch.ids, decode, tokens, cfg.seed
        )
        has_media = torch.stack([part.mask.any(1) for part in parts]).any(0).tolist()
        rows = zip(index, batch.meta, generated.tokens.tolist(), generated.score.tolist(), has_media, strict=True)
        for i, meta, numbers, score, any_media in rows:
            if meta["id"]:
                mine["clips"][i], mine["captions"][i] = meta, (read(numbers), score)
                mine["no_media"] |= {} if any_media else {i: True}
    return mine


def _nearest(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """Give each of this rank's clips the first caption of the training clip that looks most like it (a baseline).

    Returns as _written; the score is the cosine. A clip without frames gets an empty caption and is in `no_media`.
    """
    mine: dict[str, dict] = {"clips": {}, "captions": {}, "no_media": {}}
    looks: dict[int, Tensor] = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: batch {k}")
        vectors = model.pooled_frames(batch.to(loader.device)).cpu()
        for i, meta, has_frames, look in zip(
            loader.sample_numbers(k), batch.meta, batch.has_frames.tolist(), vectors, strict=True
        ):
            if meta["id"]:
                mine["clips"][i], mine["captions"][i] = meta, ("", 0.0)
                looks |= {i: look.clone()} if has_frames else {}
                mine["no_media"] |= {} if has_frames else {i: True}
    looks = collectives.all_gather_dicts({"looks": looks})["looks"]  # of all ranks, which search together
    nearest = visual_neighbors.captions(model, loader, cfg, looks)
    mine["captions"] |= {i: nearest[i] for i in mine["captions"].keys() & nearest.keys()}
    return mine


def compute_metrics(outputs: CaptioningOutputs, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """Compute {type token: {"caption": metrics}}, and keep the scores of each clip in outputs.scores."""
    references = {i: clip["captions"] for i, clip in outputs.clips.items()}
    metrics, outputs.scores = score({i: text for i, (text, _) in outputs.captions.items()}, references)
    groups = np.array([stable_hash63(clip["group"]) for clip in outputs.clips.values()])
    if cfg.eval.bootstrap:
        metrics["ci"] = {
            name: interval(np.array(outputs.scores[name]), groups, cfg.eval.bootstrap, cfg.seed)
            for name in ("ROUGE-L", "CIDEr")
        }
    metrics |= {"n_clips": len(references), "n_references": sum(map(len, references.values()))}
    return {cfg.model.audio_type: {"caption": metrics}}


def score(captions: dict[Any, str], references: dict[Any, list[str]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Compute (metrics of all captions, scores of each caption by metric, in the order of `captions`), times 100."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    java = bool(shutil.which("java"))
    hypotheses = tokenise({i: [text] for i, text in captions.items()}, java)
    wanted = tokenise({i: references[i] for i in captions}, java)
    scorers = [(METRICS[:4], Bleu(4)), (METRICS[5:6], Rouge())]
    if any(text for some in wanted.values() for text in some):
        scorers.append((METRICS[6:], Cider()))
    if java:
        scorers.insert(1, (METRICS[4:5], Meteor()))
    totals: dict[str, Any] = {}
    each: dict[str, list[float]] = {}
    for names, scorer in scorers:
        quiet = {"verbose": 0} if isinstance(scorer, Bleu) else {}
        total, by_clip = scorer.compute_score(wanted, hypotheses, **quiet)
        if not isinstance(scorer, Bleu):  # which alone gives several
            total, by_clip = [total], [by_clip]
        totals |= {name: 100 * float(value) for name, value in zip(names, total, strict=True)}
        each |= {name: [100 * float(x) for x in values] for name, values in zip(names, by_clip, strict=True)}
    if "CIDEr" not in totals:  # references without a word share no n-gram; pycocoevalcap fails on them
        totals["CIDEr"], each["CIDEr"] = 0.0, [0.0] * len(hypotheses)
    return totals | ({} if java else {"excluded": NO_JAVA}), each


def scored() -> list[str]:
    """List the metrics that this machine can compute: METEOR needs Java."""
    return [name for name in METRICS if name != "METEOR" or shutil.which("java")]


def must_have_scorers() -> None:
    """Raise UserError where pycocoevalcap is not installed, or cannot write the file that its tokeniser reads."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if not spec or not spec.submodule_search_locations:
        raise UserError("eval.task=captioning: captions are scored by pycocoevalcap: pip install 'clip4vla[eval]'")
    folder = Path(spec.submodule_search_locations[0], "tokenizer")
    if shutil.which("java") and not os.access(folder, os.W_OK):
        raise UserError(
            f"eval.task=captioning: pycocoevalcap writes into {folder}, which is read-only: install it elsewhere"
        )


def tokenise(texts: dict[Any, list[str]], java: bool) -> dict[Any, list[str]]:
    """Split texts into words with the PTB tokeniser, or by letters without Java; keep WORDS of each, space-joined."""
    clean = {
        i: [" ".join(text.replace("|||", " ").split()) for text in some] for i, some in texts.items()
    }  # a line each; ||| is METEOR's
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        words = PTBTokenizer().tokenize({i: [{"caption": text} for text in some] for i, some in clean.items()})
    else:
        words = {i: [" ".join(re.findall(r"\w+", text.lower())) for text in some] for i, some in clean.items()}
    return {i: [" ".join(text.split(" ")[:WORDS]) for text in some] for i, some in words.items()}


def interval(values: np.ndarray, groups: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Estimate a 95% bootstrap interval [low, high] of the mean of values (n,); whole groups (n,) are drawn."""
    _, own = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(own, values), np.bincount(own)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    return np.quantile(drawn @ sums / (drawn @ sizes), [0.025, 0.975]).tolist()


def protocol(outputs: CaptioningOutputs, cfg: RunConfig) -> dict[str, Any]:
    """Describe for the manifest how captions were written and compared, and what is missing."""
    which = "the first caption" if cfg.eval.captions == "first" else "every caption"
    words = f"{which} of a clip is a reference; pycocoevalcap's metrics, times 100, "
    words += "on words of its PTB tokeniser" if shutil.which("java") else "without Java on plain words"
    words += f", the first {WORDS} of each text"
    return {"protocol": words, "no_media": outputs.no_media, "excluded": outputs.left_out}


def write_results(folder: Path, outputs: CaptioningOutputs) -> None:
    """Write results.json and references.json in COCO's formats, which pycocoevalcap reads."""
    clips = {clip["id"]: (clip["captions"], outputs.captions[i][0]) for i, clip in outputs.clips.items()}
    results = [{"image_id": name, "caption": text} for name, (_, text) in clips.items()]
    pairs = [(name, text) for name, (texts, _) in clips.items() for text in texts]
    tree = {
        "images": [{"id": name} for name in clips],
        "annotations": [{"id": n, "image_id": name, "caption": text} for n, (name, text) in enumerate(pairs)],
    }
    for name, value in (("results.json", results), ("references.json", tree)):
        write_text(folder / name, json.dumps(value, ensure_ascii=False, indent=1))


def table(metrics: dict[str, dict]) -> str:
    """Format the metrics as text."""
    row = metrics["caption"]
    there = [name for name in METRICS if name in row]
    lines = ["".join(f"{name:>9}" for name in [*there, "clips"]), "".join(f"{row[name]:>9.1f}" for name in there)]
    lines[1] += f"{row['n_clips']:>9}"
    return "\n".join(lines + ([row["excluded"]] if "excluded" in row else []))


def examples(
    outputs: CaptioningOutputs, loader: Loader, cfg: RunConfig
) -> tuple[list[preview.ClipPreview], list[CaptionCard]]:
    """Preview clips spread over all of them, each with its caption and scores for the report page."""
    rows = list(outputs.clips)
    chosen = torch.linspace(0, len(rows) - 1, min(cfg.eval.report_queries, len(rows))).long().tolist()
    written = []
    for n, row in enumerate(chosen):
        text, likelihood = outputs.captions[rows[row]]
        scores = {name: outputs.scores[name][row] for name in ("CIDEr", "METEOR", "ROUGE-L") if name in outputs.scores}
        kind = "cosine" if cfg.decode.method == "nearest" else "log-probability"
        written.append(CaptionCard(n, text, scores | {kind: likelihood}))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(
            pool.map(lambda row: preview.preview_clip(loader, rows[row], outputs.clips, cfg.model.modalities), chosen)
        ), written
