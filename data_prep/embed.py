"""Embed the captions and frames of shards with the frozen text and vision towers of a pre-training run.

    python data_prep/embed.py [CONFIG.yaml] [KEY=VALUE ...]      # the run's own config; without one: configs/pretrain/stamps.yaml
    deepspeed --num_accelerators 8 data_prep/embed.py ...        # each rank takes its shards; also torchrun, or srun
    python data_prep/embed.py CONFIG.yaml model.clip=vectors:NAME --from FILES    # vectors that another program computed

Fills FOLDER/clip/ (clip4vla/data/precomputed_embeddings.py says with what) for every folder of data.train and data.val, local or
at any fsspec URL; the shards stay as they are. Pre-training then runs the audio tower alone and reads no frames. May be killed
at any moment and started again: finished shards are kept (.parts/ says which), those of other towers or rewritten shards are
made again. The bytes depend on the number of threads of a rank (OMP_NUM_THREADS) and on the device, not on the number of ranks.

--from: no tower is run. The vectors of captions, frames or whole clips are copied from .parquet, .npz and .safetensors files, by
the clips' ids (data_prep/packed/vectors.py says how they are named), for data.test too. One process; each call writes all again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import entry_point, parse_args  # noqa: E402
from clip4vla.config import RunConfig  # noqa: E402
from clip4vla.quick_imports import quick_imports  # noqa: E402


@entry_point
def main() -> None:
    """Read the run's config, embed what is not embedded yet, print counts of each folder."""
    cfg, args = parse_args(RunConfig, "configs/pretrain/stamps.yaml", __doc__, files_from=True)
    with quick_imports():  # after the words are read: a typing error shows at once
        from data_prep import embed_shards
        from data_prep.packed import vector_shards

    if args.files:
        vector_shards.run(cfg, args.files)
    else:
        embed_shards.run(cfg)


if __name__ == "__main__":
    main()
