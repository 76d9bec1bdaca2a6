"""Train any stage in one loop: stages differ in which towers train and which losses have a weight."""

import signal
import sys
from typing import Any

from clip4vla.checkpoints.manager import CheckpointManager, frozen_weights
from clip4vla.config import RunConfig
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.evaluation.runner import BackgroundValidator
from clip4vla.report import page, tracking
from clip4vla.training import engine, preflight, train_step
from clip4vla.training.meter import Meter
from clip4vla.training.run_setup import prepare, train_loader

PREEMPTED = 85  # exit code after SIGTERM or SIGUSR1, once the state is saved


def train(cfg: RunConfig, ds_config: str | None) -> None:
    """Train until max_steps, from wherever this run stands; exit 85 when a signal asked to stop."""
    stop = _Signals()  # first: start-up takes minutes
    collectives.setup(cfg.train.hang_timeout_minutes)
    with tracking.own(cfg):  # before it is looked up where the run stands
        _train(cfg, ds_config, stop)


def _train(cfg: RunConfig, ds_config: str | None, stop: "_Signals") -> None:
    setup = prepare(cfg, ds_config)
    tracking.start_run(cfg, setup.ds)
    frozen = frozen_weights(setup.model)
    watch.progress("start-up: engine")
    run = engine.start(setup.model, setup.ds, cfg.train)
    sizes = [[shard.samples for shard in folder.shards] for folder in setup.folders]
    checkpoints = CheckpointManager(run, cfg, frozen, sizes)
    watch.progress("start-up: checkpoint")
    step = checkpoints.load(setup.resume) if setup.resume else 0
    tracker = tracking.Tracker(cfg, step)
    loader = train_loader(cfg, setup.folders, setup.vectors, setup.device, setup.model.pictures)
    for line in preflight.describe(cfg, setup, loader, step):
        tracker.say(line)
    held_out = BackgroundValidator(cfg, tracker.say)
    due = cfg.eval.every_steps and step and step % cfg.eval.every_steps == 0
    if due and held_out.lacks(step):  # killed in its evaluation
        with engine.gathered_parameters(run):
            held_out.start(run.module, step)
    meter = Meter(cfg, setup)
    watch.progress(f"step {step + 1}: data")
    for micros in meter.timed(loader.steps(step, cfg.train.max_steps)):
        watch.progress(f"step {step + 1}: forward and backward")
        engine.set_learning_rate(run, engine.learning_rate(step, cfg.train))
        with preflight.enough_memory(cfg):
            losses, features = train_step.step(run, micros, cfg)
        step += 1
        meter.add(losses, features, micros, run)
        tracker.took(step, micros)
        evaluating = cfg.eval.every_steps and step % cfg.eval.every_steps == 0
        saving = checkpoints.should_save(step) or (evaluating and cfg.eval.best_metric)  # the best one is to be there
        stopped = stop.anywhere()
        if saving or stopped or evaluating or step % cfg.train.log_every == 0:
            tracker.rows_of(meter.rows(step, run))  # stops if a loss is not finite, so such a state is never saved
        if saving or stopped:
            watch.progress(f"step {step}: checkpoint")
            held_out.finish()  # who resumes here would not evaluate the step before again
            checkpoints.save(step)
        if evaluating:
            watch.progress(f"step {step}: evaluation")
            with engine.gathered_parameters(run):
                held_out.start(run.module, step)
        if not meter.pending:
            meter.restart()  # the rates are those of training alone
        if stopped or ((saving or evaluating) and stop.now()):  # these take long: signals that came meanwhile count
            checkpoints.save(step)
            break
        watch.progress(f"step {step + 1}: data")
    watch.progress("the end")
    held_out.finish()
    checkpoints.close()
    run.destroy()  # else its hooks keep it, and a next run in this process has less memory
    tracker.say(f"step {step} of {cfg.train.max_steps}: state saved in {cfg.run_dir}/checkpoints")
    tracker.close()
    if collectives.rank() == 0:
        with tracking.watching("curves.png"):
            page.write_plot(cfg.run_dir, tracking.read_rows(cfg.run_dir))
    collectives.barrier()
    if step < cfg.train.max_steps:
        sys.exit(PREEMPTED)


class _Signals:
    """Catches SIGTERM and SIGUSR1, which ask for a stop; all ranks agree on the step.

    Signals between two runs of a process stop the next one.
    """

    asked = False

    def __init__(self) -> None:
        self.agree = collectives.AsyncAnyFlag()
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, *_: Any) -> None:
        _Signals.asked = True

    def anywhere(self) -> bool:
        """Tell whether any rank was asked to stop, as of the last call."""
        return self.agree(self.asked)

    def now(self) -> bool:
        """Tell whether any rank was asked to stop, as of this call, for which the ranks wait for each other."""
        self.agree(self.asked)
        return self.agree(self.asked)
