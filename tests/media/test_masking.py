"""masking.py: both presets, and masks as a pure function of their key."""

import numpy as np
import pytest
import torch

from clip4vla.config import MaskConfig, RunConfig
from clip4vla.config_io import load
from clip4vla.media.masking import draw, masked_view
from clip4vla.media.spectrogram import normalise

PAPER, OFFICIAL = MaskConfig(), load(RunConfig, None, ["preset=official"]).mask


@pytest.mark.parametrize("cfg, coverage", [(PAPER, 0.78), (OFFICIAL, 0.53)], ids=["paper", "official"])
def test_hides_the_share_of_time_that_the_setting_implies(cfg, coverage):
    shares = [draw((0, i, 0), 2240, 224, cfg)[0].mean() for i in range(100)]
    assert abs(np.mean(shares) - coverage) < 0.02


def test_brute_force_union_of_runs():
    rng = np.random.default_rng((1, 2, 3))
    starts = rng.integers(0, 500, 75)
    expected = np.zeros(500, bool)
    for start in starts:
        expected[start : start + 10] = True
    assert (draw((1, 2, 3), 500, 224, PAPER)[0] == expected).all()


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
