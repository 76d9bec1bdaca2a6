"""The import rules of the design: one direction, and inference without the training packages."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ROOT

MODULES = sorted((ROOT / "clip4vla").rglob("*.py"))
LAYERS = [  # lowest first: a file imports from its own folder and from lower layers
    ("errors", "quick_imports", "config", "config_io"),
    "io", "distributed", "media", "data", "checkpoints", "towers", "models", "losses", "report", "evaluation", "training",
    "paper",
    "export",
    ("api", "cli"),
    "search", "web",
]  # fmt: skip
TRAINING = ("deepspeed", "nvidia", "wandb", "webdataset")
EXTRAS = (*TRAINING, "faiss", "gradio", "onnxruntime", "onnxscript", "pycocoevalcap", "sklearn", "cairosvg")
PLAIN = ("media", "models", "losses", "api", "data.batch", "data.preprocessing")
DATA_PREP = {"cli", "config", "config_io", "errors", "quick_imports", "io", "media", "data", "towers"}
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


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules and names that a file imports, lazily too unless only at its top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """The modules of clip4vla that a file imports, as data.loader."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if name == "clip4vla.CLIP4VLA":
            found.add("api")
        elif parts[0] == "clip4vla":
            is_module = (ROOT / "/".join(parts)).is_dir() or (ROOT / "/".join(parts)).with_suffix(".py").is_file()
            found.add(".".join(parts[1:] if is_module else parts[1:-1]))
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "clip4vla").with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int:
    first = name.partition(".")[0]
    return next(i for i, names in enumerate(LAYERS) if first == names or (isinstance(names, tuple) and first in names))


def test_the_root_is_short_and_a_folder_has_few_files():
    assert len(list((ROOT / "clip4vla").glob("*.py"))) <= 8
    folders = [
        path
        for top in ("clip4vla", "data_prep", "launch/bench")
        for path in (ROOT / top).rglob("*/")
        if path.name != "__pycache__"
    ]
    for folder in [ROOT / "data_prep", *folders]:
        assert 3 <= len(list(folder.glob("*.py"))) <= 12, folder


def test_no_file_is_long():
    code = [path for folder in ("clip4vla", "data_prep", "launch", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in code if len(path.read_text(encoding="utf-8").splitlines()) > 400]


@pytest.mark.parametrize("path", MODULES, ids=module)
def test_imports_go_to_lower_layers(path):
    assert not [
        name for name in imported(path) if name.split(".")[0] in ("launch", "data_prep", "shard", "annotations")
    ]
    if path.parent != ROOT / "clip4vla" or path.name != "__init__.py":  # it brings CLIP4VLA at first use
        assert not [name for name in own(path) if layer(name) > layer(module(path))]


def test_no_imports_form_a_circle():
    left = {module(path): own(path) - {module(path)} for path in MODULES if module(path)}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_data_prep_uses_only_its_part_of_the_library(path):
    allowed = set(DATA_PREP)
    if path.name in ("embed.py", "embed_shards.py"):  # runs what a pre-training run would
        allowed |= {"checkpoints", "distributed", "models", "training"}
    if path.name == "page.py":  # a page like the others
        allowed |= {"report"}
    assert not [name for name in own(path) if not {name, name.partition(".")[0]} & allowed]


@pytest.mark.parametrize("path", [p for p in MODULES if module(p).startswith(PLAIN)], ids=module)
def test_model_and_losses_know_no_engine_and_no_loader(path):
    assert not [name for name in imported(path) if name.split(".")[0] in TRAINING]
    assert not own(path) & {"data.loader", "training.engine", "checkpoints.manager"}


@pytest.mark.parametrize("path", MODULES, ids=module)
def test_packages_of_the_extras_are_imported_where_they_are_used(path):
    assert not [name for name in imported(path, top_level_only=True) if name.split(".")[0] in EXTRAS]


def test_inference_needs_no_package_of_the_extras():  # test_packaging.py has the same in an environment without them
    code = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\nimport clip4vla; print(clip4vla.CLIP4VLA)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SCRIPTS = sorted((ROOT / "launch").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_launch_scripts_are_thin(path):
    assert len(path.read_text().splitlines()) <= 80


ENTRIES = [
    path for folder in ("launch", "data_prep", "clip4vla") for path in sorted((ROOT / folder).rglob("*.py"))
    if "\n@entry_point\n" in path.read_text()
]  # fmt: skip
MISTYPED = [(path, "--stesp") for path in ENTRIES]
MISTYPED += [(path, "train.stesp=3") for path in ENTRIES if " parse_args(" in path.read_text()]


def modules(path: Path, word: str) -> tuple[int, set[str]]:
    """Exit code of an entry script that is given this word, and what it imported."""
    script = ["-m", f"clip4vla.{path.parent.name}"] if path.name == "__main__.py" else [str(path)]
    words = [sys.executable, "-X", "importtime", *script, word]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.rpartition("|")[2].strip() for line in lines}


def test_every_entry_script_is_looked_at():
    assert {"pretrain", "evaluate", "bench", "shard", "check", "embed", "__main__"} <= {p.stem for p in ENTRIES}


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
    code = "import sys, clip4vla.cli, clip4vla.training.train, deepspeed; "
    code += f"print([n for n in {TRAINING_NEEDS_NOT} if sys.modules.get(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_command_ends_without_a_collection_of_all_that_it_imported():
    """It took 1.5 to 2 CPU seconds. What is registered first runs last, after cli.py's."""
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); import clip4vla.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 1000, done.stderr
