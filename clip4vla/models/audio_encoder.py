"""Encode audio: a vision tower's structure and first weights, an audio type token at the end, one position more."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.data.batch import unpack, upload
from clip4vla.errors import UserError
from clip4vla.models.audio_trunk import masked_mean, resized_kernel, resized_positions, vit_of
from clip4vla.towers.vision import embed_patches

DEFAULT, SPECTROGRAM = ModelConfig(), SpectrogramConfig()


def type_token_weights(audio_type: str, own: Tensor | None = None, key: str = "model.audio_type") -> Tensor:
    """Weigh the T type tokens to append, as shares of ([VB], [NB]): (1, T, 2), or (S, T, 2) by the clips' own types.

    vb, nb: one token. both: both tokens, T = 2 (the paper's fine-tuning). none: T = 0. A number r: the token
    (1 - r) VB + r NB. `data`: own (S,) decides, 0 VB, 1 NB, 2 the mean of both. They are on own's device.
    """
    both = torch.eye(
        2, device=None if own is None else own.device
    )  # made there: a table would be copied, and waited for
    vb, nb = both
    if audio_type == "data":
        assert own is not None
        return torch.stack([vb, nb, (vb + nb) / 2])[own][:, None]
    named = {"vb": both[:1], "nb": both[1:], "both": both, "none": both[:0]}
    if audio_type in named:
        return named[audio_type][None]
    try:
        ratio = float(audio_type)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise UserError(f"{key} must be vb, nb, both, none or a number from 0 to 1, not {audio_type!r}")
    return ((1 - ratio) * vb + ratio * nb)[None, None]


def audio_reading(cfg: ModelConfig, tower: dict[str, Any] | None) -> list[Any]:
    """List how the audio tower reads clips, and of which configuration it is, where that is not the paper's way.

    They are part of the hash of what it computes.
    """
    names = ("audio_span", "audio_pool")
    ways = [getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(DEFAULT, name)]
    return [*ways, tower] if tower else ways


class AudioEncoder(nn.Module):
    """Encodes spectrograms by a vision transformer: P patches of a segment (49 with ViT-B/32), W width, T type tokens.

    tower: copied, with its weights; dim: of the space, 0: the tower's own.
    """

    def __init__(
        self, tower: nn.Module, cfg: ModelConfig = DEFAULT, spectrogram: SpectrogramConfig = SPECTROGRAM, dim: int = 0
    ):
        super().__init__()
        vit_of(tower, cfg.audio_tower)  # refuses others before they are copied
        self.trunk = copy.deepcopy(tower)
        self.vit = vit_of(self.trunk)
        self.mean_pool = cfg.audio_pool == "mean"
        self.segments = spectrogram.max_segments if cfg.audio_span == "clip" else 1  # that have positions
        if cfg.audio_span == "clip" and not self.vit.can_hide(self.mean_pool):
            raise UserError(
                "model.audio_span=clip: needs an audio tower whose attention and pooling can leave out padding: set segment, or "
                "model.audio_pool=mean"
            )
        if self.mean_pool:
            self.vit.drop_pool()
        old = self.vit.grid
        self._set_patches(cfg.audio_patch, (spectrogram.segment_rows, spectrogram.n_mels))
        self._set_positions(old, cfg.position_init)
        width = self.vit.kernel.out_channels
        self.type_embedding = nn.Parameter(torch.randn(2, width) * width**-0.5)
        own = self.vit.dim
        self.projection = nn.Linear(own, dim, bias=False) if dim and dim != own else nn.Identity()

    def _set_patches(self, patch: list[int], size: tuple[int, int]) -> None:
        """Give the trunk patches of [rows, mels], its own if empty, of segments of size (rows, mels); kernels are resized."""
        kernel = self.vit.kernel
        height, width = sides = patch if len(patch) == 2 else kernel.kernel_size
        if len(patch) not in (0, 2) or min(sides) < 1 or any(a % b for a, b in zip(size, sides, strict=True)):
            raise UserError(
                f"model.audio_patch={patch or list(sides)}: two numbers, of rows and mels, that divide a segment's "
                f"{size[0]} x {size[1]}"
            )
        if patch:
            new = nn.Conv2d(kernel.in_channels, kernel.out_channels, (height, width), (height, width), bias=False)
            new.weight, new.bias = nn.Parameter(resized_kernel(kernel.weight.detach(), patch)), kernel.bias
            kernel = new
        self.vit.set_patches(kernel, (size[0] // height, size[1] // width), self.segments)

    def _set_positions(self, old: tuple[int, int], init: str) -> None:
        """Resize the position rows of a grid `old`, for each segment of a clip, and append one for the type tokens."""
        if self.vit.positions is None:
            return
        positions, prefix = self.vit.positions.detach(), self.vit.prefix_rows
        places = resized_positions(positions[prefix:], old, self.vit.grid)
        own = places + _like(positions, self.segments)[:, None] if self.segments > 1 else places[None]
        extra = torch.randn_like(positions[:1]) if init == "unit" else _like(positions, 1)
        self.vit.set_positions(torch.cat([positions[:prefix], own.flatten(0, 1), extra]))

    def forward(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Encode normalised segments (S, C, rows, mels), C = 1 or 3, each alone, to vectors z (S, D), not normalised.

        mix: what type_token_weights gives.
        """
        if not len(segments):  # attention on CUDA fails on none, and under ZeRO-3 all ranks must run the tower
            return self.forward(segments.new_zeros(1, *segments.shape[1:]), mix.new_zeros(1, *mix.shape[1:]))[:0]
        return self._encode(self._placed(segments), mix, self.vit.rotations())  # a name for it would keep it in memory

    def encode_clips(self, views: list[Tensor], rows: Tensor, counts: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        """Encode each clip's segments as one sequence: vectors z (B, D), not normalised, of each view (S, C, rows, mels).

        rows (S,) counts valid rows of segments, counts (B,) segments of clips, both on the CPU; mix is of clips. Patches
        without a valid row are ignored. A clip without segments gets a vector that says nothing.
        """
        (high, columns), clips = self.vit.grid, len(counts)
        most = max(1, int(counts.max()))
        tops = torch.arange(high).repeat_interleave(columns) * self.vit.kernel.kernel_size[0]  # P
        there = (tops < unpack(rows, counts, most)[..., None]).flatten(1)  # B mP
        there[:, 0] |= ~there.any(1)  # attention to nothing at all would be NaN
        length = int(there.any(0).nonzero().max()) + 1
        there = there[:, :length]
        place = torch.arange(most, device=views[0].device).clamp(max=self.segments - 1)
        own, rotations = self._patch_rows(), self.vit.rotations()
        if own is not None:
            own = own.view(self.segments, high * columns, -1)[place]  # m P W
        if rotations is not None:
            rotations = rotations.unflatten(-2, (self.segments, high * columns)).index_select(-3, place)
            rotations = rotations.flatten(-3, -2)[..., :length, :]
        packed = [unpack(self._patches(view), counts, most) for view in views]
        packed = [(x if own is None else x + own).flatten(1, 2)[:, :length] for x in packed]
        mix = mix.expand(clips, -1, -1).repeat(len(views), 1, 1)
        ignored = None if bool(there.all()) else upload(~there, views[0].device).repeat(len(views), 1)
        return self._encode(torch.cat(packed), mix, rotations, ignored).chunk(len(views))

    def _placed(self, segments: Tensor) -> Tensor:
        """Embed the patches of segments (S, C, rows, mels) with their positions: (S, P, W)."""
        x, rows = self._patches(segments), self._patch_rows()
        return x if rows is None else x + rows

    def _patch_rows(self) -> Tensor | None:
        """Return the positions (P, W) of the patches; None if they are rotary alone."""
        return None if self.vit.positions is None else self.vit.positions[self.vit.prefix_rows : -1]

    def _patches(self, segments: Tensor) -> Tensor:
        """Embed the patches of segments (S, C, rows, mels): (S, P, W), in the order of their rows, without positions."""
        weight, bias = self.vit.kernel.weight, self.vit.kernel.bias
        if segments.shape[1] == 1:  # of mono, repeated in three channels, only the sum matters: a third of the work
            weight = weight.sum(1, keepdim=True)
        x = embed_patches(segments, weight)
        return self.vit.patch_norm(x if bias is None else x + bias)

    def _encode(self, x: Tensor, mix: Tensor, rotations: Tensor | None, ignored: Tensor | None = None) -> Tensor:
        """Encode embedded patches (B, L, W), of which those in `ignored` (B, L) are padding, to vectors (B, D)."""
        vit, position, count = self.vit, self.vit.positions, len(x)
        types = (mix.to(x.dtype) @ self.type_embedding).expand(count, -1, -1)  # B T W; all share the last position
        start = vit.prefix().expand(count, -1, -1)
        x = torch.cat([start, x, types if position is None else types + position[-1]], 1)
        first, extra = vit.prefix_tokens, types.shape[1]
        hidden = None if ignored is None else F.pad(ignored, (first, extra))
        x = vit.run(vit.norm_pre(x), hidden, rotations, self.mean_pool)
        if self.mean_pool:
            x = vit.mean_norm(masked_mean(vit.norm(x[:, first : x.shape[1] - extra]), ignored))
        elif vit.first_only:
            x = vit.pool(x, None)
        else:
            x = vit.pool(x[:, : x.shape[1] - extra], None if ignored is None else F.pad(ignored, (first, 0)))
        return self.projection(vit.project(x))


def _like(positions: Tensor, count: int) -> Tensor:
    """Draw `count` rows distributed as the given ones (P, W), which CLIP has no row for."""
    noise = torch.randn(count, positions.shape[1], dtype=positions.dtype)
    return positions.mean(0, keepdim=True) + noise * positions.std(0, keepdim=True)
