"""Changed sound: rotations and moves of what was there, hidden runs of the stated size, and nothing else."""

import numpy as np
import pytest
import torch

from clip4vla.config import AugmentConfig, SpectrogramConfig
from clip4vla.media import augmentation

ROWS, SEGMENTS, SIZE = [300, 0, 100], [2, 0, 1], (224, 224)
OWNER = torch.tensor([0, 0, 2])
KEYS = [(0, 11, 0), (0, 12, 0), (0, 13, 0)]


@pytest.fixture
def segments():
    """Three segments of all different rows and channels; beyond the valid rows, 0."""
    code = torch.randint(1, 255, (3, 1, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    code[1, :, 76:] = 0
    code[2, :, 100:] = 0
    return code


def changed(segments, keys=KEYS, **settings):
    cfg = AugmentConfig(**settings)
    return augmentation.change(segments, OWNER, 3, augmentation.draw(keys, ROWS, SEGMENTS, SIZE, cfg))


def strips(segments):
    """Valid rows (R, 224) of the two clips that have sound."""
    return segments[:2, 0].flatten(0, 1)[:300], segments[2, 0][:100]


def test_without_settings_nothing_changes(segments):
    assert not augmentation.is_on(AugmentConfig())
    assert torch.equal(changed(segments), segments)


def test_a_clip_is_turned_across_its_segments(segments):
    turns = set()
    for epoch in range(60):
        found = changed(segments, [(0, 11, epoch), (0, 12, epoch), (0, 13, epoch)], time_shift=5)
        assert torch.equal(found[1, 0, 76:], segments[1, 0, 76:]) and torch.equal(
            found[2, 0, 100:], segments[2, 0, 100:]
        )
        for ours, theirs in zip(strips(found), strips(segments), strict=True):
            turn = [n for n in range(-5, 6) if torch.equal(ours, theirs.roll(n, 0))]
            assert len(turn) == 1
            turns.add(turn[0])
    assert turns == set(range(-5, 6))


def test_channels_move_and_the_last_one_fills_what_is_left(segments):
    moves = set()
    for epoch in range(60):
        found = changed(segments, [(0, 11, epoch), (0, 12, epoch), (0, 13, epoch)], mel_shift=2)
        for ours, theirs in zip(strips(found), strips(segments), strict=True):
            padded = torch.cat([theirs[:, :1].expand(-1, 2), theirs, theirs[:, -1:].expand(-1, 2)], 1)
            move = [n for n in range(-2, 3) if torch.equal(ours, padded[:, 2 + n : 226 + n])]
            assert len(move) == 1
            moves.add(move[0])
    assert moves == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    "axis, settings", [(1, {"time_masks": 1, "time_mask_rows": 30}), (0, {"mel_masks": 1, "mel_mask_channels": 30})]
)
def test_a_hidden_run_gets_the_clips_mean_and_is_of_any_length_up_to_the_longest(segments, axis, settings):
    lengths = []
    for epoch in range(200):
        found = changed(segments, [(0, 11, epoch), (0, 12, epoch), (0, 13, epoch)], **settings)
        for ours, theirs in zip(strips(found), strips(segments), strict=True):
            hidden = (ours != theirs).any(axis).nonzero()[:, 0]
            lengths.append(len(hidden))
            if len(hidden):
                assert torch.equal(hidden, torch.arange(hidden[0], hidden[-1] + 1))
                filled = ours[hidden] if axis == 1 else ours[:, hidden]
                assert filled.unique().tolist() == [round(float(theirs.double().mean()))]
    assert set(lengths) == set(range(31))  # of 400 draws from 31
    assert abs(np.mean(lengths) - 15) < 4 * 9 / 400**0.5  # the deviation of one is 9


def test_changes_are_a_function_of_the_key(segments):
    settings = {"time_shift": 50, "mel_shift": 9, "time_masks": 2, "mel_masks": 2}
    assert torch.equal(changed(segments, **settings), changed(segments, **settings))
    other = changed(segments, [(0, 11, 1), *KEYS[1:]], **settings)
    assert not torch.equal(other[:2], changed(segments, **settings)[:2])
    assert torch.equal(other[2], changed(segments, **settings)[2])


def test_mixed_sounds_are_sums_of_power_at_one_loudness_with_the_others_repeated(segments):
    cfg = SpectrogramConfig()
    other = augmentation.PackedSounds(segments.flip(0)[:1], [100, 0, 0], [1, 0, 0])
    own = augmentation.PackedSounds(segments, ROWS, SEGMENTS)
    mixed = augmentation.mix(own, other, torch.tensor([0.3, 1.0, 1.0]), cfg)
    mine, theirs = strips(segments)  # 300 and 100 rows
    power, added = (10 ** ((x.double().numpy() / 2 - 95) / 10) for x in (mine, theirs.repeat(3, 1)))
    expected = 10 * np.log10(0.3 * power + 0.7 * added * power.mean() / added.mean())
    expected = np.maximum(expected, expected.max() - 80)
    assert np.abs(strips(mixed)[0].double().numpy() / 2 - 95 - expected).max() <= 0.2501  # half a step
    assert torch.equal(mixed[2], segments[2]) and not mixed[1, 0, 76:].any()


def test_shares_are_uniform_for_as_many_clips_as_asked_and_1_without_two_sounds():
    keys = [(0, clip, 5) for clip in range(4000)]
    both = augmentation.PackedSounds(torch.empty(0), [10] * 4000, [1] * 4000)
    shares = augmentation.draw_shares(keys, both, both, 0.25)
    drawn = shares[shares < 1]
    assert len(drawn) / 4000 == pytest.approx(0.25, abs=0.03) and drawn.mean() == pytest.approx(0.5, abs=0.03)
    silent = augmentation.PackedSounds(torch.empty(0), [0] * 4000, [0] * 4000)
    assert (augmentation.draw_shares(keys, both, silent, 1.0) == 1).all()
    assert (augmentation.draw_shares(keys, silent, both, 1.0) == 1).all()
