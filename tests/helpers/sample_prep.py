"""data_prep/shard.py's words and results on the sample, and files of tones."""

import json

import numpy as np
import soundfile
from forks import ROOT

from clip4vla.data.shards import ShardFolder

SAMPLE = ROOT / "tests" / "sample"


def settings(out, *words, media=SAMPLE, dataset="stamps"):
    fixed = [f"media_root={media}", f"out={out}", f"dataset={dataset}", "workers=2", "samples_per_shard=4"]
    return [str(ROOT / "configs/data/sample.yaml"), *fixed, *words]


def contents(out):
    """Bytes of everything that a run leaves, by path."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and ".lock" not in path.name]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def rows_of(place):
    shards = ShardFolder.open(str(place))
    where = [(s, e) for s, shard in enumerate(shards.shards) for e in range(shard.samples)]
    return [json.loads(item["json"]) for item in shards.read(where, ("json",))]


def tones(media, *names):
    """A folder data set of one-second tones of different pitch; files that are there stay as they are."""
    media.mkdir(exist_ok=True)
    for name in names:
        if not (media / f"{name}.wav").exists():
            soundfile.write(media / f"{name}.wav", np.sin(np.arange(8000) * (0.1 + int(name[1:]) / 9)), 8000)
    (media / "captions.csv").write_text("path,caption\n" + "".join(f"{name}.wav,{name}\n" for name in names))
