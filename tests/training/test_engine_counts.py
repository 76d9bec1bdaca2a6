"""DeepSpeed's engine by count, on the CPU: the operations that it launches in a step, and where the host waits for the device.

The tower has as many parameters as ViT-B/32's audio tower, and is narrow: counts are those of the full size.
"""

import collections
import contextlib
import json
import sys

import half
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from made_batch import batch
from running import ranks
from torch.utils._python_dispatch import TorchDispatchMode

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.distributed import collectives
from clip4vla.models.model import Model
from clip4vla.training import engine, train_step, zero_optimizer

NARROW = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 16, "patch_size": 32, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
PARAMETERS = 153  # of ViT-B/32's audio tower
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
COPIES = ("lift_fresh",)  # torch.tensor(number, device=...) on a GPU waits too: its number is not in pinned memory
HOST = ("empty", "detach", "alias", "_unsafe_view")  # nothing is launched for them


@pytest.fixture(autouse=True)
def own_linear(monkeypatch):
    """ZeRO-3 leaves its own F.linear, which rounds otherwise."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


class Counter(TorchDispatchMode):
    """Counts operations by the DeepSpeed function that launches them ("ours": zero_optimizer.py), and waits by theirs."""

    def __init__(self):
        super().__init__()
        self.launched, self.waits = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, place = operation._schema.name.removeprefix("aten::"), owner()
        if place and name in WAITS + COPIES:
            self.waits[place] += 1
        elif place and not operation.is_view and not name.startswith(HOST):
            self.launched[place] += 1
        return operation(*args, **(kwargs or {}))


def owner() -> str:
    """The innermost function of DeepSpeed on the stack, as file:function; "" below its calls of the model and of autograd."""
    frame = sys._getframe(2)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == zero_optimizer.__file__:
            return "ours"
        if "/deepspeed/" in file:
            inside = file.endswith("/runtime/engine.py") and function in ("forward", "backward")
            return "" if inside else f"{file.rsplit('/', 1)[1]}:{function}"
        frame = frame.f_back
    return ""


def start(ds, *words):
    cfg = load(RunConfig, None, ["train.batch_size=4", "train.grad_clip_norm=0.01", *words])
    torch.manual_seed(0)
    model = Model(NARROW, cfg.model, SpectrogramConfig())
    model.freeze()
    assert sum(p.requires_grad for p in model.parameters()) == PARAMETERS
    return engine.start(model, engine.merge_ds_config(ds, "ds.json", cfg), cfg.train), cfg


def counted(monkeypatch, ds, *words) -> Counter:
    """Counts of the fourth step: ZeRO-3 has learnt the order of the weights by then, and timers have started."""
    counter = Counter()
    synchronize = lambda self, device=None: counter.waits.update([owner()])  # noqa: E731
    monkeypatch.setattr(type(get_accelerator()), "synchronize", synchronize)
    collectives.setup()
    run, cfg = start(ds, *words)
    micros = cfg.train.gradient_accumulation_steps
    batches = [batch(4 // micros) for _ in range(micros)]
    for _ in range(3):
        train_step.step(run, batches, cfg)
    counter.waits.clear()
    with counter:
        train_step.step(run, batches, cfg)
    waits = counter.waits.copy()
    run.destroy()
    counter.waits = waits
    return counter


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage} | keys}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_launches_one_operation_a_parameter_and_never_waits(monkeypatch, stage):
    counter = counted(monkeypatch, zero(stage), "train.precision=bf16")
    assert counter.waits == {}
    assert counter.launched.total() <= PARAMETERS + 75, counter.launched.most_common(9)


WAITS_LEFT = {  # what cannot be switched off: function of DeepSpeed, number in a step
    "fp32": (zero(1), {"utils.py:is_invalid_grad_norm": 1}),
    "fp16": (
        zero(1) | {"fp16": {"initial_scale_power": 0}},
        {"stage_1_and_2.py:has_overflow": 1, "utils.py:is_invalid_grad_norm": 1},
    ),
    "bf16": (zero(3), {"utils.py:is_invalid_grad_norm": 1}),
}


@pytest.mark.parametrize("precision", WAITS_LEFT)
def test_the_waits_that_are_left_in_fp32_in_fp16_and_under_zero_3(monkeypatch, precision):
    ds, allowed = WAITS_LEFT[precision]
    half.answer(True, monkeypatch.setattr)
    assert counted(monkeypatch, ds, f"train.precision={precision}").waits == allowed


class Stream:
    """A stream of a pretended GPU: notes who works on it and who waits for it, in order."""

    current: "Stream"
    log: list = []

    def wait_stream(self, other):
        self.log.append((self, "waits for", other))


@contextlib.contextmanager
def on(accelerator, stream):
    before, Stream.current = Stream.current, stream
    Stream.log.append((stream, "works", None))
    yield
    Stream.current = before


@pytest.mark.parametrize("stage", [1, 2])
def test_reductions_overlap_the_backward_pass_without_a_wait_of_the_host(monkeypatch, stage):
    """The step's stream waits for that of the reductions, after the last of these, where DeepSpeed's host would."""
    Stream.current = main = Stream()
    Stream.log = []
    device = type(get_accelerator())
    for name, value in {
        "is_synchronized_device": lambda self: False,
        "Stream": Stream,
        "stream": on,
        "current_stream": lambda self, device=None: Stream.current,
    }.items():
        monkeypatch.setattr(device, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    overlapped = zero(stage, overlap_comm=True, contiguous_gradients=True, reduce_bucket_size=20_000)
    counter = counted(monkeypatch, overlapped, "train.precision=bf16")
    assert counter.waits == {}
    reductions = next(stream for stream, _, _ in Stream.log if stream is not main)
    works = [i for i, event in enumerate(Stream.log) if event == (reductions, "works", None)]
    waits = [i for i, event in enumerate(Stream.log) if event == (main, "waits for", reductions)]
    assert len(works) > 20 and works[-1] < waits[-1]


def trained(stage: int, micros: int, precision: str) -> list[torch.Tensor]:
    """Weights after three steps that are all clipped."""
    run, cfg = start(zero(stage), f"train.precision={precision}", f"train.gradient_accumulation_steps={micros}")
    for number in range(3):
        torch.manual_seed(number)
        train_step.step(run, [batch(4 // micros) for _ in range(micros)], cfg)
    assert float(run.get_global_grad_norm()) > 0.01
    weights = [p.detach().clone() for p in run.module.parameters() if p.requires_grad]
    run.destroy()
    return weights


@pytest.mark.parametrize("stage, micros, precision", [(1, 1, "bf16"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 1, "fp32")])
def test_weights_are_those_of_deepspeeds_own_functions_to_the_last_bit(monkeypatch, stage, micros, precision):
    collectives.setup()
    ours = trained(stage, micros, precision)
    monkeypatch.setattr(engine, "spare_launches_and_waits", lambda run: None)
    monkeypatch.setattr(engine, "_set_defaults", lambda *args: None)
    theirs = trained(stage, micros, precision)
    assert all(map(torch.equal, ours, theirs))


def test_many_micro_batches_are_added_up_in_fp32(tmp_path):
    """Against a sum in float64, on two ranks: 2^-24 of a number, where bf16's 2^-9 is lost at each addition."""
    own = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    many = [("bf16", 16, zero(stage, stage3_param_persistence_threshold=0)) for stage in (1, 2, 3)]
    cases = [*many, ("bf16", 8, zero(1)), ("bf16", 16, zero(1) | own)]
    done = ranks(2, "tests/helpers/reduced_gradients.py", tmp_path / "out.json", json.dumps(cases))
    assert done.returncode == 0, done.stderr
    *exact, fewer, users = json.loads((tmp_path / "out.json").read_text())
    assert max(exact) < 1e-6 and fewer > 1e-3 and users > 1e-3
    assert done.stdout == ""


def test_many_ranks_add_gradients_in_fp32(monkeypatch):
    def settings(world, precision):
        monkeypatch.setattr(collectives, "world_size", lambda: world)
        cfg = load(RunConfig, None, ["train.batch_size=256", f"train.precision={precision}"])
        return engine.merge_ds_config(zero(1), "ds.json", cfg).get("communication_data_type")

    assert settings(256, "bf16") == "fp32" and settings(128, "bf16") is settings(256, "fp32") is None
