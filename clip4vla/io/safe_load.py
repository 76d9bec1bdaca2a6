"""Read files of tensors that others made (safetensors, torch's, TorchScript): none runs code, none grows beyond its size."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip4vla.errors import UserError, one_line

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
MODULES = 100_000  # of an archive
ROOM = 64 << 20  # bytes that an archive may hold packed beside its tensors, such as the code of TorchScript


def read(path: str | Path) -> tuple[Any, bool]:
    """Read a weights file: (its content, as a rule a dictionary of tensors, on the CPU; whether it is a TorchScript archive).

    Raises ValueError for what would unpack to more than twice the file, and what torch and safetensors raise.
    """
    if str(path).endswith(".safetensors"):
        return load_file(path), False
    names = _must_unpack_small(path) if zipfile.is_zipfile(path) else []
    if any(name.endswith("/constants.pkl") for name in names):
        return _scripted(path), True
    return torch.load(path, map_location="cpu", weights_only=True), False


def must_be_plain(state: dict[str, Tensor], size: int) -> None:
    """Raise ValueError for tensors that are not dense numbers, or claim more bytes than a file of `size` bytes gives."""
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise ValueError(f"{name} is no dense tensor of real numbers")
    if sum(value.numel() * value.element_size() for value in state.values()) > 2 * size + ROOM:
        raise ValueError("its tensors claim more bytes than the file has")


def _must_unpack_small(path: str | Path) -> list[str]:
    """List the names in a zip archive; ValueError if it unpacks to far more than itself, which torch's, stored as is, do not."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > 2 * Path(path).stat().st_size + ROOM:
            raise ValueError("it would unpack to more than twice its size")
        return archive.namelist()


def _scripted(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive, by name; torch.jit.load would run its __setstate__, which may write files."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        with archive.open(f"{root}data.pkl") as stream:
            module = _Tensors(stream, archive, f"{root}data/").load()
    return _collected(module)


class _Module:
    """Stands for any module of an archive, and holds its attributes."""

    def __setstate__(self, held: Any) -> None:
        self.held = held if isinstance(held, dict) else {}


class _Tensors(pickle.Unpickler):
    """Unpickles modules, tensors and ordered dictionaries, and nothing that runs."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(stream)
        self.archive, self.folder = archive, folder
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}  # tensors may share one

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module == "torch.jit._pickle":  # lists of numbers, and what type a list or dictionary has
            return _first
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a module")
        return known[module, name]

    def persistent_load(self, place: Any) -> Tensor:
        _, dtype, key, *_ = place
        if (key, dtype) not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}{key}"))
            self.storages[key, dtype] = torch.frombuffer(data, dtype=dtype)
        return self.storages[key, dtype]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # raises for what lies outside of the storage


def _first(value: Any, *_: Any) -> Any:
    return value


def _collected(root: _Module) -> dict[str, Tensor]:
    """Collect the tensors of all modules by name; ValueError for too many, as modules may hold each other over and over."""
    state: dict[str, Tensor] = {}
    todo, visited = [("", root)], 0
    while todo:
        (prefix, module), visited = todo.pop(), visited + 1
        if visited > MODULES:
            raise ValueError(f"more than {MODULES} modules")
        for name, value in module.held.items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, _Module):
                todo.append((f"{prefix}{name}.", value))
    return state


def save_tensors(weights: dict[str, Tensor], file: Path) -> None:
    """Write tensors by name to a file, .safetensors or torch's, with the rights of other files of this user.

    Raises UserError if the disk does not take them.
    """
    file.touch()
    rights = file.stat().st_mode  # safetensors would leave it to its owner alone
    try:
        (save_file if file.suffix == ".safetensors" else torch.save)(weights, file)
    except (SafetensorError, RuntimeError) as error:  # what both make of a full disk
        why = one_line(error, 100)
        raise UserError(f"{file.name}: cannot be written ({why}): make room, or choose another folder") from None
    file.chmod(rights)
