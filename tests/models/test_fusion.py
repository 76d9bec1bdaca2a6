"""fusion.py: the authors' logits, brute force pair by pair, gradients, memory, and what must hold by construction."""

import ctypes

import psutil
import pytest
import torch
import torch.nn.functional as F
from released import head, reference_model, same
from running import TINY

from clip4vla.config import ModelConfig
from clip4vla.errors import UserError
from clip4vla.models import fusion
from clip4vla.models.fusion import AUDIO, TEXT, VISION, PaddedSequence, pad_packed
from clip4vla.models.model import pool
from clip4vla.towers.build import build_clip

KINDS = {"": "va", ".video": "v", ".audio": "a"}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_authors_global_to_local_logits(name):
    ref, model, sentence, _, parts = reference_model(head="global_local")
    media = model.head([parts[kind] for kind in KINDS[name]])
    same(100 * F.normalize(sentence, dim=-1) @ media.T, ref[f"logits.loose_seq{name}"])


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("words, key", [("all", "cross_align"), ("eos", "tight_seq")])
def test_the_authors_local_to_local_logits(name, words, key):
    ref, model, sentence, tokens, parts = reference_model(head="local_local", words=words)
    assert torch.equal(tokens.mask, ref["in.token_mask"].bool())
    scores = model.head(model.head.words(sentence, tokens), [parts[kind] for kind in KINDS[name]])
    same(100 * scores, ref[f"logits.{key}{name}"])


@torch.no_grad()
def test_the_authors_mean_of_unit_vectors():
    ref, model, sentence, _, parts = reference_model()
    parts["a"] = parts["a"]._replace(vectors=ref["audio.by_type"])
    same(100 * F.normalize(sentence, dim=-1) @ model.head(list(parts.values())).T, ref["logits.global_global.t_va"])


def random_parts(count, seed=1):
    """Words of 5 captions; frames and segments of `count` clips, of different lengths; clip 1 has no sound, clip 2 nothing."""
    generator = torch.Generator().manual_seed(seed)
    words, frames, segments = (
        torch.randn(n, m, 64, generator=generator).double() for n, m in ((5, 6), (count, 4), (count, 3))
    )
    lengths = [torch.randint(1, m + 1, (n,), generator=generator) for n, m in ((5, 6), (count, 4), (count, 3))]
    lengths[1][2] = lengths[2][1] = lengths[2][2] = 0
    there = [torch.arange(m) < length[:, None] for m, length in zip((6, 4, 3), lengths, strict=True)]
    kinds = (TEXT, VISION, AUDIO)
    return [PaddedSequence(*one) for one in zip(kinds, (words, frames, segments), there, strict=True)]


def one_by_one(made, words, parts):
    """Scores from the text tower's own kind of block, one pair at a time, without padding and without tiles."""
    encoder, out = made.encoder, torch.zeros(len(words.mask), len(parts[0].mask), dtype=torch.float64)
    for c in range(out.shape[0]):
        for b in range(out.shape[1]):
            x, start = [], 0
            for part, row in ((words, c), *((part, b) for part in parts)):
                vectors = part.vectors[row][part.mask[row]]
                places = encoder.positional_embedding[start : start + len(vectors)]
                x.append(vectors + places + encoder.type_embedding[part.kind])
                start += encoder.max_positions[part.kind]
            x = torch.cat(x)[None]
            for block in encoder.blocks:
                x = block(x)
            out[c, b] = made.score(x[0, 0])
    return out


@pytest.mark.parametrize("tokens", [1, 60, 1 << 12])
def test_tiles_of_pairs_equal_pairs_one_by_one_and_so_do_their_gradients(monkeypatch, tokens):
    monkeypatch.setitem(fusion.TOKENS, "cpu", tokens)
    made, (words, *parts) = head("local_local"), random_parts(7)
    found = []
    for score in (made, lambda *args: one_by_one(made, *args)):
        leaves = [part.vectors.clone().requires_grad_() for part in (words, *parts)]
        given = [part._replace(vectors=leaf) for part, leaf in zip((words, *parts), leaves, strict=True)]
        scores = score(given[0], given[1:])
        weights = torch.linspace(-1, 1, scores.numel(), dtype=torch.float64).view_as(scores)
        grads = torch.autograd.grad((scores * weights).sum(), [*leaves, *made.parameters()])
        found.append([scores.double(), *grads])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # scores are fp32


def test_scores_of_many_pairs_hold_tiles_not_the_pairs():
    """256 x 256 pairs of 13 tokens of 64 numbers: one activation alone would take 218 MB, and two blocks keep some twenty."""
    made, (words, *parts) = head("local_local").float(), random_parts(256)
    words, *parts = (part._replace(vectors=part.vectors.float()) for part in (words, *parts))
    many = words.select(torch.arange(256) % 5)
    made(many.select(torch.arange(16)), parts).sum().backward()
    before = held()
    scores = made(many, parts)
    assert held() - before < 110e6, f"{(held() - before) / 1e6:.0f} MB"
    scores.sum().backward()
    assert made.encoder.type_embedding.grad.isfinite().all()


def held() -> float:
    """Bytes of this process, without what malloc keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_global_to_local_does_not_see_padding_and_survives_clips_without_anything():
    made, (_, *parts) = head("global_local"), random_parts(7)
    media = made(parts)
    assert media.isfinite().all() and (media[2] == 0).all()
    torch.testing.assert_close(media.norm(dim=1)[[0, 1, 3, 4, 5, 6]], torch.ones(6))
    for b in range(7):
        alone = [part.select(torch.tensor([b])) for part in parts]
        torch.testing.assert_close(made(alone)[0], media[b], rtol=1e-5, atol=1e-6)
    spoilt = [part._replace(vectors=part.vectors.masked_fill(~part.mask[..., None], 1e3)) for part in parts]
    torch.testing.assert_close(made(spoilt), media)


def test_means_are_of_what_a_clip_has():
    (_, *parts) = random_parts(7)
    seen, heard = (fusion.mean_pool_padded(part) for part in parts)
    raw, unit = (fusion.mean([seen, heard], how) for how in ("raw", "normalized"))
    torch.testing.assert_close(raw[0], (seen[0] + heard[0]) / 2)
    torch.testing.assert_close(raw[1], seen[1])  # it makes no sound
    torch.testing.assert_close(unit, F.normalize(raw, dim=-1))


def test_packed_vectors_become_rows_and_pool_as_they_do_packed():
    owner = torch.tensor([0, 0, 2, 2, 2, 4, 4])  # 4 is padding
    packed = torch.randn(7, 64)
    rows = pad_packed(VISION, packed, torch.tensor([2, 0, 3, 0]))
    assert rows.mask.sum(1).tolist() == [2, 0, 3, 0] and rows.vectors.shape == (4, 3, 64)
    assert torch.equal(rows.vectors[rows.mask], packed[:5])
    assert pad_packed(VISION, packed, rows.lengths, 9).mask.shape == (4, 9)
    torch.testing.assert_close(fusion.mean_pool_padded(rows), pool(packed, owner, 4))


def test_it_starts_as_the_text_tower_where_that_fits():
    text = build_clip(TINY).text
    made = fusion.build(text, ModelConfig(head="global_local", head_layers=1, max_frames=4), 64, 3)
    for name, value in text.transformer.resblocks[0].state_dict().items():
        assert torch.equal(made.encoder.blocks[0].state_dict()[name], value)
    assert torch.equal(made.encoder.positional_embedding, text.positional_embedding[:7])
    wider = fusion.build(text, ModelConfig(head="local_local", head_layers=3, max_tokens=90), 128, 3)
    assert wider.encoder.positional_embedding.shape == (90 + 12 + 3, 128) and len(wider.encoder.blocks) == 3
    with pytest.raises(UserError, match="divides by 64"):
        fusion.build(text, ModelConfig(head="local_local"), 100, 3)


def test_dropout_is_for_training_alone():
    made, (_, *parts) = head("global_local"), random_parts(7)
    made.encoder.dropout.p = 0.5
    assert not torch.equal(made(parts), made(parts))
    made.eval()
    assert torch.equal(made(parts), made(parts))
