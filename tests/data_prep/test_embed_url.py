"""data_prep/embed.py on shards at a URL: the vectors that local shards get, through faults, an end in the middle, and ranks."""

import signal
import time
from collections import Counter

import pytest
import running
import s3
import torch
from running import ONE_HEAD, run
from s3fs import S3FileSystem
from safetensors.torch import save_file

from clip4vla.data.shards import ShardFolder, write_index, write_shard
from clip4vla.towers.build import build_clip


@pytest.fixture(scope="module")
def shards(sample_shards, tmp_path_factory):
    """Two folders of the sample, in shards of four."""
    out = tmp_path_factory.mktemp("few")
    for name in ("speech_fr", "sounds"):
        source, entries = ShardFolder.open(str(sample_shards / name / "train")), []
        (out / name).mkdir()
        keys = source.entries(0).keys()
        for first in range(0, len(keys), 4):
            some = range(first, min(len(keys), first + 4))
            samples = source.read([(0, entry) for entry in some])
            members = [
                {"json": sample["json"], "fbank.jpg": sample["fbank"], "frames.jpg": sample["frames"]}
                for sample in samples
            ]
            cut = zip([keys[entry] for entry in some], members, strict=True)
            entries.append(write_shard(out / name / f"{name}-train-{first // 4:06d}.tar", cut))
        names = {"media_root": ".", "source": name, "split": "train", "counts": source.counts}
        write_index(out / name, fingerprint=source.fingerprint, shards=entries, **names)
    return out


def vectors(files):
    """Those of the files (name: bytes) whose bytes are always the same: notes have times."""
    return {name: data for name, data in files.items() if "clip/" in name and ".parts" not in name}


def notes(server, begin):
    """Those of finished shards that were uploaded since."""
    paths = [path.partition("?")[0] for verb, path, _ in server.seen[begin:] if verb == "PUT"]
    return [path for path in paths if "/.parts/" in path]


def test_a_run_that_ended_in_the_middle_and_one_that_was_killed_are_finished_by_two_ranks(server, shards, tmp_path):
    torch.manual_seed(0)
    save_file(build_clip(ONE_HEAD).state_dict(), tmp_path / "clip.safetensors")
    url, begin = f"s3://{s3.BUCKET}/embedded", len(server.seen)
    s3.put(shards, "embedded", server.port)
    env = s3.environment(server.server_port)

    def words(root):
        train = ", ".join(f"{root}/{name}: 1" for name in ("speech_fr", "sounds"))
        return [
            "data_prep/embed.py", "configs/pretrain/sample.yaml", "init_from=[]", f"data.train={{{train}}}",
            f"model.clip={tmp_path}/clip.safetensors", "data.val=[]", f"run_dir={tmp_path}/run", "data.decode_threads=1",
            "data.retries=4",
        ]  # fmt: skip

    assert run(*words(shards)).returncode == 0
    with server.faults(puts=5):  # two shards and their notes, a third shard
        done = run(*words(url), env=env)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {url}/speech_fr/clip/.parts/speech_fr-train-000002.tar.json: cannot be written" in done.stderr
    killed = len(server.seen)
    with running.job(1, *words(url), env=env) as started:
        while not notes(server, killed) and started.ranks[0].is_alive():
            time.sleep(0.001)
        started.ranks[0].kill()
        started.ranks[0].join()
    assert started.ranks[0].exitcode == -signal.SIGKILL, "finished before it could be killed"
    S3FileSystem.clear_instance_cache()
    there = {path.rsplit("/")[-1] for path in S3FileSystem().find(f"{s3.BUCKET}/embedded")}
    assert notes(server, killed) and "sounds/clip/index.json" not in there
    with server.faults(fail=0.05, cut=0.05):
        done = running.ranks(2, *words(url), env=env)
    assert done.returncode == 0 and f"{url}/sounds/clip: " in done.stdout and "clip4vla-out" not in done.stdout, done
    S3FileSystem.clear_instance_cache()
    fs, root = S3FileSystem(), f"{s3.BUCKET}/embedded/"
    uploaded = {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}
    local = {path.relative_to(shards).as_posix(): path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    assert vectors(uploaded) == vectors(local) and len(vectors(local)) > 10
    puts = Counter(path.partition("?")[0].split("/")[-1] for verb, path, _ in server.seen[begin:] if verb == "PUT")
    assert {puts[f"speech_fr-train-00000{i}.tar"] for i in (0, 1)} == {1}
