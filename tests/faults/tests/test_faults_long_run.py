"""A slice of the long run: files, threads and children of some hundred steps, and what the bounds see."""

import json
import tracemalloc

import numpy as np
import pytest
from faults import long_run

from clip4vla.config import RunConfig, TrackConfig
from clip4vla.report.page import _smooth
from clip4vla.report.tracking import Tracker


def test_many_evaluations_and_checkpoints_leave_no_file_thread_or_child(tmp_path):
    every = {"train.log_every": 2, "train.save_every": 4, "eval.every_steps": 10}
    rows, samples = long_run.trained(tmp_path, 3, 60, every, pause=0.02)
    found = long_run.growth(rows, samples)
    for name in long_run.CONSTANT:
        late = found[name][3:]  # the pools' threads start with the first evaluation and checkpoint
        assert max(late) == min(late), (name, found[name])


def test_a_run_of_weeks_is_gone_on_with_in_the_memory_of_one_row(tmp_path):
    cfg = RunConfig(run_dir=str(tmp_path), track=TrackConfig(wandb="off", log_sample_ids=True))
    (tmp_path / "samples").mkdir()
    ids = [f"howto100m/{n:060d}" for n in range(100)]
    lists = {
        name: [json.dumps({"step": step, "ids": ids}) + "\n" for step in range(1, 3001)]
        for name in ("metrics.jsonl", "samples/rank-00000.jsonl")
    }
    for name, lines in lists.items():
        (tmp_path / name).write_text("".join(lines) + '{"step": 3001, "i')
    tracemalloc.start()
    tracker = Tracker(cfg, 2999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tracker.close()
    assert peak < 2**20 < 10 * 2**20 < (tmp_path / "metrics.jsonl").stat().st_size
    for name, lines in lists.items():
        assert (tmp_path / name).read_text() == "".join(lines[:2999])


@pytest.mark.parametrize("name", ["mib", "files", "threads", "cpu"])
def test_what_grows_is_seen(name):
    at = np.arange(2000.0)
    rows = [{"time": float(t), "step": 10 * t, "clips_per_s": 80.0} for t in range(1, 2001)]
    samples = {
        "time": at,
        "mib": 700 + at % 3,
        "files": 20 + at % 5 // 4,
        "threads": 17 + 0 * at,
        "children": 1 + 0 * at,
        "cpu": at,
    }
    long_run.must_be_flat(long_run.growth(rows, samples), "flat")
    samples[name] = samples[name] + {"cpu": at**2 / 4e4, "mib": at / 50}.get(name, at // 900)
    with pytest.raises(AssertionError, match="it should grow"):
        long_run.must_be_flat(long_run.growth(rows, samples), "it should grow")


def test_smoothing_is_a_moving_average_of_what_is_finite():
    values = np.random.default_rng(0).normal(size=400)
    kernel = np.ones(21)
    assert np.allclose(
        _smooth(values), np.convolve(values, kernel, "same") / np.convolve(values * 0 + 1, kernel, "same")
    )
    values[100] = 1e20  # no difference of sums gets rid of it
    assert np.allclose(_smooth(values)[111:390], np.convolve(values[101:], kernel / 21, "valid")[:279])
    values[7], values[200] = np.inf, np.nan
    assert np.isfinite(_smooth(values)).all() and np.isnan(_smooth(np.array([1.0, np.nan]))[1])
