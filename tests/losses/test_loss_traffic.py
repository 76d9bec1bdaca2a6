"""Passes over the tiles of a term: bytes that it reads and writes, forward and backward, over those of its similarity matrix.

One rank of four, with masks for rows that are not valid, as on a GPU. Those of matrix products are counted apart: a product
writes its tile (b N), or reads one.
"""

import functools

import pytest
import torch
from tile_passes import Passes, fused_bytes

from clip4vla.config import LossConfig
from clip4vla.data.batch import Labels
from clip4vla.distributed import collectives
from clip4vla.losses import contrastive, tiles
from clip4vla.losses.contrastive import Term, multi_info_nce
from clip4vla.losses.objective import compute_losses
from launch.bench.training import scale

B, WORLD, D = 512, 4, 8
TILE = (2048, 16384)  # rows and columns of a GPU's
KINDS = {  # most passes operation by operation, and as inductor fuses them for a GPU
    "plain": (54.5, 6.5),
    "one way": (54.5, 6.5),
    "groups": (57.5, 7.5),
    "intra": (110.5, 12.5),
    "intra groups": (117.5, 13.5),
}


@functools.cache
def fused_passes(name: str, groups: bool, by_column: bool) -> float:
    """Passes over a GPU's tile of the kernels of a function of tiles.py."""
    height, width = TILE

    def clips(m):
        return tiles.Clips(torch.empty(m, dtype=torch.bool), torch.empty(m, dtype=torch.int64) if groups else None)

    pairs = clips(height), clips(width)
    tile = torch.empty(TILE, device="meta")
    if name == "add_logits":
        columns = tiles.LogSumExp.empty(width, torch.ones(1)) if by_column else None
        rest = tiles.LogSumExp.empty(height, torch.ones(1)), columns
    else:
        rest = *(tiles.Denominator(torch.empty(m), torch.empty(m)) for m in TILE), torch.ones(1)
    return fused_bytes(getattr(tiles, name).__wrapped__, tile, *pairs, *rest) / (4 * height * width)


@pytest.fixture
def count(monkeypatch):
    """Returns what counts (elementwise, products) passes of work on one of the ranks, fused or operation by operation."""
    monkeypatch.setitem(contrastive.TILE, "cpu", 1 << 18)  # 256 x 1024
    monkeypatch.setattr(collectives, "all_reduce_max", lambda x: x)

    def run(work, fused, world=WORLD):
        passes = Passes()
        monkeypatch.setattr(collectives, "world_size", lambda: world)
        monkeypatch.setattr(collectives, "all_gather", lambda x: x.detach().repeat(world, *[1] * (x.dim() - 1)))
        monkeypatch.setattr(collectives, "all_reduce_sum", lambda x: world * x)

        def as_on_gpu(function):
            def instead(tile, rows, columns, by_row, by_column=None, *rest):
                passes.paused = True
                per_tile = fused_passes(function.__name__, rows.group is not None, by_column is not None)
                passes.elementwise += per_tile * tile.nbytes
                function(tile, rows, columns, by_row, by_column, *rest)
                passes.paused = False

            return instead

        with monkeypatch.context() as patch:
            for function in (tiles.add_logits, tiles.turn_into_gradients) if fused else ():
                patch.setattr(contrastive, function.__name__, as_on_gpu(function))
            with passes:
                work().sum().backward()
        matrix = 4 * B * B * world
        return passes.elementwise / matrix, passes.products / matrix

    return run


def features(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=generator).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_makes_few_passes_over_its_tiles(kind, count):
    group = torch.arange(B) // 2 if "groups" in kind else None
    term = Term(0, 1, torch.arange(B) != 3, "intra" in kind, kind == "one way")

    def work():
        return multi_info_nce(features(2), torch.ones(1), [term], group)[0]

    (eager, products), (fused, same_products) = count(work, fused=False), count(work, fused=True)
    assert eager <= KINDS[kind][0] and fused <= KINDS[kind][1] <= 20
    assert products == same_products == pytest.approx(11.5 if "intra" in kind else 5, abs=0.5)


def test_the_three_terms_of_pretraining_make_a_tenth_of_the_passes_that_they_did(count):
    """They made 238 operation by operation, masks in place; 20 for each term was the aim."""
    valid = torch.arange(B) != 3
    labels = Labels(torch.arange(B), valid, valid, valid)

    def work():
        named = dict(zip(("text", "vision", "audio", "masked"), features(4), strict=True))
        return compute_losses(named | {"scale": torch.ones(1)}, labels, LossConfig())["loss"]

    (eager, products), (fused, _), (fused_alone, _) = (count(work, *how) for how in ((False,), (True,), (True, 1)))
    assert eager <= 218.5 and fused <= 25 and products <= 22
    for passes, assumed in zip((fused_alone, fused), scale.PASSES, strict=True):
        assert assumed <= passes <= assumed + 2  # with the vectors of rows and columns, which are not small here
