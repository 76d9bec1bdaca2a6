"""towers/attention.py: against nn.MultiheadAttention in open_clip 3's block, and brute force in float64."""

import copy

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from clip4vla.towers.attention import Block, own_blocks

HEADS, WIDTH, LENGTH = 2, 16, 5


class Release4(nn.Module):
    """What open_clip 4 has in place of nn.MultiheadAttention, by its names: a mask is True at keys that are attended to."""

    def __init__(self, like):
        super().__init__()
        self.num_heads, self.head_dim = like.num_heads, like.head_dim
        self.in_proj_weight, self.in_proj_bias, self.out_proj = like.in_proj_weight, like.in_proj_bias, like.out_proj

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        raise AssertionError("its arguments are not release 3's: nothing of ours calls it")


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    block = ResidualAttentionBlock(WIDTH, HEADS, ls_init_value=0.5).double()
    nn.init.normal_(block.attn.in_proj_bias)
    return block


def brute_force(block, x, seen):
    """The block's outputs, a query and a head at a time; seen[b][q]: the keys of query q."""
    y, width = block.ln_1(x), WIDTH // HEADS
    q, k, v = (
        y @ w.T + b for w, b in zip(block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
    )
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            keys = seen[b][i].nonzero()[:, 0]
            for h in range(HEADS):
                at = slice(h * width, (h + 1) * width)
                weights = (k[b, keys, at] @ q[b, i, at] / width**0.5).softmax(0)
                out[b, i, at] = weights @ v[b, keys, at]
    x = x + block.ls_1(out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@pytest.mark.parametrize("release", [3, 4])
@pytest.mark.parametrize("kept", [1, LENGTH])
@pytest.mark.parametrize("by", ["none", "keys", "queries"])
def test_outputs_and_gradients_are_brute_forces(theirs, release, kept, by):
    reference, model = copy.deepcopy(theirs), nn.Sequential(copy.deepcopy(theirs))
    if release == 4:
        model[0].attn = Release4(model[0].attn)
    own_blocks(model)
    block = model[0]
    assert type(block) is Block and list(block.state_dict()) == list(reference.state_dict())
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    keys = torch.tensor([[True] * 5, [True, True, False, True, False], [False] * 4 + [True]])
    each = keys[:, None] | torch.eye(LENGTH, dtype=torch.bool)
    seen = {
        "none": torch.ones(3, LENGTH, LENGTH, dtype=torch.bool),
        "keys": keys[:, None].expand(-1, LENGTH, -1),
        "queries": each,
    }[by]
    mask = {"none": None, "keys": keys, "queries": each[:, :kept]}[by]
    ours, wanted = block.run(x, kept, mask), brute_force(reference, x, seen)[:, :kept]
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    loss = torch.randn_like(ours)
    (ours * loss).sum().backward()
    (wanted * loss).sum().backward()
    for (name, p), (_, other) in zip(block.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["none", "causal", "of each head"])
def test_called_as_open_clip_calls_its_block_it_gives_the_same(theirs, kind):
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    causal = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    mask = {"none": None, "causal": causal, "of each head": causal + torch.randn(3 * HEADS, 1, LENGTH)}[kind]
    torch.testing.assert_close(Block(theirs)(x, None, None, mask), theirs(x, attn_mask=mask), rtol=1e-12, atol=1e-12)


def test_a_position_after_others_is_that_of_all_at_once(theirs):
    x, block = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), Block(theirs)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, -1, -1)
    past, steps = None, []
    for i in range(LENGTH):
        step, past = block.extend(x[:, i : i + 1], 1, past=past)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), block.run(x, LENGTH, causal), rtol=1e-12, atol=1e-12)


def test_a_block_that_reads_another_sequence_too_stays_open_clips():
    model = nn.ModuleList([ResidualAttentionBlock(WIDTH, HEADS, is_cross_attention=True)])
    own_blocks(model)
    assert type(model[0]) is ResidualAttentionBlock
