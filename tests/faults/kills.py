"""Kill storm: ranks, launcher, checkpoint writer, conversion, shard workers and embedder, until the work is done all the same."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from forks import ROOT
from running import TINY, ranks, run, trace
from safetensors.torch import load_file, save_file

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.checkpoints.universal import load_tensors
from clip4vla.towers.build import build_clip
from faults._kills import KILL, PAUSE, STOP, TERM, Kill, Started, Work, nothing_left, plan, storm

SOURCES = ("speech_fr", "sounds")
BATCH, STEPS, EVERY = 12, 40, 8  # EVERY: steps between evaluations
TIMEOUT = 0.2  # minutes, train.hang_timeout_minutes
TIME_LIMIT = 6.0  # s, shard.py's


def campaign(folder: Path, seed: int) -> dict:
    """At least 100 kills; see docs/reliability.md."""
    rng, found = random.Random(seed), {}
    given = prepare(folder)
    for name, (work, kills) in works(folder, given, rng).items():
        with nothing_left(folder, forked=name != "launcher"):
            found[name] = storm(work(), kills, seed).figures()
        print(f"{name}: {found[name]['kills']} kills survived", flush=True)
    total = sum(part["kills"] for part in found.values())
    assert total >= 100, total
    return {"kills": total, "train_timeout_s": 60 * TIMEOUT, "shard_time_limit_s": TIME_LIMIT, "parts": found}


def works(folder: Path, given: "Given", rng: random.Random) -> dict[str, tuple[Callable[[], Work], list[Kill]]]:
    """By name what is killed, and how: (weight, who, sign, when, longest delay, seconds)."""
    far, hung = 12.0, 60 * TIMEOUT + 3
    either = [(2.0, f"rank {rank}", sign, "time", far, 0.0) for rank in (0, 1) for sign in (KILL, TERM)]
    either += [(1.0, f"rank {rank}", STOP, when, 2.0, 0.0) for rank, when in ((0, "time"), (1, "saved"))]
    either += [(1.0, f"rank {rank}", KILL, when, 0.5, 0.0) for rank in (0, 1) for when in ("first data", "evaluation")]
    either += [(1.0, "judge", KILL, "saved", 2.0, 0.0), (1.0, "all", PAUSE, "time", far, hung)]
    writer = [(2.0, f"rank {rank}", sign, "partial", 0.05, 0.0) for rank in (0, 1) for sign in (KILL, TERM)]
    writer += [(1.0, f"rank {rank}", STOP, "partial", 0.02, 0.0) for rank in (0, 1)]
    writer += [(1.0, "all", PAUSE, "partial", 0.02, 3.0)]
    convert = [(2.0, "rank 0", KILL, "universal", 0.3, 0.0), (1.0, "rank 1", KILL, "universal", 0.3, 0.0),
               (1.0, "rank 0", STOP, "universal", 0.1, hung + 5), (4.0, "rank 0", KILL, "saved", 1.0, 0.0),
               (2.0, "rank 0", TERM, "saved", 1.0, 0.0)]  # fmt: skip
    launcher = [(2.0, who, sign, when, 3.0, 0.0) for who in ("launcher", "launch.py") for sign in (KILL, TERM)
                for when in ("time", "saved")]  # fmt: skip
    launcher += [(1.0, "rank 1", KILL, "saved", 2.0, 0.0), (1.0, "launcher", PAUSE, "saved", 1.0, hung)]
    launcher += [(1.0, "all", PAUSE, "saved", 1.0, hung), (1.0, "rank 0", STOP, "saved", 1.0, 0.0)]
    shards = [(3.0, who, sign, "time", 4.0, 0.0) for who in ("worker", "parent") for sign in (KILL, TERM)]
    shards += [(2.0, "parent", KILL, when, 0.05, 0.0) for when in ("partial", "index", "manifest")]
    shards += [(1.0, "reader", KILL, "time", 0.5, 0.0), (1.0, "worker", PAUSE, "partial", 0.5, TIME_LIMIT + 2)]
    shards += [(1.0, "all", PAUSE, "partial", 1.0, TIME_LIMIT + 2)]
    embedder = [(2.0, f"rank {rank}", sign, when, 0.3, 0.0) for rank in (0, 1) for sign in (KILL, TERM)
                for when in ("partial", "note")]  # fmt: skip
    embedder += [(1.0, "rank 0", KILL, "time", 5.0, 0.0), (1.0, "all", PAUSE, "partial", 0.3, 5.0)]
    return {
        "two ranks": (lambda: Training(folder / "two", given), plan(rng, 26, either)),
        "checkpoint writer": (lambda: Training(folder / "writer", given, more=WRITER), plan(rng, 18, writer)),
        "conversion": (lambda: Training(folder / "convert", given, LAYOUTS), plan(rng, 16, convert)),
        "launcher": (lambda: Training(folder / "launched", given, launcher=True), plan(rng, 12, launcher)),
        "shards": (lambda: Sharding(folder / "sharding", given), plan(rng, 24, shards)),
        "embedder": (lambda: Embedding(folder / "embedding", given), plan(rng, 14, embedder)),
    }


WRITER = ["train.save_async=true"]
LAYOUTS = [(2, 1), (1, 2), (2, 3), (1, 1), (2, 2), (1, 3)]  # ranks, ZeRO stage: one after the other


class Given:
    """What is there before: shards, a small CLIP, and an undisturbed run, whose losses do not depend on how it is saved."""

    def __init__(self, folder: Path):
        self.media, self.shards, self.clip = folder / "media", folder / "shards", folder / "clip.safetensors"
        shutil.copytree(ROOT / "tests/sample", self.media)
        corrupt = self.media / "household/rubberduck.ogg"  # something for the quarantine
        corrupt.write_bytes(corrupt.read_bytes()[:100])
        _done(run("data_prep/shard.py", *self.sharding(self.shards)))
        torch.manual_seed(0)
        save_file(build_clip(TINY).state_dict(), self.clip)
        self.run = folder / "undisturbed"
        _done(ranks(2, "launch/pretrain.py", *self.training(self.run)))
        self.vectors = folder / "vectors"
        shutil.copytree(self.shards, self.vectors)
        _done(ranks(2, "data_prep/embed.py", *self.embedding(self.vectors)))

    def sharding(self, out: Path) -> list[str]:
        """Words of shard.py."""
        words = [
            f"media_root={self.media}",
            f"out={out}",
            "samples_per_shard=4",
            "workers=2",
            "max_failed_fraction=0.5",
        ]
        return ["configs/data/sample.yaml", *words, f"decode_timeout={TIME_LIMIT}"]

    def training(self, run_dir: Path) -> list[str]:
        """Words of pretrain.py."""
        train, val = ([self.shards / source / split for source in SOURCES] for split in ("train", "val"))
        return [
            "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={self.clip}", "train.precision=fp32",
            f"data.train={{{train[0]}: 0.5, {train[1]}: 0.5}}", f"data.val=[{val[0]}, {val[1]}]", "data.decode_threads=1",
            f"train.batch_size={BATCH}", f"train.max_steps={STEPS}", "train.log_every=1", "train.save_every=2",
            f"train.hang_timeout_minutes={TIMEOUT}", f"eval.every_steps={EVERY}", "eval.permutations=0", "eval.bootstrap=0",
            "track.wandb=off", "track.log_sample_ids=true", "data.precomputed_embeddings=off", f"run_dir={run_dir}",
        ]  # fmt: skip

    def embedding(self, shards: Path) -> list[str]:
        """Words of embed.py."""
        train = ", ".join(f"{shards / source / 'train'}: 1" for source in SOURCES)
        words = ["configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={self.clip}", "train.precision=fp32"]
        return [*words, f"data.train={{{train}}}", "data.val=[]", f"run_dir={shards / 'none'}"]


def prepare(folder: Path) -> Given:
    """Everything that the kills need."""
    (folder / "given").mkdir()
    return Given(folder / "given")


def _done(result) -> None:
    assert result.returncode == 0, result.stderr[-3000:]


class Training(Work):
    """A run of pretrain.py; with several layouts each kill outside the conversion brings the next one."""

    def __init__(self, folder: Path, given: Given, layouts=((2, 1),), more=(), launcher: bool = False):
        self.name, self.given, self.layouts, self.launched = folder.name, given, layouts, launcher
        self.more, self.layout = list(more), 0
        super().__init__(folder)

    def fresh(self) -> None:
        self.number += 1
        shutil.rmtree(self.folder / f"run{self.number - 1}", ignore_errors=True)
        self.run = self.folder / f"run{self.number}"

    def start(self) -> Started:
        self.from_here = newest_checkpoint(self.run)
        if self.from_here:
            whole(self.from_here)
        count, stage = self.layouts[self.layout % len(self.layouts)]
        words = ["launch/pretrain.py", *self.given.training(self.run), *self.more]
        if len(self.layouts) > 1:
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            self.folder.mkdir(exist_ok=True)
            (self.folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
            words += ["--deepspeed_config", str(self.folder / "ds.json")]
        return Started(self.folder, count, words, self.launched)

    def roles(self, started: Started) -> dict[str, list[int]]:
        if not self.launched:
            return super().roles(started) | {"judge": started.below(started.pids[0])}
        found = {"launcher": started.pids, "launch.py": started.below(started.pids[0])}
        return found | {f"rank {i}": [pid] for i, pid in enumerate(started.below(started.pids[0], 2)[:2])}

    def states(self, started: Started) -> dict[str, Callable[[], bool]]:
        folder = self.run / "checkpoints"
        found = {"universal": (folder / "partial-universal").exists} if self._to_convert() else {}
        return found | {
            "partial": lambda: any(folder.glob("partial-0*")),
            "evaluation": self._evaluating,
            "saved": lambda: newest_checkpoint(self.run) != self.from_here,
            "first data": lambda: " done of " in started.said("out"),
        }

    def _to_convert(self) -> bool:
        """Whether the start has to convert what it resumes from."""
        if len(self.layouts) == 1 or not self.from_here or (self.from_here / "universal").exists():
            return False
        meta = json.loads((self.from_here / "config.json").read_text())
        return (meta["ranks"], meta["zero_stage"]) != self.layouts[self.layout % len(self.layouts)]

    def _evaluating(self) -> bool:
        file = self.run / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+),', file.read_text()) if file.exists() else []
        step = int(steps[-1]) if steps else 1
        return step % EVERY == 0 and not (self.run / f"eval/val-{step:08d}/metrics.json").exists()

    def ended(self, started: Started, code: int, kill: Kill | None) -> bool:
        said = re.search(r"(\d+) done of", started.said("out"))
        before = int(self.from_here.name[5:]) if self.from_here else 0
        assert not said or int(said[1]) == before, f"resumed from {said[1]}, not from {before}"
        newest = newest_checkpoint(self.run)
        done = bool(newest) and int(newest.name[5:]) == STEPS and f"step {STEPS} of {STEPS}" in started.said("out")
        assert kill or code == 0, f"ended by itself with exit code {code}"
        assert code != 85 or kill.sign == TERM, "exit code 85 without a SIGTERM"
        if kill and kill.when != "universal":
            self.layout += 1
        return done

    def check(self) -> None:
        ours, theirs = trace(self.run), trace(self.given.run)
        assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
        exact = len(self.layouts) == 1
        for step, losses in theirs.items():
            near = all(abs(a - b) <= (0 if exact else 1e-5 * abs(b)) for a, b in zip(ours[step], losses, strict=True))
            assert near, f"step {step}: {ours[step]} instead of {losses}"
        self._check_samples(exact)
        assert not list((self.run / "checkpoints").glob("partial-*")), "a half checkpoint is left"
        for step in range(EVERY, STEPS + 1, EVERY):
            found, wanted = ((r / f"eval/val-{step:08d}/metrics.json").read_text() for r in (self.run, self.given.run))
            assert not exact or found == wanted, f"the evaluation of step {step} differs"
        checkpoint = newest_checkpoint(self.run)
        whole(checkpoint)
        if exact:
            ours, theirs = (load_file(r / checkpoint.name / "model.safetensors") for r in self._checkpoints())
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def _checkpoints(self) -> list[Path]:
        return [self.run / "checkpoints", self.given.run / "checkpoints"]

    def _check_samples(self, exact: bool) -> None:
        """None lost, none repeated: by rank if these are the same, else by step; and within an epoch each at most once."""
        ours, theirs = logged(self.run), logged(self.given.run)
        if exact:
            assert ours == theirs, "the logged samples differ"
        by_step = [{step: Counter(ids) for step, ids in joined(found).items()} for found in (ours, theirs)]
        assert by_step[0] == by_step[1], "samples are lost or repeated"
        for source in SOURCES:
            seen = [[name for name in by_step[0][step] if name.startswith(f"{source}/")] for step in by_step[0]]
            steps = samples(self.given.shards / source / "train") // (BATCH // len(SOURCES))
            for first in range(0, STEPS, steps):
                assert max(Counter(sum(seen[first : first + steps], [])).values()) == 1, f"{source}: twice in an epoch"


def samples(shards: Path) -> int:
    """How many a folder has."""
    return json.loads((shards / "index.json").read_text())["counts"]["samples"]


def logged(run_dir: Path) -> dict[str, list[tuple[int, list[str]]]]:
    """(step, ids) by file of RUN/samples."""
    rows = {file.name: file.read_text().splitlines() for file in sorted((run_dir / "samples").glob("*"))}
    return {name: [(row["step"], row["ids"]) for row in map(json.loads, lines)] for name, lines in rows.items()}


def joined(found: dict[str, list[tuple[int, list[str]]]]) -> dict[int, list[str]]:
    """Ids by step, of all ranks."""
    steps: dict[int, list[str]] = {}
    for rows in found.values():
        for step, ids in rows:
            steps.setdefault(step, []).extend(ids)
    return dict(sorted(steps.items()))


def whole(checkpoint: Path) -> None:
    """AssertionError unless all of it can be read."""
    assert json.loads((checkpoint / "config.json").read_text())["step"] == int(checkpoint.name[5:])
    assert load_file(checkpoint / "model.safetensors")
    files = sorted(checkpoint.rglob("*.pt"))
    assert files, f"{checkpoint} is empty"
    for file in files:
        load_tensors(str(file))


class Sharding(Work):
    """shard.py on media of which one is corrupt."""

    name = "shards"

    def __init__(self, folder: Path, given: Given):
        self.given = given
        super().__init__(folder)

    def fresh(self) -> None:
        self.number += 1
        self.out = self.folder / f"shards{self.number}"

    def start(self) -> Started:
        return Started(self.folder, 1, ["data_prep/shard.py", *self.given.sharding(self.out)])

    def roles(self, started: Started) -> dict[str, list[int]]:
        planned = (self.out / "manifest.jsonl").exists()  # before it, workers read sounds to group the clips
        return {"parent": started.pids, "worker" if planned else "reader": started.below(started.pids[0])[:1]}

    def states(self, started: Started) -> dict[str, Callable[[], bool]]:
        return {
            "index": lambda: any(self.out.glob("*/*/index.json*")),
            "partial": lambda: any(self.out.rglob("*.tar.partial")),
            "manifest": lambda: any(self.out.glob("manifest.jsonl*")),
        }

    def ended(self, started: Started, code: int, kill: Kill | None) -> bool:
        worker = kill is not None and kill.who in ("worker", "reader") and kill.sign in (KILL, TERM)
        assert code in ((0, 2) if worker else (0,) if kill is None else (-9, -15, 0)), f"exit code {code}"
        if code == 2:
            said = started.said("err").splitlines()[-1]
            assert "Traceback" not in started.said("err") and "a worker was killed" in said, said
        return code == 0

    def check(self) -> None:
        ours, theirs = contents(self.out), contents(self.given.shards)
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        differ = [name for name in theirs if ours[name] != theirs[name]]
        assert not differ, f"{differ} differ"
        assert any(name.endswith("quarantine.jsonl") and data for name, data in theirs.items())


class Embedding(Sharding):
    """embed.py on two ranks."""

    name = "embedder"

    def fresh(self) -> None:
        self.number += 1
        self.out = self.folder / f"shards{self.number}"
        shutil.copytree(self.given.shards, self.out)

    def start(self) -> Started:
        return Started(self.folder, 2, ["data_prep/embed.py", *self.given.embedding(self.out)])

    def roles(self, started: Started) -> dict[str, list[int]]:
        return Work.roles(self, started)

    def states(self, started: Started) -> dict[str, Callable[[], bool]]:
        notes = len(list(self.out.glob("*/train/clip/.parts/*.json")))
        return {
            "partial": lambda: any(self.out.glob("*/train/clip/*.partial")),
            "note": lambda: len(list(self.out.glob("*/train/clip/.parts/*.json"))) > notes,
        }

    def ended(self, started: Started, code: int, kill: Kill | None) -> bool:
        assert kill or code == 0, f"ended by itself with exit code {code}"
        return code == 0

    def check(self) -> None:
        ours, theirs = (contents(place) for place in (self.out, self.given.vectors))
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        differ = [name for name in theirs if ours[name] != theirs[name] and "/clip/.parts/" not in name]
        assert not differ, f"{differ} differ"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks, with the way to the media, which depends on the place, taken out of index.json."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: re.sub(rb'"media_root": ?"[^"]*"', b"", data) for name, data in found.items()}
