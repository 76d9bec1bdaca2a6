"""Turn captions into the token numbers of a CLIP."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from clip4vla.config_io import expand_path
from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.errors import UserError, one_line
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers import transformers_clip
from clip4vla.towers.build import names_in_open_clip
from clip4vla.towers.config import text_config
from clip4vla.towers.weights import FOLDER, HUB

WORDS, LETTERS = 1 << 18, 64  # how many, of how many letters, are remembered with their tokens: 0.2 GB at most


def get_tokenizer(clip: str, max_tokens: int = 77, config: dict[str, Any] | None = None) -> Callable[..., Tensor]:
    """Make open_clip's tokenizer of a CLIP, or return the one made before; a file's is that of OpenAI's, if no config says other.

    config: the CLIP's, found by its name if not given. OpenAI's tokenizer takes time that grows with the square of a word, so
    of a text it gets no more than max_tokens can hold.
    """
    text = text_config(clip) if config is None else config["text_cfg"]
    name, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    if other := {*options} - {"clean", "strip_sep_token", "language"}:
        raise UserError(
            f"model.clip: its tokenizer_kwargs has {min(other)!r}: only clean, strip_sep_token, language are taken"
        )
    if name:
        name = _source(clip, name)
    return _made(name, max_tokens, json.dumps(options), text.get("tokenizer_mode"))


def _source(clip: str, name: str) -> str:
    """Find where the tokenizer lies that a configuration names: a folder, or a name of the hub; UserError for any others."""
    if clip.startswith(FOLDER):
        folder = expand_path(clip.removeprefix(FOLDER), "model.clip")
        if Path(folder, "tokenizer_config.json").is_file():
            return folder
    if name not in names_in_open_clip() and name != clip.removeprefix(HUB):
        raise UserError(f"model.clip: its text_cfg names {name!r}: a tokenizer that none of open_clip's own models has")
    return name


@functools.cache  # very many small pieces: made again by each evaluation, they kept others' memory from being given back
def _made(name: str | None, max_tokens: int, options: str, mode: str | None) -> Callable[..., Tensor]:
    kwargs = json.loads(options)
    if name:
        import_for_open_clip("transformers")
        try:
            full = HFTokenizer(name, context_length=max_tokens, tokenizer_mode=mode, trust_remote_code=False, **kwargs)
            full([""])  # it sets the length to cut at, which later calls, from several threads, leave as it is
            return full
        except Exception as error:  # transformers and the hub's libraries raise many kinds
            raise UserError(
                f"model.clip: the tokenizer {name} cannot be had ({one_line(error, 200)}); fetch it where there is a network: "
                f"hf download {name}"
            ) from None
    simple = open_clip.SimpleTokenizer(context_length=max_tokens, **kwargs)
    most = max_tokens * (max(map(len, simple.encoder)) + 1)  # with a space after each
    simple.clean_fn = functools.partial(_cleaned, simple.clean_fn, most)
    simple.cache = _FirstWords(simple.cache)
    return simple


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


def tokenizer(
    clip: str, max_tokens: int, config: dict[str, Any] | None = None, fixed: bool = False
) -> Callable[[list[str]], Tensor]:
    """Make a function of B strings to token numbers (B, L); captions are cut to max_tokens, and keep their [EOS].

    L is that of the longest, max_tokens if `fixed`, or that of the training of a tower which reads what follows a caption.
    config: the CLIP's, found by its name if not given. A space of vectors reads no texts: L = 0.
    """
    if transformers_clip.is_named(clip):
        return transformers_clip.tokenizer(clip, max_tokens, fixed)
    if clip.startswith(SPACE):
        return lambda texts: torch.zeros(len(texts), 0, dtype=torch.int64)
    text = text_config(clip) if config is None else config["text_cfg"]
    full, room = get_tokenizer(clip, max_tokens, config), text.get("context_length", 77)
    simple = isinstance(full, open_clip.SimpleTokenizer)
    pad = 0 if simple else full.tokenizer.pad_token_id  # type: ignore[attr-defined]

    def tokenize(texts: list[str]) -> Tensor:
        tokens = full(texts)
        if reads_padding(text):
            return F.pad(tokens, (0, room - max_tokens), value=pad)
        if fixed:
            return tokens
        if simple:
            return tokens[
                :, : int(tokens.argmax(1).max()) + 1
            ]  # [EOS] has the largest number; 0 is padding, but "!" too
        used = (tokens != pad).any(0).nonzero()
        return tokens[:, : int(used.max()) + 1] if len(used) else tokens[:, :1]

    return tokenize


def reads_padding(text: dict[str, Any]) -> bool:
    """Tell whether what follows a caption changes its vector, by the text tower's part of a configuration.

    So it is where words attend to all places (SigLIP, MobileCLIP 2), or the last place gives the vector (SigLIP, CLIPA, CoCa).
    """
    own = not text.get("hf_model_name")
    return own and bool(text.get("no_causal_mask") or text.get("embed_cls") or text.get("pool_type") == "last")
