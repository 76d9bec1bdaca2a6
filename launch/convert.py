"""Foreign weights as a model folder: model.safetensors, config.json, README.md. And back to the authors' names.

official  python launch/convert.py pytorch_model.bin.0 imported/clip4vla model.head=local_local
CLIP      python launch/convert.py ViT-B-32-quickgelu/openai imported/clip       (or a weights file of open_clip or OpenAI)
back      python launch/convert.py runs/msrvtt_retrieval pytorch_model.bin --to-official --base-checkpoint pytorch_model.bin.0

Prints what became of every key. docs/weights.md has the table of names.
"""

import argparse
from pathlib import Path

from clip4vla.cli import entry_point, help_text, path_word
from clip4vla.config import ImportConfig
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(ImportConfig), formatter_class=raw)
    parser.add_argument(
        "source",
        type=path_word,
        help="the authors' checkpoint, or what model.clip takes; to go back a model or run folder",
    )
    parser.add_argument("out", type=path_word, help="new folder; to go back a new file, .safetensors or torch's format")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings that the weights do not tell")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--allow-unknown", action="store_true", help="leave out keys that have no place")
    parser.add_argument("--to-official", action="store_true", help="from our names to the authors'")
    parser.add_argument(
        "--base-checkpoint", type=path_word, default="", help="to go back: a checkpoint that gives what the model lacks"
    )
    args = parser.parse_intermixed_args()
    args.out = Path(args.out)
    with quick_imports():  # after the command line: a typing error shows at once
        from clip4vla.checkpoints.lookup import newest_checkpoint
        from clip4vla.export import model_card, model_folder

    model_folder.must_be_new(args.out, is_folder=not args.to_official)
    if args.to_official:
        print(
            model_folder.export_official(
                newest_checkpoint(args.source) or args.source, args.out, args.dtype, args.base_checkpoint
            )
        )
        return
    model, account, origin = model_folder.import_weights(args.source, args.words, args.allow_unknown)
    print(account)
    print(
        f"{args.out}: {model_folder.save_model_folder(model, args.out, model_card.card(model, origin=origin), args.dtype)}"
    )


if __name__ == "__main__":
    main()
