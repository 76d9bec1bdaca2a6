"""Pre-train: the audio tower onto frozen CLIP towers, or, with other loss weights, a CLIP from scratch.

laptop    deepspeed --num_accelerators 2 launch/pretrain.py --deepspeed_config ds.json
one GPU   deepspeed launch/pretrain.py configs/pretrain/howto_audioset.yaml train.batch_size=256
cluster   sbatch launch/slurm/pretrain.sbatch configs/pretrain/howto_audioset.yaml
"""

from clip4vla.config import RunConfig, cli, command_line
from clip4vla.train import train


@cli
def main() -> None:
    cfg, args = command_line(RunConfig, "configs/pretrain/stamps.yaml", __doc__)
    train(cfg, args.deepspeed_config)


if __name__ == "__main__":
    main()
