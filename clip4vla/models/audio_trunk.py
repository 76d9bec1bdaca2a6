"""Use plain vision transformers of open_clip and timm in one way: patches, prefix tokens, positions, blocks, pooling.

A Vit is a view of the module that holds the weights, whose names stay. B sequences have L tokens of W numbers: n prefix tokens
([CLS], registers), patches, T type tokens. Position rows are of the prefix tokens that have some, of the patches, of the type
tokens. Rotary positions turn patches alone.
"""

import difflib
import functools
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip4vla.errors import UserError, one_line
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers.attention import Block
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.vision import pooled_places, pools_first
from clip4vla.towers.weights import WEIGHTS, check_size_claims, load_clip_weights, names_weights

NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 2, "heads": 1, "layers": 1}  # beside a vision tower alone


class OpenClipVit:
    """Views open_clip's VisionTransformer."""

    prefix_tokens = prefix_rows = 1  # prefix tokens, and those that have a position

    def __init__(self, tower: VisionTransformer):
        self.tower = tower
        self.patch_norm: nn.Module = nn.Identity()
        self.norm_pre, self.norm, self.mean_norm = tower.ln_pre, tower.ln_post, nn.Identity()

    @property
    def kernel(self) -> nn.Conv2d:
        """Return the convolution that embeds patches."""
        return self.tower.conv1

    @property
    def dim(self) -> int:
        """Return the width E of what project gives."""
        return self.tower.ln_post.weight.shape[0] if self.tower.proj is None else self.tower.proj.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many patches there are in a column and in a row."""
        return self.tower.grid_size

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the transformer's blocks."""
        return self.tower.transformer.resblocks

    @property
    def positions(self) -> Tensor:
        """Return the position rows (n + P, W), or (n + P + 1, W)."""
        return self.tower.positional_embedding

    def set_positions(self, rows: Tensor) -> None:
        """Replace the position rows by others (n, W)."""
        self.tower.positional_embedding = nn.Parameter(rows)

    def set_patches(self, kernel: nn.Conv2d, grid: tuple[int, int], segments: int) -> None:
        """Replace the patches by a grid of others, in each of `segments` pictures one after the other."""
        self.tower.conv1, self.tower.grid_size = kernel, grid

    def prefix(self) -> Tensor:
        """Return the prefix tokens (n, W) with their positions."""
        return (self.tower.class_embedding + self.positions[0])[None]

    def rotations(self) -> None:
        """Return no rotary positions."""
        return None

    @property
    def first_only(self) -> bool:
        """Tell whether the vector is the output at [CLS] alone, and run gives no others."""
        return pools_first(self.tower)

    def can_hide(self, mean: bool) -> bool:
        """Tell whether padding can be hidden from all blocks, and from the pooling; mean: that is the mean over patches."""
        plain = all(type(block) is Block for block in self.blocks)
        return plain and self.tower.attn_pool is None and (mean or self.tower.pool_type in ("tok", "avg"))

    def drop_pool(self) -> None:
        """Prepare the mean over patches instead of the tower's own pooling; UserError where they have another width."""
        if self.tower.attn_pool is not None:
            raise UserError(
                "model.audio_pool=mean: the attention pooling of this audio tower changes the width: set model.audio_pool=tower"
            )

    def run(self, x: Tensor, hidden: Tensor | None, rotations: Tensor | None, all_places: bool) -> Tensor:
        """Run the blocks on tokens (B, L, W), of which hidden (B, L) are no keys: (B, L, W), or (B, 1, W) at [CLS] alone."""
        return pooled_places(self.tower, x, hidden, all_places)

    def pool(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """Pool outputs (B, L, W), of which hidden (B, L) are padding, as the tower does: (B, W)."""
        tower = self.tower
        if hidden is None or tower.pool_type != "avg":
            return tower._pool(x)[0]
        if tower.final_ln_after_pool:
            return tower.ln_post(masked_mean(x[:, 1:], hidden[:, 1:]))
        return masked_mean(tower.ln_post(x[:, 1:]), hidden[:, 1:])

    def project(self, x: Tensor) -> Tensor:
        """Project pooled outputs (B, W) into the tower's space (B, E)."""
        return x if self.tower.proj is None else x @ self.tower.proj


class TimmVit:
    """Views open_clip's TimmModel of timm's VisionTransformer or Eva."""

    first_only = False

    def __init__(self, tower: Any):
        self.tower, self.vit = tower, tower.trunk
        self.patch_norm, self.norm_pre = self.vit.patch_embed.norm, self.vit.norm_pre
        self.norm, self.mean_norm = self.vit.norm, self.vit.fc_norm
        self.rope = getattr(self.vit, "rope", None)
        self.prefix_tokens: int = self.vit.num_prefix_tokens
        self.prefix_rows = 0 if self.vit.no_embed_class or self.vit.pos_embed is None else self.prefix_tokens

    @property
    def kernel(self) -> nn.Conv2d:
        """Return the convolution that embeds patches."""
        return self.vit.patch_embed.proj

    @property
    def dim(self) -> int:
        """Return the width E of what project gives."""
        linear = [m for m in (self.vit.head, *self.tower.head.modules()) if isinstance(m, nn.Linear)]
        return linear[-1].out_features if linear else self.vit.num_features

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many patches there are in a column and in a row."""
        return self.vit.patch_embed.grid_size

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """Return the transformer's blocks."""
        return self.vit.blocks

    @property
    def positions(self) -> Tensor | None:
        """Return the position rows (n + P, W), or (n + P + 1, W); None if positions are rotary alone."""
        return None if self.vit.pos_embed is None else self.vit.pos_embed[0]

    def set_positions(self, rows: Tensor) -> None:
        """Replace the position rows by others (n, W)."""
        self.vit.pos_embed = nn.Parameter(rows[None])

    def set_patches(self, kernel: nn.Conv2d, grid: tuple[int, int], segments: int) -> None:
        """Replace the patches by a grid of others, in each of `segments` pictures one after the other: their time goes on."""
        embed = self.vit.patch_embed
        embed.proj, embed.grid_size = kernel, grid
        if self.rope is None:
            return
        if segments > 1 and self.rope.ref_feat_shape is not None:  # of a picture: coordinates are scaled by ref / grid
            self.rope.ref_feat_shape = (segments * self.rope.ref_feat_shape[0], self.rope.ref_feat_shape[1])
        if hasattr(self.rope, "update_feat_shape"):
            self.rope.update_feat_shape((segments * grid[0], grid[1]))
        self.rope_shape = (segments * grid[0], grid[1])

    def prefix(self) -> Tensor:
        """Return the prefix tokens (n, W) with their positions."""
        tokens = [x[0] for x in (self.vit.cls_token, getattr(self.vit, "reg_token", None)) if x is not None]
        prefix = torch.cat(tokens) if tokens else self.kernel.weight.new_zeros(0, self.vit.embed_dim)
        return prefix + self.vit.pos_embed[0, : self.prefix_rows] if self.prefix_rows else prefix

    def rotations(self) -> Tensor | None:
        """Return the rotary positions (.., P, R), sines before cosines, of the patches; None if there are none."""
        return None if self.rope is None else self.rope.get_embed(shape=self.rope_shape)

    def can_hide(self, mean: bool) -> bool:
        """Tell whether padding can be hidden from the pooling, and rotations go on from segment to segment."""
        kind = self.vit.global_pool
        pools = (
            mean or kind in ("token", "map") or (kind == "avg" and not getattr(self.vit, "pool_include_prefix", False))
        )
        return pools and (self.rope is None or getattr(self.rope, "grid_type", "") == "index")

    def drop_pool(self) -> None:
        """Prepare the mean over patches instead of the tower's own pooling."""
        self.vit.attn_pool = None

    def run(self, x: Tensor, hidden: Tensor | None, rotations: Tensor | None, all_places: bool) -> Tensor:
        """Run the blocks on tokens (B, L, W), of which hidden (B, L) are no keys, rotations (.., P, R) of patches: (B, L, W)."""
        mask = None if hidden is None else _additive(hidden, x.dtype)
        if rotations is not None:
            still = x.shape[1] - self.prefix_tokens - rotations.shape[-2]  # type tokens
            rotations = torch.cat([rotations, _no_rotation(rotations, still)], -2)
        for number, block in enumerate(self.blocks):
            run = functools.partial(block, attn_mask=mask)
            if rotations is not None:
                run = functools.partial(run, rope=rotations[number] if self.vit.rope_mixed else rotations)
            x = checkpoint(run, x, use_reentrant=False) if self.vit.grad_checkpointing else run(x)
        return x

    def pool(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """Pool outputs (B, L, W), of which hidden (B, L) are padding, as the tower does: (B, W)."""
        x, start = self.vit.norm(x), self.prefix_tokens
        if hidden is not None and self.vit.attn_pool is not None:
            x = self.vit.attn_pool(x, attn_mask=_additive(hidden, x.dtype))
        elif hidden is not None and self.vit.global_pool == "avg":
            x = masked_mean(x[:, start:], hidden[:, start:])
        else:
            x = self.vit.pool(x)
        return self.vit.fc_norm(x)

    def project(self, x: Tensor) -> Tensor:
        """Project pooled outputs (B, W) into the tower's space (B, E)."""
        return self.tower.head(self.vit.head(self.vit.head_drop(x)))


def vit_of(tower: nn.Module, name: str = "vision") -> OpenClipVit | TimmVit:
    """View a vision tower as a plain ViT; UserError, with the name that model.audio_tower gives it, if it is none."""
    if isinstance(tower, VisionTransformer):
        return OpenClipVit(tower)
    kind: Any = tower
    if isinstance(tower, TimmModel):
        from timm.layers import PatchEmbed
        from timm.models import eva, vision_transformer

        kind = tower.trunk
        if type(kind) in (eva.Eva, vision_transformer.VisionTransformer) and kind.global_pool:
            if type(kind.patch_embed) is PatchEmbed:
                return TimmVit(tower)
            kind = kind.patch_embed
    raise UserError(
        f"model.audio_tower={name}: with a {type(kind).__name__} it is no plain ViT, whose patches can be of sound: "
        "name one, as in model.audio_tower=vit_small_patch16_224"
    )


def tower_config(name: str, dim: int) -> dict[str, Any] | None:
    """Find open_clip's configuration of the vision tower that model.audio_tower names; None: vision, a copy of that.

    A name of timm's gets a linear projection into the space of `dim` numbers.
    """
    if name == "vision":
        return None
    if name.endswith((*WEIGHTS, ".json")) or ":" in name or name.partition("/")[0] in open_clip.list_models():
        return {key: value for key, value in resolve_clip_config(name).items() if key != "text_cfg"}
    timm = import_for_open_clip("timm")
    if not timm.is_model(name.partition(".")[0]) or "/" in name:
        near = difflib.get_close_matches(name, [*open_clip.list_models(), *timm.list_models()], n=1, cutoff=0)
        raise UserError(
            f"model.audio_tower={name}: neither vision, nor a model of open_clip or timm (nearest: {near[0]}), nor a file"
        )
    architecture = name.partition(".")[0]
    size = timm.get_pretrained_cfg(architecture).input_size[-1]  # its own; positions are resized to the segment's grid
    vision = {"timm_model_name": architecture, "timm_pool": "", "timm_proj": "linear", "image_size": size}
    return {"embed_dim": dim, "vision_cfg": vision}


def must_be_held(config: dict[str, Any] | None, name: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint's configuration is of the audio tower it names, of no more weights than it holds."""
    if (config is None) != (name == "vision"):
        raise ValueError(f"model.audio_tower={name} without its configuration, or with one too many")
    if config:
        check_size_claims(config | {"text_cfg": NO_TEXT}, state)


def build_tower(config: dict[str, Any], name: str = "") -> nn.Module:
    """Build the vision tower of a configuration: with the weights that `name` names, else randomly initialised."""
    tower: Any = build_clip(config | {"text_cfg": NO_TEXT}).visual
    timm_name = config["vision_cfg"].get("timm_model_name")
    if timm_name and name.startswith(f"{timm_name}."):
        tower.trunk.load_state_dict(_timm_weights(name))
    elif name and names_weights(name) and not (timm_name and name == timm_name):
        with torch.device("meta"):
            whole = build_clip(resolve_clip_config(name))
        load_clip_weights(whole, name)
        tower.load_state_dict(whole.visual.state_dict())
    return tower


def _timm_weights(name: str) -> dict[str, Tensor]:
    """Fetch the weights of timm's NAME.TAG, without those of its classes."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm raises whatever its download libraries raise
        raise UserError(
            f"model.audio_tower={name}: cannot get these weights ({one_line(error)}); give the name alone for a random tower"
        ) from None


def masked_mean(x: Tensor, ignored: Tensor | None) -> Tensor:
    """Average x (B, L, W) over the places that are not in `ignored` (B, L): (B, W)."""
    if ignored is None:
        return x.mean(1)
    used = (~ignored)[..., None].to(x.dtype)
    return (x * used).sum(1) / used.sum(1).clamp(min=1)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Make of hidden keys (B, L) the mask (B, 1, 1, L) that timm adds to scores, with its own attention and with torch's."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)[:, None, None]


def _no_rotation(rotations: Tensor, count: int) -> Tensor:
    """Make `count` rows like those of rotations (.., P, R) that turn nothing: sines 0, cosines 1."""
    sizes = (*rotations.shape[:-2], count, rotations.shape[-1] // 2)
    return torch.cat([rotations.new_zeros(sizes), rotations.new_ones(sizes)], -1)


def resized_kernel(weight: Tensor, patch: Sequence[int]) -> Tensor:
    """Resize the kernel (W, C, h, w) of a patch embedding to patches of another size, (W, C, *patch).

    It gives a patch what the old kernel gives the patch resized (bilinear, antialiased): the transpose of that resizing.
    """
    rows, columns = (_resizing(new, old).to(weight) for new, old in zip(patch, weight.shape[2:], strict=True))
    return torch.einsum("wcij,ir,js->wcrs", weight, rows, columns)


def _resizing(new: int, old: int) -> Tensor:
    """Make the matrix (old, new) that resizes a line of `new` numbers to `old` numbers."""
    return F.interpolate(torch.eye(new)[None, None], (old, new), mode="bilinear", antialias=True)[0, 0]


def resized_positions(positions: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize position rows (P, W) of a grid `old` to one of another size (P', W), bicubic, antialiased."""
    if tuple(old) == tuple(new):
        return positions
    grid = positions.reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, tuple(new), mode="bicubic", antialias=True).flatten(2)[0].T
