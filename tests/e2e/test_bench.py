"""launch/bench.py: one JSON object, both sides doing the same work, and arithmetic that follows from the measured figures."""

import itertools
import json
import math
import statistics
import sys

import numpy as np
import pytest
from running import TINY, run

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.media.av_reader import frame_times, read_clip
from launch.bench.data.plan import markdown
from launch.bench.data.prep import VIDEOS, peer_frames, prepare, psnr


@pytest.fixture(scope="module")
def prep():
    done = run("launch/bench.py", "prep", "--rounds", 1, "--clips", 1)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    done = run("launch/bench.py", "plan", "--rounds", 2)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(done.stdout)
    return path, json.loads(done.stdout)


def test_prep_prints_one_object_with_its_fixed_keys(prep):
    assert prep["bench"] == "prep"
    assert {"throughput_ratio", "ratios", "median_cpu_s", "clips", "versions", "machine"} <= set(prep)
    assert {"librosa", "opencv-python-headless", "av", "torch"} <= set(prep["versions"])
    assert prep["machine"]["cpu"] and prep["machine"]["cores"] >= 1


def test_both_sides_of_prep_make_the_same(prep):
    (clip,) = prep["clips"]
    assert clip["frames"] == [10, 10]
    assert clip["frames_psnr_db"] > 30
    assert clip["segments"] == [[math.ceil(10 / 1.792), 3, 224, 224]] * 2
    assert clip["spectrogram_rms_db"] < 1  # 0.3: the resampler, and 8 bits


def test_frames_of_another_time_would_show(tmp_path):
    row, cfg = VIDEOS[0].make(tmp_path), load(DataConfig).frames
    ours = read_clip(tmp_path / row.media, None, None, cfg)
    times = frame_times(0, ours.seconds, cfg)[:4]
    same, other = (peer_frames(tmp_path / row.media, [time + late for time in times], cfg.size) for late in (0, 0.4))
    assert min(psnr(a, b) for a, b in zip(ours.frames, same, strict=False)) > 38
    assert min(psnr(a, b) for a, b in zip(ours.frames, other, strict=False)) < 30


def test_psnr_is_that_of_its_definition():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 51) == pytest.approx(20 * math.log10(5))


def test_the_ratio_of_prep_follows_from_its_rounds(prep):
    parts = {}
    for clip in prep["clips"]:
        for part in clip["median_cpu_s"]:
            spent = statistics.median(times[part] for times in clip["rounds_cpu_s"])
            parts[part] = parts.get(part, 0) + spent
    theirs = parts["peer_frames"] + parts["peer_wave"] + parts["peer_fbank"]
    assert prep["throughput_ratio"] == pytest.approx(theirs / parts["ours"], rel=1e-3)
    assert min(parts.values()) > 0


def test_a_missing_package_is_one_line_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(UserError, match=r"librosa: pip install .*\[bench\]"):
        prepare()


def test_a_plan_follows_from_its_figures(plan):
    _, plan = plan
    howto, audioset = plan["clips"]["howto100m"], plan["clips"]["audioset"]
    size = 3 * 512 + sum(512 * math.ceil(size / 512) for size in howto["member_bytes"].values())
    assert howto["tar_bytes"] == size
    needs = plan["sets"]["HowTo100M"]
    assert needs["clips"] == 1_200_000 * 8
    assert needs["files"] == 37_500
    assert needs["core_hours"] == pytest.approx(9.6e6 * howto["cpu_s"] / 3600, rel=1e-3)
    assert needs["days_on_64_cores"] == pytest.approx(9.6e6 * howto["cpu_s"] / 86400 / 64, rel=1e-3)
    both = plan["sets"]["HowTo100M + AudioSet"]
    terabytes = (9.6e6 * howto["tar_bytes"] + 2e6 * audioset["tar_bytes"]) / 1e12
    assert both["terabytes"] == pytest.approx(terabytes, rel=1e-3)
    assert plan["terabytes_by_codec"]["fbank jpg 95, frames 90"] == pytest.approx(terabytes, rel=1e-3)
    assert both["files"] == 37_500 + 7_813


def test_codecs_that_keep_more_take_more(plan):
    _, plan = plan
    for kind in ("howto100m", "audioset"):
        jpg, png = (plan["codecs"]["fbank"][codec][kind] for codec in ("jpg 95", "png"))
        assert jpg["bytes"] < png["bytes"] and jpg["rms_db"] > png["rms_db"]
        assert png["rms_db"] == pytest.approx(0.5 / math.sqrt(12), abs=0.02)  # steps of 0.5 dB
        frames = [plan["codecs"]["frames"][quality][kind] for quality in ("75", "90", "95")]
        assert sorted(frames, key=lambda f: f["bytes"]) == frames == sorted(frames, key=lambda f: f["psnr_db"])


def test_the_tables_hold_the_figures_of_the_saved_plan(plan):
    path, plan = plan
    table = markdown(str(path))
    assert f"| HowTo100M | 9,600,000 | {plan['sets']['HowTo100M']['core_hours']:,.0f} |" in table
    assert f"| fbank png | {plan['codecs']['fbank']['png']['howto100m']['bytes'] / 1e3:.1f} |" in table


def test_tables_of_no_plan_are_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text('{"bench": "prep"}')
    for name in ("other.json", "absent.json"):
        with pytest.raises(UserError, match=f"{name}: not a plan .* make it with"):
            markdown(str(tmp_path / name))


@pytest.fixture(scope="module")
def loss():
    done = run("launch/bench.py", "loss", "--n", 2048, "--dim", 64, "--rounds", 2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_sides_of_loss_compute_the_same(loss):
    assert loss["value"]["ours"] == pytest.approx(loss["value"]["peer"], rel=1e-5)
    assert max(loss["gradient_difference"].values()) < 1e-4
    assert min(loss["gradient_difference"].values()) > 0  # two programs, not one twice


def test_the_time_ratio_of_loss_follows_from_its_rounds(loss):
    ours, peer = (loss["rounds_s"][side] for side in ("ours", "peer"))
    assert len(ours) == len(peer) == 2
    assert loss["time_ratio"] == pytest.approx(statistics.median(ours) / statistics.median(peer), rel=1e-3)


def test_the_peak_of_the_matrix_shows_and_ours_has_none(loss):
    matrix = 4 * loss["n"] ** 2
    assert 3 * matrix < loss["peak_bytes"]["peer"] < 7 * matrix
    assert 2 * 4 * loss["n"] * loss["dim"] < loss["peak_bytes"]["ours"] < 2 * matrix
    assert loss["memory_ratio"] == pytest.approx(loss["peak_bytes"]["ours"] / loss["peak_bytes"]["peer"], rel=1e-3)


def test_bytes_of_loss_are_those_of_both_sides_formulas():
    done = run("launch/bench.py", "loss", "--world", 2, "--n", 128, "--dim", 32)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    b, n, dim = 64, 128, 32
    assert figures["bytes_formula_error"] == 0
    assert figures["bytes"]["ours"]["put_in"] == 4 * b * dim * 4 + 3 * (b + 12 * b + 8 * n)
    for name, trained in (
        ("frozen_clip", 4),
        ("all_towers", 6),
    ):  # of 3 losses x 2 sides; b rows out, gradients of N back
        assert figures["bytes"][name]["put_in"] == 4 * dim * (6 * b + trained * n)
    assert figures["bytes_ratio"] == pytest.approx(figures["ratios"]["frozen_clip"]["put_in"])


@pytest.fixture(scope="module")
def loader():
    done = run("launch/bench.py", "loader", "--clips", 70, "--batch", 10, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_clips_of_loader_are_of_the_stated_size(loader):
    assert loader["n_frames_per_clip"] == pytest.approx(6.5, abs=0.1)
    assert loader["n_segments_per_clip"] == pytest.approx(3.3, abs=0.2)


def test_both_sides_of_loader_make_the_same(loader):
    apart = loader["agreement"]
    assert apart["clips"] == 10
    assert apart["frames"]["bytes"] % (3 * 224 * 224) == apart["segments"]["bytes"] % (224 * 224) == 0
    assert apart["frames"]["bytes"] > 30 * 3 * 224 * 224 and apart["segments"]["bytes"] > 10 * 224 * 224
    assert max(apart[kind]["largest"] for kind in ("frames", "segments")) <= 4  # decoders may round differently


def test_the_ratios_of_loader_follow_from_its_rounds(loader):
    rates = {side: rounds[0] for side, rounds in loader["rounds_clips_per_s"].items()}
    assert loader["throughput_ratio"] == pytest.approx(rates["ours"] / rates["peer"], rel=1e-3)
    assert loader["frozen_ratio"] == pytest.approx(rates["ours_frozen"] / rates["peer"], rel=1e-3)
    assert min(loader["cpu_s_per_clip"].values()) > 0


def test_the_reader_alone_takes_a_part_of_the_time_of_loader(loader):
    assert 0 < loader["python_ms_per_clip"] < 1000 * loader["cpu_s_per_clip"]["ours_frozen"]


def test_fewer_clips_than_a_batch_are_refused_in_one_line():
    done = run("launch/bench.py", "loader", "--clips", 8, "--batch", 16)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "fewer than a batch" in done.stderr


def test_all_sides_of_storage_give_the_same_bytes_and_only_the_remote_ones_ask_the_server():
    done = run("launch/bench.py", "storage", "--clips", 16, "--batch", 8, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["same_bytes"] is True
    asked, rates = figures["requests_per_clip"], figures["clips_per_s"]
    near = {f"{how}/{name}" for how in ("read", "loader") for name in ("disk", "cache")}
    assert {side for side, requests in asked.items() if not requests} == near
    assert set(rates) == set(asked) and asked["read/one_by_one"] == 1 > asked["read/s3"]  # neighbours share a request
    for how, name in itertools.product(("read", "loader"), ("cache", "s3", "faults", "far")):
        assert figures[f"{how}_{name}_ratio"] == pytest.approx(rates[f"{how}/{name}"] / rates[f"{how}/disk"], rel=1e-3)
    assert figures["concurrency_ratio"] == pytest.approx(rates["read/far"] / rates["read/one_by_one"], rel=1e-3)


ENGINE = {  # what each must print, and what holds on any machine
    "step": (["--batch", 8, "--peer-batch", 8], ("throughput_ratio", "loss_difference", "data_wait", "tflops")),
    "start": ([], ("seconds", "compilers")),
    "resume": ([], ("save_ratio", "load_ratio")),
    "scale": (["--batch", 8], ("model_error", "table", "check")),
    "captions": (
        ["--clips", 3, "--words", 6, "--beams", 2],
        ["time_ratio_greedy", "time_ratio_beam", "greedy", "beam"],
    ),
    "fusion": (
        ["--captions", 40, "--clips", 9, "--compared", 4],
        ["time_ratio", "pairs_per_s", "minutes_for_1000_x_1000"],
    ),
}


@pytest.mark.parametrize("name", ENGINE)
def test_benches_of_the_engine_print_their_keys(name, tmp_path):
    words, keys = ENGINE[name]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"embed_dim": 512}))
    done = run("launch/bench.py", name, "--rounds", 1, "--clip", tmp_path / "tiny.json", *words)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bench"] == name and set(keys) <= set(figures)
    if name == "step":
        assert figures["loss_difference"] < 1e-2  # both sides do the same
    if name == "captions":
        assert all(figures[way]["same"] and figures[way]["difference"] < 1e-3 for way in ("greedy", "beam"))
    if name == "fusion":
        assert figures["difference"] < 1e-5
    if name == "scale":
        assert [row["gpus"] for row in figures["table"]] == [2**i for i in range(13)]
        assert figures["table"][-1]["efficiency"] < figures["table"][0]["efficiency"] == 1


def test_frozen_towers_give_open_clips_vectors(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"embed_dim": 512}))
    done = run("launch/bench.py", "embed", "--rounds", 1, "--clips", 64, "--clip", tmp_path / "tiny.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["agreement"] > 0.9999  # float16, and JPEG decoders that may differ by a grey level
    ratio = figures["rounds"]["ours"][0] / figures["rounds"]["peer"][0]
    assert figures["throughput_ratio"] == pytest.approx(ratio, rel=1e-3)


def test_every_engine_takes_the_same_steps(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"embed_dim": 512}))
    done = run("launch/bench.py", "engines", "--precision", "bf16", "fp32", "--clip", tmp_path / "tiny.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["engines"]
    assert [(row["precision"], row["zero"]) for row in rows] == [
        (p, zero) for p in ("bf16", "fp32") for zero in (1, 2, 3)
    ]
    exact = rows[3]["loss"]
    assert [row["loss"] for row in rows] == pytest.approx([exact] * 6, rel=5e-3)
    assert min(min(row["clips_per_s"], row["estimated_gib"], row["memory_gib"]) for row in rows) > 0
