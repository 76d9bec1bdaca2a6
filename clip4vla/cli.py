"""Parse the command line of an entry script, and report a mistake in one line instead of a traceback."""

import argparse
import atexit
import errno
import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from clip4vla.config_io import Config, describe, expand_path, load
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError

EXTRAS = {  # setup.py's, by the names that are imported
    "train": (
        "deepspeed",
        "webdataset",
        "braceexpand",
        "wandb",
        "tqdm",
        "matplotlib",
        "soundfile",
        "cairosvg",
        "fsspec",
    ),
    "dali": ("nvidia",),
    "eval": ("pycocoevalcap", "sklearn"),
    "web": ("faiss", "gradio", "fastapi", "uvicorn", "matplotlib", "soundfile", "cairosvg", "fsspec"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "s3": ("s3fs",),
    "hf": ("pyarrow", "datasets", "transformers", "sentencepiece"),
    "bench": ("librosa", "cv2", "threadpoolctl", "packaging"),
}
UNUSED = (
    "timm",
    "transformers",
)  # open_clip would import them; quick_imports.py does, where a tower of theirs is asked for
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def help_text(cls: type) -> str:
    """List every setting, with its type, default and meaning, for `--help`."""
    return "settings (YAML keys, or KEY=VALUE on the command line):\n" + "\n".join(
        f"  {key:<26} {kind}\n{'':<29}{meaning}" for key, kind, meaning in describe(cls)
    )


def path_word(text: str) -> str:
    """Expand ~ and $VARIABLES in a path or URL of the command line, as argparse's `type`."""
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(
    cls: type[Config], default: str | None, about: str, dry_run: bool = False, files_from: bool = False
) -> tuple[Config, argparse.Namespace]:
    """Parse `[CONFIG.yaml] [KEY=VALUE ...]` and what the launchers add; --help lists every setting."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=help_text(cls), formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|KEY=VALUE", help=f"default config: {default}")
    parser.add_argument(
        "--deepspeed_config",
        type=path_word,
        help="DeepSpeed's JSON; default: ./ds.json, else configs/deepspeed/ds.json",
    )
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="check everything with one real step; write nothing")
    if files_from:
        parser.add_argument(
            "--from", dest="files", nargs="+", type=path_word, metavar="FILE", help="vectors computed elsewhere"
        )
    args = parser.parse_intermixed_args()
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"command line: one config file at most, not {' and '.join(files)}")
    path = expand_path(files[0]) if files else default
    if path == default and path and not Path(path).is_file():
        path = str(Path(__file__).parent.parent / path)
    return load(cls, path, [word for word in args.words if "=" in word]), args


def entry_point(main: Callable[[], object]) -> Callable[[], None]:
    """Decorate an entry script's main: a UserError, a package that is not installed, or a disk that cannot be written, is
    one line on stderr and exit code 2.

    Of several ranks that fail, the first is reported (watchdog.py); before they have met, rank 0.
    """

    @functools.wraps(main)
    def run() -> None:
        watch.enabled, in_order = True, False
        try:
            main()
            in_order = True
        except SystemExit:
            in_order = True
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            message = _explained(error)
            watch.fail(2 if message else 1, message or traceback.format_exc())
            if not message:
                raise
            if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
                time.sleep(5)  # most mistakes are every rank's: rank 0 reports it, and the launcher ends the others
            print(message, file=sys.stderr, flush=True)
            sys.exit(2)
        finally:
            watch.stop(in_order)

    return run


def _explained(error: Exception) -> str:
    """Explain in one line a mistake that the user can correct; "" for any other error."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):
        return _extra_of((error.name or "").partition(".")[0])
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"error: {error.filename or 'writing'}: {error.strerror}: make room, or choose another folder"
    return ""


def _extra_of(package: str) -> str:
    """Name in one line the extras that install a package; "" if none does."""
    wanted = [f"'clip4vla[{extra}]'" for extra, packages in EXTRAS.items() if package in packages]
    return f"error: {package} is not installed: pip install {' or '.join(wanted)}" if wanted else ""


def _before_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report, as sys.excepthook, a package that an entry script imports before its `main` and that is not installed."""
    message = isinstance(error, ModuleNotFoundError) and _explained(error)
    if not message:
        return sys.__excepthook__(kind, error, trace)
    print(message, file=sys.stderr, flush=True)
    sys.exit(2)


def _set_allocator() -> None:
    """Let CUDA's allocator grow its blocks, unless the user has set it: batches differ in size, and leave gaps in fixed ones.

    torch reads the setting when CUDA starts.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


_set_allocator()
sys.excepthook = _before_main  # only entry scripts import this module
atexit.register(gc.freeze)  # else the interpreter ends with seconds of looking for cycles among all that was imported
for package in UNUSED:  # the second that timm and wandb, which it brings, would take is saved
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
