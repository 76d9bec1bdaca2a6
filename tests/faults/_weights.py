"""Weights: mutated files and hostile ones by name, through model.clip, launch/convert.py's way, from_pretrained and resuming."""

import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save

from clip4vla import CLIP4VLA
from clip4vla.checkpoints.universal import load_tensors
from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.distributed.rank_0 import FAILURES
from clip4vla.export import model_folder
from clip4vla.models.model import Model
from faults._mutate import mutate
from faults._tars import Code

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 112},
    "text_cfg": {"context_length": 77, "vocab_size": 300, "width": 64, "heads": 1, "layers": 2},
}
WORDS = ("model.max_tokens=12", "model.max_frames=3")


class Files:
    """Small weights in every form that is read, as bytes by name."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder = folder
        self.state = {k: v.contiguous() for k, v in open_clip.CLIP(**CLIP).eval().state_dict().items()}
        model = Model(CLIP, ModelConfig(clip="ViT-B-32"), SpectrogramConfig())
        self.config = model.config()
        self.model = save({k: v.contiguous() for k, v in model.state_dict().items()})
        self.named = {
            "clip.safetensors": save(self.state),
            "clip.pt": torched(self.state),
            "wrapped.pt": torched({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in self.state.items()}}),
            "old.pt": torched(self.state, _use_new_zipfile_serialization=False),
            "archive.pt": scripted(),
            "official.bin": torched(official(self.state)),
        }
        state = {
            "loss_scaler": 1.0,
            "step": torch.tensor(3),
            "state": {0: {"exp_avg": torch.ones(500)}},
            "names": ["a"],
        }
        self.deepspeed = torched(state)


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same CLIP under the authors' names, with ears."""
    vision = {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
    return (
        {f"clip.{k}": v for k, v in state.items()}
        | {f"audio.visual.{k}": v for k, v in vision.items()}
        | {
            "audio.visual.control_embedding": torch.zeros(2, 64),
            "audio.visual.positional_embedding": torch.zeros(6, 64),
        }
    )


def torched(tree: Any, **how: Any) -> bytes:
    """As torch.save has it."""
    out = io.BytesIO()
    torch.save(tree, out, **how)
    return out.getvalue()


def scripted() -> bytes:
    """A CLIP as a TorchScript archive."""
    torch.manual_seed(0)
    out, clip = io.BytesIO(), open_clip.CLIP(**CLIP, quick_gelu=True).eval()
    traced = torch.jit.trace(clip, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)))
    torch.jit.save(traced, out)
    return out.getvalue()


def mutated(folder: Path):
    """A case: one of the files mutated, read in its way."""
    files = Files(folder)
    kinds = [*files.named, "model", "config", "deepspeed"]

    def case(number: int, rng: random.Random) -> str | None:
        kind, place = kinds[number % len(kinds)], folder / f"{number}"
        place.mkdir()
        try:
            if kind in files.named:
                (place / kind).write_bytes(mutate(files.named[kind], rng))
                return brought(place / kind)
            if kind == "deepspeed":
                return tensors(place / "x.pt", mutate(files.deepspeed, rng))
            config = json.dumps(files.config, indent=1).encode()
            data = (mutate(files.model, rng), config) if kind == "model" else (files.model, mutate(config, rng))
            return pretrained(place, *data)
        finally:
            shutil.rmtree(place)

    return case


def brought(path: Path) -> None:
    """As launch/convert.py has it, and as model.clip has it."""
    model, _, _ = model_folder.import_weights(str(path), WORDS)
    assert not any(parameter.is_meta for parameter in model.parameters())


def tensors(path: Path, data: bytes) -> str | None:
    """A file of DeepSpeed's; checkpoints.py makes one line of all FAILURES."""
    path.write_bytes(data)
    try:
        load_tensors(str(path))
    except FAILURES:
        return "refused"
    return None


def pretrained(place: Path, model: bytes, config: bytes) -> None:
    """A model folder, as from_pretrained and init_from have it."""
    (place / "model.safetensors").write_bytes(model)
    (place / "config.json").write_bytes(config)
    CLIP4VLA.from_pretrained(place)


def header(tree: Any, body: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + body


def zipped(names: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return out.getvalue()


def with_code(data: bytes, canary: Path) -> bytes:
    """A torch archive whose pickle runs code."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    code = pickle.dumps(Code(canary), protocol=2)
    return zipped({n: code if n.endswith("/data.pkl") else d for n, d in names.items()}, zipfile.ZIP_STORED)


class Saving(torch.nn.Module):
    """TorchScript that writes a file as soon as it is loaded."""

    def __init__(self, canary: str) -> None:
        super().__init__()
        self.weight, self.canary = torch.nn.Parameter(torch.zeros(2)), canary

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.canary, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.canary, self.training = state[0], state[1], state[2]
        torch.save(self.weight, self.canary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unused."""
        return x + self.weight


def saving(canary: Path) -> bytes:
    """Its archive."""
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(Saving(str(canary))), out)
    return out.getvalue()


def old_tar(canary: Path) -> bytes:
    """A file of torch's first format, a tar, with a link and code."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, str(canary)
        tar.addfile(link)
        for name in ("tensors", "pickle"):
            info, code = tarfile.TarInfo(name), pickle.dumps(Code(canary), protocol=2)
            info.size = len(code)
            tar.addfile(info, io.BytesIO(code))
    return out.getvalue()


def hostile(files: Files, canary: Path) -> dict[str, tuple[str, bytes]]:
    """name: (suffix, bytes) of weights."""
    state, word = files.state, "token_embedding.weight"
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    huge = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    blocks = {f"transformer.resblocks.{i}.ln_1.weight": torch.zeros(0) for i in range(5000)}
    code = pickle.dumps(Code(canary), protocol=2)
    return {
        "code.pt": (".pt", code),
        "code_in_zip.pt": (".pt", with_code(files.named["clip.pt"], canary)),
        "code_in_archive.pt": (".pt", with_code(files.named["archive.pt"], canary)),
        "code_as_safetensors": (".safetensors", code),
        "code_in_torchscript.pt": (".pt", saving(canary)),
        "code_in_old_tar.pt": (".pt", old_tar(canary)),
        "zip_bomb.pt": (".pt", zipped({"archive/data.pkl": b"}.", "archive/version": b"3\n", "archive/data/0": bytes(10**9)})),
        "zip_bomb_pickle.pt": (".pt", zipped({"archive/data.pkl": bytes(10**9), "archive/version": b"3\n"})),
        "zip_outside.pt": (".pt", zipped({"../../../data.pkl": b"}.", "/etc/version": b"3\n"})),
        "stretched.pt": (".pt", torched({**state, word: torch.zeros(1, 1).expand(2**40, 64)})),
        "stretched_half.pt": (".pt", torched({**state, word: torch.zeros(1, 1).half().expand(2**40, 64)})),
        "shared_2000_times.pt": (".pt", torched({**state, **{f"x{i}": state[word] for i in range(20000)}})),
        "sparse.pt": (".pt", torched({**state, word: torch.sparse_coo_tensor([[0], [0]], [1.0], (2**40, 64))})),
        "meta.pt": (".pt", torched({**state, word: torch.zeros(2**40, 64, device="meta")})),
        "complex.pt": (".pt", torched({**state, word: state[word].to(torch.complex64)})),
        "empty_dimension.pt": (".pt", torched({**state, "positional_embedding": torch.zeros(2**40, 0)})),
        "5000_blocks.pt": (".pt", torched({**state, **blocks})),
        "no_dimension.pt": (".pt", torched({k: torch.tensor(0.0) for k in state})),
        "integers.pt": (".pt", torched({k: v.to(torch.int8) for k, v in state.items()})),
        "not_finite.pt": (".pt", torched({k: v * torch.nan for k, v in state.items()})),
        "names_are_numbers.pt": (".pt", torched(dict(enumerate(state.values())))),
        "nested_1000.pt": (".pt", b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b"."),
        "empty_dictionary.pt": (".pt", torched({})),
        "list.pt": (".pt", torched([1])),
        "zero_bytes.pt": (".pt", b""),
        "old_claims_more.pt": (".pt", files.named["old.pt"].replace(struct.pack("<H", 19200), b"\xff\xff")),
        "zero_bytes.safetensors": (".safetensors", b""),
        "header_100_MB.safetensors": (".safetensors", header(b"{" + b" " * 10**8 + b"}")),
        "header_claims_8_EiB.safetensors": (".safetensors", struct.pack("<Q", 2**63) + b"{}"),
        "header_nested.safetensors": (".safetensors", header(b'{"a":' * 100000 + b"1" + b"}" * 100000)),
        "overlap.safetensors": (".safetensors", header({"a": one, "b": one}, bytes(16))),
        "negative.safetensors": (".safetensors", header({"a": {**one, "data_offsets": [-16, 0]}}, bytes(16))),
        "negative_shape.safetensors": (".safetensors", header({"a": {**one, "shape": [-4]}}, bytes(16))),
        "huge.safetensors": (".safetensors", header({"a": huge}, bytes(16))),
        "overflow.safetensors": (".safetensors", header({"a": {**one, "shape": [2**62, 4]}}, bytes(16))),
        "wrong_dtype.safetensors": (".safetensors", header({"a": {**one, "dtype": "PY_OBJECT"}}, bytes(16))),
        "empty_dimension.safetensors": (".safetensors", save({**state, "positional_embedding": torch.zeros(2**40, 0)})),
    }  # fmt: skip


CONFIGS: dict[str, Callable[[dict], Any]] = {  # changes to a config.json
    "10^12 words": lambda c: c["clip"]["text_cfg"].update(vocab_size=10**12),
    "10^9 layers": lambda c: c["clip"]["vision_cfg"].update(layers=10**9),
    "10^9 wide": lambda c: c["clip"]["vision_cfg"].update(width=10**9),
    "patches of 0": lambda c: c["clip"]["vision_cfg"].update(patch_size=0),
    "-1 layers": lambda c: c["clip"]["text_cfg"].update(layers=-1),
    "mlp 10^9": lambda c: c["clip"]["text_cfg"].update(mlp_ratio=1e9),
    "heads of 0": lambda c: c["clip"]["text_cfg"].update(heads=0),
    "heads of -1": lambda c: c["clip"]["text_cfg"].update(heads=-1),
    "image of lists": lambda c: c["clip"]["vision_cfg"].update(image_size=[[1]]),
    "words for numbers": lambda c: c["clip"].update(embed_dim="x"),
    "another library's text": lambda c: c["clip"]["text_cfg"].update(hf_model_name="../../etc"),
    "another library's vision": lambda c: c["clip"]["vision_cfg"].update(timm_model_name="resnet18", timm_model_pretrained=True),
    "10^9 blocks": lambda c: c["model"].update(head="local_local", head_layers=10**9),
    "10^9 tokens": lambda c: c["model"].update(head="local_local", max_tokens=10**9),
    "10^9 segments": lambda c: c["spectrogram"].update(max_segments=10**9) or c["model"].update(head="captioner"),
    "10^9 queries of a pool": lambda c: c["clip"]["vision_cfg"].update(attentional_pool=True, attn_pooler_queries=10**9),
    "patches of two sides": lambda c: c["clip"]["vision_cfg"].update(patch_size=[1, 32]),
    "no such head": lambda c: c["model"].update(head="x"),
    "unknown key": lambda c: c["model"].update(evil=1),
    "temperature 0": lambda c: c["model"].update(temperature=0),
    "lists for sections": lambda c: c.update(model=[1]),
    "no clip": lambda c: c.pop("clip"),
    "labels are numbers": lambda c: c["model"].update(head="classifier", labels=[[1]]),
    "clip is a file": lambda c: c["model"].update(clip="/etc/passwd"),
    "clip is a web page": lambda c: c["model"].update(clip="hf-hub:../../x/y"),
}  # fmt: skip


def configured(files: Files, place: Path, change: Callable[[dict], Any]) -> None:
    """A model folder with a changed config.json."""
    config = json.loads(json.dumps(files.config))
    change(config)
    pretrained(place, files.model, json.dumps(config).encode())


def deepspeed_with_code(place: Path, canary: Path) -> str | None:
    """DeepSpeed's file with code in it."""
    return tensors(place / "x.pt", torched({"a": torch.ones(2)})[:0] + pickle.dumps(Code(canary), protocol=2))
