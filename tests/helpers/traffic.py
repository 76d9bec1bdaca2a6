"""Bytes that each step of real runs passes into collectives: tests/helpers/traffic.py OUT JSON, a list of (words, ds.json).

Writes a list of (bytes of the last whole step, those of its losses, last row of metrics.jsonl), and audio_space of what each
rank made up.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

SENT = {  # collective: which argument a rank puts in
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather": (1, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter": (1, "input_list"),
    "all_to_all_single": (1, "input"),
}
steps = [0]  # bytes of each step, the one under way last
of_losses = [0]  # of these, what the losses' forward passes put in (their backward passes put in nothing)


def counted(name: str):
    """The collective, counting what goes in."""
    call, (place, keyword) = getattr(dist, name), SENT[name]

    def counting(*args, **kwargs):
        given = args[place] if len(args) > place else kwargs[keyword]
        tensors = given if isinstance(given, list) else [given]
        steps[-1] += sum(x.numel() * x.element_size() for x in tensors)
        return call(*args, **kwargs)

    return counting


for name in SENT:
    setattr(dist, name, counted(name))

from clip4vla.config import RunConfig  # noqa: E402
from clip4vla.config_io import load  # noqa: E402
from clip4vla.data.batch import Labels  # noqa: E402
from clip4vla.distributed import collectives  # noqa: E402
from clip4vla.training import meter, train_step  # noqa: E402  (DeepSpeed keeps the functions that it finds)
from clip4vla.training.train import train  # noqa: E402

add, objective = meter.Meter.add, train_step.compute_losses


def add_and_turn_over(self, *args):
    steps.append(0)
    of_losses.append(0)
    add(self, *args)


def counted_objective(*args):
    before = steps[-1]
    values = objective(*args)
    of_losses[-1] += steps[-1] - before
    return values


meter.Meter.add, train_step.compute_losses = add_and_turn_over, counted_objective


def made_up(rank: int) -> tuple[dict[str, torch.Tensor], list[Labels]]:
    """Unit vectors (6, 5) of a rank, and who has what."""
    draw = torch.Generator().manual_seed(rank)
    unit = torch.nn.functional.normalize(torch.randn(2, 6, 5, generator=draw), dim=-1)
    text, frames, audio = torch.rand(3, 6, generator=draw) < 0.7
    labels = Labels(torch.arange(6), text, frames, audio)
    return {"audio": unit[0], "text": unit[1]}, [Labels(*(x[:3] for x in labels)), Labels(*(x[3:] for x in labels))]


if __name__ == "__main__":
    results = []
    for words, ds in json.loads(sys.argv[2]):
        cfg = load(RunConfig, words[0], words[1:])
        train(cfg, ds)
        collectives.barrier()
        lines = Path(cfg.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        results.append((steps[-2], of_losses[-2], json.loads(lines[-1])))
    space = meter.audio_space(*made_up(collectives.rank()))
    if collectives.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps([results, space]), encoding="utf-8")
