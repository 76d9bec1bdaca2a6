"""Write captions greedily, by nucleus sampling (Holtzman et al. 2020), or by beam search; many clips at a time.

Notation: B clips, K beams, R captions at work (B, or B K, those of a clip next to each other), V tokens, n so far.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import DecodeConfig
from clip4vla.data.batch import upload
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.models.captioner import CaptionDecoder
from clip4vla.towers.tokenizer import get_tokenizer


class SpecialTokens(NamedTuple):
    """Holds the numbers of [SOS] and [EOS], and how many tokens can be written out: a model may have scores for more."""

    start: int
    end: int
    known: int


class GeneratedCaptions(NamedTuple):
    """Holds one caption of each clip."""

    tokens: Tensor  # B n int64, without [SOS]; filled up with [EOS]
    score: Tensor  # B fp32: log-probability; of beam search divided by the length penalty


def special_tokens(clip: str, config: dict[str, Any] | None = None) -> tuple[SpecialTokens, Callable[[list[int]], str]]:
    """Find the special tokens of a CLIP's tokenizer, and how it decodes token numbers; UserError if it is not OpenAI's."""
    known = get_tokenizer(clip, config=config)
    if not isinstance(known, open_clip.SimpleTokenizer):
        raise UserError(
            f"model.clip={clip}: captions are written with the tokenizer of OpenAI's CLIP, this has another"
        )
    ends = known.sot_token_id, known.eot_token_id
    return SpecialTokens(*ends, known.vocab_size), lambda numbers: known.decode(
        [n for n in numbers if n not in ends]
    ).strip()


def method_name(cfg: DecodeConfig) -> str:
    """Name the method in a few words, such as beam 5."""
    number = {"beam": f" {cfg.num_beams}", "nucleus": f" {cfg.top_p:g}"}
    return cfg.method + number.get(cfg.method, "")


def resolve_max_tokens(cfg: DecodeConfig, positions: int) -> DecodeConfig:
    """Set cfg.max_new_tokens as a model of `positions` has room; UserError if it asks for more, or for < min_new_tokens."""
    room = positions - 1
    most = cfg.max_new_tokens or room
    if not cfg.min_new_tokens < most <= room:
        raise UserError(
            f"decode.max_new_tokens={cfg.max_new_tokens}, min_new_tokens={cfg.min_new_tokens}: the first must be larger, "
            f"and at most {room}: model.max_tokens={positions} less [SOS]"
        )
    return replace(cfg, max_new_tokens=most)


@torch.no_grad()
def generate(
    grow: Callable[[int], CaptionDecoder], ids: Sequence[str], cfg: DecodeConfig, tokens: SpecialTokens, seed: int
) -> GeneratedCaptions:
    """Write a caption for each of the clips `ids`; grow(copies) starts `copies` captions of each.

    Sampling depends on seed and id alone, not on the batch. Ranks write in step: each must come here as often as the others.
    """
    if cfg.method == "beam":
        return beam_search(grow(cfg.num_beams), len(ids), cfg, tokens)
    if cfg.method == "greedy":
        return generate_stepwise(grow(1), len(ids), cfg, tokens, lambda scores, _: scores.argmax(1))
    rows = [np.random.default_rng((seed, zlib.crc32(name.encode()))).random(cfg.max_new_tokens) for name in ids]
    decoder = grow(1)
    draws = upload(torch.from_numpy(np.stack(rows)).T.float(), decoder.mask.device)
    return generate_stepwise(decoder, len(ids), cfg, tokens, lambda scores, n: nucleus(scores, draws[n], cfg))


def generate_stepwise(
    decoder: CaptionDecoder,
    rows: int,
    cfg: DecodeConfig,
    tokens: SpecialTokens,
    choose: Callable[[Tensor, int], Tensor],
) -> GeneratedCaptions:
    """Write one caption a clip, token by token: choose(scores (R, V), n) gives the next one (R,)."""
    device = decoder.mask.device
    token = torch.full((rows,), tokens.start, device=device)
    written, total = token.new_empty(rows, 0), torch.zeros(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for n in range(cfg.max_new_tokens):
        scores = mask_disallowed_logits(decoder.step(token), written, cfg, tokens)
        token = choose(scores, n).masked_fill(done, tokens.end)
        total += scores.log_softmax(1).gather(1, token[:, None])[:, 0].masked_fill(done, 0)
        written = torch.cat([written, token[:, None]], 1)
        done |= token == tokens.end
        if _everywhere(done):
            break
    return GeneratedCaptions(written, total)


def nucleus(scores: Tensor, draws: Tensor, cfg: DecodeConfig) -> Tensor:
    """Sample tokens (R,) of scores (R, V): inverse of their distribution, cut to cfg.top_p, at draws (R,) in 0..1."""
    shares, order = (scores / cfg.temperature).softmax(1).sort(1, descending=True)
    before = shares.cumsum(1) - shares
    shares = shares.masked_fill((before >= cfg.top_p) & (before > 0), 0)  # the first one stays
    upto = shares.cumsum(1)
    place = torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True)
    place = torch.minimum(place, (shares > 0).sum(1, keepdim=True) - 1)  # a draw of 1 is rounding's
    return order.gather(1, place)[:, 0]


def beam_search(decoder: CaptionDecoder, clips: int, cfg: DecodeConfig, tokens: SpecialTokens) -> GeneratedCaptions:
    """Search the best finished caption of each clip by log-probability / length ** length_penalty, [EOS] counted.

    K captions of a clip live. Of the 2 K best of their continuations those with [EOS] are finished, and the K best others
    live on. Over when no living one can become better than the best finished one, or at max_tokens.
    """
    device, beams = decoder.mask.device, cfg.num_beams
    first = torch.arange(clips, device=device)[:, None] * beams  # R-numbers of a clip's captions start there
    token = torch.full((clips * beams,), tokens.start, device=device)
    written = token.new_empty(clips, beams, 0)
    alive = torch.zeros(clips, beams, device=device)
    alive[:, 1:] = -torch.inf  # at first all are the same
    best, kept = torch.full_like(alive[:, 0], -torch.inf), token.new_full((clips, cfg.max_new_tokens), tokens.end)
    for n in range(1, cfg.max_new_tokens + 1):
        scores = mask_disallowed_logits(decoder.step(token), written.flatten(0, 1), cfg, tokens).log_softmax(1)
        total, place = (alive[..., None] + scores.view(clips, beams, -1)).flatten(1).topk(2 * beams)
        parent, token = place // scores.shape[1], place % scores.shape[1]  # B 2K
        longer = torch.cat([_rows(written, parent), token[..., None]], 2)
        ends = (token == tokens.end) | (n == cfg.max_new_tokens)
        finished, which = (total / n**cfg.length_penalty).masked_fill(~ends, -torch.inf).max(1, keepdim=True)
        filled = F.pad(_rows(longer, which)[:, 0], (0, cfg.max_new_tokens - n), value=tokens.end)
        kept = torch.where(finished > best[:, None], filled, kept)
        best = torch.maximum(finished[:, 0], best)
        alive, which = total.masked_fill(ends, -torch.inf).topk(beams)
        written, token = _rows(longer, which), token.gather(1, which).flatten()
        decoder.reorder_cache((first + parent.gather(1, which)).flatten())
        longest = cfg.max_new_tokens if cfg.length_penalty > 0 else n  # at which a living one's score would be best
        if _everywhere(alive[:, 0] / longest**cfg.length_penalty <= best):
            break
    return GeneratedCaptions(kept, best)


def mask_disallowed_logits(scores: Tensor, written: Tensor, cfg: DecodeConfig, tokens: SpecialTokens) -> Tensor:
    """Set scores (R, V) to -inf, in a copy, for tokens that may not follow what is written (R, n)."""
    scores = scores.clone()
    scores[:, tokens.start] = scores[:, tokens.known :] = -torch.inf
    n, size = written.shape[1], cfg.no_repeat_ngram_size
    if n < cfg.min_new_tokens:
        scores[:, tokens.end] = -torch.inf
    if size and n >= size:
        windows = written.unfold(1, size, 1)  # R, n - size + 1, size
        same = (windows[..., :-1] == written[:, None, n - size + 1 :]).all(2)
        again = torch.zeros_like(scores).scatter_add_(1, windows[..., -1], same.to(scores.dtype))
        again[:, tokens.end] = 0  # what is finished is filled up with it
        scores.masked_fill_(again > 0, -torch.inf)
    return scores


def _rows(x: Tensor, which: Tensor) -> Tensor:
    """Gather x (B, K, n) at rows which (B, J) of each clip: (B, J, n)."""
    return x.gather(1, which[..., None].expand(-1, -1, x.shape[2]))


def _everywhere(done: Tensor) -> bool:
    """Tell whether all captions of all ranks are done: under ZeRO-3 a step needs every rank."""
    return not bool(collectives.all_reduce_max((~done).any().int()))
