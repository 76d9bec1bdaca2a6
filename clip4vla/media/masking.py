"""Make the augmented view: runs of rows and of mel channels hidden from a spectrogram ("Masking").

With the paper's setting about 80% of the time steps are hidden (15% starts, runs of 10, overlap allowed), with the released
code's about 50%: log the fraction.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clip4vla.config import MaskConfig
from clip4vla.media.random_integers import integers
from clip4vla.media.spectrogram import normalise


def draw(
    keys: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    segments: Sequence[int],
    size: tuple[int, int],
    cfg: MaskConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw (hidden rows (S, 224), hidden mel channels (S, 224)), bool, of clips with these numbers of valid rows and segments.

    A pure function of the clips' keys = (seed, sample, epoch). All S segments of a clip hide the same channels. size: rows and
    channels of a segment.
    """
    height, width = size
    sounding = [clip for clip, count in enumerate(segments) if count]
    counts, lengths = [segments[clip] for clip in sounding], [rows[clip] for clip in sounding]
    by_row = _Runs(lengths, [round(cfg.time_start_prob * length) for length in lengths], cfg)
    by_channel = _Runs([width] * len(sounding), [round(cfg.freq_start_prob * width)] * len(sounding), cfg)
    drawn = integers([keys[clip] for clip in sounding], by_row.calls + by_channel.calls)
    hidden_rows = by_row.marked(drawn[: len(by_row.calls)], [height * count for count in counts])
    hidden_channels = by_channel.marked(drawn[len(by_row.calls) :], [width] * len(sounding))
    return hidden_rows.reshape(-1, height), hidden_channels.reshape(-1, width).repeat(counts, 0)


class _Runs:
    """Describes runs of clips, `counts` (B,) among `lengths` (B,) places, and the calls of `integers` that draw them."""

    def __init__(self, lengths: list[int], counts: list[int], cfg: MaskConfig) -> None:
        self.lengths, self.counts = np.array(lengths, np.int64), np.array(counts, np.int64)
        self.width = cfg.length
        self.calls = [([max(1, length) for length in lengths], counts)]
        if cfg.random_length:
            self.calls.append(([cfg.length + 1] * len(lengths), counts))

    def marked(self, drawn: list[np.ndarray], room: list[int]) -> np.ndarray:
        """Mark the places of the runs, where more have begun than ended, (sum of room,) bool; a clip has `room` places."""
        starts, widths = drawn[0], drawn[1] if len(drawn) > 1 else self.width
        ends = np.minimum(starts + widths, np.repeat(self.lengths, self.counts))
        first = np.repeat(np.cumsum(room, dtype=np.int64) - np.array(room, np.int64), self.counts)
        begun, ended = (np.bincount(first + places, minlength=sum(room) + 1) for places in (starts, ends))
        return (begun - ended)[:-1].cumsum() > 0


def masked_view(
    decibels: Tensor,
    rows: Tensor,
    hidden: Tensor,
    cfg: MaskConfig,
    how: str,
    owner: Tensor | None = None,
    clips: int = 0,
) -> Tensor:
    """Normalise segments (S, C, 224, M) and fill the pairs (time, mel) in hidden (S, 224, M); one mask for all channels.

    `mean` puts 0 after normalisation, `zero_db` 0 dB before it, as the released code does. how, owner, clips: see normalise.
    """
    hidden = hidden[:, None]
    if cfg.fill == "zero_db":
        return normalise(decibels.masked_fill(hidden, 0), rows, how, owner, clips)
    return normalise(decibels, rows, how, owner, clips).masked_fill(hidden, 0)
