"""Fine-tune for captioning: all towers, and the Multimodal Caption Generator on top of them (model.head=captioner).

laptop    deepspeed --num_accelerators 2 launch/finetune_captioning.py configs/finetune/stamps_captioning.yaml
GPUs      deepspeed launch/finetune_captioning.py configs/finetune/msrvtt_captioning.yaml
then      python launch/evaluate.py configs/finetune/msrvtt_captioning.yaml decode.num_beams=5
"""

from clip4vla.cli import entry_point, parse_args
from clip4vla.config import RunConfig
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    cfg, args = parse_args(RunConfig, "configs/finetune/stamps_captioning.yaml", __doc__, dry_run=True)
    if not cfg.loss.caption:
        raise UserError(
            "loss.caption is 0: fine-tuning for captioning trains it; set loss.caption=1 (and at, av, aa to 0)"
        )
    if cfg.eval.task != "captioning":
        raise UserError(f"eval.task={cfg.eval.task}: what is trained here is evaluated by eval.task=captioning")
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.training import preflight, train

    (preflight.check if args.dry_run else train.train)(cfg, args.deepspeed_config)


if __name__ == "__main__":
    main()
