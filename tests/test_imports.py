"""The import rules of the design: one direction, and inference without the training packages."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODULES = sorted((ROOT / "clip4vla").glob("*.py"))
TRAINING = ("deepspeed", "nvidia", "wandb", "webdataset")
EXTRAS = (*TRAINING, "faiss", "gradio", "onnxruntime", "onnxscript", "pycocoevalcap", "sklearn", "cairosvg")
PLAIN = ["api", "inputs", "media", "pictures", "model", "towers", "audio_encoder", "fusion", "captioner", "decoding"]
SLOW = (
    "torch",
    "deepspeed",
    "nvidia",
    "matplotlib",
    "open_clip",
    "torchaudio",
    "torchvision",
    "wandb",
    "gradio",
)
PLAIN += ["classifier", "losses", "spectrogram", "masking", "batch"]


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_the_library_imports_neither_launch_nor_data_prep(path):
    assert not [
        name for name in imported(path) if name.split(".")[0] in ("launch", "data_prep", "shard", "annotations")
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep").glob("*.py")), ids=lambda p: p.name)
def test_data_prep_uses_only_its_part_of_the_library(path):
    allowed = {
        "cli",
        "clips",
        "config",
        "files",
        "settings",
        "media",
        "pictures",
        "pool",
        "spectrogram",
        "shards",
        "towers",
    }
    if path.name == "embed.py":  # runs what a pre-training run would
        allowed |= {
            "batch",
            "build",
            "checkpoints",
            "distributed",
            "engine",
            "loader",
            "model",
            "order",
            "train",
            "vectors",
        }
    if path.name == "check_page.py":  # a page like the others
        allowed |= {"exhibits", "report"}
    used = {name.split(".")[1] for name in imported(path) if name.startswith("clip4vla.")}
    assert used <= allowed


@pytest.mark.parametrize("name", PLAIN)
def test_model_and_losses_know_no_engine_and_no_loader(name):
    names = imported(ROOT / f"clip4vla/{name}.py")
    assert not [
        n
        for n in names
        if n.split(".")[0] in TRAINING or n in ("clip4vla.loader", "clip4vla.engine", "clip4vla.checkpoints")
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_packages_of_the_extras_are_imported_where_they_are_used(path):
    assert not [name for name in imported(path, top_level_only=True) if name.split(".")[0] in EXTRAS]


def test_inference_needs_no_package_of_the_extras():  # test_packaging.py has the same in an environment without them
    code = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\nimport clip4vla; print(clip4vla.CLIP4VLA)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SCRIPTS = [path for path in sorted((ROOT / "launch").glob("*.py")) if not path.stem.startswith("bench_")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_launch_scripts_are_thin(path):  # bench_*.py are no entry to the library: they hold the other side too
    assert len(path.read_text().splitlines()) <= 80


ENTRIES = [
    path for folder in ("launch", "data_prep", "clip4vla") for path in sorted((ROOT / folder).glob("*.py"))
    if "\n@cli\n" in path.read_text()
]  # fmt: skip
MISTYPED = [(path, "--stesp") for path in ENTRIES]
MISTYPED += [(path, "train.stesp=3") for path in ENTRIES if "command_line(" in path.read_text()]


def modules(path: Path, word: str) -> tuple[int, set[str]]:
    """Exit code of an entry script that is given this word, and what it imported."""
    script = ["-m", f"clip4vla.{path.stem}"] if path.parent.name == "clip4vla" else [str(path)]
    words = [sys.executable, "-X", "importtime", *script, word]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.rpartition("|")[2].strip() for line in lines}


def test_every_entry_script_is_looked_at():
    assert {"pretrain", "evaluate", "bench", "shard", "check", "embed", "search", "web"} <= {p.stem for p in ENTRIES}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda p: p.stem)
def test_help_imports_nothing_slow(path):
    code, names = modules(path, "--help")
    assert code == 0 and "clip4vla.cli" in names and not names & {*SLOW}


@pytest.mark.parametrize("path, word", MISTYPED, ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_a_mistyped_word_is_answered_before_anything_slow_is_imported(path, word):
    code, names = modules(path, word)
    assert code == 2 and "clip4vla.cli" in names and not names & {*SLOW}


def test_help_takes_little_cpu_time():  # 0.1 s on a CPU of 2025; torch alone would be 1.6 s there
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "launch/pretrain.py", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


TRAINING_NEEDS_NOT = ("matplotlib", "timm", "wandb", "torch._inductor.compile_fx")


def test_a_training_run_imports_no_plotting_and_nothing_of_timm():
    code = f"import sys, clip4vla.cli, clip4vla.train, deepspeed; print([n for n in {TRAINING_NEEDS_NOT} if sys.modules.get(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
