"""A large index: 10,000,000 samples in 10,000 shards, of which a rank keeps the counts, and the offsets of what it reads.

The tars are links to one real tar, so that an epoch of ten million decodes as it would; every shard has its own row in
index.json and lines in entries.jsonl. Memory and time are those of fresh processes, against a folder of one shard; beside it
what all offsets would take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from clip4vla.data.shards import write_index, write_shard
from clip4vla.io.atomic import write_json

SHARDS, SAMPLES = 10_000, 1_000
BATCH = 256
MEASURE = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
import torch
from clip4vla.config import DataSources, MaskConfig
from clip4vla.data.loader import Loader
from clip4vla.data.sampler import TrainSampler
from clip4vla.data.shards import ShardFolder
def memory(name):  # not getrusage: its peak is that of the process which started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
folder, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
imported, before = time.perf_counter(), memory("VmRSS")
opened = ShardFolder.open(folder, DataSources(decode_threads=1))
indexed, after = time.perf_counter(), memory("VmRSS")
order = TrainSampler([[shard.samples for shard in opened.shards]], [1.0], batch, 0, 8)
loader = Loader([opened], order, opened.cfg, tokenize=lambda texts: torch.zeros(len(texts), 32, dtype=torch.int64),
                mask=MaskConfig(), seed=0, needs=("fbank", "frames"), device=torch.device("cpu"),
                damage_log=Path(folder, "corrupt.jsonl"))
seen = set()
far = len(opened) // batch // 2
first = None
for k in (0, 1, far, *range(far + 1, far + steps)):
    got = loader.batch(k)
    seen.update(got.ids)
    first = first or time.perf_counter()
for k in range(0, len(opened) // batch, max(1, len(opened) // batch // 200)):
    opened.read([(place.shard, place.entry) for place in order.batch(k)], ("json",))
print(json.dumps({"samples": len(opened), "open_s": indexed - imported, "first_batch_s": first - imported,
                  "index_bytes": after - before, "peak_bytes": memory("VmHWM"),
                  "shards_in_use": len(opened.in_use), "corrupt": loader.corrupt,
                  "bytes_in_use": sum(sys.getsizeof(line) for part in opened.in_use.values() for line in part.lines)}))
"""
OLD = """
import json, sys
from pathlib import Path
with open(sys.argv[1]) as stream:
    tree = json.load(stream)
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1]))
"""


def campaign(folder: Path, seed: int) -> dict:
    """Both sizes and the formula."""
    tar = one_shard(folder / "tar", SAMPLES)
    found = {}
    for name, shards in (("one", 1), ("large", SHARDS)):
        place = spread(folder / name, tar, shards)
        found[name] = {"shards": shards, **measured(place)}
        found[name] |= {f"{file}_mb": (place / file).stat().st_size / 1e6 for file in ("index.json", "entries.jsonl")}
    large, one = found["large"], found["one"]
    assert large["corrupt"] == one["corrupt"] == 0, found
    a_shard = (large["index_bytes"] - one["index_bytes"]) / (SHARDS - 1)
    tree = folder / "tree.json"
    old = whole_tree(tree, folder / "large", 200)
    return {
        **found,
        "bytes_a_shard": a_shard,
        "bytes_a_sample": a_shard / SAMPLES,
        "mb_of_1e9_samples_in_1e6_shards": a_shard,  # 1e6 shards, 1e6 bytes in a megabyte
        "bytes_a_sample_if_all_offsets_were_kept": old,
    }


def one_shard(folder: Path, samples: int) -> tuple[Path, dict]:
    """A tar of that many samples, and what write_shard says of it: the sample's clips, over and over under other ids."""
    from forks import ROOT

    from clip4vla.data.shards import ShardFolder

    done = _run("data_prep/shard.py", "configs/data/sample.yaml", f"out={folder}/few", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    few = ShardFolder.open(str(folder / "few/speech_fr/train"))
    clips = [
        c
        for c in few.read([(s, e) for s, held in enumerate(few.shards) for e in range(held.samples)])
        if isinstance(c, dict)
    ]
    fbank = next(ext for ext in few.entries(0)[0][1] if ext.startswith("fbank"))

    def rows():
        for i in range(samples):
            clip = clips[i % len(clips)]
            meta = json.loads(clip["json"]) | {"id": f"clip {i}", "group": f"clip {i}"}
            yield (
                f"{i:07d}-clip",
                {"json": json.dumps(meta).encode(), fbank: clip["fbank"], "frames.jpg": clip["frames"]},
            )

    path = folder / "one.tar"
    entry = write_shard(path, rows())
    (folder / "head.json").write_text(json.dumps({"fingerprint": few.fingerprint}))
    return path, entry


def spread(folder: Path, tar: tuple[Path, dict], shards: int) -> Path:
    """A folder of that many shards, all links to the tar."""
    path, entry = tar
    folder.mkdir(parents=True)
    fingerprint = json.loads((path.parent / "head.json").read_text())["fingerprint"]
    for i in range(shards):
        os.link(path, folder / f"s-train-{i:06d}.tar")
    rows = (entry | {"name": f"s-train-{i:06d}.tar"} for i in range(shards))
    about = {"media_root": ".", "source": "s", "split": "train", "counts": {"samples": shards * entry["samples"]}}
    write_index(folder, fingerprint=fingerprint, **about, shards=rows)
    return folder


def measured(folder: Path, batch: int = BATCH, steps: int = 8) -> dict:
    """What a fresh process needs to open a folder, for its first batch, and for reading all over an epoch."""
    done = _run("-c", MEASURE, folder, batch, steps)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def whole_tree(file: Path, folder: Path, shards: int) -> float:
    """Bytes a sample of offsets that are all kept as Python has them from JSON, from some of the shards."""
    from clip4vla.data.shards import ShardFolder

    opened = ShardFolder.open(str(folder))
    entries = [list(opened.entries(i % len(opened.shards))) for i in range(shards)]
    write_json(file, [])
    empty = int(_run("-c", OLD, file).stdout)
    write_json(file, entries)
    full = int(_run("-c", OLD, file).stdout)
    return (full - empty) / sum(map(len, entries))


def _run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    from forks import ROOT

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=1800
    )
