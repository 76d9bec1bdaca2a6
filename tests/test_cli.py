"""cli.py: ~ and $VARIABLES are expanded in every path of a command line, and one that is not set is named."""

import ast
import importlib.util
import os
import subprocess
import sys

import pytest
from forks import ROOT

from clip4vla.cli import path_word

BENCHES = sorted((ROOT / "launch/bench").glob("*/[a-z]*.py"))
MODULES = [
    *sorted((ROOT / "launch").glob("*.py")), *sorted((ROOT / "data_prep").glob("*.py")), ROOT / "clip4vla/cli.py",
    ROOT / "clip4vla/search/__main__.py", ROOT / "clip4vla/web/__main__.py", *BENCHES,
]  # fmt: skip
NO_PATHS = {
    "--audio-types",
    "--device",
    "--only",
    "--decode",
    "--host",
    "--allowed-hosts",
    "text",
    "--compile",
    "--part",
}
WORDS = {"words", "what", "bench", "clips"}  # settings among them, or a choice: expanded after parsing
PATHS = [
    *(f"launch/{name}.py" for name in ("baseline", "evaluate", "pretrain")), "data_prep/shard.py", "data_prep/embed.py",
    "launch/pretrain.py --deepspeed_config", "launch/ablate.py table5", "launch/ablate.py figure4",
    "launch/ablate.py cost x --out", "launch/convert.py", "launch/convert.py x", "launch/convert.py x y --base-checkpoint",
    "launch/export.py", "launch/export.py x", "launch/evaluate.py --table x", "launch/report.py x --out",
    "launch/results.py --data x", "data_prep/check.py x", "data_prep/check.py x --report",
    "clip4vla/search/__main__.py info", "clip4vla/search/__main__.py remove x --index",
    "clip4vla/search/__main__.py build", "clip4vla/search/__main__.py query --index x --sound", "clip4vla/web/__main__.py",
]  # fmt: skip


def test_every_flag_that_takes_a_text_is_a_path_or_known_to_be_none():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                flag = node.args[0].value if isinstance(node.args[0], ast.Constant) else "--dry-run"
                if not {"action", "choices"} & {*given} and flag not in NO_PATHS | WORDS:
                    kinds = ("path_word", "_folder", "int", "float", "count")
                    assert given.get("type") in kinds, f"{path}: {flag}"


@pytest.mark.parametrize("words", PATHS)
def test_a_variable_that_is_not_set_is_named(words, monkeypatch, capsys):
    script, *rest = words.split()
    spec = importlib.util.spec_from_file_location("entry", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *rest, "$GONE/x"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and "$GONE/x: $GONE is empty or not set" in capsys.readouterr().err


def test_a_path_of_the_command_line_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_word("~/a/$HOME") == "/home/me/a//home/me" and path_word("s3://a/b") == "s3://a/b"


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_cudas_allocator_grows_its_blocks_unless_the_user_has_set_it(name):
    """Before torch is there, which reads it when CUDA starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {key: value for key, value in os.environ.items() if key not in names} | ({name: "own"} if name else {})
    code = f"import os, sys, clip4vla.cli; print('torch' in sys.modules, [os.environ.get(name) for name in {names}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    wanted = ["own" if key == name else None for key in names] if name else ["expandable_segments:True", None]
    assert done.stdout == f"False {wanted}\n", done.stderr
