"""Runs with one number spoilt each, in one process of every rank: python tests/faults/_numbers.py OUT JSON of cases.

A case: {"name", "words" of the config, "ds" of DeepSpeed, "what" of SPOILS, "step", ranks "at" which it happens}. OUT: by name
what the run ended with ("" if in order), the steps of its checkpoints, and whether all their weights are finite.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers")]

import half  # noqa: E402
from brute_force import brute_force  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from clip4vla.config import RunConfig  # noqa: E402
from clip4vla.config_io import load  # noqa: E402
from clip4vla.data.batch import SEGMENTS, Batch  # noqa: E402
from clip4vla.distributed import collectives  # noqa: E402
from clip4vla.errors import UserError  # noqa: E402
from clip4vla.losses.objective import PAIRS  # noqa: E402
from clip4vla.training import train, train_step  # noqa: E402

honest = train_step.step


class Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


def without(batch: Batch, kind: str) -> Batch:
    """No clip has audio, text or frames."""
    no = {f"has_{kind}": torch.zeros(len(batch), dtype=torch.bool)}
    packs = {"audio": ("segment_clip", *SEGMENTS), "frames": ("frame_clip", "frames"), "text": ()}[kind]
    return dataclasses.replace(batch, **no, **{name: getattr(batch, name)[:0] for name in packs})


def sentence_lost(module, args, out):
    """A hook on the tower's last norm: of the second caption nothing is finite."""
    return torch.cat([out[:1], out[1:2] * torch.nan, out[2:]])


SPOILS = {
    "silence": lambda b: dataclasses.replace(b, segments=torch.zeros_like(b.segments)),
    "hum": lambda b: dataclasses.replace(b, segments=torch.full_like(b.segments, 137)),
    "no rows": lambda b: dataclasses.replace(b, segment_rows=torch.zeros_like(b.segment_rows)),
    "hidden": lambda b: dataclasses.replace(b, hidden_rows=torch.ones_like(b.hidden_rows)),
    "alike": lambda b: dataclasses.replace(b, group=torch.zeros_like(b.group)),
    "no audio": lambda b: without(b, "audio"),
    "no text": lambda b: without(b, "text"),
    "no frames": lambda b: without(b, "frames"),
    **dict.fromkeys(("vector", "gradient", "nothing"), lambda b: b),
}


def spoilt(case: dict):
    """accumulation.step, with what the case says in its turn, compared with brute force where nothing is to end it."""
    steps = iter(range(1, 10**6))

    def step(run, micros, cfg):
        now = next(steps) == case["step"] and collectives.rank() in case["at"]
        hook = None
        if now and case["what"] == "gradient":
            hook = run.module.audio.register_forward_hook(lambda module, args, out: Poison.apply(out))
        if now and case["what"] == "vector":
            hook = run.module.text.ln_final.register_forward_hook(sentence_lost)
        micros = [SPOILS[case["what"]](m) for m in micros] if now else micros
        losses, features = honest(run, micros, cfg)
        if hook:
            hook.remove()
        if case.get("compared"):
            must_equal_brute_force(losses, features, micros, cfg)
        return losses, features

    return step


def must_equal_brute_force(losses, features, micros, cfg) -> None:
    """The terms of the loss of one global batch, in float64."""
    labels = [
        torch.cat([getattr(m, name) for m in micros]) for name in ("group", "has_text", "has_frames", "has_audio")
    ]
    group, *has = (collectives.all_gather(x) for x in labels)
    everyone = {name: collectives.all_gather(x).double() for name, x in features.items() if name != "scale"}
    there = dict(zip(("text", "vision", "audio"), has, strict=True))
    there["masked"] = there["audio"]
    for term in ("at", "av", "aa"):
        a, b = PAIRS[term]
        more = {"group": group if cfg.loss.exclude_same_group else None, "intra": term == "aa"}
        want = brute_force(everyone[a], everyone[b], features["scale"].double(), there[a] & there[b], **more)
        got = collectives.all_reduce_mean(losses[term])
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5), (term, got, want)


def ended(case: dict) -> dict:
    """What came of one run."""
    cfg = load(RunConfig, case["words"][0], case["words"][1:])
    ds = Path(cfg.run_dir + f"-{collectives.rank()}.json")
    ds.parent.mkdir(parents=True, exist_ok=True)
    ds.write_text(json.dumps(case.get("ds", {})), encoding="utf-8")
    train_step.step = spoilt(case)
    said = ""
    try:
        train.train(cfg, str(ds))
    except UserError as error:
        said = str(error)
    saved = sorted(Path(cfg.run_dir, "checkpoints").glob("step-*"))
    finite = all(bool(x.isfinite().all()) for path in saved for x in load_file(path / "model.safetensors").values())
    return {"said": said, "saved": [int(path.name[5:]) for path in saved], "finite": finite}


if __name__ == "__main__":
    half.answer(True)
    found = {case["name"]: ended(case) for case in json.loads(sys.argv[2])}
    if collectives.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
