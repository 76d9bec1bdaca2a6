"""What scripts in tests import, imported once by the process that they are forks of (forks.py)."""

import contextlib
import gc
import importlib
import sys
from pathlib import Path

PACKAGES = """torch deepspeed deepspeed.runtime.zero.muon.original_muon open_clip nvidia.dali.fn nvidia.dali.pipeline
    webdataset torchaudio soundfile setuptools matplotlib.axes matplotlib.figure""".split()
OURS = """clip4vla.train clip4vla.preflight clip4vla.evaluation clip4vla.captioning clip4vla.classification clip4vla.text_video
    clip4vla.zero_shot clip4vla.stages data_prep.shard data_prep.check data_prep.embed""".split()

sys.path.insert(0, str(Path(__file__).parents[1]))
for name in [*PACKAGES, *OURS]:
    with contextlib.suppress(ImportError):  # of a package that is not installed: the script that needs it says so
        importlib.import_module(name)
sys.path.pop(0)
gc.freeze()  # a fork looks for cycles among its own objects only
