"""How captions are written: greedily, by nucleus sampling (Holtzman et al. 2020), or by beam search; many clips at a time.

Notation: B clips, K beams, R captions at work (B, or B K, those of a clip one behind the other), V tokens, n so far.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla import distributed
from clip4vla.captioner import Growing
from clip4vla.config import DecodeConfig, UserError
from clip4vla.towers import vocabulary


class Tokens(NamedTuple):
    """The numbers of [SOS] and [EOS], and how many tokens can be written out: a model may have scores for more."""

    start: int
    end: int
    known: int


class Written(NamedTuple):
    """Captions, of each clip one."""

    tokens: Tensor  # B n int64, without [SOS]; filled up with [EOS]
    score: Tensor  # B fp32: log-probability; of beam search divided by the length penalty


def tokens_of(clip: str) -> tuple[Tokens, Callable[[list[int]], str]]:
    """Of a CLIP's tokenizer: its special tokens, and how to read numbers; UserError if it is not OpenAI's."""
    known = vocabulary(clip)
    if not isinstance(known, open_clip.SimpleTokenizer):
        raise UserError(
            f"model.clip={clip}: captions are written with the tokenizer of OpenAI's CLIP, this has another"
        )
    ends = known.sot_token_id, known.eot_token_id
    return Tokens(*ends, known.vocab_size), lambda numbers: known.decode([n for n in numbers if n not in ends]).strip()


def named(cfg: DecodeConfig) -> str:
    """The way of writing in a few words, such as beam 5."""
    number = {"beam": f" {cfg.beams}", "nucleus": f" {cfg.top_p:g}"}
    return cfg.method + number.get(cfg.method, "")


def within(cfg: DecodeConfig, positions: int) -> DecodeConfig:
    """cfg with max_tokens as a model of so many positions has room; UserError if it asks for more, or less than min_tokens."""
    room = positions - 1
    most = cfg.max_tokens or room
    if not cfg.min_tokens < most <= room:
        raise UserError(
            f"decode.max_tokens={cfg.max_tokens}, min_tokens={cfg.min_tokens}: the first must be larger, and at most "
            f"{room}: model.max_tokens={positions} less [SOS]"
        )
    return replace(cfg, max_tokens=most)


@torch.no_grad()
def write(grow: Callable[[int], Growing], ids: Sequence[str], cfg: DecodeConfig, tokens: Tokens, seed: int) -> Written:
    """A caption for each of the clips `ids`, of which grow(copies) starts so many.

    Sampling depends on seed and id alone, not on the batch. Ranks write in step: each must come here as often as the others.
    """
    if cfg.method == "beam":
        return beam_search(grow(cfg.beams), len(ids), cfg, tokens)
    if cfg.method == "greedy":
        return follow(grow(1), len(ids), cfg, tokens, lambda scores, _: scores.argmax(1))
    rows = [np.random.default_rng((seed, zlib.crc32(name.encode()))).random(cfg.max_tokens) for name in ids]
    draws = torch.from_numpy(np.stack(rows)).T.float()
    return follow(grow(1), len(ids), cfg, tokens, lambda scores, n: nucleus(scores, draws[n].to(scores.device), cfg))


def follow(
    growing: Growing, rows: int, cfg: DecodeConfig, tokens: Tokens, choose: Callable[[Tensor, int], Tensor]
) -> Written:
    """One caption a clip: choose(scores (R, V), n) gives the next token (R,)."""
    device = growing.there.device
    token = torch.full((rows,), tokens.start, device=device)
    written, total = token.new_empty(rows, 0), torch.zeros(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for n in range(cfg.max_tokens):
        scores = permitted(growing.next(token), written, cfg, tokens)
        token = choose(scores, n).masked_fill(done, tokens.end)
        total += scores.log_softmax(1).gather(1, token[:, None])[:, 0].masked_fill(done, 0)
        written = torch.cat([written, token[:, None]], 1)
        done |= token == tokens.end
        if _everywhere(done):
            break
    return Written(written, total)


def nucleus(scores: Tensor, draws: Tensor, cfg: DecodeConfig) -> Tensor:
    """Tokens (R,) of scores (R, V) by the inverse of their distribution at draws (R,) in 0..1, cut to cfg.top_p."""
    shares, order = (scores / cfg.temperature).softmax(1).sort(1, descending=True)
    before = shares.cumsum(1) - shares
    shares = shares.masked_fill((before >= cfg.top_p) & (before > 0), 0)  # the first one stays
    upto = shares.cumsum(1)
    place = torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True)
    place = torch.minimum(place, (shares > 0).sum(1, keepdim=True) - 1)  # a draw of 1 is rounding's
    return order.gather(1, place)[:, 0]


def beam_search(growing: Growing, clips: int, cfg: DecodeConfig, tokens: Tokens) -> Written:
    """The best finished caption of each clip by log-probability / length ** length_penalty, [EOS] counted.

    K captions of a clip live. Of the 2 K best of their continuations those with [EOS] are finished, and the K best others
    live on. Over when no living one can become better than the best finished one, or at max_tokens.
    """
    device, beams = growing.there.device, cfg.beams
    first = torch.arange(clips, device=device)[:, None] * beams  # R-numbers of a clip's captions start there
    token = torch.full((clips * beams,), tokens.start, device=device)
    written = token.new_empty(clips, beams, 0)
    alive = torch.zeros(clips, beams, device=device)
    alive[:, 1:] = -torch.inf  # at first all are the same
    best, kept = torch.full_like(alive[:, 0], -torch.inf), token.new_full((clips, cfg.max_tokens), tokens.end)
    for n in range(1, cfg.max_tokens + 1):
        scores = permitted(growing.next(token), written.flatten(0, 1), cfg, tokens).log_softmax(1)
        total, place = (alive[..., None] + scores.view(clips, beams, -1)).flatten(1).topk(2 * beams)
        parent, token = place // scores.shape[1], place % scores.shape[1]  # B 2K
        longer = torch.cat([_rows(written, parent), token[..., None]], 2)
        ends = (token == tokens.end) | (n == cfg.max_tokens)
        finished, which = (total / n**cfg.length_penalty).masked_fill(~ends, -torch.inf).max(1, keepdim=True)
        filled = F.pad(_rows(longer, which)[:, 0], (0, cfg.max_tokens - n), value=tokens.end)
        kept = torch.where(finished > best[:, None], filled, kept)
        best = torch.maximum(finished[:, 0], best)
        alive, which = total.masked_fill(ends, -torch.inf).topk(beams)
        written, token = _rows(longer, which), token.gather(1, which).flatten()
        growing.pick((first + parent.gather(1, which)).flatten())
        longest = cfg.max_tokens if cfg.length_penalty > 0 else n  # at which a living one's score would be best
        if _everywhere(alive[:, 0] / longest**cfg.length_penalty <= best):
            break
    return Written(kept, best)


def permitted(scores: Tensor, written: Tensor, cfg: DecodeConfig, tokens: Tokens) -> Tensor:
    """Scores (R, V) with -inf for what may not follow what is written (R, n)."""
    scores = scores.clone()
    scores[:, tokens.start] = scores[:, tokens.known :] = -torch.inf
    n, size = written.shape[1], cfg.no_repeat
    if n < cfg.min_tokens:
        scores[:, tokens.end] = -torch.inf
    if size and n >= size:
        windows = written.unfold(1, size, 1)  # R, n - size + 1, size
        same = (windows[..., :-1] == written[:, None, n - size + 1 :]).all(2)
        again = torch.zeros_like(scores).scatter_add_(1, windows[..., -1], same.to(scores.dtype))
        again[:, tokens.end] = 0  # what is finished is filled up with it
        scores.masked_fill_(again > 0, -torch.inf)
    return scores


def _rows(x: Tensor, which: Tensor) -> Tensor:
    """x (B, K, n) at rows which (B, J) of each clip, (B, J, n)."""
    return x.gather(1, which[..., None].expand(-1, -1, x.shape[2]))


def _everywhere(done: Tensor) -> bool:
    """Whether all captions of all ranks are done: under ZeRO-3 a step needs every rank."""
    return not bool(distributed.all_max((~done).any().int()))
