"""launch/slurm/*.sbatch on a real SLURM."""

import json
import os
import shutil
from pathlib import Path

import pytest
import slurm
from forks import ROOT
from running import ranks, trace, wait_for

from clip4vla.config import DataConfig
from clip4vla.config_io import load
from clip4vla.data.shards import ShardFolder
from data_prep.build_shards import shard
from data_prep.plan import read_plan

pytestmark = pytest.mark.skipif(
    not slurm.installed() and os.geteuid() != 0, reason="no slurmctld, and only root can install it"
)
CONFIG = "configs/data/sample.yaml"


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as it:
        yield it


def submit(cluster, log, options, *words):
    """The id of launch/slurm/shard.sbatch as a job of one core; all its tasks say what they say in `log`."""
    return cluster.sbatch("--cpus-per-task=1", f"--output={log}", *options, "launch/slurm/shard.sbatch", *words)


def stall(media, unit):
    """Make reading the second row of a unit hang, as a lost file server does; returns what repairs it."""
    file, aside = media / unit.read()[1].media, media.parent / "aside"
    file.rename(aside)
    os.mkfifo(file)  # opening it waits for a writer that never comes
    return lambda: aside.replace(file)


def contents(out):
    """Bytes of everything that a run leaves, by path."""
    files = [path for path in out.rglob("*") if path.is_file() and ".lock" not in path.name]
    return {path.relative_to(out): path.read_bytes() for path in files}


def ids(out):
    """Ids of all samples, read as the loader does."""
    folders = [ShardFolder.open(index.parent) for index in out.rglob("index.json")]
    where = [[(s, e) for s, part in enumerate(folder.shards) for e in range(part.samples)] for folder in folders]
    read = [item for folder, places in zip(folders, where, strict=True) for item in folder.read(places)]
    return sorted(json.loads(item["json"])["id"] for item in read)


def test_an_array_with_a_preempted_task_and_its_merge_give_what_one_run_gives(cluster, tmp_path):
    media, log = shutil.copytree(ROOT / "tests/sample", tmp_path / "media"), tmp_path / "log"
    one, out, words = tmp_path / "one", tmp_path / "out", [f"media_root={media}", "samples_per_shard=4"]
    shard(load(DataConfig, CONFIG, [*words, f"out={one}", "workers=1"]))
    shard(load(DataConfig, CONFIG, [*words, f"out={out}"]), plan=True)
    units = read_plan(out)[1][1::3]
    before, unit = units[: len(units) // 2], units[len(units) // 2]
    repair = stall(media, unit)

    job = submit(cluster, log, ["--array=5-7%2"], CONFIG, *words, f"out={out}")
    merge = submit(cluster, log, [f"--dependency=afterok:{job}"], CONFIG, *words, f"out={out}", "--merge")
    cluster.until(Path(f"{unit.tar}.partial").exists)
    made = {done.tar: done.tar.stat().st_mtime_ns for done in before}
    cluster.run("scontrol", "requeue", f"{job}_6")
    repair()
    assert set(cluster.wait(job, merge).values()) == {"COMPLETED"}, log.read_text()

    assert "Restarts=1" in cluster.run("scontrol", "show", "job", f"{job}_6")
    assert "REQUEUE" in log.read_text(), "the restart emptied its log"
    assert made == {tar: tar.stat().st_mtime_ns for tar in made} != {}, "finished shards were made again"
    assert contents(out) == contents(one)
    assert ids(out) == sorted(row.id for unit in read_plan(out)[1] for row in unit.read())


def test_an_array_with_gaps_is_refused_and_its_merge_never_runs(cluster, tmp_path):
    log = tmp_path / "log"
    words = [CONFIG, f"out={tmp_path / 'out'}"]
    job = submit(cluster, log, ["--array=0,2"], *words)
    merge = submit(cluster, tmp_path / "merge", [f"--dependency=afterok:{job}"], *words, "--merge")
    states = cluster.wait(job, merge)
    assert states == {f"{job}_0": "FAILED", f"{job}_2": "FAILED", merge: "CANCELLED"}
    message = "error: --array: the numbers have gaps; give a range like 0-1: finished shards are kept"
    assert log.read_text().splitlines() == [message] * 2 and not (tmp_path / "out").exists()


def test_a_preempted_job_of_two_nodes_is_requeued_and_ends_with_the_losses_of_an_undisturbed_run(
    cluster,
    tiny,
    tmp_path,
):
    log, words = tmp_path / "log", [*tiny, "train.max_steps=20", "train.save_every=1000"]
    assert ranks(2, "launch/pretrain.py", *words, f"run_dir={tmp_path / 'undisturbed'}").returncode == 0

    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    job = cluster.sbatch(*options, "launch/slurm/pretrain.sbatch", *words, f"run_dir={tmp_path / 'r'}")
    wait_for(tmp_path / "r/metrics.jsonl", 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job) == {job: "COMPLETED"}, log.read_text()

    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    first, second = sorted((tmp_path / "r/checkpoints").glob("step-*"))
    assert f"weights from {first}" in log.read_text() and "2 ranks" in log.read_text().partition("step 1 ")[0]
    assert int(first.name[-8:]) < int(second.name[-8:]) == 20
    assert trace(tmp_path / "r") == trace(tmp_path / "undisturbed")
