"""Turn captions into the token numbers of a CLIP."""

import functools
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor

from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.towers.weights import WEIGHTS

WORDS, LETTERS = 1 << 18, 64  # how many, of how many letters, are remembered with their tokens: 0.2 GB at most


@functools.cache  # very many small pieces: made again by each evaluation, they kept others' memory from being given back
def get_tokenizer(clip: str, max_tokens: int = 77) -> Callable[[list[str]], Tensor]:
    """Make open_clip's tokenizer of a CLIP, or return the one made before; a file's is that of OpenAI's.

    OpenAI's takes time that grows with the square of a word, so of a text it gets no more than max_tokens can hold.
    """
    named = not clip.endswith((*WEIGHTS, ".json"))
    full = open_clip.get_tokenizer(clip.partition("/")[0] if named else "ViT-B-32", context_length=max_tokens)
    if isinstance(full, open_clip.SimpleTokenizer):
        most = max_tokens * (max(map(len, full.encoder)) + 1)  # with a space after each
        full.clean_fn = functools.partial(_cleaned, full.clean_fn, most)
        full.cache = _FirstWords(full.cache)
    return full


def _cleaned(clean: Callable[[str], str], most: int, text: str) -> str:
    """Clean a text as open_clip does, and cut it to `most` characters."""
    try:
        return clean(text[: 16 * most])[:most]  # names of characters, such as &amp;, become shorter
    except ValueError:  # html.unescape meets the number of a character that has thousands of digits
        return text[:most].lower()


class _FirstWords(dict):
    """Caches the tokens of the first WORDS short words; open_clip's own cache keeps every word and grows without bound."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < WORDS and len(word) <= LETTERS:
            super().__setitem__(word, tokens)


def tokenizer(clip: str, max_tokens: int) -> Callable[[list[str]], Tensor]:
    """Make a function of B strings to token numbers (B, L), L of the longest, max_tokens at most; cut captions keep [EOS].

    A space of vectors reads no texts: L = 0.
    """
    if clip.startswith(SPACE):
        return lambda texts: torch.zeros(len(texts), 0, dtype=torch.int64)
    full = get_tokenizer(clip, max_tokens)
    if not isinstance(full, open_clip.SimpleTokenizer):  # other kinds of padding and pooling
        return full

    def tokenize(texts: list[str]) -> Tensor:
        tokens = full(texts)
        return tokens[:, : int(tokens.argmax(1).max()) + 1]  # [EOS] has the largest number; 0 is padding, but "!" too

    return tokenize
