"""accumulation.py: the gradient of several micro-batches is that of the one whole batch, on the real engine."""

import json
from types import SimpleNamespace

import pytest
import torch
from running import ONE_HEAD, ranks

from clip4vla.config import RunConfig
from clip4vla.distributed import collectives
from clip4vla.training import train_step

ZERO2 = json.dumps({"zero_optimization": {"stage": 2}})
ZERO3 = json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
CASES = {
    "whole": [],
    "three": ["train.gradient_accumulation_steps=3"],
    "three, ZeRO-3": ["train.gradient_accumulation_steps=3", ZERO3],
    "recomputed": ["train.activation_checkpointing=true", "train.gradient_accumulation_steps=3"],
    "micro": ["train.gradient_accumulation_steps=3", "train.negatives=micro"],
    "bf16": ["train.precision=bf16", ZERO2],
    "bf16, three": ["train.precision=bf16", ZERO2, "train.gradient_accumulation_steps=3"],
}


def test_the_words_that_a_loss_is_the_mean_over_are_those_of_all_ranks(monkeypatch):
    """This rank's micro-batches teach 3 and 4, another rank's 5. If none teaches any, nothing is divided by 0."""
    run = SimpleNamespace(device="cpu", module=SimpleNamespace(num_targets=lambda micro, loss: torch.tensor(micro)))
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda x: x + 5)
    assert train_step._count_targets(run, [3, 4], RunConfig()) == 12
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda x: x)
    assert train_step._count_targets(run, [0, 0], RunConfig()) == 1


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tiny, tmp_path_factory):
    """Losses and gradients of every case, on one rank and on two."""
    folder = tmp_path_factory.mktemp("gradients")
    (folder / "clip.json").write_text(
        json.dumps(ONE_HEAD)
    )  # a CPU rounds bf16 attention of several heads by the batch's size
    words = [*map(str, tiny), "model.trainable_towers=text+vision+audio", "model.learn_temperature=true", "loss.tv=0.5"]
    words.append(f"model.clip={folder / 'clip.json'}")
    lists = json.dumps([[*words, f"run_dir={folder / 'r'}", *case] for case in CASES.values()])
    done = ranks(request.param, "tests/helpers/gradients.py", folder / "out.pt", lists)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "out.pt"), strict=True))


def apart(one, other) -> float:
    """Relative distance of two sets of gradients, over all parameters."""
    assert one.keys() == other.keys() and len(one) > 15
    a, b = (torch.cat([x[name].flatten().double() for name in one]) for x in (one, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", ["three", "three, ZeRO-3", "recomputed"])
def test_in_fp32_micro_batches_give_the_whole_batchs_losses_and_gradient(found, case):
    ours, whole = found[case], found["whole"]
    assert apart(ours["gradients"], whole["gradients"]) < 1e-5
    for name, value in whole["gradients"].items():  # each parameter's, on its own scale
        close = (ours["gradients"][name] - value).norm() <= 1e-5 * max(float(value.norm()), 1e-3)
        assert close, name
    for name, value in whole["losses"].items():
        assert ours["losses"][name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_in_bf16_under_zero_2_they_differ_by_no_more_than_bf16_does(found):
    """The losses agree to 1e-5. Gradients are rounded to 8 bits of mantissa by every micro-batch's own products, which
    is why the bound is their direction's: 1 - cosine = distance^2 / 2."""
    ours, whole, exact = found["bf16, three"], found["bf16"], found["whole"]
    assert ours["losses"]["loss"].item() == pytest.approx(whole["losses"]["loss"].item(), rel=1e-5)
    assert apart(ours["gradients"], whole["gradients"]) ** 2 / 2 < 1e-5
    errors = [apart(case["gradients"], exact["gradients"]) for case in (ours, whole)]
    assert errors[0] < 1.05 * errors[1], "accumulating loses precision"


def test_negatives_of_a_micro_batch_alone_are_another_loss(found):
    assert apart(found["micro"]["gradients"], found["whole"]["gradients"]) > 0.01
    assert found["micro"]["losses"]["at"] < found["whole"]["losses"]["at"]  # fewer negatives


def test_compiled_on_padded_batches_it_is_the_same(tiny, tmp_path):
    words = [*map(str, tiny), f"run_dir={tmp_path / 'r'}", ZERO2]
    lists = json.dumps(
        [[*words, *extra] for extra in (["train.compile=aot_eager", "train.gradient_accumulation_steps=2"], [])]
    )
    done = ranks(1, "tests/helpers/gradients.py", tmp_path / "out.pt", lists)
    assert done.returncode == 0, done.stderr
    compiled, eager = torch.load(tmp_path / "out.pt")
    assert apart(compiled["gradients"], eager["gradients"]) < 1e-5
