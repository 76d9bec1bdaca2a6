"""Zero-shot retrieval of a run's newest checkpoint on data.test, in every direction; metrics and a page to look at.

laptop    python launch/evaluate.py configs/pretrain/stamps.yaml
two ranks deepspeed --num_accelerators 2 launch/evaluate.py configs/pretrain/stamps.yaml eval.types=[both,0.3]
"""

from clip4vla.cli import cli, command_line
from clip4vla.config import RunConfig, UserError


@cli
def main() -> None:
    cfg, _ = command_line(RunConfig, "configs/pretrain/stamps.yaml", __doc__)
    from clip4vla import distributed  # after the settings are read: a typing error shows at once
    from clip4vla.checkpoints import newest_checkpoint
    from clip4vla.evaluation import check_evaluation, evaluate, write_report
    from clip4vla.model import CLIP4VLA

    device = distributed.setup()
    check_evaluation(cfg)
    checkpoint = newest_checkpoint(cfg.run_dir)
    if checkpoint is None:
        raise UserError(f"run_dir {cfg.run_dir}: no checkpoint there; train first, or name the run with run_dir=FOLDER")
    model = CLIP4VLA.from_checkpoint(checkpoint).to(device)
    result = evaluate(model, cfg, cfg.data.test, "test", print, with_examples=True)
    if result:
        print(f"report: {write_report(cfg, checkpoint, *result)}")
    distributed.barrier()


if __name__ == "__main__":
    main()
