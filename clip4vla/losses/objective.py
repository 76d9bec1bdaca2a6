"""The loss of a step: its terms, the features that they compare, and the bytes that they send; InfoNCE is in contrastive.py."""

from dataclasses import replace

import torch
from torch import Tensor

from clip4vla.config import LossConfig
from clip4vla.data.batch import Labels
from clip4vla.distributed import collectives
from clip4vla.losses.contrastive import Term, multi_info_nce, nce_from_scores

PAIRS = {
    "at": ("text", "audio"),
    "av": ("vision", "audio"),
    "aa": ("audio", "masked"),
    "tv": ("text", "vision"),
    "tm": ("text", "media"),
}
CROSS_ENTROPY_TERMS = ("caption", "label")
TERMS = (*PAIRS, *CROSS_ENTROPY_TERMS)  # what can have a weight


def required_features(cfg: LossConfig) -> list[str]:
    """List the features that the terms with a weight compare."""
    used = {name for term, pair in PAIRS.items() if getattr(cfg, term) for name in pair}
    return [name for name in ("text", "vision", "audio", "masked", "media") if name in used]


def bytes_sent(cfg: LossConfig, b: int, n: int, dim: int, scored: bool = False) -> int:
    """Count the bytes that each of several ranks puts into collectives for its b of n rows; F features of width D, T terms, fp32:

    4 b D F (features) + b T (valid) + 12 b T (positives, log-sum-exps) + 8 N T (columns' maxima and sums) + 8 b (groups, if any)

    scored: the term of text and media is made from scores: 4 b N (scores) + 4 N N (their gradient) + b (valid) + 8 b (groups)
    """
    if scored:
        rest = bytes_sent(replace(cfg, tm=0.0), b, n, dim)
        return rest + 4 * n * (b + n) + b * (1 + 8 * cfg.exclude_same_group)
    terms = sum(bool(getattr(cfg, term)) for term in PAIRS)
    groups = 8 * cfg.exclude_same_group * bool(terms)
    return b * (4 * dim * len(required_features(cfg)) + 13 * terms + groups) + 8 * n * terms


def compute_losses(
    features: dict[str, Tensor],
    labels: Labels,
    cfg: LossConfig,
    modalities: str = "av",
    taught: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the terms that have a weight, by name, and their weighted sum under `loss`; all are scalars.

    features: as Model.forward gives them for these modalities: unit vectors (b, D) by name, `scale`; of a head that compares
    captions with clips itself `scores` (b, N) in place of `media`; `nll`, cross entropies in nats, where `taught` is given.
    taught: words of the captions, or labels, of all ranks: `caption` or `label` is the mean over them.
    """
    valid = _valid_rows(labels, modalities)
    group = labels.group if cfg.exclude_same_group else None
    one_way = not cfg.symmetric
    pairs = {name: pair for name, pair in PAIRS.items() if getattr(cfg, name)}
    if "scores" in features:
        del pairs["tm"]
    losses = _info_nce_losses(features, pairs, valid, group, cfg)
    if "scores" in features:
        both = valid["text"] & valid["media"]
        losses["tm"] = nce_from_scores(features["scores"], features["scale"], both, group, one_way)
    for name in CROSS_ENTROPY_TERMS:
        if getattr(cfg, name):
            assert taught is not None
            losses[name] = collectives.world_size() * features["nll"].sum() / taught
    return losses | {"loss": sum(getattr(cfg, name) * value for name, value in losses.items())}


def _valid_rows(labels: Labels, modalities: str) -> dict[str, Tensor]:
    """Mark for each feature the rows (b,) bool of clips that have what it is made from."""
    has_media = torch.zeros_like(labels.has_audio)
    if "v" in modalities:
        has_media = has_media | labels.has_frames
    if "a" in modalities:
        has_media = has_media | labels.has_audio
    return {
        "text": labels.has_text,
        "vision": labels.has_frames,
        "audio": labels.has_audio,
        "masked": labels.has_audio,
        "media": has_media,
    }


def _info_nce_losses(
    features: dict[str, Tensor],
    pairs: dict[str, tuple[str, str]],
    valid: dict[str, Tensor],
    group: Tensor | None,
    cfg: LossConfig,
) -> dict[str, Tensor]:
    """Compute the InfoNCE of each named pair of features (b, D); all features are gathered at once."""
    if not pairs:
        return {}
    compared = [name for name in required_features(cfg) if name in features]
    terms = []
    for name, (a, b) in pairs.items():
        one_way = name == "tm" and not cfg.symmetric
        terms.append(Term(compared.index(a), compared.index(b), valid[a] & valid[b], name == "aa", one_way))
    values = multi_info_nce([features[name] for name in compared], features["scale"], terms, group)
    return dict(zip(pairs, values, strict=True))
