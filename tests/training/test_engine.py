"""engine.py: ds.json merged with the YAML, schedule, parameter groups, safe loading, and a full disk."""

import json
import math
import subprocess
import sys
from pathlib import Path

import half
import pytest
import torch
from forks import ROOT
from running import TINY, run

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.checkpoints.universal import load_tensors
from clip4vla.config import ModelConfig, RunConfig, SpectrogramConfig, TrainConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.training import engine

SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


def merged(ds, *words):
    return engine.merge_ds_config(ds, "my.json", load(RunConfig, None, words))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_deepspeed_config_merges(path):
    ds = merged(engine.read_ds_config(str(path))[0], "train.batch_size=64", "train.lr=3e-4")
    assert ds["train_batch_size"] == ds["train_micro_batch_size_per_gpu"] == 64
    assert ds["optimizer"]["params"]["lr"] == 3e-4 and ds["gradient_clipping"] == 1.0
    assert not [key for key, value in engine._leaves(ds) if value == "auto"]


def test_users_keys_pass_through_and_their_file_stays_as_it_is():
    mine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "wall_clock_breakdown": True}
    before = json.dumps(mine)
    ds = merged(mine)
    assert ds["zero_optimization"].items() >= mine["zero_optimization"].items() and ds["wall_clock_breakdown"] is True
    assert json.dumps(mine) == before


@pytest.mark.parametrize(
    "ds, words, said",
    [
        ({"train_batch_size": 8}, ["train.batch_size=16"], ["my.json", "train_batch_size=8", "train.batch_size=16"]),
        ({"gradient_clipping": 0.5}, [], ["gradient_clipping=0.5", "train.grad_clip_norm=1.0"]),
        ({"bf16": {"enabled": True}}, ["train.precision=fp32"], ["bf16.enabled=True", "train.precision"]),
        (
            {"gradient_accumulation_steps": 2},
            [],
            ["gradient_accumulation_steps=2", "train.gradient_accumulation_steps=1"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, [], ["optimizer.params.lr=1.0", "train.lr"]),
        (
            {"zero_optimization": {"stage": 3}},
            ["train.compile=inductor"],
            ["zero_optimization.stage=3", "train.compile"],
        ),
        ({"zero_optimization": {"stage": "auto"}}, [], ["zero_optimization.stage", "does not decide"]),
    ],
)
def test_contradictions_name_both_places(ds, words, said):
    with pytest.raises(UserError) as caught:
        merged(ds, *words)
    assert all(word in str(caught.value) for word in said) and "\n" not in str(caught.value)


def test_precision_follows_ds_json_unless_the_yaml_decides():
    assert merged({"bf16": {"enabled": True}})["bf16"]["enabled"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides, and has bf16")
@pytest.mark.parametrize(
    "cpu, bf16",
    [
        ({"cpu_name": "Intel", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_left_to_itself_a_cpu_takes_bf16_only_where_it_is_fast(monkeypatch, cpu, bf16):
    assert {"cpu_name", "avx512_bf16", "amx_bf16"} <= set(torch.cpu.get_capabilities())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert merged({})["bf16"]["enabled"] is bf16
    assert merged({"bf16": {"enabled": True}})["bf16"]["enabled"] is True
    assert merged({}, "train.precision=fp32")["bf16"]["enabled"] is False


def test_whether_fp16_is_refused_depends_on_the_device(monkeypatch):
    half.answer(True, monkeypatch.setattr)
    assert merged({"fp16": {"enabled": True}})["fp16"]["enabled"] is True
    assert merged({}, "train.precision=fp16")["fp16"]["enabled"] is True
    half.answer(False, monkeypatch.setattr)
    with pytest.raises(UserError, match="^my.json: fp16 is not supported on c"):  # cpu or cuda
        merged({"fp16": {"enabled": True}})
    with pytest.raises(UserError, match="^train.precision: fp16 is not supported on c"):
        merged({}, "train.precision=fp16")


def test_own_ds_json_in_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert engine.read_ds_config("ds.json")[1] == engine.read_ds_config(None)[1] == str(engine.SHIPPED)
    Path("ds.json").write_text("\ufeff{}", encoding="utf-8")  # as editors of Windows write it
    assert engine.read_ds_config("ds.json")[1] == engine.read_ds_config(None)[1] == "ds.json"
    Path("ds.json").write_text('{\n"x": "é"}', encoding="latin-1")
    with pytest.raises(UserError, match="^ds.json: not valid JSON: line 2 is not UTF-8 text"):
        engine.read_ds_config(None)


def test_learning_rate_is_a_warm_up_and_a_cosine():
    train = TrainConfig(max_steps=100, lr=2.0, warmup_ratio=0.1)
    rates = [engine.learning_rate(step, train) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0
    assert rates[55] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False)) and rates[-1] < 0.01


def tiny(**settings) -> Model:
    model = Model(TINY, ModelConfig(clip="tiny.json", **settings), SpectrogramConfig())
    model.freeze()
    return model


def test_no_decay_on_biases_norms_embeddings_and_temperature():
    model = tiny(trainable_towers="text+vision+audio", learn_temperature=True)
    groups = engine.parameter_groups(model, {})
    assert len(groups) == 7  # two for each tower, and the temperature
    decayed, plain = (
        {"params": [p for g in groups if ("weight_decay" in g) == there for p in g["params"]]} for there in (0, 1)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    for group, matrices in ((decayed, True), (plain, False)):
        for p in group["params"]:
            name = names[id(p)]
            is_matrix = (
                name.endswith(("weight", "proj", "text_projection")) and "ln_" not in name and "embedding" not in name
            )
            assert is_matrix == matrices, name
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_only_the_chosen_towers_train():
    model = tiny()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"audio"}


def test_a_pickle_among_the_checkpoint_files_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save({"module": Evil()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        load_tensors(str(tmp_path / "mp_rank_00_model_states.pt"))
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_while_saving_is_one_line_and_leaves_no_half_checkpoint(sample_shards, tmp_path):
    """A file size limit stands for the full disk: the write fails half-way."""
    clip = tmp_path / "tiny.json"
    clip.write_text(json.dumps(TINY))
    words = [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={clip}", "train.precision=fp32", "track.wandb=off",
        f"data.train={sample_shards}/sounds/train", "train.batch_size=4", "train.max_steps=2", f"run_dir={tmp_path / 'r'}",
    ]  # fmt: skip
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "sys.argv = ['launch/pretrain.py', *sys.argv[1:]]; runpy.run_path('launch/pretrain.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint" in line and str(tmp_path / "r") in line
    assert newest_checkpoint(tmp_path / "r") is None
    assert run("launch/pretrain.py", *words).returncode == 0
    assert newest_checkpoint(tmp_path / "r").name == "step-00000002"
