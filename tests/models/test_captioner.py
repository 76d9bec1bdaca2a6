"""captioner.py and decoding.py: the authors' scores, no leaks, one step at a time as all at once, searches by brute force."""

import functools
import itertools

import numpy as np
import open_clip
import pytest
import torch
from released import reference_model, same
from running import TINY

from clip4vla.config import DecodeConfig, ModelConfig
from clip4vla.errors import UserError
from clip4vla.models import generation
from clip4vla.models.captioner import CaptionDecoder, Captioner
from clip4vla.models.fusion import AUDIO, TEXT, VISION, PaddedSequence
from clip4vla.models.generation import SpecialTokens
from clip4vla.towers.build import build_clip
from clip4vla.towers.text import encode_text

SMALL = TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 6}}
SPECIAL = SpecialTokens(start=4, end=5, known=6)


@torch.no_grad()
def test_the_authors_scores():
    ref, model, _, words, parts = reference_model(head="captioner")
    _, read = model.encode_tokens(ref["in.tokens"])  # with the weights that the output is tied to
    words = words._replace(vectors=read)
    everywhere = torch.ones_like(words.mask)
    scores = model.head(words, [parts["v"], parts["a"]], everywhere, model.text.token_embedding.weight)
    same(scores.view(5, 12, -1), ref["caption.logits"])
    assert not torch.allclose(scores, model.head(words, [parts["v"]], everywhere, model.text.token_embedding.weight))


def writer(vocabulary=6, seed=0, dim=64, **settings):
    """(text tower, captioner) in float64, whose every weight matters."""
    torch.manual_seed(seed)
    clip = SMALL | {"text_cfg": SMALL["text_cfg"] | {"vocab_size": vocabulary}, "embed_dim": dim}
    text = build_clip(clip).text
    cfg = ModelConfig(head="captioner", head_layers=2, head_dropout=0.0, max_tokens=12, max_frames=4, **settings)
    head = Captioner(text, cfg, dim, segments=3)
    for parameter in itertools.chain(text.parameters(), head.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return text.double().eval(), head.double().eval()


def media(clips=3, seed=1, dim=64):
    """Frames and segments of clips of different lengths; clip 1 has no sound, clip 2 nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    frames, segments = (torch.randn(clips, n, dim, dtype=torch.float64, generator=generator) for n in (4, 3))
    seen, heard = ([4, 2, 0, 3] * clips)[:clips], ([3, 0, 0, 1] * clips)[:clips]
    there = [torch.arange(n) < torch.tensor(counts)[:, None] for n, counts in ((4, seen), (3, heard))]
    return [PaddedSequence(VISION, frames, there[0]), PaddedSequence(AUDIO, segments, there[1])]


def scored(text, head, tokens, parts):
    """Scores (B, L, V) after each of tokens (B, L), all at once, as in training."""
    _, read = encode_text(text, tokens)
    there = torch.ones_like(tokens, dtype=torch.bool)
    return head(PaddedSequence(TEXT, read, there), parts, there, text.token_embedding.weight).view(*tokens.shape, -1)


def test_no_later_word_is_known():
    text, head = writer()
    parts, tokens = media(), torch.randint(0, 4, (3, 7))
    before = scored(text, head, tokens, parts)
    for place in range(1, 7):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 4
        after = scored(text, head, other, parts)
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place:] - before[:, place:]).abs().flatten(2).amax(2).min() > 1e-4
    read = encode_text(text, tokens)[1].detach().requires_grad_()
    there = torch.ones_like(tokens, dtype=torch.bool)
    out = head(PaddedSequence(TEXT, read, there), parts, there, text.token_embedding.weight).view(3, 7, -1)
    out[:, 3].square().sum().backward()
    assert read.grad[:, 4:].eq(0).all() and read.grad[:, :4].ne(0).all()


def test_what_is_seen_and_heard_is_known_and_padding_is_not():
    text, head = writer()
    parts, tokens = media(), torch.randint(0, 4, (3, 5))
    before = scored(text, head, tokens, parts)
    assert before.isfinite().all()
    for part in parts:
        for clip, place in itertools.product(range(3), range(part.vectors.shape[1])):
            vectors = part.vectors.clone()
            vectors[clip, place] *= -1
            after = scored(text, head, tokens, [p._replace(vectors=vectors) if p is part else p for p in parts])
            changed = (after - before).abs().amax((1, 2)) > 1e-6
            assert changed.tolist() == [i == clip and bool(part.mask[clip, place]) for i in range(3)]
    swapped = [parts[0]._replace(kind=AUDIO), parts[1]._replace(kind=VISION)]
    with pytest.raises(AssertionError):  # four things in the room of three segments
        scored(text, head, tokens, swapped)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["va", "v", "a"])
def test_a_step_at_a_time_gives_the_scores_of_all_at_once(kinds):
    text, head = writer(dim=128)
    parts = [part for part, kind in zip(media(4, dim=128), "va", strict=True) if kind in kinds]
    tokens = torch.randint(0, 4, (8, 11))
    decoder, rows = CaptionDecoder(text, head, parts, copies=2), torch.arange(8)
    twice = [p._replace(vectors=p.vectors.repeat_interleave(2, 0), mask=p.mask.repeat_interleave(2, 0)) for p in parts]
    for n in range(11):
        if n in (3, 7):  # captions change places within their clips, as in beam search
            swap = rows ^ 1
            decoder.reorder_cache(swap)
            tokens[:, :n] = tokens[swap, :n]
        torch.testing.assert_close(
            decoder.step(tokens[:, n]), scored(text, head, tokens[:, : n + 1], twice)[:, -1], rtol=1e-5, atol=1e-6
        )


@functools.cache
@torch.no_grad()
def following(seed, clip, written):
    """Scores (V,) after what is written of a clip's caption, from scratch."""
    text, head = writer(seed=seed)
    parts = [p.select(torch.tensor([clip])) for p in media(8)]
    return scored(text, head, torch.tensor([[SPECIAL.start, *written]]), parts)[0, -1].float()


def likelihood(seed, clip, tokens, cfg):
    """Log-probability of a whole caption of a clip, under `permitted`'s rules in plain Python."""
    total, written, size = 0.0, [], cfg.no_repeat_ngram_size
    for token in tokens:
        grams = {tuple(written[i : i + size]) for i in range(len(written) - size + 1)} if size else set()
        banned = {SPECIAL.start} | ({SPECIAL.end} if len(written) < cfg.min_new_tokens else set())
        banned |= {t for t in range(SPECIAL.start) if size and (*written[len(written) - size + 1 :], t) in grams}
        if token in banned:
            return -np.inf
        scores = following(seed, clip, tuple(written)).clone()
        scores[list(banned)] = -torch.inf
        total += float(scores.log_softmax(0)[token])
        written.append(token)
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length_penalty": 1.0},
        {"length_penalty": -1.0},
        {"min_new_tokens": 2},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
    ],
)
def test_a_wide_beam_finds_the_best_of_all_captions(settings):
    text, head = writer(seed=3)
    parts, cfg = media(8), DecodeConfig(num_beams=130, max_new_tokens=4, **settings)
    with torch.no_grad():
        found = generation.beam_search(CaptionDecoder(text, head, parts, 130), 8, cfg, SPECIAL)
    whole = [[*c, SPECIAL.end] for n in range(4) for c in itertools.product(range(SPECIAL.start), repeat=n)]
    whole += [list(c) for c in itertools.product(range(SPECIAL.start), repeat=4)]
    for clip in range(3):
        scores = [likelihood(3, clip, c, cfg) / len(c) ** cfg.length_penalty for c in whole]
        best = int(np.argmax(scores))
        assert found.tokens[clip].tolist() == (whole[best] + [SPECIAL.end] * 4)[:4]
        assert float(found.score[clip]) == pytest.approx(scores[best], rel=1e-5)


def test_a_beam_is_as_good_as_its_score_and_never_worse_than_greed():
    text, head = writer(seed=15)
    parts, cfg = media(8), DecodeConfig(num_beams=3, min_new_tokens=5, max_new_tokens=9, no_repeat_ngram_size=2)
    many = generation.generate(lambda n: CaptionDecoder(text, head, parts, n), "abcdefgh", cfg, SPECIAL, 0)
    greedy = DecodeConfig(method="greedy", min_new_tokens=5, max_new_tokens=9, no_repeat_ngram_size=2)
    one = generation.generate(lambda n: CaptionDecoder(text, head, parts, n), "abcdefgh", greedy, SPECIAL, 0)
    assert many.score.mean() > one.score.mean() + 0.1 and len({tuple(c) for c in many.tokens.tolist()}) > 4
    for found in (many, one):
        for clip, (tokens, score) in enumerate(zip(found.tokens.tolist(), found.score.tolist(), strict=True)):
            caption = tokens[: tokens.index(SPECIAL.end) + 1] if SPECIAL.end in tokens else tokens
            assert likelihood(15, clip, caption, cfg) == pytest.approx(score, rel=1e-5)
    for clip, caption in enumerate(one.tokens.tolist()):  # each of greed's words is the likeliest one
        for n, token in enumerate(caption[: caption.index(SPECIAL.end) + 1 if SPECIAL.end in caption else None]):
            ranked = [likelihood(15, clip, [*caption[:n], t], cfg) for t in range(SPECIAL.known)]
            assert token == int(np.argmax(ranked))


def test_captions_do_not_depend_on_their_batch():
    text, head = writer(seed=2)
    parts, names = media(6), [f"clip{i}" for i in range(6)]
    for method in ("beam", "greedy", "nucleus"):
        cfg = DecodeConfig(method=method, num_beams=4, min_new_tokens=6, max_new_tokens=8, top_p=0.95)

        def written(rows, cfg=cfg):
            picked = [p.select(torch.tensor(rows)) for p in parts]
            found = generation.generate(
                lambda n: CaptionDecoder(text, head, picked, n), [names[i] for i in rows], cfg, SPECIAL, 7
            )
            return [[t for t in c if t != SPECIAL.end] for c in found.tokens.tolist()]

        together = written(list(range(6)))
        assert together == [written([i])[0] for i in range(6)] and len({tuple(c) for c in together}) > 1
    other = generation.generate(lambda n: CaptionDecoder(text, head, parts, n), names, cfg, SPECIAL, 8)
    assert [[t for t in c if t != SPECIAL.end] for c in other.tokens.tolist()] != together  # nucleus: another seed


def test_nucleus_sampling_keeps_the_likeliest_and_their_proportions():
    scores = torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log().expand(40_000, -1)
    draws = (torch.arange(40_000) + 0.5) / 40_000
    shares = {
        0.5: [4 / 7, 0, 3 / 7, 0],  # the least set with half of the probability: 0.4 + 0.3
        0.0: [1, 0, 0, 0],
        0.9: [0.4 / 0.95, 0, 0.3 / 0.95, 0.25 / 0.95],
        1.0: [0.4, 0.05, 0.3, 0.25],
    }
    for top_p, wanted in shares.items():
        drawn = generation.nucleus(scores, draws, DecodeConfig(top_p=top_p)).bincount(minlength=4) / 40_000
        assert drawn.tolist() == pytest.approx(wanted, abs=2e-4)
    cold = generation.nucleus(scores, draws, DecodeConfig(top_p=1.0, temperature=0.5)).bincount(minlength=4) / 40_000
    squares = torch.tensor([0.4, 0.05, 0.3, 0.25]).square()
    assert cold.tolist() == pytest.approx((squares / squares.sum()).tolist(), abs=2e-4)


def test_only_what_can_be_read_is_written():
    scores = torch.zeros(2, 10)
    allowed = generation.mask_disallowed_logits(
        scores, torch.tensor([[1], [2]]), DecodeConfig(), SpecialTokens(6, 7, 8)
    ).isfinite()
    assert allowed.all(0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 7]
    tokens, read = generation.special_tokens("ViT-B-32")
    numbers = open_clip.get_tokenizer("ViT-B-32")("A dog, barking.")[0].tolist()
    assert (tokens.start, tokens.end, tokens.known) == (49406, 49407, 49408)
    assert read(numbers[: numbers.index(tokens.end) + 1]) == "a dog , barking ."


def test_text_towers_that_know_the_future_are_refused():
    clip = SMALL | {"text_cfg": SMALL["text_cfg"] | {"no_causal_mask": True}}
    with pytest.raises(UserError, match="is causal"):
        Captioner(build_clip(clip).text, ModelConfig(head="captioner"), 64, 3)
