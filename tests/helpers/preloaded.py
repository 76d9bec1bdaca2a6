"""What scripts in tests import, imported once by the process that they are forks of (forks.py)."""

import contextlib
import gc
import importlib
import sys
from pathlib import Path

PACKAGES = """torch deepspeed deepspeed.runtime.zero.muon.original_muon open_clip nvidia.dali.fn nvidia.dali.pipeline
    webdataset torchaudio soundfile setuptools matplotlib.axes matplotlib.figure""".split()
OURS = """clip4vla.training.train clip4vla.training.preflight clip4vla.evaluation.runner clip4vla.evaluation.captioning
    clip4vla.evaluation.classification clip4vla.evaluation.text_video clip4vla.evaluation.zero_shot
    clip4vla.training.pipeline data_prep.build_shards data_prep.checks.folders
    data_prep.checks.page data_prep.embed_shards""".split()

sys.path.insert(0, str(Path(__file__).parents[2]))
for name in [*PACKAGES, *OURS]:
    with contextlib.suppress(ImportError):  # of a package that is not installed: the script that needs it says so
        importlib.import_module(name)
sys.path.pop(0)


def _share_tables(kind: type) -> None:
    """Let each of open_clip's tokenizers take the tables of the first one, which take 0.2 s to make."""
    make, made = kind.__init__, kind()

    def init(self: object, *args: object, context_length: int = 77, **words: object) -> None:
        if args or words:
            return make(self, *args, context_length=context_length, **words)
        vars(self).update(vars(made) | {"cache": dict(made.cache), "context_length": context_length})

    kind.__init__ = init


if "open_clip" in sys.modules:
    _share_tables(sys.modules["open_clip"].SimpleTokenizer)
gc.freeze()  # a fork looks for cycles among its own objects only
