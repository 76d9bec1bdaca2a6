"""Analyse what the audio type token does: are speech and other sounds apart, how verbal is a clip, and a picture of it.

Every clip with sound is embedded under [VB] and under [NB]; probes (evaluation/linear_probe.py) are
fitted on data.train and judged on data.test. n clips, D width.
"""

import contextlib
import csv
import io
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.loader import open_folders
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.evaluation import features, linear_probe, retrieval_metrics, runner, zero_shot
from clip4vla.evaluation.features import Features
from clip4vla.io.atomic import write_bytes, write_text
from clip4vla.models.model import Model
from clip4vla.report.preview import to_bytes
from clip4vla.training.run_setup import load_eval_model

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3)
TOKENS = ("vb", "nb")
COLOURS = {"vb": "#2563eb", "nb": "#d97706"}  # of the clips' own types
SIZES = {"vb": 14, "nb": 36}  # other sounds are few
MARKS = {"vb": "o", "nb": "x"}  # of the token they are embedded under
SHOWN = 1000  # clips in the plot


def analyse(cfg: RunConfig) -> None:
    """Analyse a run's newest checkpoint; write audio_types.json, audio_types.csv and audio_types.png to RUN/audio_types/.

    The json holds probes and queries, the csv how verbal each clip is.
    """
    device = collectives.setup()
    model = load_eval_model(cfg)[0].to(device)
    both = {key: _under_both(model, getattr(cfg.data, key), f"data.{key}", cfg, device) for key in ("train", "test")}
    queries = _queries(model, cfg)
    if collectives.rank() == 0:
        out = Path(cfg.run_dir, "audio_types")
        out.mkdir(parents=True, exist_ok=True)
        judged, verbal = _probes(both["train"], both["test"], cfg.seed)
        write_text(out / "audio_types.json", json.dumps({"probes": judged, "queries": queries}, indent=1))
        write_text(out / "audio_types.csv", _csv(both["test"]["vb"].clips, verbal))
        plot = figure(both["test"], cfg.seed)
        write_bytes(out / "audio_types.png", to_bytes(lambda buffer: plot.savefig(buffer, format="png")))
        print(_table(judged, queries) + f"\n{out}: audio_types.json, audio_types.csv, audio_types.png")
    collectives.barrier()


def _under_both(
    model: Model, sources: dict[str, float], key: str, cfg: RunConfig, device: torch.device
) -> dict[str, Features]:
    """Compute features under each token of the clips that have sound and are known to be verbal or not."""
    folders, out = open_folders(sources, key, cfg.data), {}
    for token in TOKENS:
        one = deepcopy(cfg)
        one.model.modalities, one.model.audio_type = "a", token
        loader = runner.eval_loader(one, folders, device, model=model)
        with torch.no_grad():
            embedded = features.of_folders(model, loader, folders, one)
        out[token] = embedded.where(lambda clip: clip["audio_type"] in TOKENS and clip["has_audio"])
    common = set(out["vb"].number) & set(out["nb"].number)  # one of them may be corrupt by now
    out = {token: embedded.among(common) for token, embedded in out.items()}
    kinds = {clip["audio_type"] for clip in out["vb"].clips}
    if kinds != set(TOKENS):
        raise UserError(f"{key}: needs verbal (vb) and nonverbal (nb) sounds to tell apart; there are {sorted(kinds)}")
    return out


def _probes(
    train: dict[str, Features], test: dict[str, Features], seed: int
) -> tuple[dict[str, dict[str, float]], Tensor]:
    """Fit and judge probes: (AUC and balanced accuracy by probe, probability (n,) float64 that a test clip is verbal).

    One probe separates the two tokens on the same clips; the others separate speech from other sound, under each token
    and both. The probability is from both tokens.
    """
    mine, theirs = (torch.tensor([c["audio_type"] == "nb" for c in some["vb"].clips]).long() for some in (train, test))
    groups = [clip["group"] for clip in train["vb"].clips]

    def fit_and_score(
        x: Tensor, y: Tensor, of: list[str], tested: Tensor, target: Tensor
    ) -> tuple[dict[str, float], Tensor]:
        probe = linear_probe.fit_select_C(x, y, 2, STRENGTHS, linear_probe.group_holdout(y, of, seed))
        p = probe.log_probabilities(tested)[:, 1].exp()
        return {"auc": auc(p, target), "balanced_accuracy": balanced(p > 0.5, target)}, p

    x, tested = ([some[token].vectors["a"] for token in TOKENS] for some in (train, test))
    ones = [torch.full((len(some["vb"].clips),), i) for some in (train, test) for i in (0, 1)]
    judged = {
        "vb or nb token, same clips": fit_and_score(
            torch.cat(x), torch.cat(ones[:2]), groups * 2, torch.cat(tested), torch.cat(ones[2:])
        )[0]
    }
    for i, token in enumerate(TOKENS):
        judged[f"speech or sound, all under {token}"] = fit_and_score(x[i], mine, groups, tested[i], theirs)[0]
    judged["speech or sound, from both"], p = fit_and_score(torch.cat(x, 1), mine, groups, torch.cat(tested, 1), theirs)
    return judged, 1 - p


def auc(score: Tensor, positive: Tensor) -> float:
    """Compute the area under the ROC curve: how often a positive (1) scores above a negative (0), ties half."""
    high, low = score[positive == 1], score[positive == 0].sort().values
    below, upto = (torch.searchsorted(low, high, right=right) for right in (False, True))
    return float((below + upto).double().mean() / 2 / len(low))


def balanced(prediction: Tensor, target: Tensor) -> float:
    """Compute the mean of the two classes' accuracies in percent, from bool predictions (n,) and 0/1 targets (n,)."""
    return 50 * sum(float((prediction[target == k] == bool(k)).double().mean()) for k in (0, 1))


def _queries(model: Model, cfg: RunConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Rank all sounds for captions, by token and query type: R@1, R@10, MedR, and how many best hits have its type."""
    cfg = deepcopy(cfg)
    cfg.eval.audio_types, cfg.eval.permutations, cfg.eval.bootstrap, cfg.eval.task = (
        ["data", *TOKENS, "both"],
        0,
        0,
        "zero_shot",
    )
    _, outputs = runner.run_inference(model, cfg, cfg.data.test, "data.test")
    out: dict[str, dict] = {}
    for token in cfg.eval.audio_types if collectives.rank() == 0 else ():
        sides = zero_shot.captions_and_audio(outputs.clips, outputs.vectors, token)
        captions, sounds = (zero_shot.deduplicate(side, outputs.clips) for side in sides)
        nonverbal = torch.tensor(["nb" in tags for tags in sounds.tags])
        for kind in TOKENS:
            some = captions.tagged(kind)
            row = zero_shot.rank(some, sounds, cfg)
            best = retrieval_metrics.top_k(some.vectors, sounds.vectors, 1)[1][:, 0]
            same = float((nonverbal[best] == (kind == "nb")).double().mean())
            few = {name: row[name] for name in ("R@1", "R@10", "MedR", "n_queries", "n_gallery")}
            out.setdefault(token, {})[kind] = few | {"best_hit_of_own_type": 100 * same}
    return out


def _csv(clips: list[dict[str, Any]], verbal: Tensor) -> str:
    """Format CSV: id, source, audio_type, and the probability (n,) that the clip is verbal."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "source", "audio_type", "verbal"])
    for clip, p in zip(clips, verbal.tolist(), strict=True):
        writer.writerow([clip["id"], clip["source"], clip["audio_type"], f"{p:.6f}"])
    return out.getvalue()


def _table(judged: dict[str, dict[str, float]], queries: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the probes' and the queries' results as text."""
    lines = [f"{'probe':<34}{'AUC':>8}{'balanced %':>12}"]
    lines += [f"{name:<34}{row['auc']:>8.3f}{row['balanced_accuracy']:>12.1f}" for name, row in judged.items()]
    lines += ["", f"{'text to audio':<34}{'R@1':>8}{'R@10':>8}{'MedR':>8}{'best hit of own type %':>24}{'queries':>9}"]
    lines += [
        f"{'token ' + token + ', ' + {'vb': 'speech', 'nb': 'other sound'}[kind]:<34}{row['R@1']:>8.1f}{row['R@10']:>8.1f}"
        f"{row['MedR']:>8.1f}{row['best_hit_of_own_type']:>24.1f}{row['n_queries']:>9}"
        for token, kinds in queries.items()
        for kind, row in kinds.items()
    ]
    return "\n".join(lines)


def figure(test: dict[str, Features], seed: int) -> Figure:
    """Plot the clips under both tokens: PCA, and t-SNE if scikit-learn is installed (pip install 'clip4vla[eval]')."""
    few = np.random.default_rng(seed).permutation(len(test["vb"].clips))[:SHOWN]
    kinds = np.array([clip["audio_type"] for clip in test["vb"].clips])[few]
    x = torch.cat([test[token].vectors["a"][few] for token in TOKENS]).double()
    x -= x.mean(0)
    _, values, directions = torch.linalg.svd(x, full_matrices=False)
    share = 100 * values.square() / values.square().sum()
    panels = {f"PCA ({share[0]:.0f}% and {share[1]:.0f}% of the variance)": (x @ directions[:2].T).numpy()}
    with contextlib.suppress(ImportError):
        from sklearn.manifold import TSNE

        panels["t-SNE"] = TSNE(random_state=seed, perplexity=min(30, (len(x) - 1) / 3)).fit_transform(x.numpy())
    plot = Figure(figsize=(5.5 * len(panels), 5.2), dpi=150, layout="constrained")
    for place, (title, points) in enumerate(panels.items()):
        axes = plot.add_subplot(1, len(panels), place + 1)
        for token, own in zip(TOKENS, np.split(points, 2), strict=True):
            for kind, name in (("vb", "speech"), ("nb", "other sound")):
                x, y = own[kinds == kind].T
                axes.scatter(x, y, s=SIZES[kind], marker=MARKS[token], c=COLOURS[kind], alpha=0.55,
                             linewidths=1, label=f"{name} under [{token.upper()}]")  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    plot.axes[0].legend(fontsize=8)
    return plot
