"""What the program can say when something is wrong: the messages of its sources, their variable parts as …"""

import ast
import itertools
import re
from collections.abc import Iterator

from forks import ROOT

SOURCES = sorted(path for folder in ("clip4vla", "data_prep", "launch") for path in (ROOT / folder).rglob("*.py"))
KINDS = ("UserError", "ValueError", "OSError", "ConnectionError", "TimeoutError", "RuntimeError")
Names = dict[str, ast.AST]


def said(node: ast.AST, names: Names) -> list[str]:
    """Each text that an expression may be; alternatives apart, a conditional piece inside a text is a variable part."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [
            said(part, names) if isinstance(part, ast.Constant) else _inner(part.value, names) for part in node.values
        ]
        return ["".join(some) for some in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return said(node.body, names) + said(node.orelse, names)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in said(value, names)]
    return _inner(node, names)


def _inner(node: ast.AST, names: Names) -> list[str]:
    known = isinstance(node, ast.Name) and node.id in names
    return said(names[node.id], {k: v for k, v in names.items() if k != node.id}) if known else ["…"]


def _named(tree: ast.AST) -> Names:
    """Texts that are given a name below here, once."""
    given = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    counts = [n.targets[0].id for n in given]
    texts = [
        n for n in given if isinstance(n.value, ast.JoinedStr | ast.Constant) and counts.count(n.targets[0].id) == 1
    ]
    return {n.targets[0].id: n.value for n in texts}


def _expressions() -> Iterator[tuple[str, ast.AST, Names]]:
    """(FILE, node, names of texts in its function and at the top of its file) of every node."""
    for path in SOURCES:
        module = ast.parse(path.read_text())
        top = _named(ast.Module([node for node in module.body if isinstance(node, ast.Assign)], []))
        for outer in module.body:
            functions = outer.body if isinstance(outer, ast.ClassDef) else [outer]
            for function in functions:
                names = top | _named(function)
                yield from ((path.name, node, names) for node in ast.walk(function))


def plain(text: str) -> str:
    """One … where several variable parts meet, and one space between words."""
    return " ".join(re.sub("…+", "…", text).split())


def raised() -> dict[str, str]:
    """Where each message of an error is made, FILE:LINE by message; less what has no word of its own, as it passes on another."""
    found = {}
    for file, node, names in _expressions():
        if isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in KINDS:
            found |= {plain(text): f"{file}:{node.lineno}" for text in said(node.args[0], names)}
    return {text: where for text, where in found.items() if re.search(r"[A-Za-z]{3}", text)}


def texts() -> set[str]:
    """Every text in the sources."""
    return {plain(text) for _, node, names in _expressions() for text in said(node, names)}
