"""masking.py: both presets, and masks as a pure function of their key."""

import hashlib

import numpy as np
import pytest
import torch

from clip4vla.config import MaskConfig, RunConfig
from clip4vla.config_io import load
from clip4vla.media import masking
from clip4vla.media.masking import masked_view
from clip4vla.media.spectrogram import normalise

PAPER, OFFICIAL = MaskConfig(), load(RunConfig, None, ["preset=official"]).mask


def draw(key, rows, channels, cfg):
    """The hidden rows (rows,) and hidden channels (channels,) of one clip."""
    by_row, by_channel = masking.draw([key], [rows], [-(-rows // 224)], (224, channels), cfg)
    assert not by_row.ravel()[rows:].any() and (by_channel == by_channel[:1]).all()
    return by_row.ravel()[:rows], by_channel[0] if rows else by_channel


@pytest.mark.parametrize("cfg, coverage", [(PAPER, 0.78), (OFFICIAL, 0.53)], ids=["paper", "official"])
def test_hides_the_share_of_time_that_the_setting_implies(cfg, coverage):
    shares = [draw((0, i, 0), 2240, 224, cfg)[0].mean() for i in range(100)]
    assert abs(np.mean(shares) - coverage) < 0.02


def test_brute_force_union_of_runs():
    rng = np.random.default_rng((1, 2, 3))
    starts = rng.integers(0, 500, 75)
    assert (draw((1, 2, 3), 500, 224, PAPER)[0] == union(starts, [10] * 75, 500)).all()


def union(starts, widths, length):
    hidden = np.zeros(length, bool)
    for start, width in zip(starts, widths, strict=True):
        hidden[start : start + width] = True
    return hidden


KEYS = [
    (seed, name, epoch)
    for seed in (0, 7, 2**40, 2**70)
    for name in (0, 1, 3735928559, 2**32 - 1)
    for epoch in (0, 1, 99)
]
ROWS = [37 * i % 1100 for i in range(len(KEYS))]


@pytest.mark.parametrize(
    "cfg, digest",
    [
        (PAPER, "4d5574be23b1aa31e9715d1691ab944d85bf24e71671250345be4464120d0844"),
        (OFFICIAL, "a36a54e0b338b2174d6fcba1e9da6bdb7d510387cf55b007ba12e1bb7304b0dc"),
    ],
    ids=["paper", "official"],
)
def test_masks_of_a_batch_are_those_that_numpy_draws_clip_by_clip(cfg, digest):
    """And never change: a run that goes on after an update of this package hides what it would have hidden."""
    drawn = hashlib.sha256()
    for part in (slice(i, i + 12) for i in range(0, len(KEYS), 12)):  # of one seed
        segments = [-(-rows // 224) for rows in ROWS[part]]
        by_row, by_channel = masking.draw(KEYS[part], ROWS[part], segments, (224, 224), cfg)
        assert len(by_row) == len(by_channel) == sum(segments)
        first = 0
        for key, rows, count in zip(KEYS[part], ROWS[part], segments, strict=True):
            own, first = slice(first, first + count), first + count
            rng, expected = np.random.default_rng(key), []
            for length, share in ((rows, cfg.time_start_prob), (224, cfg.freq_start_prob)):
                starts = rng.integers(0, max(1, length), round(share * length))
                widths = [cfg.length] * len(starts)
                if cfg.random_length:
                    widths = rng.integers(0, cfg.length + 1, len(starts))
                expected.append(union(starts, widths, length))
            assert (by_row[own].ravel()[:rows] == expected[0]).all() and not by_row[own].ravel()[rows:].any()
            assert (by_channel[own] == expected[1]).all()
            drawn.update(b"".join(hidden.tobytes() for hidden in expected) if count else b"")
    assert drawn.hexdigest() == digest


def test_clips_without_sound_have_no_masks():
    by_row, by_channel = masking.draw([(0, 1, 0)] * 2, [0, 0], [0, 0], (224, 200), PAPER)
    assert by_row.shape == (0, 224) and by_channel.shape == (0, 200)


def test_eleven_channel_starts():
    most = max(draw((0, i, 0), 100, 224, PAPER)[1].sum() for i in range(200))
    assert 100 < most <= 110  # 11 runs of 10 rarely miss each other entirely


def test_pure_function_of_seed_sample_and_epoch():
    first = draw((7, 11, 2), 300, 224, PAPER)
    assert all((a == b).all() for a, b in zip(first, draw((7, 11, 2), 300, 224, PAPER), strict=True))
    for other in ((8, 11, 2), (7, 12, 2), (7, 11, 3)):
        assert (first[0] != draw(other, 300, 224, PAPER)[0]).any()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_tiny_clips(rows):
    hidden, _ = draw((0, 0, 0), rows, 224, PAPER)
    assert hidden.shape == (rows,)


def test_fill_is_the_mean_or_zero_db():
    decibels, rows = -60 + 5 * torch.randn(1, 3, 224, 224), torch.tensor([224])
    hidden = torch.zeros(1, 224, 224, dtype=torch.bool)
    hidden[:, 10:20] = True
    view = masked_view(decibels, rows, hidden, PAPER, "valid")
    assert view[:, :, 10:20].abs().max() == 0
    assert torch.equal(view[:, :, 20:], normalise(decibels, rows, "valid")[:, :, 20:])
    louder = masked_view(decibels, rows, hidden, OFFICIAL, "padded")
    assert louder[:, :, 10:20].min() > louder[:, :, 20:].max()  # 0 dB is louder than all of the clip
