"""Numerical trouble: in each case the run goes on with the right loss, or ends in the one line, and no checkpoint holds NaN.

The spoilt numbers come from _numbers.py; everything else is the shipped program on two gloo ranks. Of a CPU
without AVX512-FP16 DeepSpeed's refusal of fp16 alone is taken away (half.py).
"""

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from running import ranks, run

from faults.long_run import SMALL

STEPS, SPOILT = 6, 4  # checkpoints after 2, 4, 6; rows are logged after 5: step 4 is looked at because it is saved
CURE = r": lower train.lr, or take bf16 or fp32 in train.precision; the last checkpoint in \S+/checkpoints is good$"
CLIP = rf"^the loss of step {SPOILT} is nan, text not finite in \d of the \d+ clips of rank 1 \(\S+/\S+.*\){CURE}"
UNSOUND = r", but the gradient, or the weights after it, are not finite" + CURE
BROKEN = rf"^(the loss of step \d is (nan|inf), .+{CURE}|step \d: the loss is \S+{UNSOUND})"
LEAST = (
    r"^step \d+: forward and backward: the gradients overflow fp16 with the least loss scale too: take bf16 or fp32 in "
)
SKIPPED = rf"^step \d+: the last 50 gradients overflow fp16{CURE}"  # ZeRO-0's scaler says nothing
LARGE = r"^data.train: source 1 has 18 samples, fewer than its 1000 of a batch of 2000"


class Case(NamedTuple):
    """One run: what of _numbers.SPOILS happens in step SPOILT on which ranks, and the line it ends in, none if in order."""

    name: str
    what: str = "nothing"
    line: str = ""
    precision: str = "fp32"
    stage: int = 1
    at: Sequence[int] = (0, 1)
    more: Sequence[str] = ()
    compared: bool = False  # the losses with brute force
    steps: int = STEPS
    scale: int = 16  # power of two that the loss scale of fp16 starts at


def cases() -> list[Case]:
    """All of them."""
    return [*_broken(), *_odd(), *_half()]


def _broken() -> list[Case]:
    """What is not finite, by precision and ZeRO stage, and with accumulation."""
    unsound = rf"^step {SPOILT}: the loss is [\d.]+{UNSOUND}"
    found = []
    for how in product(("fp32", "bf16"), range(4)):
        name = f"{how[0]} ZeRO-{how[1]}"
        found.append(Case(f"vector {name}", "vector", CLIP, *how, at=[1]))
        found.append(Case(f"gradient {name}", "gradient", unsound, *how, at=[1]))
        found.append(Case(f"explodes {name}", "nothing", BROKEN, *how, more=["train.lr=1e30"]))
    pieces = ["train.gradient_accumulation_steps=3"]
    found.append(Case("vector accumulated", "vector", CLIP, at=[1], more=pieces))
    found.append(Case("gradient accumulated", "gradient", unsound, at=[1], more=pieces))
    found.append(Case("infinite norm", line=rf"^step \d: the loss is \S+e\+30{UNSOUND}", more=["loss.at=1e30"]))
    wild = ["model.learn_temperature=true", "train.lr=100", "train.lr_scale={text: 0, vision: 0, audio: 0}"]
    return [*found, Case("temperature", line=rf"^$|{BROKEN}", more=wild)]


def _odd() -> list[Case]:
    """What is finite, and must go on."""
    found = [
        Case("one clip a rank", more=["train.batch_size=2"], compared=True),
        Case("large batch", line=LARGE, more=["train.batch_size=2000"]),
    ]
    for what, at, pieces in product(("no audio", "no text", "no frames"), ([0], [0, 1]), (1, 3)):
        some = "one" if at == [0] else "all"
        found.append(
            Case(
                f"{what} on {some} x{pieces}",
                what,
                at=at,
                more=[f"train.gradient_accumulation_steps={pieces}"],
                compared=True,
            )
        )
    for what, kind in product(("silence", "hum", "no rows", "hidden", "alike"), ("fp32", "bf16")):
        found.append(Case(f"{what} {kind}", what, precision=kind, compared=True))
    return found


def _half() -> list[Case]:
    """fp16: a storm that ends, and one that does not."""
    found = []
    for stage in range(4):
        line, steps = (LEAST, 30) if stage else (SKIPPED, 52)
        how: dict[str, Any] = {"precision": "fp16", "stage": stage}
        found.append(Case(f"overflows ZeRO-{stage}", line=line, more=["loss.at=1e9"], steps=steps, **how))
        found.append(Case(f"fp16 ZeRO-{stage}", steps=20, scale=22, **how))
    return found


def _run(folder: Path, shards: Path, case: Case, seed: int) -> dict[str, Any]:
    """A case as _numbers.py takes it."""
    words = [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={folder}/small.json", "track.wandb=off",
        f"data.train=[{shards}/speech_fr/train, {shards}/sounds/train]", "train.batch_size=12", "data.decode_threads=1",
        f"run_dir={folder}/{case.name.replace(' ', '-')}", f"seed={seed}", f"train.max_steps={case.steps}",
        f"train.save_every={2 if case.steps == STEPS else case.steps}", "train.log_every=5", "train.keep_last=9",
        f"train.precision={case.precision}", *case.more,
    ]  # fmt: skip
    ds: dict[str, Any] = {"zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0}}
    if case.precision == "fp16":
        ds["fp16"] = {"initial_scale_power": case.scale}
    return case._asdict() | {"words": words, "ds": ds, "step": SPOILT}


def ended(folder: Path, shards: Path, some: list[Case], seed: int) -> dict[str, dict[str, Any]]:
    """What came of each, all as it should; AssertionError naming the first that did not."""
    (folder / "small.json").write_text(json.dumps(SMALL))
    runs = json.dumps([_run(folder, shards, case, seed) for case in some])
    done = ranks(2, "tests/faults/_numbers.py", folder / "out.json", runs, timeout=1200)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    found = json.loads((folder / "out.json").read_text())
    for case in some:
        _must_be_right(case, found[case.name], f"seed {seed}, {case.name}: {found[case.name]}")
    return found


def _must_be_right(case: Case, came: dict[str, Any], about: str) -> None:
    assert came["finite"] and "\n" not in came["said"], about
    assert re.search(case.line or "^$", came["said"]), about
    if not came["said"]:
        assert came["saved"][-1] == case.steps, about
    if case.what in ("vector", "gradient"):
        assert came["saved"] == [2], about


def campaign(folder: Path, seed: int) -> dict[str, Any]:
    """Every case on two ranks."""
    done = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={folder}/shards")
    assert done.returncode == 0, done.stderr
    found = ended(folder, folder / "shards", cases(), seed)
    lines = {name: came["said"].replace(str(folder), "DIR") for name, came in found.items() if came["said"]}
    saved = sum(len(came["saved"]) for came in found.values())
    went_on = [name for name in found if name not in lines]
    counts = {"cases": len(found), "checkpoints": saved, "checkpoints_with_nan": 0, "ranks": 2}
    return counts | {"went_on": went_on, "ended_in_one_line": lines}
