"""20,000 steps of a small model in one process, with evaluations and checkpoints: what grows, seen from outside by /proc.

Bounds over the whole run, from the line through its last nine tenths: resident memory 20 MiB, CPU time of a step 2%
(beyond the line's own error); the lowest number of open files, threads and children of each tenth is the same in all.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from forks import ROOT, Job
from matplotlib.figure import Figure
from running import job, run

STEPS = 20_000
EVERY = {"train.log_every": 20, "train.save_every": 500, "eval.every_steps": 1000}
MOST_MIB, MOST_CPU = 20.0, 0.02
CONSTANT = ("files", "threads", "children")
PLOT = ROOT / "docs/faults_long_run.png"
SMALL = {  # 0.8 million parameters of text, which are words that no step sees, and 0.1 million of the rest
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 16, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
Samples = dict[str, np.ndarray]


def campaign(folder: Path, seed: int) -> dict[str, Any]:
    """The long run, its figures, and docs/faults_long_run.png."""
    rows, samples = trained(folder, seed, STEPS, EVERY, pause=1.0)
    grown = growth(rows, samples)
    PLOT.write_bytes(_picture(rows, samples))
    must_be_flat(grown, f"seed {seed}")
    return {
        "steps": STEPS, "settings": EVERY, "samples": len(samples["time"]), "growth_over_the_run": grown,
        "bytes": written(folder / "run", STEPS),
    }  # fmt: skip


def trained(folder: Path, seed: int, steps: int, every: dict[str, int], pause: float) -> tuple[list[dict], Samples]:
    """(rows of metrics.jsonl that have a time, what /proc said every `pause` seconds) of a whole run."""
    with job(1, "launch/pretrain.py", *_words(folder, seed, steps), *(f"{k}={v}" for k, v in every.items())) as started:
        samples = list(_watched(started, folder / "run/metrics.jsonl", pause))
        done = started.wait(60)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), f"seed {seed}: steps are missing"
    samples = [sample for sample in samples if sample["time"] < rows[-1]["time"]]  # then the threads end
    return [row for row in rows if "time" in row], {key: np.array([s[key] for s in samples]) for key in samples[0]}


def _words(folder: Path, seed: int, steps: int) -> list[str]:
    (folder / "small.json").write_text(json.dumps(SMALL))
    shards = folder / "shards"
    if not shards.exists():
        done = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={shards}")
        assert done.returncode == 0, done.stderr
    return [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={folder}/small.json", "train.precision=fp32",
        "track.wandb=off", f"data.train=[{shards}/speech_fr/train, {shards}/sounds/train]", "train.batch_size=8",
        f"data.val=[{shards}/speech_fr/val, {shards}/sounds/val]", "data.decode_threads=1", "train.save_async=true",
        "eval.permutations=0", f"run_dir={folder}/run", f"seed={seed}", f"train.max_steps={steps}",
    ]  # fmt: skip


def _watched(started: Job, metrics: Path, pause: float):
    """From the first logged step on, until the process ends."""
    (rank,) = started.ranks
    while rank.is_alive():
        if metrics.exists() and metrics.stat().st_size and (sample := _sample(Path("/proc", str(rank.pid)))):
            yield sample
        time.sleep(pause)


def _sample(process: Path) -> dict[str, float] | None:
    """What a process has and has used; None once it is gone."""
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        children = sum(len(task.read_text().split()) for task in process.glob("task/*/children"))
        return {
            "time": time.time(), "mib": int(status["VmRSS"].split()[0]) / 1024, "files": len(os.listdir(process / "fd")),
            "threads": int(status["Threads"]), "children": children,
            "cpu": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        }  # fmt: skip
    except (OSError, KeyError):
        return None


def growth(rows: list[dict], samples: Samples) -> dict[str, Any]:
    """Of each figure what its line gains over the whole run, its error, its middle; of the counts the least of each tenth."""
    steps = np.interp(samples["time"], [row["time"] for row in rows], [row["step"] for row in rows])
    wall = _steps_alone(rows)
    # between logged steps the step of a sample is a guess: CPU time over fifty stretches, not over single seconds
    at = np.linspace(steps[0], steps[-1], 51)
    used = np.diff(np.interp(at, steps, samples["cpu"])) / np.diff(at)
    found = {
        "memory_mib": _line(steps, samples["mib"]),
        "cpu_s_a_step": _line(at[1:], used),
        "wall_s_a_step": _line(*wall),
    }
    tenths = np.array_split(np.arange(len(steps)), 10)[1:]
    return found | {name: [int(samples[name][part].min()) for part in tenths] for name in CONSTANT}


def _steps_alone(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, seconds of a step) without evaluations and saves: fifty medians of logged intervals."""
    some = [rows[part[0] : part[-1] + 1] for part in np.array_split(range(len(rows)), min(50, len(rows)))]
    return np.array([p[-1]["step"] for p in some]), np.array(
        [np.median([8 / r["clips_per_s"] for r in p]) for p in some]
    )


def _line(steps: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Least squares through the last nine tenths."""
    late = steps > steps[-1] / 10
    (slope, _), cover = np.polyfit(steps[late], values[late], 1, cov=True)
    gained, error = np.array([slope, cover[0, 0] ** 0.5]) * steps[-1]
    return {"median": float(np.median(values[late])), "growth": float(gained), "error": float(error)}


def must_be_flat(found: dict[str, Any], case: str) -> None:
    """AssertionError for what grows."""
    memory, cpu = found["memory_mib"], found["cpu_s_a_step"]
    assert memory["growth"] < MOST_MIB, f"{case}: resident memory grows: {memory}"
    assert cpu["growth"] - 2 * cpu["error"] < MOST_CPU * cpu["median"], f"{case}: steps grow slower: {cpu}"
    for name in CONSTANT:
        assert len(set(found[name])) == 1, f"{case}: {name} by tenths: {found[name]}"


def written(run_dir: Path, steps: int) -> dict[str, float]:
    """Bytes that a step adds to the logs, and an evaluation; GB of a million steps with these settings."""
    sizes = {name: (run_dir / name).stat().st_size / steps for name in ("metrics.jsonl", "log.txt")}
    tests = [sum(f.stat().st_size for f in place.iterdir()) for place in run_dir.glob("eval/*")]
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert len(kept) == 2, kept
    million = (sum(sizes.values()) * 1e6 + sum(tests) / steps * 1e6) / 1e9
    return {f"{name} a step": size for name, size in sizes.items()} | {
        "of an evaluation": float(np.mean(tests)), "GB of a million steps": million,
    }  # fmt: skip


def _picture(rows: list[dict], samples: Samples) -> bytes:
    from clip4vla.report.preview import to_bytes

    steps = np.interp(samples["time"], [row["time"] for row in rows], [row["step"] for row in rows])
    plot = Figure(figsize=(8, 6.4), dpi=130, layout="constrained")
    memory, counts, speed = plot.subplots(3, 1, sharex=True)
    memory.plot(steps, samples["mib"], lw=0.8)
    memory.set_ylabel("resident memory (MiB)")
    for name in CONSTANT:
        counts.plot(steps, samples[name], lw=0.8, label=name)
    counts.legend(frameon=False, ncols=3)
    counts.set_ylabel("count")
    speed.plot([r["step"] for r in rows], [8 / r["clips_per_s"] for r in rows], lw=0.4, alpha=0.4, label="20 steps")
    speed.plot(*_steps_alone(rows), lw=1.4, label="median of 400")
    speed.set(
        ylabel="wall time of a step (s)", xlabel="step", ylim=(0, 3 * np.median([8 / r["clips_per_s"] for r in rows]))
    )
    speed.legend(frameon=False)
    for axes in (memory, counts):
        axes.set_ylim(bottom=0)
    return to_bytes(lambda buffer: plot.savefig(buffer, format="png"))
