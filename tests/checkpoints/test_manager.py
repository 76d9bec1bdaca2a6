"""Checkpoints: on other numbers of ranks, in the background, by the clock, around signals and full disks, mirrored, exported."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3
import torch
from rank_scripts import LIMITED, LONG, SIGNALLED
from running import optimizer_groups, ranks, run, trace
from safetensors.torch import load_file

from clip4vla.checkpoints import manager
from clip4vla.checkpoints.lookup import chosen_checkpoint, read_metadata
from clip4vla.checkpoints.manager import CheckpointManager, checkpoint_to_resume
from clip4vla.checkpoints.remote import CheckpointUploader, remove, upload
from clip4vla.checkpoints.universal import load_tensors
from clip4vla.config import RunConfig, TrainConfig
from clip4vla.errors import UserError
from clip4vla.io import remote
from clip4vla.models.model import Model

STEPS = 10


@pytest.fixture(scope="module")
def words(tiny):
    """The tiny run, a little longer; all of its checkpoints stay."""
    return ["launch/pretrain.py", *tiny, f"train.max_steps={STEPS}", "train.keep_last=9"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """A run of two ranks from start to end."""
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    _go(2, *words, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """Words that choose a ZeRO stage, nothing being too small to be partitioned."""
    folder = tmp_path_factory.mktemp("ds")

    def choose(stage: int) -> list[str]:
        keys = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": keys}))
        return ["--deepspeed_config", str(folder / f"{stage}.json")]

    return choose


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """launch/pretrain.py whose files have at most that many bytes on one rank, as if its disk were full; {RANK} is it."""
    script = tmp_path_factory.mktemp("script") / "limited.py"
    script.write_text(LIMITED)
    return script


def steps(run_dir: Path) -> list[int]:
    """The complete checkpoints."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????"))


def back_to(run_dir: Path, step: int) -> Path:
    """Remove the checkpoints after that step; returns its folder."""
    for later in (s for s in steps(run_dir) if s > step):
        shutil.rmtree(run_dir / f"checkpoints/step-{later:08d}")
    return run_dir / f"checkpoints/step-{step:08d}"


def test_a_run_goes_on_with_other_numbers_of_ranks_and_other_zero_stages(undisturbed, words, zero, tmp_path):
    """Weights, Adam's state and step count, weight decay, sample order: the losses are those of the undisturbed run."""
    folder = tmp_path / "with+signs"
    shutil.copytree(undisturbed, folder)
    (folder / "checkpoints/partial-universal/universal/zero").mkdir(
        parents=True
    )  # left by a conversion that was killed
    for step, count, stage in ((2, 1, 1), (4, 2, 3), (6, 1, 2), (8, 2, 2)):  # from ZeRO-1, 1, 3, 2
        checkpoint = back_to(folder, step)
        done = _go(count, *words, f"run_dir={folder}", *zero(stage))
        assert f"{step} done of {STEPS}" in done.stdout and (checkpoint / "universal").is_dir()
        ours, theirs = trace(folder), trace(undisturbed)
        assert list(ours) == list(theirs)
        for at, losses in theirs.items():
            assert ours[at] == pytest.approx(losses, rel=1e-5), (
                f"step {at}, on {count} ranks, ZeRO-{stage}, since {step}"
            )
        towers = [(1.0, 0.2), (1.0, 0.0)] * 3
        assert optimizer_groups(folder / f"checkpoints/step-{STEPS:08d}") == [towers] * count
    assert not list((folder / "checkpoints").glob("partial-*"))


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_with_all_towers_goes_on_with_one_rank_instead_of_two(words, zero, tmp_path, stage):
    """fp32 master weights are saved and restored: the two continuations stay far closer than a few steps move the weights."""
    more = [
        *zero(stage),
        "train.precision=bf16",
        "model.trainable_towers=text+vision+audio",
        "train.save_every=3",
        "loss.tv=1",
    ]
    _go(2, *words, *more, f"run_dir={tmp_path / 'r'}", "train.max_steps=6")
    start, end = (load_file(tmp_path / f"r/checkpoints/step-0000000{n}/model.safetensors") for n in (3, 6))
    assert all((value != value.bfloat16().float()).any() for name, value in end.items() if name.endswith("c_fc.weight"))
    losses = trace(tmp_path / "r")
    back_to(tmp_path / "r", 3)
    _go(1, *words, *more, f"run_dir={tmp_path / 'r'}", "train.max_steps=6")
    again = load_file(tmp_path / "r/checkpoints/step-00000006/model.safetensors")
    moved, apart = (sum((a[k] - b[k]).square().sum() for k in end) for a, b in ((end, start), (again, end)))
    assert apart < 0.01 * moved
    for step, values in trace(tmp_path / "r").items():
        assert values == pytest.approx(losses[step], rel=1e-2)


@pytest.mark.parametrize(
    "change",
    [{"step": 580}, {"step": "500"}, {"step": 500.0}, {"ranks": None}, {"zero_stage": [1]}, "no key", "no json"],
)
def test_what_a_damaged_config_json_says_is_not_gone_on_with(tmp_path, change):
    """One flipped bit makes step 500 another: the steps between would never be trained."""
    metadata = {"step": 500, "ranks": 2, "zero_stage": 1, "sample order": "0" * 12}
    (checkpoint := tmp_path / "step-00000500").mkdir()
    text = "{" if change == "no json" else json.dumps({} if change == "no key" else metadata | change)
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"step-00000500: cannot be continued from \(.*\); remove it"):
        read_metadata(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(metadata))
    assert read_metadata(checkpoint) == metadata


def test_a_state_without_zero_goes_on_without_zero_alone():
    def fit(theirs: int, ours: int) -> None:
        run = SimpleNamespace(layout={"zero_stage": ours, "sample order": "a"})
        CheckpointManager.must_fit(run, {"zero_stage": theirs, "sample order": "a"}, Path("r"))

    fit(0, 0), fit(1, 3)
    for theirs, ours in ((0, 1), (2, 0)):
        with pytest.raises(UserError, match=f"zero_stage {theirs} there and {ours} here"):
            fit(theirs, ours)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What is there whenever something is brought to the disk: power that fails then leaves all of a checkpoint, or none."""
    order, folder = [], tmp_path / "checkpoints"
    (aside := folder / "partial-00000007").mkdir(parents=True)

    def fsync(path: Path) -> None:
        there = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        order.append((path.name, there))

    monkeypatch.setattr(manager, "fsync", fsync)
    run = SimpleNamespace(
        folder=folder, last_step=7, failure=None, _staging_dir=lambda: aside, _prune=lambda: None,
        uploader=SimpleNamespace(update=lambda: None), files=dict.fromkeys([aside / "a", aside / "b"], Path.touch),
    )  # fmt: skip
    CheckpointManager._flush(run)
    CheckpointManager._publish(run)
    both = ["partial-00000007/a", "partial-00000007/b"]
    named = ["step-00000007/a", "step-00000007/b"]
    assert order == [("a", both[:1]), ("b", both), (aside.name, both), ("checkpoints", named)]
    assert (folder / "latest").read_text() == "step-00000007"


def test_in_the_background_by_the_clock_and_pruned(undisturbed, words, tmp_path):
    """The same state as written at once. The clock is always late here, and answers one step after it is asked."""
    more = [
        "train.save_async=true",
        "train.save_every=1000",
        "train.save_every_minutes=1e-6",
        "train.keep_last=1",
        "train.keep_every=3",
    ]
    (tmp_path / "r/checkpoints/step-00000099-good").mkdir(parents=True)  # the user's: neither resumed nor removed
    _go(2, *words, *more, f"run_dir={tmp_path / 'r'}")
    assert trace(tmp_path / "r") == trace(undisturbed)
    assert steps(tmp_path / "r") == [6, 10] and (tmp_path / "r/checkpoints/step-00000099-good").exists()
    assert (tmp_path / "r/checkpoints/latest").read_text() == "step-00000010"
    for step in steps(tmp_path / "r"):
        ours, theirs = (folder / f"checkpoints/step-{step:08d}" for folder in (tmp_path / "r", undisturbed))
        assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
        for name in ("model.safetensors", "config.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
        for file in ours.glob("*.pt"):
            _equal(*(load_tensors(str(folder / file.name)) for folder in (ours, theirs)))


def test_a_writer_killed_in_the_background_leaves_the_older_checkpoint(undisturbed, words, tmp_path):
    mine, script = [*words, f"run_dir={tmp_path / 'r'}", "train.save_async=true"], tmp_path / "killed.py"
    moment = {"module": "checkpoints.manager", "name": "CheckpointManager", "method": "_flush"}
    script.write_text(SIGNALLED.format(**moment, rank=0, when="self.last_step == 4", signal="SIGKILL"))
    assert ranks(2, script, *mine[1:]).returncode != 0
    assert steps(tmp_path / "r") == [2] and (tmp_path / "r/checkpoints/partial-00000004").is_dir()
    done = _go(2, *mine)
    assert "2 done of" in done.stdout
    assert trace(tmp_path / "r") == trace(undisturbed)


def test_a_disk_that_is_full_for_one_rank_stops_all_with_one_line(words, limited, tmp_path):
    mine = [*words[1:], f"run_dir={tmp_path / 'r'}", "train.save_async=true"]
    done = ranks(2, limited, 1, 100_000, *mine)  # which waits far less long than a rank for one that hangs
    assert done.returncode == 2
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert "the checkpoint of step 2 could not be written" in line and "Traceback" not in done.stderr
    assert steps(tmp_path / "r") == [] and max(trace(tmp_path / "r")) < STEPS


def test_ranks_that_do_not_share_run_dir_end_with_one_line(words, limited, tmp_path):
    done = ranks(2, limited, -1, 0, *words[1:], f"run_dir={tmp_path}/disk-{{RANK}}")
    _refused(done, "the checkpoint of step 2 could not be written (run_dir must be on a disk that all nodes share")
    assert steps(tmp_path / "disk-0") == steps(tmp_path / "disk-1") == []


def test_long_work_of_rank_0_is_not_taken_for_a_hang(undisturbed, tmp_path):
    """Conversion and download tell where they are; by what rank 0 tells, all ranks outlast a time-out of 2 s."""
    checkpoint = shutil.copytree(undisturbed / "checkpoints/step-00000002", tmp_path / "c")
    upload(undisturbed / "checkpoints/step-00000004", str(tmp_path / "mirror"))
    script = tmp_path / "long.py"
    script.write_text(LONG)
    done = _go(2, script, checkpoint, tmp_path / "mirror/step-00000004", tmp_path / "back")
    first, second = done.stdout.splitlines()
    converted, synced, pieces, places, _ = first.split(",")
    assert first == second and first.endswith(",second 7")
    assert int(converted) > 20 and int(synced) > 20 and int(places) >= 7
    assert int(pieces) == len(list((tmp_path / "back").iterdir()))


def test_a_checkpoint_that_cannot_be_converted_is_one_line_and_runs_no_code(undisturbed, words, limited, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "r")
    checkpoint, mine = back_to(tmp_path / "r", 2), [*words[1:], f"run_dir={tmp_path / 'r'}"]
    _refused(ranks(1, limited, 0, 100_000, *mine), f"{checkpoint}: cannot be made fit for 1 ranks, ZeRO-1")
    assert steps(tmp_path / "r") == [2] and not (checkpoint / "universal").exists()

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    with (checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt").open("wb") as file:
        pickle.dump({"optimizer_state_dict": Evil()}, file)
    _refused(ranks(1, *words, f"run_dir={tmp_path / 'r'}"), "cannot be made fit for 1 ranks, ZeRO-1")
    assert not (tmp_path / "pwned").exists()


MOMENTS = {
    "checkpoint": ("checkpoints.manager", "CheckpointManager", "save", "train.save_every=3"),
    "evaluation": ("evaluation.runner", "BackgroundValidator", "start", "eval.every_steps=3 train.save_every=99"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_during_a_checkpoint_or_an_evaluation_saves_that_step_once(undisturbed, words, tmp_path, moment):
    folder, script = tmp_path / "r", tmp_path / "signalled.py"
    module, name, method, more = MOMENTS[moment]
    script.write_text(
        SIGNALLED.format(module=module, name=name, method=method, rank=1, when="arguments[-1] == 3", signal="SIGTERM")
    )
    done = ranks(2, script, *words[1:], *more.split(), f"run_dir={folder}")
    assert done.returncode == 85, done.stderr
    assert steps(folder) == [3] and list(trace(folder)) == [1, 2, 3]
    assert trace(folder).items() <= trace(undisturbed).items()


def test_checkpoints_are_copied_to_object_storage_and_resumed_from_there(undisturbed, words, tmp_path):
    """A real S3 server, with failed and cut answers while it is read."""
    url = f"s3://{s3.BUCKET}/run"
    mine = [*words, f"train.mirror={url}", "train.keep_last=1", "train.save_async=true"]
    with s3.serve() as (proxy, env), pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        done = _go(2, *mine, f"run_dir={tmp_path / 'r'}")
        assert "train.mirror" not in done.stderr  # no copy failed
        fs, root = remote.open_folder(url)
        assert [Path(path).name for path in fs.ls(root)] == ["step-00000010"]  # what was removed here is removed there
        remove(f"{url}/step-00000010")
        upload(undisturbed / "checkpoints/step-00000006", url)
        with proxy.faults(fail=0.2, cut=0.2):
            done = _go(2, *mine, f"run_dir={tmp_path / 'elsewhere'}")
    assert proxy.done and f"6 done of {STEPS}" in done.stdout
    assert trace(tmp_path / "elsewhere") == {step: row for step, row in trace(undisturbed).items() if step > 6}
    _refused(ranks(1, *words, f"run_dir={tmp_path / 'r'}", "train.mirror=nope://x"), "train.mirror=nope://x: ")


def test_the_mirror_keeps_the_newest_copy_and_what_the_run_keeps_whatever_was_left_there(tmp_path):
    """A copy so slow that its checkpoint is removed here before it is done; and copies of another job, one of them newer."""
    folder, url = tmp_path / "r/checkpoints", tmp_path / "mirror"
    for step in (1, 2, 3, 4, 5, 6, 7):
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}/config.json").write_text("{}")
        upload(folder / f"step-{step:08d}", str(url)) if step not in (5, 6) else None
    shutil.move(folder / "step-00000006", tmp_path)
    back_to(tmp_path / "r", 5)
    (url / "mine").mkdir()

    def prune() -> None:
        shutil.move(tmp_path / "step-00000006", folder)
        shutil.rmtree(folder / "step-00000005")

    cfg = RunConfig(run_dir=str(tmp_path / "r"), train=TrainConfig(mirror=f"{url}/", keep_last=1, keep_every=2))
    copies = CheckpointUploader(cfg, prune)
    copies.update()
    copies.close(print)
    assert sorted(path.name for path in url.iterdir()) == ["mine", *(f"step-0000000{step}" for step in (2, 4, 5, 7))]


def test_a_fresh_disk_gets_the_best_checkpoint_and_its_evaluation_from_the_mirror(tmp_path):
    """Step 2 is the best of three; the mirror keeps it beside the newest, and a job elsewhere does so too."""
    url = tmp_path / "mirror"
    cfg = RunConfig(run_dir=str(tmp_path / "r"), train=TrainConfig(mirror=str(url), keep_last=1))
    cfg.eval.best_metric = "caption/CIDEr"
    for step, value in ((1, 10.0), (2, 30.0), (3, 20.0)):
        made = tmp_path / f"r/checkpoints/step-{step:08d}"
        made.mkdir(parents=True)
        (made / "config.json").write_text(json.dumps({"step": step}))
        for name in ("model.safetensors", "latest"):
            (made / name).write_text("x")
        copies = CheckpointUploader(cfg, lambda: None)
        copies.update()
        evaluated = tmp_path / f"r/eval/val-{step:08d}/metrics.json"
        evaluated.parent.mkdir(parents=True)
        evaluated.write_text(json.dumps({"caption": {"CIDEr": value}}))
        copies.close(print)
    assert sorted(path.name for path in url.iterdir()) == ["evaluations.json", "step-00000002", "step-00000003"]
    elsewhere = dataclasses.replace(cfg, run_dir=str(tmp_path / "new"))
    assert checkpoint_to_resume(elsewhere).name == "step-00000003"
    assert chosen_checkpoint(elsewhere).name == "step-00000002"
    (url / "evaluations.json").write_text('{"../../escaped": {}, "val-00000009": {"caption": {"CIDEr": 1.0}}}')
    checkpoint_to_resume(elsewhere)
    assert not (tmp_path / "escaped").exists() and (tmp_path / "new/eval/val-00000009/metrics.json").is_file()


def test_export_gives_one_file_of_weights_in_any_precision(undisturbed, tmp_path):
    newest = undisturbed / "checkpoints/step-00000010"
    done = run("launch/export.py", undisturbed, tmp_path / "out/fp32")
    assert done.returncode == 0 and "step 10 of " in done.stdout, done.stderr
    assert (tmp_path / "out/fp32/model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert run("launch/export.py", undisturbed, tmp_path / "out/bf16", "--step", 4, "--dtype", "bf16").returncode == 0
    assert len({file.stat().st_mode for file in newest.iterdir()}) == 1  # safetensors' own would be 0600
    weights = load_file(tmp_path / "out/bf16/model.safetensors")
    full = load_file(undisturbed / "checkpoints/step-00000004/model.safetensors")
    assert all(torch.equal(weights[name], full[name].bfloat16()) for name in full)
    Model.from_checkpoint(tmp_path / "out/bf16")
    _refused(run("launch/export.py", undisturbed, tmp_path / "out/bf16"), "out/bf16 is there already")
    _refused(run("launch/export.py", undisturbed, tmp_path / "out/x", "--step", 5), "no complete checkpoint of step 5")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bf16", "fp32"]


def _go(count: int, *words: object):
    done = ranks(count, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def _refused(done, expected: str) -> None:
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and expected in line and "Traceback" not in done.stderr, done.stderr


def _equal(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            _equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _equal(a, b)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_copies_weights_to_its_host(monkeypatch, rank):
    copied, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copied.append(self.shape) or cpu(self))
    monkeypatch.setattr(manager.collectives, "rank", lambda: rank)
    of = SimpleNamespace(frozen={}, engine=SimpleNamespace(module=torch.nn.Linear(2, 3), optimizer=None))
    assert list(CheckpointManager._weights(of)) == ["weight", "bias"] * (rank == 0) and bool(copied) is (rank == 0)
