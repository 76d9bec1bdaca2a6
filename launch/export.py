"""The weights of a checkpoint as OUT/model.safetensors and OUT/config.json, for Model.from_checkpoint(OUT).

local     python launch/export.py runs/stamps exported/stamps-300 --step 300 --dtype fp16
remote    python launch/export.py s3://bucket/run exported/run          (a train.mirror)
"""

import argparse
import json
import tempfile
from pathlib import Path

from clip4vla.cli import cli
from clip4vla.config import UserError

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder, checkpoint folder, or URL of a train.mirror")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    if args.out.exists() or any(parent.is_file() for parent in args.out.parents):
        raise UserError(f"{args.out} is there already, or below a file; name another folder, or remove it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as temporary:  # as large as a checkpoint, if that is remote
        folder = find(args.source, args.step, Path(temporary))
        print(f"{args.out}: {export(folder, args.out, args.dtype)} of {args.source}")


def find(source: str, step: int | None, temporary: Path) -> Path:
    """The checkpoint folder; UserError if there is none."""
    from clip4vla import mirror
    from clip4vla.checkpoints import newest_checkpoint

    name = f"step-{step:08d}" if step is not None else ""
    if "://" in source:
        try:
            url = f"{source.rstrip('/')}/{name}" if name else mirror.newest_upload(source)
            if url:
                mirror.download(url, temporary / "checkpoint")
                return temporary / "checkpoint"
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"{source}: {' '.join(str(error).split())[:200]}") from None
    folder = Path(source, "checkpoints", name) if name else newest_checkpoint(source) or Path(source)
    if "://" in source or not (folder / "model.safetensors").is_file():
        raise UserError(f"{source}: no complete checkpoint{f' of step {step}' if name else ''} there")
    return folder


def export(folder: Path, out: Path, dtype: str) -> str:
    """Write OUT aside, sync and rename it; what was written, in one line. UserError if the checkpoint cannot be loaded."""
    import torch
    from safetensors.torch import save_file

    from clip4vla.model import Model
    from clip4vla.universal import fsync

    model = Model.from_checkpoint(folder)
    weights = {name: value.to(getattr(torch, DTYPES[dtype])) for name, value in model.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{folder}: some weights are not finite in {dtype}; take another --dtype or --step")
    aside = out.with_name(f"{out.name}.partial")
    aside.mkdir(exist_ok=True)
    save_file(weights, aside / "model.safetensors")
    step = json.loads((folder / "config.json").read_text()).get("step")
    (aside / "config.json").write_text(json.dumps(model.config() | {"step": step}, indent=1))
    for file in (*aside.iterdir(), aside):
        fsync(file)
    aside.rename(out)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    size = (out / "model.safetensors").stat().st_size / 1e6
    return f"{millions:.1f}M weights in {dtype}, {size:.0f} MB, step {step}"


if __name__ == "__main__":
    main()
