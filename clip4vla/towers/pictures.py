"""Say what pictures a CLIP's vision tower was trained with."""

import open_clip

from clip4vla.towers.weights import WEIGHTS


def image_statistics(clip: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of RGB in 0..1 that the vision tower was trained with."""
    name, _, tag = clip.partition("/")
    known = {} if clip.endswith((*WEIGHTS, ".json")) else open_clip.get_pretrained_cfg(name, tag)
    return known.get("mean", open_clip.OPENAI_DATASET_MEAN), known.get("std", open_clip.OPENAI_DATASET_STD)
