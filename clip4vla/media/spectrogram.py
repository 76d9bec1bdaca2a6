"""Turn waveforms into log-mel segments, encode these in 8 bits, and normalise them ("Audio to image").

Shapes: T samples, R rows (time steps of 8 ms), C stored channels (1 mono, 3 left/mid/right), M = 224 mel channels, S segments.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import torch
import torchaudio.functional as AF
from torch import Tensor

from clip4vla.config import SpectrogramConfig

CANCELLED = 1e-3  # power of the mean by that of the channels; of two independent ones it is 1/2
FLOOR = -100.0  # dB that nothing is below


def log_mel(wave: Tensor, rate: int, cfg: SpectrogramConfig) -> Tensor:
    """Compute log-mel power in dB, (C, R, M) float32, of a waveform (channels, T) in [-1, 1] at `rate` Hz.

    R = max(1, ceil(T / hop)) after resampling to cfg.sample_rate: row i is centred on sample i * hop, with silence beyond
    both ends, so that a clip of t seconds gives ceil(t / 1.792) segments. Mel filters are Slaney's, area-normalised.
    dB are relative to a power of 1, never below -100, and at most top_db below the clip's loudest point.
    """
    ratio = Fraction(cfg.sample_rate, rate).limit_denominator(1000)  # 22254 Hz: exact, the filter bank has 11127 rows
    wave = AF.resample(_channels(wave.float(), cfg), ratio.denominator, ratio.numerator)
    rows = max(1, math.ceil(wave.shape[-1] / cfg.hop_length))
    wave = torch.nn.functional.pad(wave, (0, max(0, (rows - 1) * cfg.hop_length - wave.shape[-1])))
    window = getattr(torch, f"{cfg.window}_window")(cfg.win_length)
    stft = torch.stft(
        wave, cfg.n_fft, cfg.hop_length, cfg.win_length, window, center=True, pad_mode="constant", return_complex=True
    )
    power = (stft.real.square() + stft.imag.square()).transpose(1, 2)[:, :rows]  # C R n_fft//2+1
    decibels = 10 * torch.log10((power @ mel_filters(cfg)).clamp(min=10 ** (FLOOR / 10)))
    return torch.maximum(decibels, decibels.max() - cfg.top_db)


def is_silent(decibels: Tensor, cfg: SpectrogramConfig) -> bool:
    """Tell whether a spectrogram (C, R, M) of dB shows nothing, as that of digital silence."""
    return bool(decibels.max() <= max(FLOOR, cfg.db_min))


def mel_filters(cfg: SpectrogramConfig) -> Tensor:
    """Make the mel filter bank (n_fft // 2 + 1, M)."""
    return _mel_filters(cfg.n_fft, cfg.f_min, cfg.f_max, cfg.n_mels, cfg.sample_rate)


@functools.cache
def _mel_filters(n_fft: int, f_min: float, f_max: float, n_mels: int, rate: int) -> Tensor:
    return AF.melscale_fbanks(n_fft // 2 + 1, f_min, f_max, n_mels, rate, norm="slaney", mel_scale="slaney")


def mix(wave: Tensor) -> Tensor:
    """Mix a waveform (channels, T) to one channel (1, T): their mean, or the loudest where they cancel each other in it."""
    power = wave.square().mean(1)
    mean = wave.mean(0, keepdim=True)
    return wave[power.argmax()][None] if mean.square().mean() < CANCELLED * power.mean() else mean


def _channels(wave: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Mix a waveform (channels, T) to mono (1, T), or to left, mid, right (3, T); more than two channels give mid alone."""
    mid = mix(wave)
    if cfg.channels == "mono":
        return mid
    left, right = (wave[:1], wave[1:2]) if wave.shape[0] == 2 else (mid, mid)
    return torch.cat([left, mid, right])


def n_segments(rows: int, cfg: SpectrogramConfig) -> int:
    """Count the segments that `rows` rows fill: ceil(rows / 224), and one more, blank, where the released code appends it."""
    full = rows % cfg.segment_rows == 0 and rows < cfg.max_segments * cfg.segment_rows
    return math.ceil(rows / cfg.segment_rows) + int(cfg.extra_segment and full)


def crop(decibels: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Crop (C, R, M) to its contiguous centre (C, <= max_segments * 224, M)."""
    limit = cfg.max_segments * cfg.segment_rows
    start = max(0, decibels.shape[1] - limit) // 2
    return decibels[:, start : start + limit]


def encode(decibels: Tensor, cfg: SpectrogramConfig) -> np.ndarray:
    """Encode (C, R, M) dB as an 8-bit picture (S * 224, M, C): steps of (db_max - db_min) / 255, so an error of half a step.

    Rows beyond R are 0; how many are valid is stored beside the picture.
    """
    picture = np.zeros((n_segments(decibels.shape[1], cfg) * cfg.segment_rows, cfg.n_mels, decibels.shape[0]), np.uint8)
    picture[: decibels.shape[1]] = quantise(decibels, cfg).permute(1, 2, 0).numpy()
    return picture


def quantise(decibels: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Round dB to the 8-bit code, uint8; any shape."""
    return ((decibels - cfg.db_min) * (255 / (cfg.db_max - cfg.db_min))).round().clamp(0, 255).to(torch.uint8)


def decode(picture: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Decode the 8-bit code to dB, float32; any shape."""
    return picture.float() * ((cfg.db_max - cfg.db_min) / 255) + cfg.db_min


def normalise(decibels: Tensor, rows: Tensor, how: str, owner: Tensor | None = None, clips: int = 0) -> Tensor:
    """Normalise segments (S, C, 224, M) of dB for the audio tower: z-scores by segment, or by clip, and by channel.

    rows (S,) counts the valid rows. `valid` (ours): over a segment's valid rows, padding 0 afterwards. `clip`: over those of
    all segments of a clip, `owner` (S,) of `clips` (padding belongs to number `clips`). `padded` (the released code): padding
    is 0 dB and takes part in mean and deviation.
    """
    inside = (torch.arange(decibels.shape[2], device=decibels.device) < rows[:, None])[:, None, :, None]  # S 1 224 1
    weight = torch.ones_like(inside, dtype=decibels.dtype) if how == "padded" else inside.to(decibels.dtype)

    def total(x: Tensor) -> Tensor:
        sums = x.sum((2, 3), keepdim=True)
        if how != "clip":
            return sums
        assert owner is not None
        return sums.new_zeros(clips + 1, *sums.shape[1:]).index_add(0, owner, sums)[owner]

    count = (total(weight) * decibels.shape[3]).clamp(min=1)
    decibels = decibels * inside
    centred = (decibels - total(decibels) / count) * weight
    return centred / ((total(centred.square()) / count).sqrt() + 1e-5)
