"""Plain words: what the rules for names and prose forbid is in no code and on no page."""

import ast
import re

import pytest
from forks import ROOT

CODE = sorted(path for folder in ("clip4vla", "data_prep", "launch") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_words.py")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
WORDS = re.compile(r"\b(mend\w*|anew|for ever|so many)\b", re.IGNORECASE)
NAMES = {"told", "said", "found"}  # of what? a name says what the thing is


def names(tree: ast.AST) -> set[str]:
    """Names that a module gives to variables, arguments, attributes, functions and classes."""
    given = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            given.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            given.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            given.add(node.name)
    return given


@pytest.mark.parametrize("path", [*CODE, *TESTS, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_is_one_that_a_reader_must_look_up(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if WORDS.search(line)]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_name_says_what_the_thing_is(path):
    assert not names(ast.parse(path.read_text(encoding="utf-8"))) & NAMES
