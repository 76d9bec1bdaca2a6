"""Import large packages in three quarters of the time that it takes otherwise, or only where they are needed."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import, in the block, without looking for cycles among what the imports make, now and ever after."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def import_for_open_clip(package: str) -> Any:
    """Import timm or transformers, which cli.py keeps out, and give it to open_clip, which was imported without."""
    user = {"timm": "open_clip.timm_model", "transformers": "open_clip.hf_model"}[package]
    if sys.modules.get(package, sys) is None:
        del sys.modules[package]
    module = importlib.import_module(package)
    if user in sys.modules and getattr(sys.modules[user], package) is None:
        importlib.reload(sys.modules[user])  # its classes of before see what it holds now
    return module
