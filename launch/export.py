"""The weights of a checkpoint as a model folder: model.safetensors, config.json and README.md, the model card.

local     python launch/export.py runs/stamps exported/stamps-300 --step 300 --dtype fp16
remote    python launch/export.py s3://bucket/run exported/run          (a train.mirror)
ONNX      python launch/export.py runs/stamps exported/stamps --onnx    also *.onnx of towers and head, fp32, checked
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

from clip4vla.cli import entry_point, path_word
from clip4vla.errors import UserError, one_line
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_word, help="run folder, checkpoint folder, or URL of a train.mirror")
    parser.add_argument("out", type=path_word, help="new folder")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--onnx", action="store_true", help="towers and head for onnxruntime too")
    args = parser.parse_args()
    args.out = Path(args.out)
    with quick_imports():
        from clip4vla.config_io import read_tree
        from clip4vla.export import model_card, model_folder
        from clip4vla.io.atomic import removed_if_empty
        from clip4vla.models.model import Model

    model_folder.must_be_new(args.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(removed_if_empty(args.out.parent))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = stack.enter_context(
            tempfile.TemporaryDirectory(dir=args.out.parent)
        )  # room for a remote checkpoint
        folder = find(args.source, args.step, Path(temporary))
        model, step = Model.from_checkpoint(folder), read_tree(folder / "config.json").get("step")
        if not isinstance(step, int | None):
            raise UserError(f"{folder}/config.json: its step is {step!r}, no number: take another checkpoint")
        card = model_card.card(model, run_of(folder), step)
        summary = model_folder.save_model_folder(model, args.out, card, args.dtype, step, args.onnx)
    print(f"{args.out}: {summary}, step {step} of {args.source}")


def find(source: str, step: int | None, temporary: Path) -> Path:
    """The checkpoint folder; UserError if there is none."""
    with quick_imports():
        from clip4vla.checkpoints import remote
        from clip4vla.checkpoints.lookup import newest_checkpoint

    name = f"step-{step:08d}" if step is not None else ""
    if "://" in source:
        try:
            url = f"{source.rstrip('/')}/{name}" if name else remote.newest_upload(source)
            if url:
                remote.download(url, temporary / "checkpoint")
                return temporary / "checkpoint"
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"{source}: {one_line(error)}") from None
    folder = Path(source, "checkpoints", name) if name else newest_checkpoint(source) or Path(source)
    if "://" in source or not (folder / "model.safetensors").is_file():
        raise UserError(f"{source}: no complete checkpoint{f' of step {step}' if name else ''} there")
    return folder


def run_of(folder: Path) -> Path | None:
    """The run that a checkpoint lies in."""
    run = folder.parent.parent
    return run if folder.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


if __name__ == "__main__":
    main()
