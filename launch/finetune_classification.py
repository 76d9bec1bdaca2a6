"""Classification, Table 6's task: a linear probe on frozen features, class names in words, or all of it fine-tuned.

probe      python launch/finetune_classification.py configs/finetune/stamps_classification.yaml
zero-shot  python launch/finetune_classification.py configs/finetune/stamps_classification.yaml classify.method=zero_shot
fine-tuned deepspeed launch/finetune_classification.py configs/finetune/esc50_finetuned.yaml          (a run for each fold)
"""

from clip4vla.cli import entry_point, parse_args
from clip4vla.config import RunConfig
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    cfg, args = parse_args(RunConfig, "configs/finetune/stamps_classification.yaml", __doc__, dry_run=True)
    if cfg.eval.task != "classification":
        raise UserError(f"eval.task={cfg.eval.task}: what is done here is evaluated by eval.task=classification")
    trains = cfg.model.head == "classifier"
    if bool(cfg.loss.label) != trains or bool(cfg.train.max_steps) != trains:
        raise UserError(
            f"model.head={cfg.model.head}, loss.label={cfg.loss.label:g}, train.max_steps={cfg.train.max_steps}: fine-tuning "
            "needs classifier, a weight and steps; a probe or zero-shot, on the weights of init_from, neither weight nor steps"
        )
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.training import (
            cross_validation,
            pipeline,
            preflight,
        )

    if args.dry_run and trains:
        preflight.check(cross_validation.runs(cfg)[0], args.deepspeed_config)
    elif trains:
        cross_validation.fit_and_test(cfg, args.deepspeed_config)
    else:
        pipeline.test(cfg)


if __name__ == "__main__":
    main()
