"""Fine-tune for text-video retrieval: all towers, and a head that compares text with frames and sound (model.fusion).

laptop    deepspeed --num_accelerators 2 launch/finetune_retrieval.py configs/finetune/stamps_retrieval.yaml
GPUs      deepspeed launch/finetune_retrieval.py configs/finetune/msrvtt_retrieval.yaml model.fusion=local_local
then      python launch/evaluate.py configs/finetune/msrvtt_retrieval.yaml model.fusion=local_local
"""

from clip4vla.cli import cli, command_line
from clip4vla.config import RunConfig, UserError


@cli
def main() -> None:
    cfg, args = command_line(RunConfig, "configs/finetune/stamps_retrieval.yaml", __doc__, dry_run=True)
    if not cfg.loss.tm:
        raise UserError("loss.tm is 0: fine-tuning for retrieval trains it; set loss.tm=1 (and at, av, aa to 0)")
    if cfg.eval.task != "retrieval":
        raise UserError(f"eval.task={cfg.eval.task}: what is trained here is evaluated by eval.task=retrieval")
    from clip4vla import preflight, train  # after the settings are read: a typing error shows at once

    (preflight.check if args.dry_run else train.train)(cfg, args.deepspeed_config)


if __name__ == "__main__":
    main()
