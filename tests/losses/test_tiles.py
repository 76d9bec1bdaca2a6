"""Tiles of logits: at extreme temperatures against float64, compiled, and where a compiler is missing."""

import warnings

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from clip4vla.losses import contrastive, tiles
from clip4vla.losses.contrastive import Term, multi_info_nce

N, D = 24, 16  # products of vectors of 16 times +-1/4 have no rounding in float32


def signs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (N, D), generator=generator).double() / 2 - 0.25


A, B = signs(0), signs(1)
EVERYONE = torch.ones(N).bool()
FEATURES = {
    "near": (A, torch.where(torch.arange(D) < 2, -A, A)),  # positives 0.75, of unrelated ones few above
    "random": (A, B),
    "equal": (A[:1].expand(N, D), A[:1].expand(N, D)),
    "hardest negatives": (A, torch.where(torch.arange(N)[:, None] % 2 == 0, -A, A.roll(1, 0))),  # cosines -1 beside 1
    "opposite": (A, -A),
}
PAIRS = {
    "plain": {},
    "intra": {"intra": True},
    "one way": {"one_way": True},
    "one clip": {"valid": torch.arange(N) == 17, "intra": True},
    "missing": {"valid": torch.arange(N) % 3 > 0, "intra": True},
    "one group": {"group": torch.zeros(N).long(), "intra": True},  # no negatives
    "groups": {"group": torch.arange(N) // 2, "valid": torch.arange(N) % 5 > 0, "intra": True},
}


def reference(a, b, scale, valid=EVERYONE, group=None, intra=False, one_way=False):
    """Compute the loss from the whole matrices in float64."""
    itself = torch.eye(N).bool()
    excluded = ~(valid[:, None] & valid)
    if group is not None:
        excluded = excluded | ((group[:, None] == group) & ~itself)
    losses = []
    for query, key in ((a, b), (b, a))[: 1 if one_way else 2]:
        positive = scale * (query * key).sum(1)
        logits = (scale * query @ key.T).masked_fill(excluded, -torch.inf)
        if intra:
            same = (scale * query @ query.T).masked_fill(excluded | itself, -torch.inf)
            logits = torch.cat([logits, same], 1)
        losses.append((logits[valid].logsumexp(1) - positive[valid]).mean())
    return torch.stack(losses).mean()


def ours(a, b, scale, valid=EVERYONE, group=None, intra=False, one_way=False):
    return multi_info_nce([a, b], scale, [Term(0, 1, valid, intra, one_way)], group)[0]


def derivatives(loss, features, scale, dtype, pairs):
    """Value, gradients by both features over the scale, and by the logarithm of the temperature over the scale."""
    a, b = (x.to(dtype).clone().requires_grad_() for x in features)
    scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    value = loss(a, b, scale, **pairs)
    by_a, by_b, by_scale = torch.autograd.grad(value, (a, b, scale))
    return value.detach() / scale.detach(), by_a / scale.detach(), by_b / scale.detach(), by_scale


def assert_equal(found, expected, tolerance):
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * max(want.abs().max(), 1 / N)


@pytest.mark.parametrize("name", FEATURES)
def test_it_is_exact_at_any_temperature(name, monkeypatch):
    monkeypatch.setitem(contrastive.TILE, "cpu", 80)  # tiles of 4 x 20: maxima change from tile to tile
    for scale in (1.0, 100.0, 200.0, 10000.0):
        rounded = 1e-5 * max(1, scale / 100)  # logits of that size have no more digits in float32
        for pairs in PAIRS.values():
            want = derivatives(reference, FEATURES[name], scale, torch.float64, pairs)
            for dtype, tolerance in ((torch.float64, 1e-6 * rounded), (torch.float32, rounded)):
                assert_equal(derivatives(ours, FEATURES[name], scale, dtype, pairs), want, tolerance)


@pytest.mark.parametrize("pairs", ["plain", "missing", "groups"])
def test_compiled_functions_of_a_tile_do_the_same(pairs, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setitem(contrastive.TILE, "cpu", 80)  # 4 x 20
    want = derivatives(ours, FEATURES["random"], 20.0, torch.float32, PAIRS[pairs])
    monkeypatch.setitem(tiles.BACKEND, "cpu", backend)
    assert_equal(derivatives(ours, FEATURES["random"], 20.0, torch.float32, PAIRS[pairs]), want, 1e-6)
    shapes = 2  # of tiles
    assert len(graphs) == shapes * (3 if PAIRS[pairs].get("intra") else 2)


def test_without_a_compiler_it_warns_once_and_runs_uncompiled(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C compiler\nmore")

    want = derivatives(ours, FEATURES["random"], 20.0, torch.float32, {})
    monkeypatch.setitem(tiles.BACKEND, "cpu", backend)
    with pytest.warns(UserWarning, match="run uncompiled.*no C compiler") as first:
        assert_equal(derivatives(ours, FEATURES["random"], 20.0, torch.float32, {}), want, 0)
    assert len(first) == 2 and not any("\n" in str(warning.message) for warning in first)  # a line for each function
    with warnings.catch_warnings(action="error"):
        assert_equal(derivatives(ours, FEATURES["random"], 20.0, torch.float32, {}), want, 0)
