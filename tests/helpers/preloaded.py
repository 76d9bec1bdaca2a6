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
gc.freeze()  # a fork looks for cycles among its own objects only
