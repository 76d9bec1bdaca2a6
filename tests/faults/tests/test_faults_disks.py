"""A slice of the campaign on disks (tests/faults/disks.py): full, read-only, corrupt, with two writers."""

import random

import pytest
from faults import _damage, _full, _others
from faults._disk import Disk, can_mount, refused, well
from faults._small import Small, losses

needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a tmpfs is not permitted")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return Small(tmp_path_factory.mktemp("small") / "small")


@needs_mount
def test_a_full_disk_is_one_line_and_with_room_the_result_is_the_same(small, tmp_path):
    with Disk(tmp_path / "disk") as disk:
        cases = _full.cases(disk.folder, small, 0.1)
        outcomes = {
            name: _full.fill(disk, name, cases[name]._replace(sizes=1), random.Random(5))
            for name in ("shard", "evaluate", "export", "search", "train")
        }
    assert all(of["refused"] for of in outcomes.values()), outcomes


@needs_mount
def test_a_run_on_a_read_only_disk_is_one_line_and_its_shards_are_read(small, tmp_path):
    with Disk(tmp_path / "disk") as disk:
        data = small.copy(disk.folder / "data")
        disk.read_only()
        assert "Read-only file system" in refused(small.train(disk.folder / "run"), "run_dir")
        _others.cached(small, disk.folder / "cache")
        well(small.train(tmp_path / "run", "train.max_steps=2", shards=data), "shards")


def test_a_flipped_bit_is_named_survived_and_repaired(small, tmp_path):
    assert _damage.between(tmp_path / "d", small, "flipped", random.Random(0)) == 1


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(small, tmp_path):
    with small.training(tmp_path / "run", "train.max_steps=400", "train.save_every=400", "eval.every_steps=0") as first:
        _others.wait_for(tmp_path / "run/metrics.jsonl", 2)
        said = refused(small.train(tmp_path / "run", "train.hang_timeout_minutes=0.02"), "second")
        assert "another run is writing there" in said and first.ranks[0].is_alive()
        first.ranks[0].kill()
        first.ranks[0].join()
    well(small.train(tmp_path / "run", "eval.every_steps=0"), "after a kill")
    assert len(losses(tmp_path / "run")) == 6


def test_what_was_cached_in_the_future_makes_room(tmp_path):
    _others.future_entries(tmp_path)
