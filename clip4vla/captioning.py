"""Captioning of held-out clips: written by all ranks, scored by rank 0 as the COCO caption challenge does (pycocoevalcap).

Captions and references go through Stanford's PTB tokeniser, which drops punctuation and case; then BLEU-1..4 (Papineni et
al. 2002), METEOR 1.5 (Denkowski & Lavie 2014), ROUGE-L (Lin 2004), CIDEr-D (Vedantam et al. 2015); all times 100, as papers
print them (CIDEr goes to 1000). METEOR and the tokeniser need Java: without it words alone are compared, and METEOR is left out.
Of each text the first WORDS words count: ROUGE-L takes time and memory that grow with the product of two lengths.
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

from clip4vla import decoding, distributed, exhibits, nearest
from clip4vla.captions_page import Written
from clip4vla.config import RunConfig, UserError
from clip4vla.files import write_text
from clip4vla.loader import Loader, number
from clip4vla.model import Model
from clip4vla.watchdog import watch

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
NO_JAVA = "no Java here: METEOR and the PTB tokeniser are left out (Debian: apt-get install default-jre-headless)"
WORDS = 250  # of a caption or reference that are compared
THREADS = 4  # that make exhibits


@dataclass
class Found:
    """What the ranks wrote; clips are numbered by their place in the loader's order."""

    clips: dict[int, dict]  # their json, of those with a reference; "captions" are the references
    captions: dict[int, tuple[str, float]]  # and log-probability (of a beam divided by the length penalty)
    unheard: list[str]  # ids of clips with nothing of model.modalities: their captions were written all the same
    left_out: dict[str, list[str]]  # ids by reason
    scores: dict[str, list[float]] = field(default_factory=dict)  # of each clip, by metric, once they are computed


def embed(model: Model, loader: Loader, cfg: RunConfig) -> Found:
    """Write a caption for each of the loader's clips, in the way of cfg.decode."""
    write = _nearest if cfg.decode.method == "nearest" else _written
    mine = write(model, loader, cfg)
    found = distributed.merge(mine)
    most = 1 if cfg.eval.captions == "first" else None
    clips = {i: clip | {"captions": clip["captions"][:most]} for i, clip in found["clips"].items() if clip["captions"]}
    if not clips:
        raise UserError(f"no clip has a caption to compare with (data.languages={loader.cfg.languages})")
    without = [clip["id"] for i, clip in found["clips"].items() if i not in clips]
    unheard = [clips[i]["id"] for i in clips if i in found["unheard"]]
    return Found(clips, {i: found["captions"][i] for i in clips}, unheard, {"no reference": without})


def _written(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """Of this rank's clips, by number: `clips` their json, `captions` (text, score), `unheard` those without media."""
    mine: dict[str, dict] = {"clips": {}, "captions": {}, "unheard": {}}
    decode, (tokens, read) = decoding.within(cfg.decode, cfg.model.max_tokens), decoding.tokens_of(cfg.model.clip)
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: batch {k}")
        batch, index = batch.to(loader.device), loader.numbers(k)
        parts = model.media(batch)
        found = decoding.write(functools.partial(model.grow, parts), batch.ids, decode, tokens, cfg.seed)
        there = torch.stack([part.there.any(1) for part in parts]).any(0).tolist()
        rows = zip(index, batch.meta, found.tokens.tolist(), found.score.tolist(), there, strict=True)
        for i, meta, numbers, score, heard in rows:
            if meta["id"]:
                mine["clips"][i], mine["captions"][i] = meta, (read(numbers), score)
                mine["unheard"] |= {} if heard else {i: True}
    return mine


def _nearest(model: Model, loader: Loader, cfg: RunConfig) -> dict[str, dict]:
    """A baseline: the first caption of the training clip that looks most like each; score: the cosine. None without frames."""
    mine: dict[str, dict] = {"clips": {}, "captions": {}, "unheard": {}}
    looks: dict[int, Tensor] = {}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: batch {k}")
        vectors = model.pooled_frames(batch.to(loader.device)).cpu()
        for i, meta, seen, look in zip(loader.numbers(k), batch.meta, batch.has_frames.tolist(), vectors, strict=True):
            if meta["id"]:
                mine["clips"][i], mine["captions"][i] = meta, ("", 0.0)
                looks |= {i: look.clone()} if seen else {}
                mine["unheard"] |= {} if seen else {i: True}
    looks = distributed.merge({"looks": looks})["looks"]  # of all ranks: they look together
    told = nearest.captions(model, loader, cfg, looks)
    mine["captions"] |= {i: told[i] for i in mine["captions"].keys() & told.keys()}
    return mine


def ranked(found: Found, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """{type token: {"caption": metrics}}; keeps the scores of each clip in `found`."""
    references = {i: clip["captions"] for i, clip in found.clips.items()}
    metrics, found.scores = score({i: text for i, (text, _) in found.captions.items()}, references)
    groups = np.array([number(clip["group"]) for clip in found.clips.values()])
    if cfg.eval.bootstrap:
        metrics["ci"] = {
            name: interval(np.array(found.scores[name]), groups, cfg.eval.bootstrap, cfg.seed)
            for name in ("ROUGE-L", "CIDEr")
        }
    metrics |= {"n_clips": len(references), "n_references": sum(map(len, references.values()))}
    return {cfg.model.audio_type: {"caption": metrics}}


def score(captions: dict[Any, str], references: dict[Any, list[str]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(metrics of all captions, scores of each caption by metric, in the order of `captions`), times 100."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    java = bool(shutil.which("java"))
    said = tokenise({i: [text] for i, text in captions.items()}, java)
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
        total, by_clip = scorer.compute_score(wanted, said, **quiet)
        if not isinstance(scorer, Bleu):  # which alone gives several
            total, by_clip = [total], [by_clip]
        totals |= {name: 100 * float(value) for name, value in zip(names, total, strict=True)}
        each |= {name: [100 * float(x) for x in values] for name, values in zip(names, by_clip, strict=True)}
    if "CIDEr" not in totals:  # references without a word share no n-gram; pycocoevalcap fails on them
        totals["CIDEr"], each["CIDEr"] = 0.0, [0.0] * len(said)
    return totals | ({} if java else {"left_out": NO_JAVA}), each


def scored() -> list[str]:
    """The metrics that there are on this machine."""
    return [name for name in METRICS if name != "METEOR" or shutil.which("java")]


def must_have_scorers() -> None:
    """UserError where pycocoevalcap is not installed, or cannot write the file that its tokeniser reads."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if not spec or not spec.submodule_search_locations:
        raise UserError("eval.task=captioning: captions are scored by pycocoevalcap: pip install 'clip4vla[eval]'")
    folder = Path(spec.submodule_search_locations[0], "tokenizer")
    if shutil.which("java") and not os.access(folder, os.W_OK):
        raise UserError(
            f"eval.task=captioning: pycocoevalcap writes into {folder}, which is read-only: install it elsewhere"
        )


def tokenise(texts: dict[Any, list[str]], java: bool) -> dict[Any, list[str]]:
    """The first WORDS words of each text, with spaces between them, by Stanford's PTB tokeniser, or without Java by letters."""
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
    """95% bootstrap interval [low, high] of the mean of values (n,), whole groups (n,) drawn with replacement."""
    _, own = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(own, values), np.bincount(own)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    return np.quantile(drawn @ sums / (drawn @ sizes), [0.025, 0.975]).tolist()


def account(found: Found, cfg: RunConfig) -> dict[str, Any]:
    """For the manifest: how captions were written and compared, and what is missing."""
    which = "the first caption" if cfg.eval.captions == "first" else "every caption"
    words = f"{which} of a clip is a reference; pycocoevalcap's metrics, times 100, "
    words += "on words of its PTB tokeniser" if shutil.which("java") else "without Java on plain words"
    words += f", the first {WORDS} of each text"
    return {"protocol": words, "no_media": found.unheard, "left_out": found.left_out}


def write_results(folder: Path, found: Found) -> None:
    """results.json and references.json in COCO's formats: what pycocoevalcap reads."""
    clips = {clip["id"]: (clip["captions"], found.captions[i][0]) for i, clip in found.clips.items()}
    results = [{"image_id": name, "caption": text} for name, (_, text) in clips.items()]
    pairs = [(name, text) for name, (texts, _) in clips.items() for text in texts]
    tree = {
        "images": [{"id": name} for name in clips],
        "annotations": [{"id": n, "image_id": name, "caption": text} for n, (name, text) in enumerate(pairs)],
    }
    for name, value in (("results.json", results), ("references.json", tree)):
        write_text(folder / name, json.dumps(value, ensure_ascii=False, indent=1))


def table(metrics: dict[str, dict]) -> str:
    """The metrics as text."""
    row = metrics["caption"]
    there = [name for name in METRICS if name in row]
    lines = ["".join(f"{name:>9}" for name in [*there, "clips"]), "".join(f"{row[name]:>9.1f}" for name in there)]
    lines[1] += f"{row['n_clips']:>9}"
    return "\n".join(lines + ([row["left_out"]] if "left_out" in row else []))


def examples(found: Found, loader: Loader, cfg: RunConfig) -> tuple[list[exhibits.Exhibit], list[Written]]:
    """(clips spread over all of them, what was written of them with its scores)."""
    rows = list(found.clips)
    chosen = torch.linspace(0, len(rows) - 1, min(cfg.eval.report_queries, len(rows))).long().tolist()
    written = []
    for n, row in enumerate(chosen):
        text, likelihood = found.captions[rows[row]]
        scores = {name: found.scores[name][row] for name in ("CIDEr", "METEOR", "ROUGE-L") if name in found.scores}
        kind = "cosine" if cfg.decode.method == "nearest" else "log-probability"
        written.append(Written(n, text, scores | {kind: likelihood}))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(
            pool.map(lambda row: exhibits.of_clip(loader, rows[row], found.clips, cfg.model.modalities), chosen)
        ), written
