"""Read folders and hub ids of transformers: configuration, weights, tokenizer, pictures. None of them can name code."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from PIL.Image import Resampling
from torch import Tensor

from clip4vla.config_io import expand_path, parse_json
from clip4vla.errors import UserError, one_line
from clip4vla.io import safe_load
from clip4vla.quick_imports import import_for_open_clip

PREFIX = "hf:"
SOURCE = "clip"  # in a model folder: what its towers were taken from, without weights
SMALL = ["*.json", "*.txt", "*.model"]  # configuration, tokenizer and picture preprocessing
WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
NAMES_CODE = (
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "experts_implementation",
    "quantization_config", "backbone", "backbone_config", "use_timm_backbone", "use_pretrained_backbone",
)  # fmt: skip
DROPPED = (
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "architectures",
    "return_dict",
)
EDGE = 4096  # most of a picture, in pixels
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_state(clip: str) -> dict[str, Tensor]:
    """Read the weights of a folder or hub id, in fp32: its safetensors, or else torch's files."""
    for patterns in WEIGHTS:
        files = sorted(find_folder(clip, patterns).glob(patterns[0]))
        if files:
            break
    else:
        raise ValueError("no weights there: model.safetensors or pytorch_model.bin is required")
    state: dict[str, Tensor] = {}
    for file in files:
        part, _ = safe_load.read(file)
        safe_load.must_be_plain(part, file.stat().st_size)
        state |= {name: value.float() if value.is_floating_point() else value for name, value in part.items()}
    return state


def weights_bytes(folder: Path) -> int:
    """Count the bytes of the files of weights in a folder; 0 if there are none, or not yet."""
    return sum(file.stat().st_size for patterns in WEIGHTS for file in folder.glob(patterns[0]))


def read_tokenizer(clip: str) -> Any:
    folder = find_folder(clip, SMALL)
    read_json(folder, "tokenizer_config.json")
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_pictures(folder: Path) -> dict[str, Any]:
    """Say how pictures are made for a vision tower, by its folder's preprocessor_config.json.

    size (H, W) in pixels, mean and std of RGB in 0..1, interpolation, resize_mode (shortest: of that edge, then the
    centre; squash). SigLIP 2 of any aspect ratio is given squares of as many patches.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            read_json(folder, name)
            break
    else:
        raise ValueError("no preprocessor_config.json there, which says how its pictures are made")
    made = _transformers().AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    size, mode = _picture_size(made)
    if not all(0 < edge <= EDGE for edge in size):
        raise ValueError(f"pictures of {size[0]} x {size[1]}, {EDGE} are the most")
    scale = 255 * (made.rescale_factor if made.do_rescale else 1)
    mean, std = (made.image_mean, made.image_std) if made.do_normalize else ((0, 0, 0), (1, 1, 1))
    # EfficientNet's are from -1 to 1 before they are normalised, and may be divided by the deviation once more
    shift = 1 if getattr(made, "rescale_offset", False) else 0
    again = made.image_std if getattr(made, "include_top", False) else (1, 1, 1)
    return {
        "size": list(size),
        "mean": [(value + shift) / scale for value in mean],
        "std": [value * more / scale for value, more in zip(std, again, strict=True)],
        "interpolation": Resampling(int(made.resample)).name.lower(),
        "resize_mode": mode,
    }


def _picture_size(made: Any) -> tuple[tuple[int, int], str]:
    """Read ((H, W), how pictures come to it) from an image processor; ValueError for a crop of a part of the picture."""
    if hasattr(made, "max_num_patches"):
        edge = made.patch_size * int(made.max_num_patches**0.5)
        return (edge, edge), "squash"
    given = {key: value for key, value in dict(made.size).items() if value}
    crop = dict(made.crop_size) if getattr(made, "do_center_crop", False) else None
    shortest = given.get("shortest_edge")
    resized = (given["height"], given["width"]) if shortest is None else (shortest, shortest)
    cropped = resized if crop is None else (crop["height"], crop["width"])
    if cropped != resized or (shortest is not None and crop is None) or getattr(made, "do_pad", False):
        raise ValueError(f"its pictures are resized to {given}, then cropped to {crop} or padded: not supported")
    return resized, "squash" if shortest is None else "shortest"


def model_class(tree: dict[str, Any]) -> tuple[Any, Any]:
    """Choose transformers' own (class, configuration) for a config.json; ValueError if it has no text and image features."""
    library = _transformers()
    name = tree.get("model_type")
    if name not in library.CONFIG_MAPPING:
        raise ValueError(f"transformers {library.__version__} has no model_type {name!r}")
    config = library.CONFIG_MAPPING[name].from_dict(tree)
    _must_name_no_code(config.to_dict())  # a class's own defaults may name a backbone
    kind = library.MODEL_MAPPING.get(type(config), None)
    if not hasattr(kind, "get_text_features") or not hasattr(kind, "get_image_features"):
        raise ValueError(f"{name} has not both get_text_features and get_image_features")
    return kind, config


def cleaned(tree: Any) -> Any:
    """Leave out of a configuration what says nothing of the towers' structure, in all its parts."""
    if isinstance(tree, dict):
        return {key: cleaned(value) for key, value in tree.items() if key not in DROPPED}
    return tree


def _must_name_no_code(tree: Any) -> None:
    """Raise ValueError for a configuration that names code, kernels or backbones to fetch."""
    if isinstance(tree, list):
        for value in tree:
            _must_name_no_code(value)
    elif isinstance(tree, dict):
        named = next((key for key in NAMES_CODE if tree.get(key)), None)
        if named or str(tree.get("model_type")).startswith("timm"):
            raise ValueError(f"{named or tree['model_type']} in its configuration: it may name no code")
        _must_name_no_code(list(tree.values()))


def find_folder(clip: str, patterns: list[str]) -> Path:
    """Return the folder of hf:FOLDER_OR_ID; of a hub id, that with those of its files that match."""
    name = expand_path(clip.removeprefix(PREFIX), "model.clip")
    if Path(name).is_dir():
        return Path(name)
    if not HUB_ID.fullmatch(name):
        raise ValueError("no such folder, nor a hub id")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's libraries raise whatever theirs do
        raise ValueError(f"no such folder, and the hub does not give it ({one_line(error, 120)})") from None


def copy_source(clip: str, folder: Path) -> None:
    """Copy configuration, tokenizer and pictures of hf:FOLDER_OR_ID into the new SOURCE of a model folder; UserError if gone."""
    try:
        source = find_folder(clip, SMALL)
    except ValueError as error:
        raise UserError(f"model.clip={clip}: its tokenizer is to go with the model: {error}") from None
    (folder / SOURCE).mkdir()
    for file in itertools.chain(*map(source.glob, SMALL)):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / SOURCE / file.name)


def source_beside(clip: str, folder: Path) -> str:
    """Return `clip`, or hf:SOURCE of a model folder if that has one."""
    return f"{PREFIX}{folder / SOURCE}" if clip.startswith(PREFIX) and (folder / SOURCE).is_dir() else clip


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder; ValueError if it is none, or names code."""
    if not (folder / name).is_file():
        raise ValueError(f"no {name} there")
    tree = parse_json((folder / name).read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"{name} holds no dictionary")
    _must_name_no_code(tree)
    return tree


def _transformers() -> Any:
    """Import transformers, which command lines keep out until a tower of its is wanted (cli.py)."""
    try:
        transformers = import_for_open_clip("transformers")
    except ModuleNotFoundError:
        raise UserError("model.clip=hf:: transformers is not installed: pip install 'clip4vla[hf]'") from None
    transformers.logging.set_verbosity_error()  # it prints whole configurations, of token numbers that no tower reads
    transformers.logging.disable_progress_bar()
    return transformers
