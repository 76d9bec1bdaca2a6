"""A slice of faults/index.py: what a rank keeps of an index does not grow with the samples."""

from faults import index


def test_a_rank_keeps_the_offsets_of_two_windows_of_shards(tmp_path):
    tar = index.one_shard(tmp_path / "tar", 40)
    found = index.measured(index.spread(tmp_path / "many", tar, 60), batch=32, steps=3)
    assert found["samples"] == 2400 and found["corrupt"] == 0 and found["shards_in_use"] == 16
    assert 0 < found["bytes_in_use"] < 16 * 40 * 300
