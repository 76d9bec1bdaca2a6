"""launch/finetune_retrieval.py: every head on ranks, ZeRO stages, resume with dropout, learning rates by tower, freezing."""

import json
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
from forks import ROOT
from running import TINY, optimizer_groups, ranks, trace
from safetensors.torch import load_file

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.evaluation import text_video
from clip4vla.models.model import Model
from clip4vla.training import engine

SCRIPT = "launch/finetune_retrieval.py"


@pytest.mark.parametrize("head", ["global_global", "global_local", "local_local"])
def test_any_ranks_and_zero_stages_give_the_same_losses(tuning, sample_shards, zero3, tmp_path, head):
    found = []
    held_out = [
        "eval.every_steps=2",
        f"data.val={sample_shards}/speech_fr/train",
        "eval.captions=all",
    ]  # more captions than go at once
    for n, more in ((1, []), (2, []), (2, [*held_out, "--deepspeed_config", zero3])):
        run_dir = tmp_path / f"{len(found)}"
        done = ranks(n, SCRIPT, *tuning, f"run_dir={run_dir}", f"model.head={head}", "model.head_dropout=0", *more)
        assert done.returncode == 0, done.stderr
        found.append(trace(run_dir))
    metrics = json.loads((tmp_path / "2/eval/val-00000004/metrics.json").read_text())
    assert metrics["text_to_video"]["n_queries"] > text_video.CAPTIONS
    for other in found[1:]:
        for step, losses in found[0].items():
            assert other[step] == pytest.approx(losses, rel=1e-5)
    assert len(found[0]) == 4 and found[0][4] < found[0][1]


def test_a_run_with_dropout_goes_on_to_the_last_bit(tuning, tmp_path):
    words = [
        *tuning,
        "model.head=global_local",
        f"run_dir={tmp_path}",
        "train.gradient_accumulation_steps=2",
        "train.keep_last=4",
    ]
    assert ranks(2, SCRIPT, *words).returncode == 0
    undisturbed = trace(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-00000004")
    done = ranks(2, SCRIPT, *words)
    assert done.returncode == 0 and "2 done of 4" in done.stdout, done.stderr
    assert trace(tmp_path) == undisturbed
    gentle = ranks(2, SCRIPT, *words, "model.head_dropout=0", f"run_dir={tmp_path / 'other'}", "train.max_steps=1")
    assert gentle.returncode == 0 and trace(tmp_path / "other")[1] != undisturbed[1]  # it was there


def test_a_run_goes_on_with_its_learning_rates_on_other_ranks(tuning, tmp_path):
    words = [*tuning, "model.head=local_local", "model.head_dropout=0", "train.lr_scale={text: 0.1, audio: 2}"]
    words += [f"run_dir={tmp_path}", "train.keep_last=4"]
    assert ranks(2, SCRIPT, *words).returncode == 0
    undisturbed = trace(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-00000004")
    done = ranks(1, SCRIPT, *words)
    assert done.returncode == 0 and "2 done of 4" in done.stdout, done.stderr
    for step, losses in trace(tmp_path).items():
        assert losses == pytest.approx(undisturbed[step], rel=1e-5)
    shares = (2.0, 1.0, 0.1, 1.0)  # audio, head, text, vision
    assert optimizer_groups(tmp_path / "checkpoints/step-00000004") == [
        [(s, decay) for s in shares for decay in (0.2, 0.0)]
    ]


def test_learning_rates_by_tower_and_frozen_blocks(tuning, tmp_path):
    words = [*tuning, f"run_dir={tmp_path}", "model.head=local_local", "train.keep_last=4"]
    done = ranks(1, SCRIPT, *words, "train.lr_scale={vision: 0, head: 2}", "model.freeze_layers={text: 1, audio: 0}")
    assert done.returncode == 0, done.stderr
    early, late = (load_file(tmp_path / f"checkpoints/step-0000000{step}/model.safetensors") for step in (2, 4))
    changed = {name for name in early if not torch.equal(early[name], late[name])}
    assert not [name for name in changed if name.startswith("vision.")]
    still = {name for name in early if name.startswith("text.")} - changed
    assert still == {
        name for name in early if name.startswith(("text.token_", "text.positional", "text.transformer.resblocks.0."))
    }
    assert "audio.trunk.transformer.resblocks.0.ln_1.weight" in changed and "audio.trunk.conv1.weight" not in changed
    assert "audio.type_embedding" not in changed
    assert {"head.score.weight", "head.encoder.type_embedding", "head.encoder.blocks.1.ln_1.weight"} <= changed


def test_groups_have_their_share_of_the_learning_rate():
    model = Model(
        TINY, ModelConfig(trainable_towers="text+audio", head="global_local", head_layers=1), SpectrogramConfig()
    )
    model.freeze()
    groups = engine.parameter_groups(model, {"text": 0.1, "head": 3})
    run = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    engine.set_learning_rate(run, 2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        (names[id(p)].split(".")[0], round(group["lr"], 9), group.get("weight_decay"))
        for group in groups
        for p in group["params"]
    }
    rates = {"text": 0.2, "audio": 2.0, "head": 6.0}
    assert found == {(tower, rate, decay) for tower, rate in rates.items() for decay in (None, 0.0)}


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["loss.tm=0"], "loss.tm is 0"),
        (["train.max_steps=0"], "nothing to train"),
        (["train.lr_scale={tex: 1}"], "'tex' is none of text, vision, audio, head"),
        (["model.freeze_layers={text: 3}"], "text: 3 is not between 0 and its 2 blocks"),
        (["model.freeze_layers={head: 1}"], "'head' is none of the towers of model.trainable_towers"),
        (["model.modalities=v"], "model.trainable_towers: no loss runs the audio tower"),
        (["model.head=local_local", "train.gradient_accumulation_steps=2"], "set train.negatives=micro"),
        (["train.compile=aot_eager"], "set train.compile=off"),
        (["eval.best_metric=text_to_video/R@1"], "set eval.every_steps"),
        (["loss={tm: 0, tv: 1}", "model.head=global_local"], "loss.tm is 0"),
        (["model.head=local_local", "model.max_frames=1"], "the shards have up to 12 frames"),
    ],
)
def test_mistakes_are_one_line(tuning, wrong, said, monkeypatch, capsys):
    """In this process: what is refused is refused before there is anything to undo."""
    monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, tuning), *wrong])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and said in line
