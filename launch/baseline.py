"""Compute what a plain method gets from the same shards: statistics of log-mel spectrograms and logistic regressions.

    python launch/baseline.py configs/finetune/esc50_classification.yaml      # any run's config: its data.train and data.test
    python launch/baseline.py data.train=SHARDS data.test=SHARDS run_dir=DIR

Prints the table and writes RUN_DIR/baseline.json, which tables and pages then show as the row "plain baseline".
"""

from pathlib import Path

from clip4vla.cli import entry_point, parse_args
from clip4vla.config import RunConfig
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    cfg, _ = parse_args(RunConfig, None, __doc__)
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.evaluation import baseline
        from clip4vla.io.atomic import removed_if_empty

    with removed_if_empty(Path(cfg.run_dir)):
        metrics = baseline.evaluate(cfg)
    print(baseline.table(metrics))
    baseline.write(metrics, cfg)


if __name__ == "__main__":
    main()
