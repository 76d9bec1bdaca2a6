"""spectrogram.py against an independent numpy implementation, torchaudio, and the properties that the paper's facts give."""

import math
import warnings

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip4vla.config import DataConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.media.spectrogram import (
    crop,
    decode,
    encode,
    is_silent,
    log_mel,
    mel_filters,
    mix,
    n_segments,
    normalise,
)  # fmt: skip

CFG = SpectrogramConfig()
OFFICIAL = load(DataConfig, None, ["preset=official"]).spectrogram


def noise(seconds: float, rate: int = 16000, channels: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(channels, round(seconds * rate), generator=torch.Generator().manual_seed(0))


def numpy_log_mel(wave: np.ndarray, cfg: SpectrogramConfig) -> np.ndarray:
    """The same from the definitions: frames cut by hand, numpy's FFT, triangles on the Slaney scale in float64."""
    n = np.arange(cfg.win_length)
    a0 = {"hamming": 0.54, "hann": 0.5}[cfg.window]
    window = a0 - (1 - a0) * np.cos(2 * np.pi * n / cfg.win_length)
    pad = (cfg.n_fft - cfg.win_length) // 2
    window = np.pad(window, (pad, cfg.n_fft - cfg.win_length - pad))
    rows = max(1, -(-len(wave) // cfg.hop_length))
    padded = np.pad(wave.astype(np.float64), (cfg.n_fft // 2, cfg.n_fft + cfg.hop_length))
    frames = np.stack([padded[i * cfg.hop_length : i * cfg.hop_length + cfg.n_fft] for i in range(rows)])
    power = np.abs(np.fft.rfft(frames * window)) ** 2

    def to_mel(hz):
        return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1) / 1000) / (np.log(6.4) / 27))

    def to_hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    edges = to_hz(np.linspace(to_mel(np.array(cfg.f_min)), to_mel(np.array(cfg.f_max)), cfg.n_mels + 2))
    hz = np.linspace(0, cfg.sample_rate / 2, cfg.n_fft // 2 + 1)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    weights = np.maximum(0, np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid))) * 2 / (high - low)
    decibels = 10 * np.log10(np.maximum(power @ weights.T, 1e-10))
    return np.maximum(decibels, decibels.max() - cfg.top_db)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank")  # 512 points of FFT, as the authors
@pytest.mark.parametrize("cfg", [CFG, OFFICIAL], ids=["paper", "official"])
def test_equals_numpy_implementation(cfg):
    wave = noise(1.3)
    ours = log_mel(wave, 16000, cfg)
    reference = numpy_log_mel(wave[0].numpy(), cfg)
    for channel in ours:
        np.testing.assert_allclose(channel.numpy(), reference, atol=2e-3)


def test_equals_torchaudio():
    wave = noise(2.0)
    reference = torchaudio.transforms.MelSpectrogram(
        16000, 1024, 512, 128, 0, 8000, n_mels=224, window_fn=torch.hamming_window, pad_mode="constant",
        norm="slaney", mel_scale="slaney",
    )(wave)  # fmt: skip
    reference = 10 * torch.log10(reference.clamp(min=1e-10)).transpose(1, 2)
    ours = log_mel(wave, 16000, CFG)
    torch.testing.assert_close(ours, reference[:, : ours.shape[1]], atol=1e-3, rtol=0)


def test_no_dead_mel_column_on_noise_but_with_512_points_there_are():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio says what is tested here: empty filters
        dead = {cfg.n_fft: int((log_mel(noise(3), 16000, cfg)[0].std(0) < 1e-3).sum()) for cfg in (CFG, OFFICIAL)}
        assert (mel_filters(CFG).sum(0) > 0).all()
    assert dead == {1024: 0, 512: 12}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16000 * 20))
def test_segments_are_ceil_of_rows_and_never_blank(samples):
    decibels = log_mel(torch.full((1, samples), 0.1), 16000, CFG)
    assert decibels.shape[1] == max(1, math.ceil(samples / 128))
    assert n_segments(decibels.shape[1], CFG) == max(1, math.ceil(samples / 16000 / 1.792 - 1e-9))
    assert encode(crop(decibels, CFG), CFG).shape[0] == 224 * min(10, n_segments(decibels.shape[1], CFG))


def test_official_appends_a_blank_segment_where_rows_divide():
    assert [n_segments(rows, OFFICIAL) for rows in (223, 224, 225, 448)] == [1, 2, 2, 3]
    assert [n_segments(rows, CFG) for rows in (223, 224, 225, 448)] == [1, 1, 2, 2]
    assert n_segments(2240, OFFICIAL) == n_segments(2240, CFG) == OFFICIAL.max_segments


@pytest.mark.parametrize("rate", [5000, 8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("hz", [220.0, 1000.0, 2100.0])
def test_a_sine_lands_in_its_mel_channel_at_any_rate(rate, hz):
    wave = 0.5 * torch.sin(2 * math.pi * hz * torch.arange(rate) / rate)[None]
    decibels = log_mel(wave, rate, CFG)
    assert decibels.shape[1] == 125
    centres = mel_filters(CFG).argmax(0) * 16000 / 1024
    peak = int(decibels[0, 20:100].mean(0).argmax())
    assert abs(float(centres[peak]) - hz) <= 24  # a bin and a half


def test_left_mid_right_and_mono():
    stereo = torch.stack([noise(1)[0], torch.zeros(16000)])
    live = mel_filters(OFFICIAL).sum(0) > 0
    left, mid, right = log_mel(stereo, 16000, OFFICIAL)[:, :, live]
    torch.testing.assert_close(left - mid, torch.full_like(mid, 20 * math.log10(2)), atol=0.01, rtol=0)
    assert right.max() == (left.max() - 80)
    mono = log_mel(noise(1), 16000, OFFICIAL)
    assert torch.equal(mono[0], mono[1]) and torch.equal(mono[1], mono[2])
    torch.testing.assert_close(log_mel(stereo, 16000, CFG), log_mel(stereo.mean(0, keepdim=True), 16000, CFG))


def test_channels_that_cancel_each_other_are_heard_as_one_of_them():
    """As where a cable was soldered the wrong way round."""
    sound = noise(1)
    for inverted in (torch.cat([sound, -sound]), torch.cat([sound, -sound + 1e-4 * noise(1).flip(1)])):
        assert torch.equal(mix(inverted), sound)
        torch.testing.assert_close(log_mel(inverted, 16000, CFG), log_mel(sound, 16000, CFG))
    left, mid, right = log_mel(torch.cat([sound, -sound]), 16000, OFFICIAL)
    torch.testing.assert_close(mid, left)
    torch.testing.assert_close(right, left)
    assert torch.equal(mix(torch.cat([0 * sound, sound, -sound])), sound)
    for wave in (noise(1, channels=2), torch.cat([sound, 0.9 * -sound]), torch.cat([sound, 0 * sound])):
        assert torch.equal(mix(wave), wave.mean(0, keepdim=True))


def test_what_shows_nothing_is_silent():
    for quiet, silent in ((0.0, True), (1e-8, True), (3e-7, True), (1 / 32768, False), (1.0, False)):
        wave = quiet * torch.sin(torch.arange(16000) * 0.2)[None]
        decibels = log_mel(wave, 16000, CFG)
        assert is_silent(decibels, CFG) == silent == (not encode(decibels, CFG).any())


@pytest.mark.parametrize("samples", [0, 1, 100, 511])
def test_under_one_window_is_one_row(samples):
    decibels = log_mel(torch.rand(1, samples), 16000, CFG)
    assert decibels.shape == (1, max(1, -(-samples // 128)), 224) and decibels.isfinite().all()


def test_digital_silence_gives_no_nan():
    decibels = log_mel(torch.zeros(1, 16000), 16000, CFG)
    picture = torch.from_numpy(encode(decibels, CFG)).permute(2, 0, 1)[None]
    for how in ("valid", "padded"):
        assert normalise(decode(picture, CFG), torch.tensor([125]), how).isfinite().all()


def test_eight_bit_code_errs_by_at_most_half_a_step():
    decibels = log_mel(noise(2) * torch.linspace(0, 1, 32000) ** 4, 16000, CFG)
    back = decode(torch.from_numpy(encode(decibels, CFG)[: decibels.shape[1], :, 0]), CFG)
    assert (back - decibels[0]).abs().max() <= (CFG.db_max - CFG.db_min) / 255 / 2 + 1e-4
    assert decibels.min() > CFG.db_min and decibels.max() < CFG.db_max


def test_loudest_possible_sound_fits_the_range():
    wave = torch.sign(torch.sin(torch.arange(16000) * 0.2))[None]
    assert log_mel(wave, 16000, CFG).max() <= CFG.db_max


@pytest.mark.parametrize("codec, quality, bound", [("png", None, 0.0), ("jpg", 95, 1.0)])
def test_picture_codec_error_in_db(tmp_path, codec, quality, bound):
    picture = encode(log_mel(noise(3), 16000, CFG), CFG)[:, :, 0]
    Image.fromarray(picture).save(tmp_path / f"x.{codec}", **({"quality": quality} if quality else {}))
    back = np.asarray(Image.open(tmp_path / f"x.{codec}"))
    step = (CFG.db_max - CFG.db_min) / 255
    rms = float(np.sqrt(np.mean((back[:375].astype(float) - picture[:375]) ** 2))) * step
    assert rms <= bound  # white noise is the worst case


def test_normalisation_ignores_padding_or_counts_it_as_the_released_code():
    decibels, rows = -40 + 10 * torch.randn(2, 1, 224, 224), torch.tensor([100, 224])
    ours = normalise(decibels, rows, "valid")
    assert ours[0, :, 100:].abs().max() == 0
    for segment, valid in zip(ours, rows, strict=True):
        inside = segment[:, :valid]
        assert abs(inside.mean()) < 1e-4 and abs(inside.std(correction=0) - 1) < 1e-3
    padded = decibels[0].clone()
    padded[:, 100:] = 0
    expected = (padded - padded.mean()) / padded.std(correction=0)
    torch.testing.assert_close(normalise(decibels, rows, "padded")[0], expected, atol=1e-4, rtol=1e-4)


def test_z_scores_of_a_clip_are_over_the_valid_rows_of_all_its_segments():
    decibels = torch.randn(4, 1, 224, 16) * torch.tensor([1.0, 5.0, 2.0, 3.0])[:, None, None, None] - 40
    rows, owner = torch.tensor([224, 30, 100, 0]), torch.tensor([0, 0, 1, 2])  # the last one is padding of two clips
    found = normalise(decibels, rows, "clip", owner, 2)
    for segments in ([0, 1], [2]):
        valid = torch.cat([decibels[i, 0, : rows[i]] for i in segments]).double()
        wanted = (valid - valid.mean()) / valid.std(correction=0)
        ours = torch.cat([found[i, 0, : rows[i]] for i in segments]).double()
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert not found[1, 0, 30:].any() and not found[2, 0, 100:].any() and not found[3].any()
