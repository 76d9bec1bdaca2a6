"""loader.py: sounds changed and mixed in training, by seed, clip and epoch alone."""

import itertools

import torch
from loading import loader

from clip4vla.config import AugmentConfig
from clip4vla.data.sampler import TrainSampler
from clip4vla.distributed import collectives


def test_sound_is_augmented_by_epoch_the_same_on_any_rank(sample_shards, monkeypatch):
    sizes = [[s.samples for s in f.shards] for f in loader(sample_shards).folders]
    order = TrainSampler(sizes, [1, 1], 36, 0, 2)
    cfg = AugmentConfig(time_shift=40, mel_shift=8, time_masks=2, mel_masks=2)
    plain, whole = (loader(sample_shards, order, needs=("fbank",)) for _ in range(2))
    whole.augment = cfg
    one, other = (whole.batch(k) for k in range(2))  # an epoch each
    assert torch.equal(one.segments, whole.batch(0).segments) and torch.equal(
        one.segment_rows, plain.batch(0).segment_rows
    )
    with_sound = {one.ids[clip] for clip in one.segment_clip.tolist()}
    shared = with_sound & set(other.ids)
    assert len(shared) >= 18
    for name in shared:
        sounds = [b.segments[b.segment_clip == b.ids.index(name)] for b in (plain.batch(0), one, other)]
        assert not any(torch.equal(*pair) for pair in itertools.combinations(sounds, 2))
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        part = loader(sample_shards, order, needs=("fbank",))
        part.augment = cfg
        mine = part.batch(0)
        assert mine.ids == one.ids[rank::2]
        for number, name in enumerate(mine.ids):
            theirs = one.segments[one.segment_clip == one.ids.index(name)]
            assert torch.equal(mine.segments[mine.segment_clip == number], theirs)


def test_sounds_are_mixed_with_those_of_the_next_batch_the_same_on_any_rank(sample_shards, monkeypatch):
    sizes = [[s.samples for s in f.shards] for f in loader(sample_shards).folders]
    order = TrainSampler(sizes, [1, 1], 12, 0, 2)
    plain, whole = (loader(sample_shards, order, needs=("fbank",)) for _ in range(2))
    whole.augment = AugmentConfig(mix=0.7)
    one, alone, after = whole.batch(0), plain.batch(0), plain.batch(1)
    assert one.others == after.meta and one.ids == alone.ids and torch.equal(one.segment_rows, alone.segment_rows)
    mixed = one.share < 1
    assert mixed.any() and not (mixed & ~(alone.has_audio & after.has_audio)).any()
    for clip in range(12):
        same = torch.equal(*(b.segments[b.segment_clip == clip] for b in (one, alone)))
        assert same != mixed[clip]
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        part = loader(sample_shards, order, needs=("fbank",))
        part.augment = whole.augment
        mine = part.batch(0)
        assert torch.equal(mine.share, one.share[rank::2]) and mine.others == one.others[rank::2]
        for number in range(6):
            theirs = one.segments[one.segment_clip == rank + 2 * number]
            assert torch.equal(mine.segments[mine.segment_clip == number], theirs)


def test_a_sound_that_cannot_be_decoded_is_mixed_with_none_and_listed_once(sample_shards, tmp_path):
    ours = loader(sample_shards, needs=("fbank",))
    ours.damage_log = tmp_path / "corrupt.jsonl"
    sizes = [[s.samples for s in f.shards] for f in ours.folders]
    ours.order, ours.augment = TrainSampler(sizes, [1, 1], 12, 0, 2), AugmentConfig(mix=1.0)
    read = ours.read(0, 0)
    both = [i for i, pair in enumerate(zip(read.samples, read.others, strict=True)) if all(s.members for s in pair)]
    bad = next(i for i in both if "fbank" in read.samples[i].members and "fbank" in read.others[i].members)
    name = read.others[bad].clip["id"]
    read.others[bad].members["fbank"] = b"\xff\xd8" + bytes(500)
    batch = ours._complete(read)
    assert batch.share[bad] == 1 and (batch.share < 1).any() and batch.has_audio[bad] and all(batch.ids)
    (line,) = ours.damage_log.read_text().splitlines()
    assert ours.corrupt == 1 and "fbank cannot be decoded" in line and name not in batch.ids
