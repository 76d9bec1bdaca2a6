"""Make the augmented view: runs of rows and of mel channels hidden from a spectrogram ("Masking").

With the paper's setting about 80% of the time steps are hidden (15% starts, runs of 10, overlap allowed), with the released
code's about 50%: log the fraction.
"""

import numpy as np
from torch import Tensor

from clip4vla.config import MaskConfig
from clip4vla.media.spectrogram import normalise


def draw(key: tuple[int, ...], rows: int, channels: int, cfg: MaskConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draw (hidden rows (rows,), hidden mel channels (channels,)), bool; a pure function of key = (seed, sample, epoch)."""
    rng = np.random.default_rng(key)
    return _runs(rng, rows, cfg.time_start_prob, cfg), _runs(rng, channels, cfg.freq_start_prob, cfg)


def _runs(rng: np.random.Generator, length: int, share: float, cfg: MaskConfig) -> np.ndarray:
    starts = rng.integers(0, max(1, length), round(share * length))
    widths = rng.integers(0, cfg.length + 1, len(starts)) if cfg.random_length else np.full(len(starts), cfg.length)
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, np.minimum(starts + widths, length), -1)
    return edges.cumsum()[:length] > 0


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
