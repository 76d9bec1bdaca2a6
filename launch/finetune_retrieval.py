"""Fine-tune for text-video retrieval: all towers, and a head that compares text with frames and sound (model.head).

laptop    deepspeed --num_accelerators 2 launch/finetune_retrieval.py configs/finetune/stamps_retrieval.yaml
GPUs      deepspeed launch/finetune_retrieval.py configs/finetune/msrvtt_retrieval.yaml model.head=local_local
then      python launch/evaluate.py configs/finetune/msrvtt_retrieval.yaml model.head=local_local
"""

from clip4vla.cli import entry_point, parse_args
from clip4vla.config import RunConfig
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    cfg, args = parse_args(RunConfig, "configs/finetune/stamps_retrieval.yaml", __doc__, dry_run=True)
    if not cfg.loss.tm:
        raise UserError("loss.tm is 0: fine-tuning for retrieval trains it; set loss.tm=1 (and at, av, aa to 0)")
    if cfg.eval.task != "retrieval":
        raise UserError(f"eval.task={cfg.eval.task}: what is trained here is evaluated by eval.task=retrieval")
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.training import preflight, train

    (preflight.check if args.dry_run else train.train)(cfg, args.deepspeed_config)


if __name__ == "__main__":
    main()
