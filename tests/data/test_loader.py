"""loader.py: the stateless order, what a batch holds, and damage."""

import collections
import gc
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import indexes
import numpy as np
import pytest
import torch
from forks import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import loader
from PIL import Image

from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.data import loader as loader_module
from clip4vla.data.dali_decoder import Decoder
from clip4vla.data.loader import check_fingerprint, open_folders
from clip4vla.data.sampler import EvalSampler, SampleIndex, TrainSampler
from clip4vla.data.shards import ShardFolder, write_shard
from clip4vla.distributed import collectives
from clip4vla.errors import UserError

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_repeats_nothing_and_loses_only_the_tail(counts, batch, seed, window):
    total = sum(counts)
    if batch > total:
        return
    order = TrainSampler([counts], [1.0], batch, seed, window)
    for epoch in range(3):
        steps = range(epoch * (total // batch), (epoch + 1) * (total // batch))
        seen = [(p.shard, p.entry) for k in steps for p in order.batch(k)]
        assert len(set(seen)) == len(seen) == total - total % batch
        assert all(0 <= entry < counts[shard] for shard, entry in seen)
        assert {p.epoch for k in steps for p in order.batch(k)} == {epoch}


def test_the_dropped_tail_differs_between_epochs():
    order = TrainSampler([[10]], [1.0], 4, 0, 1)
    lost = {frozenset(range(10)) - {p.entry for k in (2 * e, 2 * e + 1) for p in order.batch(k)} for e in range(20)}
    assert len(lost) > 10


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_one_order(world):
    order = TrainSampler([[50, 50], [7]], [0.75, 0.25], 12, 3, 2)
    slices = [order.batch(5)[rank::world] for rank in range(world)]
    assert sorted(p for part in slices for p in part) == sorted(order.batch(5))
    assert {len(part) for part in slices} == {12 // world}


def test_any_step_alone_equals_the_run_from_the_start():
    whole = [TrainSampler([[30, 20]], [1.0], 6, 1, 1).batch(k) for k in range(25)]
    assert [TrainSampler([[30, 20]], [1.0], 6, 1, 1).batch(k) for k in (24, 3, 17)] == [whole[24], whole[3], whole[17]]


def test_shares_hold_in_every_batch_and_seeds_differ():
    order = TrainSampler([[500], [100]], [0.8, 0.2], 96, 0, 1)
    for k in range(30):
        counts = collections.Counter(p.source for p in order.batch(k))
        assert counts == {0: 77, 1: 19}
    assert order.batch(0) != TrainSampler([[500], [100]], [0.8, 0.2], 96, 1, 1).batch(0)


def test_epochs_and_seeds_have_windows_and_samples_of_their_own():
    order = TrainSampler([[100] * 8], [1.0], 100, 0, 2)
    others = [TrainSampler([[100] * 8], [1.0], 100, seed, 2) for seed in range(10)]
    for batches in ([order.batch(8 * epoch) for epoch in range(10)], [other.batch(0) for other in others]):
        assert len({frozenset(p.shard for p in batch) for batch in batches}) > 4  # a window of two of the eight shards
    halves = [TrainSampler([[100]], [1.0], 50, seed, 1).batch(0) for seed in range(10)]
    assert len({frozenset(p.entry for p in batch) for batch in halves}) == 10


def test_every_part_of_a_batch_has_samples_of_every_source():
    order = TrainSampler([[500], [500]], [0.5, 0.5], 96, 0, 1)
    for k in range(5):
        parts = [order.batch(k)[start : start + 24] for start in range(0, 96, 24)]  # as micro-batches are cut
        assert all({p.source for p in part} == {0, 1} for part in parts)


def test_shuffling_mixes_shards_within_the_window():
    order = TrainSampler([[100] * 8], [1.0], 50, 0, 4)
    assert len({p.shard for p in order.batch(0)}) == 4  # a window of four shards
    positions = [p.shard * 100 + p.entry for k in range(16) for p in order.batch(k)]
    assert abs(np.corrcoef(range(800), positions)[0, 1]) < 0.5


def test_a_source_smaller_than_its_part_of_a_batch_is_named():
    with pytest.raises(UserError, match="source 2 has 5 samples, fewer than its 6"):
        TrainSampler([[50], [5]], [0.5, 0.5], 12, 0, 1)


def test_shares_must_be_positive():
    for shares in ([0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="shares must be positive"):
            TrainSampler([[50], [50]], shares, 12, 0, 1)


def test_evaluation_pads_and_visits_everything_once():
    order = EvalSampler([[3, 2], [4]], 4)
    rows = [p for k in range(len(order)) for p in order.batch(k)]
    assert len(rows) == 12 and rows[9:] == [None] * 3
    assert len({p for p in rows if p}) == 9
    shared = EvalSampler.for_ranks([[3, 2], [4]], 2, ranks=2)
    assert (len(shared), shared.batch_size) == (3, 4)
    assert [len([p for p in shared.batch(k) if p]) for k in range(3)] == [4, 4, 1]
    alone = EvalSampler.for_ranks([[3, 2], [4]], 5, ranks=1)
    assert (len(alone), alone.batch_size) == (2, 5) and EvalSampler.for_ranks([[9]], 99, ranks=4).batch_size == 12
    few = [(p.source, p.shard, p.entry) for p in EvalSampler([[3, 2], [4]], 4, most=4).places]
    assert few == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 0, 3)]


def test_a_batch_holds_what_the_shards_hold(sample_shards):
    """Against PIL: every frame and every valid segment, packed in order, with its clip's number and rows."""
    ours = loader(sample_shards)
    for k in range(len(ours.order)):
        batch = ours.batch(k)
        frames, segments, rows = [], [], []
        for place in ours.order.batch(k):
            if place is None:
                continue
            sample = ours.folders[place.source].read([(place.shard, place.entry)])[0]
            frames += [np.asarray(_picture(sample["frames"]).convert("RGB")).reshape(-1, 224, 224, 3)]
            segments += [np.asarray(_picture(sample["fbank"])).reshape(-1, 224, 224)]
            valid = json.loads(sample["json"])["n_rows"]
            rows += [min(224, valid - at) for at in range(0, len(segments[-1]) * 224, 224)]
        want = torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2)
        assert (batch.frames.int() - want.int()).abs().float().mean() < 1  # decoders may differ by rounding
        want = torch.from_numpy(np.concatenate(segments))
        assert (batch.segments[:, 0].int() - want.int()).abs().float().mean() < 0.5
        assert batch.segment_rows.tolist() == rows
        assert batch.segment_clip.tolist() == sorted(batch.segment_clip.tolist())
        assert len(batch) == 16 and batch.has_audio.sum() == len([p for p in ours.order.batch(k) if p])
        assert batch.hidden_rows.shape == (len(segments and want), 224)


def test_ranks_slices_add_up_to_the_global_batch(sample_shards, monkeypatch):
    order = TrainSampler([[s.samples for s in f.shards] for f in loader(sample_shards).folders], [1, 1], 12, 0, 2)
    whole = loader(sample_shards, order).batch(3)
    for world in (2, 3):
        monkeypatch.setattr(collectives, "world_size", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
            part = loader(sample_shards, order).batch(3)
            assert part.ids == whole.ids[rank::world] and part.captions == whole.captions[rank::world]
            index = torch.isin(whole.segment_clip % world, torch.tensor(rank))
            assert torch.equal(part.segments, whole.segments[index])
            assert torch.equal(part.hidden_rows, whole.hidden_rows[index])
        monkeypatch.undo()


def test_a_clip_has_another_mask_in_every_epoch_and_another_caption_in_some(sample_shards):
    sizes = [[s.samples for s in f.shards] for f in loader(sample_shards).folders]
    ours = loader(sample_shards, TrainSampler(sizes, [1, 1], 36, 0, 2), needs=("fbank",))
    first, second = (ours.batch(k) for k in range(2))
    drawn = []
    for batch in (first, second):
        hidden = [batch.hidden_channels[batch.segment_clip == i] for i in range(36)]
        drawn.append({name: (c, h) for name, c, h in zip(batch.ids, batch.captions, hidden, strict=True)})
    both = [(drawn[0][name], drawn[1][name]) for name in drawn[0].keys() & drawn[1].keys()]
    assert len(both) >= 18 and not any(torch.equal(a[1], b[1]) for a, b in both if len(a[1]))
    assert 0 < sum(a[0] != b[0] for a, b in both)
    again = ours.batch(1)
    assert all(torch.equal(getattr(again, f), getattr(second, f)) for f in ("hidden_rows", "hidden_channels", "tokens"))


def test_masks_and_drawn_captions_depend_on_the_seed(sample_shards):
    ours, other = (loader(sample_shards, needs=("fbank",)) for _ in range(2))
    other.seed = 1
    one, two = ours.batch(0), other.batch(0)
    assert one.ids == two.ids and one.captions != two.captions
    for name in ("hidden_rows", "hidden_channels"):
        assert not torch.equal(getattr(one, name), getattr(two, name))


def test_captions_come_in_turn_or_always_the_first_and_of_chosen_languages(sample_shards):
    def captions(how, epochs, *more):
        """[captions of clip 1, clip 2, ...] in the order of the epochs."""
        ours = loader(sample_shards, needs=())
        ours.folders = open_folders({str(sample_shards / "pictures/train"): 1.0}, "data.train")
        ours.cfg = load(RunConfig, None, [f"data.caption_sampling={how}", *more]).data
        places = [[SampleIndex(0, 0, entry, epoch) for epoch in range(epochs)] for entry in range(4)]
        ours.order = SimpleNamespace(batch_size=epochs, batch=lambda k, rows: places[k])
        return [(batch.captions, batch.meta[0]) for batch in map(ours.batch, range(4))]

    for said, clip in captions("cycle", 10):
        assert sorted(said) == sorted(clip["captions"]) and len(said) == 10  # all ten, once each
    assert len({clip["captions"].index(said[0]) for said, clip in captions("cycle", 10)}) > 1
    assert all(set(said) == {clip["captions"][0]} for said, clip in captions("first", 3))
    for said, clip in captions("random", 5, "data.languages=[fr]"):
        assert clip["caption_langs"] == ["fr"] and set(said) == set(clip["captions"]) and len(clip["captions"]) == 1
    assert all(set(said) == {""} and not clip["captions"] for said, clip in captions("cycle", 2, "data.languages=[xx]"))


def test_frames_that_no_loss_needs_are_not_read(sample_shards):
    batch = loader(sample_shards, needs=("fbank",)).batch(0)
    assert len(batch.frames) == 0 and not batch.has_frames.any() and batch.has_audio.any()


def test_prefetching_changes_nothing_and_a_consumer_may_leave(sample_shards):
    ours = loader(sample_shards, prefetch=2)
    count = len(ours.order)
    got = [batch.ids for batch in ours.batches(0, count)]
    assert got == [ours.batch(k).ids for k in range(count)]
    assert len(list(ours.batches(1, 2))) == 1 and list(ours.batches(2, 2)) == []
    stream = ours.batches(0, count)
    next(stream)
    stream.close()


def test_the_pictures_of_a_batch_outlive_later_batches_and_the_loader(sample_shards):
    ours = loader(sample_shards)
    stream = ours.batches(0, 3)
    kept = [(batch, batch.frames.clone(), batch.segments.clone()) for batch in stream]
    alone = [ours.batch(k) for k in range(3)]
    del ours, stream
    gc.collect()
    for (batch, frames, segments), again in zip(kept, alone, strict=True):
        assert torch.equal(batch.frames, frames) and torch.equal(again.frames, frames)
        assert torch.equal(batch.segments, segments) and torch.equal(again.segments, segments)


def damage(shards, share: float):
    """Flip one byte in the spectrograms of a share of the speech samples."""
    folder = shards / "speech_fr/train"
    shard = indexes.read(folder)["shards"][0]
    tar = bytearray((folder / shard["name"]).read_bytes())
    hit = shard["entries"][: max(1, round(share * shard["samples"]))]
    for _, members in hit:
        offset = next(place[0] for ext, place in members.items() if ext.startswith("fbank"))
        tar[offset + 50] ^= 0xFF
    (folder / shard["name"]).write_bytes(tar)
    return [key for key, _ in hit]


def test_damaged_samples_are_skipped_counted_and_listed(sample_shards, tmp_path):
    shutil.copytree(sample_shards, tmp_path / "s")
    keys = damage(tmp_path / "s", 0.03)
    ours = loader(tmp_path / "s")
    absent = sum(int((~batch.has_audio).sum()) for batch in ours.batches(0, len(ours.order)))
    padding = -len(ours.order.places) % 16
    assert ours.corrupt == len(keys) and absent == len(keys) + padding
    listed = [json.loads(line) for line in (tmp_path / "s/corrupt.jsonl").read_text().splitlines()]
    assert [row["key"] for row in listed] == keys and all("CRC" in row["reason"] for row in listed)


def _claims(kind: str, width: int, height: int) -> bytes:
    """A picture of one pixel whose header says that it is larger."""
    Image.new("L", (1, 1)).save(out := io.BytesIO(), kind)
    data = bytearray(out.getvalue())
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _json(sample, **fields):
    meta = json.loads(sample["json"]) | fields
    return {"json": json.dumps({name: value for name, value in meta.items() if value is not ...}).encode()}


HOSTILE = [  # what a sample becomes, with a right CRC-32; a word of the reason
    (
        lambda s: {"frames.jpg": s["frames"][: len(s["frames"]) // 2] + b"\xff\xd9"},
        "",
    ),  # Pillow and DALI fill it with grey
    (lambda s: {"frames.jpg": s["frames"][:300]}, "frames"),
    (lambda s: {"frames.jpg": s["frames"][:-2000] + s["frames"][:2000]}, ""),
    (lambda s: {"fbank.jpg": b"\xff\xd8" + bytes(500)}, "fbank cannot be read"),
    (lambda s: {"frames.jpg": _claims("PNG", 60_000, 60_000)}, "frames"),
    (lambda s: {"frames.jpg": _claims("JPEG", 60_000, 60_000)}, "frames"),
    (lambda s: {"frames.jpg": _claims("PNG", 224, 224)}, "frames cannot be decoded"),
    (lambda s: _json(s, n_frames=10**12), "frames is 224 x 224, by its json"),
    (lambda s: _json(s, n_rows=10**12), "n_rows is 1000000000000"),
    (lambda s: _json(s, n_segments=-1), "n_segments -1"),
    (lambda s: _json(s, captions="none"), "captions is 'none'"),
    (lambda s: _json(s, id=...), "json lacks ['id']"),
    (lambda s: _json(s, group="\ud800"), "json is not JSON"),
    (lambda s: {"json": b"[" * 100_000}, "json is not JSON"),
    (lambda s: {"json": b"\x80\x04cos\nsystem\n"}, "json is not JSON"),
    (lambda s: {"json": b""}, "json is not JSON"),
]


def test_hostile_samples_with_right_checksums_are_damage_too(sample_shards, tmp_path):
    shutil.copytree(sample_shards, tmp_path / "s")
    folder = tmp_path / "s/speech_fr/train"
    whole, opened = loader(sample_shards), ShardFolder.open(str(folder))
    tree = indexes.read(folder)
    content = []
    for i, key in enumerate(opened.entries(0).keys()):
        (sample,) = opened.read([(0, i)])
        change = HOSTILE[i][0](sample) if i < len(HOSTILE) else {}
        content.append(
            (key, {"json": sample["json"], "fbank.jpg": sample["fbank"], "frames.jpg": sample["frames"]} | change)
        )
    tree["shards"][0] = write_shard(folder / tree["shards"][0]["name"], content)
    indexes.write(folder, tree)
    ours = loader(tmp_path / "s", max_corrupt_fraction=0.02)
    batches = list(ours.batches(0, len(ours.order)))
    rows = [json.loads(line) for line in (tmp_path / "s/corrupt.jsonl").read_text().splitlines()]
    listed = {row["key"].partition("-")[0]: row["reason"] for row in rows}
    assert len(rows) == ours.corrupt == sum(bool(word) for _, word in HOSTILE), rows
    for i, (_, word) in enumerate(HOSTILE):
        assert word in listed.get(f"{i:07d}", ""), (i, word, listed)
    for k, batch in enumerate(batches):  # what is intact is as it was
        before = whole.batch(k)
        for row, name in enumerate(batch.ids):
            hostile = k * 16 + row < len(HOSTILE)
            assert name == ("" if hostile and HOSTILE[k * 16 + row][1] else before.ids[row])
            assert hostile or torch.equal(
                batch.frames[batch.frame_clip == row], before.frames[before.frame_clip == row]
            )
            assert hostile or torch.equal(
                batch.segments[batch.segment_clip == row], before.segments[before.segment_clip == row]
            )
    assert len(opened.entries(0)) >= len(HOSTILE)


def test_after_a_bad_picture_few_pipelines_are_built_and_only_the_bad_ones_are_named(
    sample_shards, tmp_path, monkeypatch
):
    built = []
    monkeypatch.setattr(loader_module, "Decoder", lambda *words: (built.append(words[0]), Decoder(*words))[1])
    ours = loader(sample_shards, needs=("fbank",))
    ours.damage_log = tmp_path / "corrupt.jsonl"
    whole, read = ours.batch(0), ours.read(0, 0)
    bad = [i for i, sample in enumerate(read.samples) if sample.members][2:9:3]
    names = [read.samples[i].clip["id"] for i in bad]
    for i in bad:
        read.samples[i].members["fbank"] = b"\xff\xd8" + bytes(500)
    made = ours._complete(read)
    assert built == [
        16,
        1,
        1,
        1,
        1,
        16,
    ]  # the batch's, one for strips alone and one more after each failure, the batch's
    assert [i for i in range(16) if made.ids[i] != whole.ids[i]] == bad and names == [whole.ids[i] for i in bad]
    assert not made.has_audio[bad].any() and ours.corrupt == 3
    kept = ~torch.isin(whole.segment_clip, torch.tensor(bad))
    assert torch.equal(made.segments, whole.segments[kept]) and torch.equal(made.hidden_rows, whole.hidden_rows[kept])


def test_more_damage_than_allowed_stops(sample_shards, tmp_path):
    shutil.copytree(sample_shards, tmp_path / "s")
    damage(tmp_path / "s", 1.0)
    with pytest.raises(UserError, match="were corrupt, more than data.max_corrupt_fraction"):
        for batch in loader(tmp_path / "s").batches(0, 8):
            assert batch


def test_fingerprints_that_differ_are_refused_with_both_values(sample_shards):
    theirs = open_folders({str(sample_shards / "speech_fr/train"): 1.0}, "data.train")[0].fingerprint
    ours = json.loads(json.dumps(theirs))
    ours["spectrogram"]["n_fft"] = 512
    with pytest.raises(UserError, match="spectrogram.n_fft is 512 there and 1024 here"):
        check_fingerprint(ours, theirs, "the model", "shards")
    ours["spectrogram"]["n_fft"], ours["versions"] = 1024, {}
    check_fingerprint(ours, theirs, "the model", "shards")


def test_without_dali_there_is_one_clear_line(sample_shards):
    code = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "from pathlib import Path; sys.path.insert(0, 'tests/helpers')\n"
        "from loading import loader\n"
        f"loader(Path({str(sample_shards)!r})).batch(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "UserError: reading shards needs NVIDIA DALI: pip install" in done.stderr


def _picture(data: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(data))
