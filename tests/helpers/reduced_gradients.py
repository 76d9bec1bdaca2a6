"""Gradients that DeepSpeed's engine has added up over ranks and micro-batches: tests/helpers/reduced_gradients.py OUT JSON.

JSON: a list of (precision, micro-batches, ds.json). Writes the largest relative error of each, against a sum in float64.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from clip4vla.config import RunConfig  # noqa: E402
from clip4vla.config_io import load  # noqa: E402
from clip4vla.distributed import collectives  # noqa: E402
from clip4vla.training import engine  # noqa: E402

SIZE = 999


class Given(torch.nn.Module):
    """A weight (SIZE) whose gradient is what forward gets; the towers are there for engine.start alone."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(SIZE))
        self.text = self.vision = SimpleNamespace(set_grad_checkpointing=bool)
        self.audio = SimpleNamespace(trunk=self.text)

    def forward(self, gradient):
        return (self.weight * gradient).sum()


def error(precision: str, micros: int, ds: dict) -> float:
    from deepspeed.utils import safe_get_full_grad

    world, rank = collectives.world_size(), collectives.rank()
    words = [f"train.precision={precision}", f"train.batch_size={world * micros}"]
    cfg = load(RunConfig, None, [*words, f"train.gradient_accumulation_steps={micros}"])
    ds = engine.merge_ds_config(ds, "ds.json", cfg)
    model = Given()
    run = engine.start(model, ds, cfg.train)
    given = torch.randn(world, micros, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for gradient in given[rank]:
        run.backward(run(gradient))
        if run.is_gradient_accumulation_boundary():
            summed = safe_get_full_grad(model.weight).double()
        run.step()
    run.destroy()
    exact = given.double().mean((0, 1))
    return float((summed - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    collectives.setup()
    errors = [error(*case) for case in json.loads(sys.argv[2])]
    if collectives.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(errors), encoding="utf-8")
