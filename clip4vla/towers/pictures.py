"""Say what pictures a CLIP's vision tower was trained with."""

from dataclasses import dataclass
from typing import Any

import open_clip

from clip4vla.errors import UserError
from clip4vla.media.images import Fit
from clip4vla.towers.transformers_folder import EDGE

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")  # that DALI and Pillow both have


@dataclass(frozen=True)
class Pictures(Fit):
    """Says how a CLIP wants pictures: fitted to its size, RGB in 0..1 less `mean`, by `std`."""

    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD

    def identity(self) -> list[Any]:
        """List what decides the vectors of square frames, to hash: interpolation only where it is not bicubic.

        So hashes from before there was a choice stay valid. A square is brought to a square in the same way by any resize_mode.
        """
        other = {"interpolation": self.interpolation} if self.interpolation != "bicubic" else {}
        if self.size[0] != self.size[1] and self.resize_mode != "shortest":
            other["resize_mode"] = self.resize_mode
        return [[self.mean, self.std], other] if other else [self.mean, self.std]

    def resizing(self, size: int, resize_mode: str) -> str:
        """Describe how frames of `size` pixels, stored with resize_mode, come to this CLIP."""
        wanted = self.size[0] if self.size[0] == self.size[1] else "{} x {}".format(*self.size)
        changed = f"frames resized {size} -> {wanted} by DALI, {self.interpolation}"
        text = f"frames of {size}, as stored" if self.size == (size, size) else changed
        if self.resize_mode == resize_mode:
            return text
        hint = (
            f"set frames.resize_mode={self.resize_mode} in data_prep/shard.py" if self.resize_mode != "longest" else ""
        )
        return "; ".join(filter(None, [f"{text}; stored as {resize_mode}, this CLIP wants {self.resize_mode}", hint]))


def pictures_of(clip: str, config: dict[str, Any]) -> Pictures:
    """Find the pictures of a CLIP named as in `model.clip`, of an open_clip configuration.

    Its own "preprocess_cfg" says them (open_clip_config.json has one), else open_clip's list of pretrained weights: its tag's, or
    of NAME and NAME/FILE what all tags of NAME share; what neither says is OpenAI's. Those of transformers have "pictures".
    """
    if "pictures" in config:
        written: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config["pictures"].items()
        }
        return _checked(Pictures(**written), clip)
    known = config.get("preprocess_cfg") or _listed(clip)
    try:
        size = config.get("vision_cfg", {}).get("image_size") or known.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        fields: dict[str, Any] = {key: known[key] for key in ("interpolation", "resize_mode") if key in known}
        fields |= {
            key: (float(r), float(g), float(b)) for key in ("mean", "std") if key in known for r, g, b in [known[key]]
        }
        made = Pictures((height, width), **fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.clip={clip}: preprocess_cfg: size of one or two numbers, mean and std of three are required ({error})"
        ) from None
    return _checked(made, clip)


def _listed(clip: str) -> dict[str, Any]:
    """Look up how open_clip's pretrained weights of a NAME/TAG want pictures; without a tag what all of NAME's share."""
    name, _, tag = clip.partition("/")
    own = open_clip.get_pretrained_cfg(name, tag)
    cfgs = (
        [own] if own else [open_clip.get_pretrained_cfg(name, t) for t in open_clip.list_pretrained_tags_by_model(name)]
    )
    return {key: value for key, value in cfgs[0].items() if all(cfg.get(key) == value for cfg in cfgs)} if cfgs else {}


def _checked(made: Pictures, clip: str) -> Pictures:
    """Return pictures that can be made; UserError for others, whose vectors would be NaN or whose pixels fill any memory."""
    if not all(isinstance(edge, int) and 0 < edge <= EDGE for edge in made.size):
        raise UserError(f"model.clip={clip}: its pictures are {made.size}: edges of 1 to {EDGE} pixels are required")
    if made.interpolation not in INTERPOLATIONS or not all(value > 0 for value in made.std):
        raise UserError(
            f"model.clip={clip}: preprocess_cfg: interpolation={made.interpolation}, std={made.std}: one of "
            f"{', '.join(INTERPOLATIONS)}, and a deviation above 0, are required"
        )
    return made
