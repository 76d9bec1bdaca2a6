"""The one training loop, for every stage: what differs is which towers train and which losses have a weight."""

import signal
import sys
from pathlib import Path
from typing import Any

import torch

from clip4vla import accumulation, distributed, engine, tracking
from clip4vla.build import build_model
from clip4vla.checkpoints import Checkpoints, frozen_weights, newest_checkpoint
from clip4vla.config import RunConfig, UserError, to_dict
from clip4vla.evaluation import check_evaluation, evaluate
from clip4vla.loader import Loader, TrainOrder, open_folders
from clip4vla.meter import Meter
from clip4vla.towers import tokenizer
from clip4vla.vectors import open_vectors

PREEMPTED = 85  # exit code after SIGTERM or SIGUSR1, once the state is saved


def train(cfg: RunConfig, ds_config: str | None) -> None:
    """Train until max_steps, from wherever this run stands; exit 85 when a signal asked to stop."""
    device = distributed.setup()
    torch.manual_seed(cfg.seed)
    folders = open_folders(cfg.data.train, "data.train")
    ds = engine.merge(*engine.read_ds_config(ds_config), cfg)
    check_evaluation(cfg)
    if not any(to_dict(cfg.loss)[name] for name in ("at", "av", "aa", "tv")):
        raise UserError("loss: every weight is 0: give at, av, aa or tv one")
    resume = distributed.gather_objects(newest_checkpoint(cfg.run_dir))[0]  # one rank's view of the disk
    model, origin = build_model(cfg, folders[0].fingerprint, resume)
    vectors = open_vectors(folders, cfg, model)  # before the engine rounds the weights that they are checked against
    tracking.start_run(cfg, ds)
    frozen = frozen_weights(model)
    run = engine.start(model, ds)
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    checkpoints = Checkpoints(run, cfg, frozen, sizes)
    step = checkpoints.load(resume) if resume else 0
    tracker = tracking.Tracker(cfg, step)
    _introduce(cfg, folders, vectors, model, origin, ds, step, tracker)
    loader = train_loader(cfg, folders, vectors, device)
    stop = _Signals()
    meter = Meter(cfg, device)
    for micros in meter.timed(loader.steps(step, cfg.train.max_steps)):
        engine.set_learning_rate(run, engine.learning_rate(step, cfg.train))
        losses, features = accumulation.step(run, micros, cfg)
        step += 1
        meter.add(losses, features, micros)
        stopped = stop.anywhere()
        saving = step % cfg.train.save_every == 0 or step == cfg.train.max_steps or stopped
        if saving or step % cfg.train.log_every == 0:
            tracker.rows_of(meter.rows(step, run))  # stops if a loss is not finite, so such a state is never saved
        if saving:
            checkpoints.save(step)
        if cfg.eval.every and step % cfg.eval.every == 0:
            with engine.whole_weights(run):
                evaluate(run.module, cfg, cfg.data.val, f"val-{step:08d}", tracker.say)
        if not meter.pending:
            meter.restart()  # the rates are those of training alone
        if stopped:
            break
    tracker.say(f"step {step} of {cfg.train.max_steps}: state saved in {cfg.run_dir}/checkpoints")
    tracker.close()
    distributed.barrier()
    if step < cfg.train.max_steps:
        sys.exit(PREEMPTED)


def train_loader(cfg: RunConfig, folders: list, vectors: list | None, device: torch.device) -> Loader:
    """The endless stream of training batches; spectrograms that no loss needs are not read, nor frames where vectors do."""
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    order = TrainOrder(sizes, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.window)
    loss = cfg.loss
    needs = ["fbank"] * bool(loss.at or loss.av or loss.aa)
    needs += ["frames"] * bool((loss.av or loss.tv) and not vectors)
    return Loader(
        folders, order, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=needs, vectors=vectors, device=device, pieces=cfg.train.accumulate,
        damage_log=Path(cfg.run_dir, f"damaged-{distributed.rank()}.jsonl"),
    )  # fmt: skip


def _introduce(cfg, folders, vectors, model, origin, ds, step, tracker) -> None:
    """One page on what is about to run."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    precision = next((kind for kind in ("bf16", "fp16") if ds[kind]["enabled"]), "fp32")
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    lines = [f"{'data':<10} {folder.url}: {len(folder)} samples in {len(folder.shards)} shards" for folder in folders]
    lines += [
        f"{'vectors':<10} {'of text and frames from embed.py' if vectors else 'not used'}",
        f"{'model':<10} {cfg.model.clip}, weights from {origin}",
        f"{'training':<10} {model.cfg.train_towers}: {trained:.1f}M parameters; losses {to_dict(cfg.loss)}",
        f"{'engine':<10} {distributed.world()} ranks, ZeRO-{stage}, {precision}, global batch {cfg.train.batch_size}",
        f"{'memory':<10} {engine.expected_memory(model, ds):.2f} GiB a rank for weights, gradients and optimizer",
        f"{'steps':<10} {step} done of {cfg.train.max_steps}; run folder {cfg.run_dir}",
    ]
    for line in lines:
        tracker.say(line)


class _Signals:
    """SIGTERM and SIGUSR1 ask for a stop; all ranks agree on the step."""

    def __init__(self) -> None:
        self.asked, self.agree = False, distributed.AnyRank()
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop, as of the last call."""
        return self.agree(self.asked)
