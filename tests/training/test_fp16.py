"""fp16 on the real engine, two ranks, ZeRO-1 to 3, against fp32: losses, loss scale, a step that overflows, and going on.

Torch computes in fp16 on any CPU; where DeepSpeed says that this one does not (half.py), its answer alone is another one here.
"""

import json
import math

import pytest
from running import ranks, trace

STEPS, SPOILT, SAVED = 8, 4, 6  # the gradient of rank 1 is infinite in step SPOILT
SCALE = {
    "initial_scale_power": 8,
    "hysteresis": 1,
    "loss_scale_window": 3,
}  # halved at once, doubled after 3 good steps


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """(folder, rows of each step by run). ZeRO-3 comes last: DeepSpeed then has its own F.linear, which rounds otherwise."""
    folder = tmp_path_factory.mktemp("fp16")
    cases = [_case(folder, "fp32", 0, what="nothing", left_out=SPOILT)]
    cases += [_case(folder, f"ZeRO-{stage}", stage, what="gradient") for stage in (1, 2)]
    cases.append(_case(folder, "ZeRO-2 again", 2, of="ZeRO-2", what="nothing"))
    cases.append(_case(folder, "ZeRO-3", 3, what="gradient"))
    cases.append(_case(folder, "ZeRO-3 again", 3, of="ZeRO-3", what="nothing"))
    cases.append(_case(folder, "ZeRO-1 to 3", 3, of="ZeRO-1", what="nothing"))
    for case in cases:
        case["words"] = [*map(str, tiny), f"train.save_every={SAVED}", f"train.precision={case['precision']}"]
    done = ranks(2, "tests/helpers/overflows.py", folder / "out.json", json.dumps(cases), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "out.json").read_text())


def _case(folder, name: str, stage: int, of: str = "", **more) -> dict:
    """A run, or the end of another one again, from its checkpoint of step SAVED."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds = {"zero_optimization": zero, **({"fp16": SCALE} if stage else {})}
    case = {"name": name, "ds": ds, "precision": "fp16" if stage else "fp32", "run_dir": f"{folder}/{of or name}"}
    return case | {"step": SPOILT, "at": [1], **more}


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_gradients_are_those_of_fp32(runs, stage):
    """A feature has some 24 roundings to 11 bits in a row, so a relative error of e = 2^-11 sqrt(24) = 2.4e-3, in no special
    direction: a cosine of two, in 64 dimensions, has sqrt(2 / 64) e = 4.2e-4, a logit at temperature 0.05 20 times that. A
    contrastive loss moves by at most twice what its logits do, and three are added: 0.05, which is 6e-3 of losses of about 8.
    Gradients have twice the roundings, 3.4e-3, and the probabilities' error, which is the logits', 8.4e-3, twice: 2e-2."""
    ours, exact = (runs[1][name] for name in (f"ZeRO-{stage}", "fp32"))
    assert set(column(ours, "dtype")) == {"torch.float16"} and set(column(exact, "dtype")) == {"torch.float32"}
    assert column(ours, "loss") == pytest.approx(column(exact, "loss"), rel=6e-3)
    # not of the last step, where the scale doubles: under ZeRO-3 DeepSpeed divides by the new one
    compared = [i for i in range(STEPS - 1) if i != SPOILT - 1]
    assert [ours[i]["norm"] for i in compared] == pytest.approx([exact[i]["norm"] for i in compared], rel=2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_overflows_on_one_rank_is_skipped_on_all(runs, stage):
    folder, rows = runs[0], runs[1][f"ZeRO-{stage}"]
    assert column(rows, "moved") == [2, 2, 2, 0, 2, 2, 2, 2]  # ranks whose weights changed
    assert column(rows, "skipped") == [0, 0, 0, 1, 1, 1, 1, 1]
    assert column(rows, "scale") == [256, 256, 256, 128, 128, 128, 128, 256]
    logged = [json.loads(line) for line in (folder / f"ZeRO-{stage}/metrics.jsonl").read_text().splitlines()]
    assert [math.isinf(row["grad_norm"]) for row in logged] == [row["step"] == SPOILT for row in logged]
    assert len(trace(folder / f"ZeRO-{stage}")) == STEPS


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_to_the_last_bit_with_its_loss_scale(runs, stage):
    assert runs[1][f"ZeRO-{stage} again"] == runs[1][f"ZeRO-{stage}"][SAVED:]


def test_another_zero_stage_goes_on_with_the_loss_scale(runs):
    ours, theirs = runs[1]["ZeRO-1 to 3"], runs[1]["ZeRO-1"][SAVED:]
    assert column(ours, "scale") == column(theirs, "scale") and column(ours, "skipped") == column(theirs, "skipped")
    assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), rel=6e-3)
