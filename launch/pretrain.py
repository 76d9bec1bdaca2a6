"""Pre-train: the audio tower onto frozen CLIP towers, or, with other loss weights, a CLIP from scratch.

laptop    deepspeed --num_accelerators 2 launch/pretrain.py --deepspeed_config ds.json
GPUs      deepspeed launch/pretrain.py configs/pretrain/howto_audioset.yaml
first     the same with --dry-run: checks all of it with one step at full size, and says what to expect
"""

from clip4vla.cli import entry_point, parse_args
from clip4vla.config import RunConfig
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    cfg, args = parse_args(RunConfig, "configs/pretrain/stamps.yaml", __doc__, dry_run=True)
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.training import preflight, train

    (preflight.check if args.dry_run else train.train)(cfg, args.deepspeed_config)


if __name__ == "__main__":
    main()
