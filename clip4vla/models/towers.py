"""Build open_clip's text and vision towers, by name, from a weights file, or from a config file; audio is added to them."""

import difflib
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError, one_line
from clip4vla.io import safe_load

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
WORDS, LETTERS = 1 << 18, 64  # how many, of how many letters, are remembered with their tokens: 0.2 GB at most
TOWER_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")


def resolve_clip_config(clip: str, quick_gelu: str = "auto") -> dict[str, Any]:
    """Find open_clip's configuration of a CLIP named as in `model.clip`; raises UserError if there is no such model."""
    if clip.endswith(WEIGHTS):
        state, jit = read_weights(clip)
        config = infer_config(state, clip)
        config["quick_gelu"] = jit if quick_gelu == "auto" else quick_gelu == "yes"
        return config
    if clip.endswith(".json"):
        try:
            return {key: value for key, value in parse_json(Path(clip).read_bytes()).items() if key in TOWER_KEYS}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"model.clip: {clip}: not a readable open_clip config ({error})") from None
    config = open_clip.get_model_config(clip.partition("/")[0])
    if config is None:
        near = difflib.get_close_matches(clip, open_clip.list_models(), n=1, cutoff=0)
        raise UserError(f"model.clip: open_clip knows no model {clip!r} (nearest: {near[0]}), and no such file exists")
    trained_with = open_clip.get_pretrained_cfg(*clip.partition("/")[::2]).get("quick_gelu")  # OpenAI's: yes
    if quick_gelu != "auto" or trained_with is not None:
        config["quick_gelu"] = trained_with if quick_gelu == "auto" else quick_gelu == "yes"
    return {key: config[key] for key in TOWER_KEYS if key in config}


def build_clip(config: dict[str, Any]) -> CustomTextCLIP:
    """Build randomly initialised towers `.visual` and `.text` of an open_clip configuration."""
    try:
        _must_be_own(config)
        model = CustomTextCLIP(**config)
    except Exception as error:  # open_clip and torch raise many kinds for sizes that cannot be
        reason = one_line(error)
        raise UserError(f"model.clip: open_clip cannot build these towers: {reason}") from None
    for tower, kind in ((model.visual, VisionTransformer), (model.text, TextTransformer)):
        if not isinstance(tower, kind):
            raise UserError(f"model.clip: needs open_clip's {kind.__name__}, this model has a {type(tower).__name__}")
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is QuickGELU:
                setattr(module, name, LeanQuickGELU())
    return model


class LeanQuickGELU(QuickGELU):
    """Computes open_clip's QuickGELU, x sigmoid(1.702 x); keeps x alone for the gradient, where that keeps the sigmoid too."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate x, of any shape."""
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(
            grad, 1.702 * x
        )  # silu(u) = u sigmoid(u), of which this is silu(1.702 x) / 1.702


def _must_be_own(config: dict[str, Any]) -> None:
    """Raise ValueError for towers that open_clip has from other libraries, which may fetch and run code that a name asks for."""
    for cfg, names in (("vision_cfg", ("timm_model_name",)), ("text_cfg", ("hf_model_name", "hf_tokenizer_name"))):
        if any(config[cfg].get(name) for name in names):
            raise ValueError(f"{cfg} names a model of another library")


def check_size_claims(config: dict[str, Any], state: dict[str, Tensor], blocks: int = 0, positions: int = 0) -> None:
    """Raise ValueError for a configuration of more weights than there are: what is built of it could fill any memory.

    blocks, positions: of a head, of the text tower's width.
    """
    sizes = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    if sum(size.layers for size in sizes) + blocks > len(state) or min(size.layers for size in sizes) < 1:
        raise ValueError(f"towers of more blocks than the file's {len(state)} tensors")
    with torch.device("meta"):  # counts without memory
        clip = build_clip(config)
    width = sizes[1].width
    head = width * (width * (4 + 2 * sizes[1].mlp_ratio) * blocks + positions)
    wanted = head + sum(value.numel() for value in itertools.chain(clip.parameters(), clip.buffers()))
    numbers = sum(value.numel() for value in state.values()) + sum(value.numel() for value in clip.buffers())
    if wanted > numbers:
        raise ValueError(f"towers of {wanted:.0f} weights, the file has {numbers}")


class Undrawn(TorchFunctionMode):
    """Keeps new modules, in the block, at what their memory holds: drawing weights that will be loaded takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)
        if func in draws:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def names_weights(clip: str) -> bool:
    """Tell whether `model.clip` names weights, in a file or by a tag, or an architecture alone."""
    return clip.endswith(WEIGHTS) or (not clip.endswith(".json") and bool(clip.partition("/")[2]))


def load_clip_weights(model: CustomTextCLIP, clip: str) -> bool:
    """Fill the towers, which may be on torch's meta device, with the weights that `model.clip` names; False if none."""
    if not names_weights(clip):
        return False
    name, _, tag = clip.partition("/")
    if clip.endswith(WEIGHTS):
        state = convert_to_custom_text_state_dict(read_weights(clip)[0])
    else:
        try:
            state = open_clip.create_model(name, pretrained=tag, force_custom_text=True).state_dict()
        except Exception as error:  # open_clip raises whatever its download libraries raise
            raise UserError(
                f"model.clip: cannot get the weights of {clip!r} ({one_line(error)}); "
                "give a local weights file, or the name alone for random towers"
            ) from None
    _load(model, {key: value for key, value in state.items() if key != "logit_bias"}, clip)
    return True


def infer_config(state: dict[str, Tensor], where: str = "weights") -> dict[str, Any]:
    """Infer the open_clip configuration of a ViT CLIP from the shapes of its weights, in OpenAI's names or open_clip's."""
    state = {key.removeprefix("text."): value for key, value in state.items()}
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions, _ = state["visual.positional_embedding"].shape
        text_width = state["ln_final.weight"].shape[0]
        config = {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "layers": _blocks(state, "visual.transformer.resblocks."),
                "width": width,
                "patch_size": patch,
                "image_size": patch * round((positions - 1) ** 0.5),
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": _blocks(state, "transformer.resblocks."),
            },
        }
        check_size_claims(config, state)
        return config
    except KeyError as error:
        raise UserError(f"{where}: not the weights of a CLIP with a vision transformer: no {error}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:  # tensors of other shapes than a CLIP's
        raise UserError(f"{where}: not the weights of a CLIP with a vision transformer: {error}") from None


def encode_text(tower: TextTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token numbers (B, L) to (sentence vector at [EOS] (B, D), projected outputs of all tokens (B, L, D))."""
    x, mask = tower._embeds(tokens)
    length = x.shape[1]
    x = projected(tower, tower.transformer(x, attn_mask=mask[..., :length, :length] if mask is not None else None))
    return text_global_pool(x, tokens, tower.pool_type, eos_token_id=tower.eos_id), x


def projected(tower: TextTransformer, x: Tensor) -> Tensor:
    """Project outputs (..., W) of the text tower's blocks to the tower's outputs (..., D)."""
    x = tower.ln_final(x)
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def encode_images(tower: VisionTransformer, images: Tensor) -> Tensor:
    """Encode normalised pictures (F, 3, H, W) into vectors (F, D), not normalised."""
    x = embed_patches(images, tower.conv1.weight)
    x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
    x = tower.ln_pre(tower.patch_dropout(x + tower.positional_embedding.to(x.dtype)))
    x = tower._pool(pooled_places(tower, x))[0]
    return x @ tower.proj if tower.proj is not None else x


def embed_patches(images: Tensor, weight: Tensor) -> Tensor:
    """Embed the patches of images (n, C, H, W) by a kernel (D, C, h, w) whose stride is its size: (n, P, D), row by row.

    A product does what the convolution would: cuDNN plans that again for each new n, and on a CPU it takes longer.
    """
    (n, channels, *_), (height, width) = images.shape, weight.shape[2:]
    rows, columns = images.shape[2] // height, images.shape[3] // width
    images = images[:, :, : rows * height, : columns * width]  # a rest is left out
    patches = images.reshape(n, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1))


def pooled_places(
    tower: VisionTransformer, x: Tensor, ignored: Tensor | None = None, all_places: bool = False
) -> Tensor:
    """Run the blocks of a vision tower on tokens (B, L, W): outputs (B, L, W), or (B, 1, W) where only [CLS] is pooled.

    ignored (B, L) bool: True at padding, which no token attends to. all_places: (B, L, W) in any case.
    """
    first_only = pools_first(tower) and not all_places
    if not first_only and ignored is None:
        return tower.transformer(x)
    blocks = tower.transformer.resblocks
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1 and first_only
        run = functools.partial(run_block, block, kept=1 if last else x.shape[1], ignored=ignored)
        x = checkpoint(run, x, use_reentrant=False) if tower.transformer.grad_checkpointing else run(x)
    return x


def pools_first(tower: VisionTransformer) -> bool:
    """Tell whether a vision tower's vector is the output at [CLS] alone, so that its last block need not give the others."""
    plain = isinstance(tower.transformer.resblocks[-1], ResidualAttentionBlock)
    return plain and tower.pool_type == "tok" and tower.attn_pool is None


def run_block(block: ResidualAttentionBlock, x: Tensor, kept: int, ignored: Tensor | None = None) -> Tensor:
    """Run a block of CLIP's on tokens (B, L, W) for its outputs (B, kept, W) at the first `kept`.

    ignored: keys that are not attended to, True: (B, L) by any token, or (B, kept, L) by each.
    """
    keys = block.ln_1(x)
    queries = keys if kept == x.shape[1] else keys[:, :kept]
    masks: dict[str, Tensor | None] = {"key_padding_mask": ignored}
    if ignored is not None and ignored.ndim == 3:
        masks = {"attn_mask": ignored.repeat_interleave(block.attn.num_heads, 0)}
    x = x[:, :kept] + block.ls_1(block.attn(queries, keys, keys, need_weights=False, **masks)[0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def token_mask(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """Mark which of token numbers (B, L) are words of the captions, [SOS] and [EOS] included, (B, L) bool."""
    if tower.pool_type in ("argmax", "eos"):  # what follows the [EOS] is padding, whatever its number
        end = tokens.argmax(1) if tower.pool_type == "argmax" else (tokens == tower.eos_id).int().argmax(1)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
    return tokens != tower.pad_id


def freeze_first(tower: TextTransformer | VisionTransformer, blocks: int, name: str) -> None:
    """Freeze the first `blocks` blocks of a tower and what lies before them."""
    held = tower.transformer.resblocks
    if not 0 <= blocks <= len(held):
        raise UserError(f"model.freeze_layers: {name}: {blocks} is not between 0 and its {len(held)} blocks")
    last = {"ln_post", "proj", "ln_final", "text_projection"}  # what comes after the blocks
    for part, module in tower.named_children():
        if part not in last and part != "transformer":
            module.requires_grad_(False)
    for part, parameter in tower.named_parameters(recurse=False):
        if part not in last:
            parameter.requires_grad_(False)
    for block in held[:blocks]:
        block.requires_grad_(False)


def image_statistics(clip: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of RGB in 0..1 that the vision tower was trained with."""
    name, _, tag = clip.partition("/")
    known = {} if clip.endswith((*WEIGHTS, ".json")) else open_clip.get_pretrained_cfg(name, tag)
    return known.get("mean", open_clip.OPENAI_DATASET_MEAN), known.get("std", open_clip.OPENAI_DATASET_STD)


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
    """Make a function of B strings to token numbers (B, L), L of the longest, max_tokens at most; cut captions keep [EOS]."""
    full = get_tokenizer(clip, max_tokens)
    if not isinstance(full, open_clip.SimpleTokenizer):  # other kinds of padding and pooling
        return full

    def tokenize(texts: list[str]) -> Tensor:
        tokens = full(texts)
        return tokens[:, : int(tokens.argmax(1).max()) + 1]  # [EOS] has the largest number; 0 is padding, but "!" too

    return tokenize


def read_weights(path: str, key: str = "model.clip: ") -> tuple[dict[str, Tensor], bool]:
    """Read a file: (state dict in fp32 on the CPU, whether it is OpenAI's TorchScript archive); no code in it is run."""
    if not Path(path).is_file():
        raise UserError(f"{key}no weights file {path}")
    try:
        state, jit = safe_load.read(path)
    except Exception as error:  # torch and safetensors raise many kinds for corrupt files
        raise _unreadable(key, path, error) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    extra = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # archives carry these beside the weights
    flat = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not state or not flat:
        raise UserError(f"{key}{path}: not one flat dictionary of weights; save the model's state_dict() alone")
    state = {k.removeprefix("module."): v for k, v in state.items() if k not in extra}
    try:
        safe_load.must_be_plain(state, Path(path).stat().st_size)
        return {name: value.float() for name, value in state.items()}, jit
    except (ValueError, RuntimeError) as error:  # torch has no way from some types to fp32
        raise _unreadable(key, path, error) from None


def _unreadable(key: str, path: str, error: Exception) -> UserError:
    return UserError(f"{key}{path}: unreadable weights ({one_line(error)})")


def _load(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{where}: these weights do not fit the towers: {one_line(error, 300)}") from None


def _blocks(state: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
