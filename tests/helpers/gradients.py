"""Gradients of one step of the real engine, for a list of settings: python tests/helpers/gradients.py OUT JSON of word lists."""

import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

sys.path.insert(0, str(Path(__file__).parents[2]))

from clip4vla.config import RunConfig  # noqa: E402
from clip4vla.config_io import load  # noqa: E402
from clip4vla.data.loader import open_folders  # noqa: E402
from clip4vla.distributed import collectives
from clip4vla.training import engine, train_step  # noqa: E402
from clip4vla.training.run_setup import build_model, train_loader  # noqa: E402


def gradients(file: str, *words: str) -> dict:
    """Losses, and the gradient of every trained parameter as the optimizer would get it (without clipping)."""
    cfg = load(RunConfig, file, [word for word in words if not word.startswith("{")])
    ds = json.loads(next((word for word in words if word.startswith("{")), "{}"))
    device = collectives.setup()
    torch.manual_seed(cfg.seed)
    folders = open_folders(cfg.data.train, "data.train")
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    model, _ = build_model(cfg, folders[0].fingerprint, None)
    run = engine.start(model, engine.merge_ds_config(ds, "words", cfg), cfg.train)
    found = {}

    def step() -> None:
        if run.is_gradient_accumulation_boundary():
            named = run.module.named_parameters()
            found.update({name: safe_get_full_grad(p).float().clone() for name, p in named if p.requires_grad})
        run.micro_steps += 1

    run.step = step
    micros = next(train_loader(cfg, folders, None, device).steps(0, 1))
    losses, _ = train_step.step(run, micros, cfg)
    return {"losses": {name: collectives.all_reduce_mean(value) for name, value in losses.items()}, "gradients": found}


if __name__ == "__main__":
    results = [gradients(*words) for words in json.loads(sys.argv[2])]
    if collectives.rank() == 0:
        torch.save(results, sys.argv[1])
