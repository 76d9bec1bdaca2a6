"""`--dry-run`: what it says is so, nothing is written, and what would stop the run stops it in one line."""

import json
import re

import pytest
import torch
from running import TINY, ranks

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.training import memory, preflight
from clip4vla.training.run_setup import RunSetup

PLAIN = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


@pytest.fixture(scope="module")
def words(sample_shards, tmp_path_factory):
    clip = tmp_path_factory.mktemp("clip") / "tiny.json"
    clip.write_text(json.dumps(TINY))
    return [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={clip}", "train.precision=fp32", "data.decode_threads=1",
        f"data.train={{{sample_shards}/speech_fr/train: 3, {sample_shards}/sounds/train: 1}}", "train.batch_size=12",
        "train.max_steps=2", "track.wandb=off",
    ]  # fmt: skip


def setup(ds, **model):
    cfg = load(RunConfig, None, ["model.trainable_towers=audio"])
    clip = TINY | {"vision_cfg": TINY["vision_cfg"] | model}
    towers = Model(clip, cfg.model, SpectrogramConfig()).train()
    towers.freeze()
    return cfg, RunSetup(torch.device("cpu"), [], ds, None, towers, "", None)


def state(folder):
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_dry_run_on_two_ranks_goes_on_from_a_checkpoint_and_writes_nothing(words, tmp_path):
    assert ranks(1, "launch/pretrain.py", *words, f"run_dir={tmp_path / 'r'}").returncode == 0
    checkpoint = tmp_path / "r/checkpoints/step-00000002"
    before = state(tmp_path)
    more = [
        "train.max_steps=20",
        "train.gradient_accumulation_steps=2",
        "train.keep_last=4",
        f"run_dir={tmp_path / 'r'}",
        "--dry-run",
    ]
    done = ranks(2, "launch/pretrain.py", *words, *more)
    assert done.returncode == 0, done.stderr
    assert state(tmp_path) == before
    page = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isalpha())
    assert done.stdout.count("9 of a batch's 12") == done.stdout.count("3 of a batch's 12") == 1  # one rank speaks
    assert f"weights from {checkpoint}; parameters: text 3.3M, vision 0.3M, audio 0.3M" in page["model"]
    assert "2 ranks, ZeRO-1, fp32, global batch 12 in 2 micro-batches" in page["engine"]
    assert page["steps"].startswith("2 done of 20, 240 samples")
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) / 2**30
    said = [float(number) for number in re.findall(r"(\d+\.\d\d)", page["disk"])]
    assert page["disk"].startswith("5 checkpoints") and said[:2] == pytest.approx([size, 5 * size], abs=0.006)
    assert page["batch"].startswith("the largest of 4: 6 clips")
    peak, there = (float(number) for number in re.findall(r"(\d+\.\d+)", page["measured"])[:2])
    assert 0.1 < peak < there
    parts = re.fullmatch(r"([\d.]+) GiB a rank, in the [a-z' ]+: (.*)", page["estimate"])
    names, sizes = zip(*(part.split() for part in parts[2].split(", ")), strict=True)
    assert names == ("state", "activations", "buckets", "gathered", "runtime")
    assert float(parts[1]) == pytest.approx(sum(map(float, sizes)), abs=0.03)
    clips, step, read = (float(number) for number in re.findall(r"([\d.]+(?:e[+-]\d+)?) [cs]", page["speed"])[:3])
    assert clips == pytest.approx(12 / max(step, read), rel=0.01) and "for 18 steps" in page["time"]
    done = ranks(1, "launch/pretrain.py", *words, *more, "seed=5")
    assert done.returncode == 2 and "seed, data.train or data.shuffle_window differs" in done.stderr


@pytest.mark.parametrize(
    "more, said",
    [
        (["train.keep_last=10000000"], "lower train.keep_last or take another disk"),
        (["run_dir=/proc/nothing"], "/proc has 0.00"),
        (["train.batch_size=100000"], "fewer than its"),
    ],
)
def test_what_would_stop_the_run_is_one_line(words, tmp_path, more, said):
    done = ranks(1, "launch/pretrain.py", *words, f"run_dir={tmp_path / 'r'}", *more, "--dry-run")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and said in line and not (tmp_path / "r").exists()


def test_memory_for_weights_gradients_and_optimizer_by_stage(monkeypatch):
    """On 4 ranks with P parameters of which T train; Rajbhandari et al. 2020, figure 1, for a part that trains."""
    monkeypatch.setattr(memory.collectives, "world_size", lambda: 4)
    half = PLAIN | {"bf16": {"enabled": True}}
    _, one = setup(half)
    p, t = (sum(x.numel() for x in part.parameters()) for part in (one.model, one.model.audio))
    for zero, expected in (
        ({"stage": 0}, 2 * p + 14 * t),
        ({"stage": 1}, 2 * p + 2 * t + 3 * t),
        ({"stage": 2}, 2 * p + 0.5 * t + 3 * t),
        ({"stage": 3}, 0.5 * p + 0.5 * t + 3 * t),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2 * p),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 0),
    ):
        assert memory.state(one._replace(ds=half | {"zero_optimization": zero})) == pytest.approx(expected, abs=4)
    assert memory.state(one._replace(ds=PLAIN)) == 4 * p + 12 * t


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_estimated_as_autograd_keeps_them(recompute):
    from made_batch import batch

    torch.backends.cuda.enable_flash_sdp(True)  # distributed.setup, which other tests call, turns it off on a CPU
    cfg, one = setup(PLAIN, width=256, layers=6)
    cfg.train.activation_checkpointing = one.model.audio.trunk.transformer.grad_checkpointing = recompute
    micro, weights = batch(segments=12), {p.data_ptr() for p in one.model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        one.model(micro, cfg.loss, cfg.mask)
    (audio,) = memory.passes_of(cfg, one._replace(vectors=[object()]), micro)
    assert audio.kept == pytest.approx(sum(size for _, size in kept.values()), rel=0.1)


def test_a_batch_too_large_for_the_memory_names_the_cure():
    cfg = load(RunConfig, None, ["train.batch_size=64", "train.gradient_accumulation_steps=2"])
    with pytest.raises(UserError, match=r"32 clips at a time .* raise train.gradient_accumulation_steps \(now 2\)"):
        with preflight.enough_memory(cfg):
            torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shape"):  # other errors stay what they are
        with preflight.enough_memory(cfg):
            torch.ones(2).view(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_too_large_for_a_gpu_names_the_cure():
    with pytest.raises(UserError, match="raise train.gradient_accumulation_steps"):
        with preflight.enough_memory(load(RunConfig)):
            torch.empty(1 << 50, device="cuda")
