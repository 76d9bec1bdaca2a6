"""Encode audio: the vision tower's structure and first weights, an audio type token at the end, one position more."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.data.batch import unpack, upload
from clip4vla.errors import UserError
from clip4vla.towers.vision import embed_patches, pooled_places, pools_first

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


class AudioEncoder(nn.Module):
    """Encodes spectrograms by a vision transformer: P patches of a segment (49 with ViT-B/32), W width, T type tokens."""

    def __init__(
        self, vision: VisionTransformer, cfg: ModelConfig = DEFAULT, spectrogram: SpectrogramConfig = SPECTROGRAM
    ):
        super().__init__()
        self.trunk = copy.deepcopy(vision)
        self.mean_pool = cfg.audio_pool == "mean"
        self.segments = spectrogram.max_segments if cfg.audio_span == "clip" else 1  # that have positions
        plain = all(type(block) is ResidualAttentionBlock for block in vision.transformer.resblocks)
        if cfg.audio_span == "clip" and not (plain and (self.mean_pool or pools_first(vision))):
            raise UserError(
                "model.audio_span=clip: needs a CLIP with plain blocks, and [CLS] or model.audio_pool=mean: set segment, or mean"
            )
        positions = vision.positional_embedding.detach()
        if cfg.audio_patch:
            self._set_patch(cfg.audio_patch, (spectrogram.segment_rows, spectrogram.n_mels))
        places = _resized_positions(positions[1:], vision.grid_size, self.trunk.grid_size)
        own = places + _like(positions, self.segments)[:, None] if self.segments > 1 else places[None]
        extra = torch.randn_like(positions[:1]) if cfg.position_init == "unit" else _like(positions, 1)
        self.trunk.positional_embedding = nn.Parameter(torch.cat([positions[:1], own.flatten(0, 1), extra]))
        self.type_embedding = nn.Parameter(torch.randn(2, positions.shape[1]) * positions.shape[1] ** -0.5)

    def _set_patch(self, patch: list[int], size: tuple[int, int]) -> None:
        """Give the trunk patches of [rows, mels] of segments of size (rows, mels), its kernels resized."""
        if len(patch) != 2 or min(patch) < 1 or any(whole % part for whole, part in zip(size, patch, strict=True)):
            raise UserError(
                f"model.audio_patch={patch}: two numbers, of rows and mels, that divide a segment's {size[0]} x {size[1]}"
            )
        old = self.trunk.conv1
        height, width = patch
        new = nn.Conv2d(old.in_channels, old.out_channels, (height, width), (height, width), bias=False)
        new.weight = nn.Parameter(resized_kernel(old.weight.detach(), patch))
        self.trunk.conv1 = new
        self.trunk.grid_size = (size[0] // height, size[1] // width)

    def forward(self, segments: Tensor, mix: Tensor) -> Tensor:
        """Encode normalised segments (S, C, 224, 224), C = 1 or 3, each alone, to vectors z (S, D), not normalised.

        mix: what type_token_weights gives.
        """
        if not len(segments):  # attention on CUDA fails on none, and under ZeRO-3 all ranks must run the tower
            return self.forward(segments.new_zeros(1, *segments.shape[1:]), mix.new_zeros(1, *mix.shape[1:]))[:0]
        return self._encode(self._patches(segments) + self.trunk.positional_embedding[1:-1], mix)

    def encode_clips(self, views: list[Tensor], rows: Tensor, counts: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        """Encode each clip's segments as one sequence: vectors z (B, D), not normalised, of each view (S, C, 224, 224).

        rows (S,) counts valid rows of segments, counts (B,) segments of clips, both on the CPU; mix is of clips. Patches
        without a valid row are ignored. A clip without segments gets a vector that says nothing.
        """
        (high, columns), clips = self.trunk.grid_size, len(counts)
        most = max(1, int(counts.max()))
        tops = torch.arange(high).repeat_interleave(columns) * self.trunk.conv1.kernel_size[0]  # P
        there = (tops < unpack(rows, counts, most)[..., None]).flatten(1)  # B mP
        length = int(there.any(0).nonzero().max()) + 1 if there.any() else 1
        there = there[:, :length]
        place = torch.arange(most, device=views[0].device).clamp(max=self.segments - 1)
        own = self.trunk.positional_embedding[1:-1].view(self.segments, high * columns, -1)[place]  # m P W
        packed = [(unpack(self._patches(view), counts, most) + own).flatten(1, 2)[:, :length] for view in views]
        mix = mix.expand(clips, -1, -1).repeat(len(views), 1, 1)
        ignored = None if bool(there.all()) else upload(~there, views[0].device).repeat(len(views), 1)
        return self._encode(torch.cat(packed), mix, ignored).chunk(len(views))

    def _patches(self, segments: Tensor) -> Tensor:
        """Embed the patches of segments (S, C, 224, 224): (S, P, W), in the order of their rows, without positions."""
        weight = self.trunk.conv1.weight
        if segments.shape[1] == 1:  # of mono, repeated in three channels, only the sum matters: a third of the work
            weight = weight.sum(1, keepdim=True)
        return embed_patches(segments, weight)

    def _encode(self, x: Tensor, mix: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Encode embedded patches (B, L, W), of which those in `ignored` (B, L) are padding, to vectors (B, D)."""
        trunk, position, count = self.trunk, self.trunk.positional_embedding, len(x)
        types = (mix.to(x.dtype) @ self.type_embedding).expand(count, -1, -1)  # B T W; both share the last position
        start = (trunk.class_embedding + position[0]).expand(count, 1, -1)
        x = torch.cat([start, x, types + position[-1]], 1)
        hidden = None if ignored is None else F.pad(F.pad(ignored, (1, 0)), (0, types.shape[1]))
        x = pooled_places(trunk, trunk.ln_pre(x), hidden, self.mean_pool)
        if self.mean_pool:
            x = _masked_mean(trunk.ln_post(x[:, 1 : x.shape[1] - types.shape[1]]), ignored)
        else:
            x = trunk._pool(x[:, : x.shape[1] if pools_first(trunk) else x.shape[1] - types.shape[1]])[0]
        return x @ trunk.proj if trunk.proj is not None else x


def _masked_mean(x: Tensor, ignored: Tensor | None) -> Tensor:
    """Average x (B, L, W) over the places that are not in `ignored` (B, L): (B, W)."""
    if ignored is None:
        return x.mean(1)
    used = (~ignored)[..., None].to(x.dtype)
    return (x * used).sum(1) / used.sum(1).clamp(min=1)


def resized_kernel(weight: Tensor, patch: Sequence[int]) -> Tensor:
    """Resize the kernel (W, C, h, w) of a patch embedding to patches of another size, (W, C, *patch).

    It gives a patch what the old kernel gives the patch resized (bilinear, antialiased): the transpose of that resizing.
    """
    rows, columns = (_resizing(new, old).to(weight) for new, old in zip(patch, weight.shape[2:], strict=True))
    return torch.einsum("wcij,ir,js->wcrs", weight, rows, columns)


def _resizing(new: int, old: int) -> Tensor:
    """Make the matrix (old, new) that resizes a line of `new` numbers to `old` numbers."""
    return F.interpolate(torch.eye(new)[None, None], (old, new), mode="bilinear", antialias=True)[0, 0]


def _resized_positions(positions: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize position rows (P, W) of a grid `old` to one of another size (P', W), bicubic, antialiased."""
    if tuple(old) == tuple(new):
        return positions
    grid = positions.reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, tuple(new), mode="bicubic", antialias=True).flatten(2)[0].T


def _like(positions: Tensor, count: int) -> Tensor:
    """Draw `count` rows distributed as the given ones (P, W), which CLIP has no row for."""
    noise = torch.randn(count, positions.shape[1], dtype=positions.dtype)
    return positions.mean(0, keepdim=True) + noise * positions.std(0, keepdim=True)
