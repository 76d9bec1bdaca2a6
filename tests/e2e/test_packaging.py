"""What is installed: wheel and sdist, an environment with inference alone, what is said without an extra, the API reference."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from forks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import TINY

from clip4vla import CLIP4VLA, cli
from clip4vla.config import ModelConfig, SpectrogramConfig

INFERENCE = """
import json, sys, wave
import av, numpy as np, torch
from PIL import Image
from clip4vla import CLIP4VLA

rng = np.random.default_rng(0)
with wave.open("a.wav", "wb") as out:
    out.setparams((1, 2, 16000, 0, "NONE", ""))
    out.writeframes((rng.normal(size=48000) * 3000).astype("<i2").tobytes())
Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save("a.png")
with av.open("a.mp4", "w") as out:
    stream = out.add_stream("mpeg4", 10, width=64, height=48, pix_fmt="yuv420p")
    for grey in range(0, 200, 10):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8))))
    out.mux(stream.encode())
model = CLIP4VLA.from_pretrained(sys.argv[1])
found = [model.encode_text("a dog"), model.encode_audio("a.wav"), model.encode_video(["a.png", "a.mp4"])]
print(json.dumps({"vectors": torch.cat(found).tolist(), "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""
COMMANDS = """
import os, runpy, sys
import av, open_clip  # once for all commands
for words in sys.argv[1:]:
    if not os.fork():
        sys.argv = words.split()
        if sys.argv[0] == "-m":
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that git has or would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what an sdist has to hold is not known")
    copy = tmp_path_factory.mktemp("checkout")
    words = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist), made without network; the wheel from the sdist."""
    files, out = sorted(walked(checkout)), tmp_path_factory.mktemp("dist")
    done = called(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout)
    assert done.returncode == 0, done.stderr
    for name in {"build", "clip4vla.egg-info"} & set(os.listdir(checkout)):
        shutil.rmtree(checkout / name)
    assert sorted(walked(checkout)) == files
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    """The wheel's METADATA."""
    with zipfile.ZipFile(built[0]) as wheel:
        return message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))


@pytest.fixture(scope="module")
def empty(built, metadata, tmp_path_factory) -> Iterator[Path]:
    """The Python of an environment with the wheel and what it requires without extras, as links, and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure([line for line in requires(metadata) if not Requirement(line).marker]):
        for file in importlib.metadata.files(name) or []:
            if ".." not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(str(file.locate()))
    python, pip = folder / "bin/python", (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    done = called(*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", built[0])
    assert done.returncode == 0, done.stderr
    yield python
    shutil.rmtree(folder)  # 25,000 links


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model's folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    CLIP4VLA(TINY, ModelConfig(clip="ViT-B-32-quickgelu"), SpectrogramConfig()).save_pretrained(folder)
    return folder


def called(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def walked(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def requires(metadata) -> list[str]:
    return metadata.get_all("Requires-Dist")


def closure(lines: list[str]) -> set[str]:
    """The distributions that these requirements bring, their own with them; each has to be installed here."""
    found, wanted = set(), [Requirement(line) for line in lines]
    while wanted:
        need = wanted.pop()
        for extra in {"", *need.extras}:
            if (canonicalize_name(need.name), extra) not in found:
                found.add((canonicalize_name(need.name), extra))
                more = map(Requirement, importlib.metadata.requires(need.name) or [])
                wanted += [r for r in more if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_the_wheel_holds_the_package_alone_and_the_sdist_the_checkout(checkout, built, metadata):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in walked(checkout) if name.startswith("clip4vla/")} and "clip4vla/py.typed" in names
    with tarfile.open(built[1]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("clip4vla.egg-info/")}
    assert names - made == walked(checkout)
    assert metadata["Version"] == __import__("clip4vla").__version__ and metadata.get_payload().startswith("# clip4vla")


def test_an_environment_with_inference_alone_encodes_text_sound_pictures_and_video(empty, model, tmp_path):
    done = called(empty, "-I", "-c", INFERENCE, model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), CLIP4VLA.from_pretrained(model)
    media = here.encode_video([tmp_path / "a.png", tmp_path / "a.mp4"])
    vectors = torch.cat([here.encode_text("a dog"), here.encode_audio(tmp_path / "a.wav"), media])
    assert vectors.shape == (4, TINY["embed_dim"]) and (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    assert (vectors - torch.tensor(there["vectors"])).abs().max() < 1e-5
    brought = {name for names in cli.EXTRAS.values() for name in names} - {
        "tqdm",
        "fsspec",
        "packaging",
    }  # open_clip's and torch's
    assert not brought & {*there["modules"]}


def test_a_command_without_its_extra_says_what_to_install(empty, checkout, model, tmp_path):
    commands = {
        f"-m clip4vla.search build {model} --model {model} --out {tmp_path}/index": "web",
        "-m clip4vla.web index": "web",
        "launch/pretrain.py configs/pretrain/sample.yaml": "train",
        f"launch/export.py {model} {tmp_path}/exported --onnx": "onnx",
        f"data_prep/shard.py configs/data/sample.yaml out={tmp_path}/shards": "train",
        "data_prep/embed.py configs/pretrain/sample.yaml": "train",
        "data_prep/check.py shards": "train",
    }
    done = called(empty, "-P", "-c", COMMANDS, *commands, cwd=checkout)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(commands) and not done.stdout, done.stderr
    for extra, line, code in zip(commands.values(), lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(rf"error: \w+ is not installed: pip install .*'clip4vla\[{extra}\]'.*", line), line
        assert code == "2", line


def imported(path: Path) -> set[str]:
    """Names of the packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_what_is_imported_is_required_and_named_by_its_extra(metadata):
    base, extras = set(), {}
    for need in map(Requirement, requires(metadata)):
        extra = re.search(r'extra == "(\w+)"', str(need.marker))
        (extras.setdefault(extra[1], set()) if extra else base).add(canonicalize_name(need.name))
    brought = importlib.metadata.packages_distributions()
    files = [path for folder in ("clip4vla", "launch", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    for package in set().union(*map(imported, files)) - {"clip4vla", "launch", "data_prep", "tests"}:
        by = set(map(canonicalize_name, brought[package]))
        wanted = {extra for extra in cli.EXTRAS if by & extras[extra]}
        assert by & base or wanted, package
        said = {extra for extra, names in cli.EXTRAS.items() if package in names}
        assert said == (set() if by & base else wanted), package
    assert set(extras) == {*cli.EXTRAS, "dali12", "dev"}


def test_the_api_reference_has_what_users_call(tmp_path):
    modules = [
        f"clip4vla.{name}"
        for name in ("api", "data.preprocessing", "search.index", "models.model", "export.model_folder")
    ]
    done = called(sys.executable, "-m", "pdoc", "--no-search", "-o", tmp_path, *modules, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = (tmp_path / "clip4vla/api.html").read_text()
    methods = [name for name in vars(CLIP4VLA) if not name.startswith("_")]
    assert {"from_pretrained", "encode_text", "encode_audio", "encode_video", "similarity"} <= {*methods}
    for name in [*methods, "save_pretrained", "push_to_hub"]:
        assert getattr(CLIP4VLA, name).__doc__ and (f'id="CLIP4VLA.{name}"' in page or name not in methods), name
