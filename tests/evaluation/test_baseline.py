"""The plain baseline: its statistics by numpy, made sounds that it can and cannot tell apart."""

import itertools
import json

import numpy as np
import pytest
import torch
from running import run

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.evaluation import baseline

SPEC = SpectrogramConfig()
WORDS = [("red", "blue", "green", "white"), ("one", "two", "three"), ("now", "soon", "again")]


def test_statistics_of_a_spectrogram():
    decibels = torch.randn(50, 224) * 10 - 40
    x = decibels.double().numpy()
    wanted = [x.mean(0), x.std(0), np.quantile(x, 0.9, axis=0), np.diff(x, axis=0).std(0)]
    np.testing.assert_allclose(baseline.statistics(decibels).numpy(), np.concatenate(wanted), rtol=1e-4, atol=1e-4)
    assert baseline.statistics(decibels[:1]).isfinite().all()


def test_bins_of_a_spectrogram():
    decibels = torch.randn(27, 224)
    found = baseline.bins(decibels, 3, SPEC).view(3, 32)
    x = torch.cat([decibels, decibels.min().expand(9, 224)]).numpy()  # 0.1 s: 12 rows; a band: 7 channels
    np.testing.assert_allclose(found.numpy(), x.reshape(3, 12, 32, 7).mean((1, 3)), rtol=1e-4, atol=1e-5)


def spoken(sentence, rng, hears):
    """A spectrogram of three words of 0.2 s, each a tone of its own; or noise alone."""
    decibels = torch.from_numpy(rng.normal(-60, 3, (75, 224))).float()
    for place, word in enumerate(sentence):
        tone = 40 + 30 * WORDS[place].index(word)
        if hears:
            decibels[25 * place : 25 * place + 25, tone : tone + 8] += 20
    return decibels


def sounds(sentences, rng, hears):
    clips = [{"captions": [" ".join(s)], "group": " ".join(s), "label": None} for s in sentences]
    return baseline.Sounds(clips, [spoken(s, rng, hears) for s in sentences], SPEC)


@pytest.mark.parametrize("hears", [True, False])
def test_sentences_are_found_by_their_words(hears, monkeypatch):
    rng, every = np.random.default_rng(0), list(itertools.product(*WORDS))
    rng.shuffle(every)
    parts = {"train": sounds(every[:26] * 2, rng, hears), "test": sounds(every[26:], rng, hears)}
    monkeypatch.setattr(baseline, "read", lambda urls, key, cfg: parts[key.removeprefix("data.")])
    cfg = RunConfig()
    cfg.data.train, cfg.data.test, cfg.eval.permutations = {"a": 1.0}, {"b": 1.0}, 1000
    metrics = baseline.evaluate(cfg)
    for way in ("text_to_audio", "audio_to_text"):
        assert metrics[way]["n_queries"] == 10
        assert (metrics[way]["R@1"] >= 90) == hears and (metrics[way]["p_value"] < 0.01) == hears


def test_the_command_writes_and_prints(sample_shards, tmp_path):
    folders = [f"{sample_shards}/speech_{language}/train" for language in ("fr", "es")]
    words = [f"data.train={folders[0]}", f"data.test={folders[1]}", f"run_dir={tmp_path}", "eval.bootstrap=100"]
    done = run("launch/baseline.py", *words)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "baseline.json").read_text())["label"]
    assert f"label: accuracy {row['accuracy']:.1f} [" in done.stdout and row["n_clips"] == 18
    done = run(
        "launch/baseline.py", f"data.test=[{', '.join(folders)}]", f"run_dir={tmp_path}", "classify.cross_validate=true"
    )
    assert done.returncode == 0 and " ± " in done.stdout, done.stderr
    assert f"replaces the numbers of data.train=['{folders[0]}'] data.test=['{folders[1]}']" in done.stdout
    assert json.loads((tmp_path / "baseline.json").read_text())["data"] == {"train": [], "test": folders}
    done = run("launch/baseline.py", *words[:-1], "eval.bootstrap=0")
    assert done.returncode == 0 and f"label: accuracy {row['accuracy']:.1f}, mAP" in done.stdout, done.stderr
    done = run("launch/baseline.py", f"data.test={folders[0]}", f"run_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.endswith(
        "data.train names no shard folder: a baseline is fitted on its clips\n"
    )
