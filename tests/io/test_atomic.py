"""atomic.py: a command that fails before it wrote anything leaves no folder, and takes none from another."""

import pytest
from forks import ROOT
from running import run

from clip4vla.io import atomic
from clip4vla.io.atomic import removed_if_empty


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_without_anything_goes_with_the_parents_that_were_made(tmp_path, error):
    for locks in ((), (".lock",), (".lock", ".plan.lock")):
        with pytest.raises(error), removed_if_empty(tmp_path / "a/b/c", ".lock", ".plan.lock"):
            (tmp_path / "a/b/c").mkdir(parents=True)
            for name in locks:
                (tmp_path / "a/b/c" / name).touch()
            raise error
        assert not list(tmp_path.iterdir())


def test_a_folder_with_something_or_that_was_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for name, file in (("there", ".lock"), ("new/a", "log.txt")):
        with pytest.raises(ValueError), removed_if_empty(tmp_path / name, ".lock"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
            (tmp_path / name / ".lock").touch()
            raise ValueError
        assert (tmp_path / name / file).is_file() and (tmp_path / name / ".lock").is_file()
    with pytest.raises(ValueError), removed_if_empty(tmp_path / "never"):
        raise ValueError
    with removed_if_empty(tmp_path / "well"):
        (tmp_path / "well").mkdir()
    assert (tmp_path / "well").is_dir()


def test_a_folder_that_another_has_locked_stays(tmp_path):
    with pytest.raises(ValueError), removed_if_empty(tmp_path / "a", ".lock"):
        (tmp_path / "a").mkdir()
        other = (tmp_path / "a/.lock").open("a")
        assert atomic.lock(other, shared=True)
        raise ValueError
    assert (tmp_path / "a/.lock").is_file()
    other.close()


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path):
    with (tmp_path / "lock").open("a") as waiting:
        (tmp_path / "lock").unlink()
        assert not atomic.lock(waiting)
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert atomic.lock(first) and not atomic.lock(second)


COMMANDS = [
    "launch/pretrain.py configs/pretrain/sample.yaml data.train=/nowhere track.wandb=off run_dir=OUT",
    "launch/finetune_classification.py configs/finetune/esc50_finetuned.yaml data.train=/nowhere run_dir=OUT",
    "launch/ablate.py table5 configs/pretrain/sample.yaml configs/finetune/stamps_retrieval.yaml init_from=scratch "
    "data.train=/nowhere --out OUT",
    "launch/evaluate.py configs/pretrain/sample.yaml data.test=/nowhere run_dir=OUT",
    "launch/export.py /nowhere OUT",
    "data_prep/shard.py configs/data/folder.yaml media_root=MEDIA out=OUT --part 0/2",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_command_that_fails_leaves_no_empty_folder(command, tmp_path):
    media = ROOT / "configs/clip"  # where no annotations are
    words = [word.replace("OUT", f"{tmp_path}/new/out").replace("MEDIA", str(media)) for word in command.split()]
    done = run(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert not list(tmp_path.iterdir())
