"""Change the sound of training clips: turned in time, moved along the mel channels, runs of both hidden (SpecAugment); two mixed.

It is done on the 8-bit code of the spectrograms, so that all terms of the loss and all heads see the same changed sound.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip4vla.config import AugmentConfig, SpectrogramConfig
from clip4vla.media.spectrogram import decode, quantise


class Changes(NamedTuple):
    """Holds what is done to S segments of 224 rows and M channels."""

    row: Tensor  # (S * 224,) int64: the row that comes here, of all rows of the segments
    channel: Tensor  # (S, M) int64: the channel that comes here
    hidden_rows: Tensor  # (S, 224) bool
    hidden_channels: Tensor  # (S, M) bool
    inside: Tensor  # (S, 224) bool: valid rows


class PackedSounds(NamedTuple):
    """Holds the segments of clips, one clip after the other."""

    segments: Tensor  # (S, C, 224, M) uint8 code
    rows: list[int]  # valid rows of each clip, 0 without sound
    counts: list[int]  # segments of each clip

    def strips(self) -> list[Tensor]:
        """Return the valid rows (R, C, M) of each clip."""
        packed = [part.transpose(1, 2).flatten(0, 1) for part in self.segments.split(self.counts)]
        return [strip[:rows] for strip, rows in zip(packed, self.rows, strict=True)]


def is_on(cfg: AugmentConfig) -> bool:
    """Tell whether anything is changed."""
    return bool(cfg.time_shift or cfg.mel_shift or cfg.time_masks or cfg.mel_masks or cfg.mix)


def draw_shares(keys: Sequence[tuple[int, ...]], own: PackedSounds, other: PackedSounds, mix: float) -> Tensor:
    """Draw the share (B,) of each clip's own sound in what is mixed: uniform for a share `mix` of the clips, else 1."""
    drawn = np.stack([np.random.default_rng(key).random(2) for key in keys])
    mixed = (drawn[:, 0] < mix) & np.array(own.rows, bool) & np.array(other.rows, bool)
    return torch.from_numpy(np.where(mixed, drawn[:, 1], 1.0)).float()


def mix(own: PackedSounds, other: PackedSounds, shares: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Mix each clip's sound with another: segments (S, C, 224, M), uint8 code, of share * P + (1 - share) * P' in power.

    P' is the other's power, brought to the mean of P; the other is repeated, or cut, to the length of the own. As a sound of
    its own has it, nothing is more than top_db below the loudest point. Clips of share 1, and without sound, stay as they are.
    """
    out = own.segments.clone()
    pairs = zip(out.split(own.counts), own.strips(), other.strips(), shares.tolist(), strict=True)
    for clip, mine, theirs, share in pairs:
        if share < 1:
            again = theirs[torch.arange(len(mine), device=theirs.device) % len(theirs)]
            power, added = (10 ** (decode(strip, cfg) / 10) for strip in (mine, again))
            decibels = 10 * (share * power + (1 - share) * added * (power.mean() / added.mean())).log10()
            code = quantise(decibels.maximum(decibels.max() - cfg.top_db), cfg)
            rows = torch.nn.functional.pad(code, (0, 0, 0, 0, 0, len(clip) * clip.shape[2] - len(mine)))
            clip.copy_(rows.view(len(clip), -1, *code.shape[1:]).transpose(1, 2))
    return out


def draw(
    keys: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    segments: Sequence[int],
    size: tuple[int, int],
    cfg: AugmentConfig,
) -> Changes:
    """Draw the changes of clips with these numbers of valid rows and of segments; a pure function of their keys.

    size: rows and channels of a segment.
    """
    height, width = size
    total = sum(segments)
    row = np.arange(total * height).reshape(total, height)
    channel = np.tile(np.arange(width), (total, 1))
    hidden_rows, inside = np.zeros((2, total, height), bool)
    hidden_channels = np.zeros((total, width), bool)
    first = 0
    for key, valid, count in zip(keys, rows, segments, strict=True):
        if not count:
            continue
        rng, part = np.random.default_rng(key), slice(first, first + count)
        turned = (np.arange(valid) + rng.integers(-cfg.time_shift, cfg.time_shift + 1)) % valid
        row[part].reshape(-1)[:valid] = first * height + turned
        moved = np.arange(width) + rng.integers(-cfg.mel_shift, cfg.mel_shift + 1)
        channel[part] = moved.clip(0, width - 1)
        hidden_rows[part].reshape(-1)[:valid] = _runs(rng, valid, cfg.time_masks, cfg.time_mask_rows)
        hidden_channels[part] = _runs(rng, width, cfg.mel_masks, cfg.mel_mask_channels)
        inside[part].reshape(-1)[:valid] = True
        first += count
    return Changes(*(torch.from_numpy(x) for x in (row.reshape(-1), channel, hidden_rows, hidden_channels, inside)))


def _runs(rng: np.random.Generator, length: int, count: int, longest: int) -> np.ndarray:
    """Mark `count` runs of 0..longest of `length` places, bool (length,)."""
    marked = np.zeros(length, bool)
    for width in rng.integers(0, longest + 1, count):
        start = rng.integers(0, max(1, length - width + 1))
        marked[start : start + width] = True
    return marked


def change(segments: Tensor, owner: Tensor, clips: int, changes: Changes) -> Tensor:
    """Return segments (S, C, 224, M), uint8 code, changed; what is hidden gets the mean of its clip, of owner (S,).

    All on one device.
    """
    row, channel, hidden_rows, hidden_channels, inside = changes
    strip = segments.transpose(1, 2).flatten(0, 1)  # S*224 C M
    moved = strip[row].view(len(segments), -1, *strip.shape[1:])  # S 224 C M
    moved = moved.gather(3, channel[:, None, None].expand_as(moved)).transpose(1, 2)
    hidden = (hidden_rows[:, :, None] | hidden_channels[:, None]) & inside[:, :, None]
    sums = torch.stack([(moved.float().mean(3).mean(1) * inside).sum(1), inside.float().sum(1)], 1)  # S 2
    totals = sums.new_zeros(clips, 2).index_add(0, owner, sums)
    means = (totals[:, 0] / totals[:, 1].clamp(min=1)).round().to(torch.uint8)[owner]
    return moved.where(~hidden[:, None], means[:, None, None, None])
