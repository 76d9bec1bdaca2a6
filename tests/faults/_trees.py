"""Seeded damage to texts that keep their grammar, as far as it is damage to what they say: JSON, YAML, CSV, and lines."""

import base64
import copy
import csv
import io
import json
import math
import random
import string
from collections.abc import Callable
from typing import Any

from faults._mutate import mutate

DEEP, DEEPER, DIGITS, LONG = "@deep@", "@deeper@", "@digits@", "@long@"  # stand for what is put in when a text is made
NEST = 100_000
PATHS = (
    "..",
    ".",
    "/",
    "../canary/secret.txt",
    "../../canary/secret.txt",
    "a/../../canary/secret.png",
    "{canary}/secret.png",
    "{canary}/new",
    "{canary}",
    "file://{canary}/secret.txt",
    "http://127.0.0.1:9/x",
    "..\\canary\\secret.txt",
    "link/secret.png",
    "link.png",
    "~/x",
    "a\0b.png",
    "x" * 300 + ".png",
    "CON",
    "-rf",
    "$HOME",
    "s3://nobody/x",
)
WORDS = (
    "",
    " ",
    "\0",
    "\ud800",
    "\udcff",
    "a\nb\r\n",
    "\u2028",
    "\x1b[2J\x1b]0;t\a",
    "\u202egnp.exe",
    "\ufeff",
    "1e400",
    "nan",
    "-1",
    "１２",
    '=HYPERLINK("http://x")',
    "+1",
    "@SUM(A1)",
    "{0.__class__}",
    "{}{}",
    "%s%n",
    "<script>alert(1)</script>",
    "' OR 1=1 --",
    "'; DROP TABLE items; --",
    "__import__('os').system('touch {canary}/ran')",
    "!!python/object/apply:os.system ['touch {canary}/ran']",
    "null",
    "true",
    "[" * 50,
    "é" * 1000,
    "$\\frac",
    "&amp;" * 100,
    "".join(random.Random(0).choices(string.ascii_lowercase, k=90_000)),  # what no tokenizer has seen, without a space
    DEEP,
    LONG,
)
OTHERS = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63),
    10**12,
    10**30,
    10**400,
    0.5,
    -0.5,
    1e-320,
    1e305,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    [],
    {},
    [[]],
    [None],
    [1, 2],
    ["a", "b"],
    {"a": 1},
    {"": ""},
    [{"a": [1]}],
    DEEP,
    DEEPER,
    DIGITS,
)


def bomb(first: str, merge: str) -> str:
    """YAML whose aliases, or merge keys, stand for 9^11 values."""
    lines = [f"x{i}: &x{i} {{{merge or 'a: '}[{','.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    return "\n".join([f"x0: &x0 {first}", *lines, "seed: *x11\n"])


YAMLS = (
    "a: !!python/object/apply:os.system ['touch {canary}/ran']\n",
    "!!python/name:os.system\n",
    "a: !!python/object/new:os.system [x]\n",
    "a: &a [*a]\n",
    "a: 2001-99-99\n",
    "a: !!int ''\n",
    "a: !!float x\n",
    "a: !!bool x\n",
    "a: !!timestamp x\n",
    "a: !!binary é\n",
    "a: 1:99:99:99\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "--- 1\n--- 2\n",
    "\t- a\n",
    "a: *b\n",
    "%YAML 9.9\n---\na: 1\n",
    "=: 1\n",
    "<<: 1\n",
    "a: 0x\n",
    "a: 0b2\n",
    "a: 1_000_\n",
    "seed: .nan\n",
    "train: {lr: .inf}\n",
    "!!set {a, b}\n",
    "!!omap [a: 1]\n",
    "!!pairs [a: 1]\n",
    "seed: 0o17\n",
    bomb("[a,a,a,a,a,a,a,a,a]", ""),
    bomb("{a: 1, b: 2}", "<<: "),
    "model: &m {fusion: *m}\n",
    "seed: [" + "[" * NEST,
    "{" * NEST,
    "- " * 20_000,
    "seed: " + "9" * 5000 + "\n",
    "? " * 20_000,
)


class Damage:
    """Draws damage; canary: a folder that nothing may touch, which hostile texts name."""

    def __init__(self, rng: random.Random, canary: str = "/nowhere"):
        self.rng, self.canary = rng, canary

    def word(self) -> str:
        """A hostile text, one in three a path."""
        word = self.rng.choice(self.rng.choice((PATHS, WORDS, WORDS)))
        return self._rare(word, "").replace("{canary}", self.canary)

    def value(self) -> Any:
        """Anything but what is expected."""
        return self.word() if self.rng.random() < 0.5 else copy.deepcopy(self._rare(self.rng.choice(OTHERS), -7))

    def _rare(self, value: Any, instead: Any) -> Any:
        """The texts of 10 MB and the nests of 100,000 come in one of ten of their turns: they take most of the time."""
        large = isinstance(value, str) and value in (LONG, DEEP)
        return instead if large and self.rng.random() < 0.9 else value

    def tree(self, tree: Any) -> Any:
        """A copy with one to three places changed."""
        tree = [copy.deepcopy(tree)]
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self._once(tree)
        return tree[0]

    def _once(self, root: list) -> None:
        places = list(_places(root))
        parent, key = self.rng.choice(places)
        what = self.rng.randrange(8)
        if what == 0 and isinstance(parent, dict):
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[self.word()] = parent.pop(key)
        elif what == 2 and isinstance(parent, list) and parent is not root:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif what == 3:
            other, at = self.rng.choice(places)
            parent[key] = copy.deepcopy(other[at])
        elif what == 4:
            parent[key] = [parent[key]]
        else:
            parent[key] = self.value()

    def json(self, data: bytes) -> bytes:
        """A JSON text with a tree, or its bytes, corrupt."""
        return self._either(data, lambda: self._dumped(json.loads(data)))

    def jsonl(self, data: bytes) -> bytes:
        """JSON lines of which one or two are corrupt, added or gone."""

        def made() -> bytes:
            lines = [json.loads(line) for line in data.splitlines()]
            at = self.rng.randrange(len(lines))
            changed = [self.tree(lines[at])]
            lines[at : at + 1] = self.rng.choice((changed, changed, [], [lines[at]] * 2, [self.value()]))
            return b"".join(_json(line, self.rng.random() < 0.5) + b"\n" for line in lines)

        return self._either(data, made)

    def yaml(self, data: bytes, tree: Any) -> bytes:
        """A YAML text (its tree as JSON, which is YAML) corrupt, or one with what only YAML has."""
        if self.rng.random() < 0.2:
            snippet = self.rng.choice(YAMLS).replace("{canary}", self.canary).encode()
            return self.rng.choice((snippet, data + b"\n" + snippet))
        return self._either(data, lambda: self._dumped(tree))

    def csv(self, data: bytes) -> bytes:
        """A table with one to three cells changed, or its bytes corrupt."""

        def made() -> bytes:
            lines = list(csv.reader(io.StringIO(data.decode()), skipinitialspace=True))
            for _ in range(self.rng.choice((1, 1, 2, 3))):
                line = self.rng.choice([line for line in lines if line] or [[""]])
                at, what = self.rng.randrange(len(line)), self.rng.randrange(6)
                line[at : at + 1] = [] if what == 0 else [line[at]] * 2 if what == 1 else [self.word()]
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(lines)
            return _filled(out.getvalue().encode("utf-8", "surrogatepass"))

        return self._either(data, made)

    def lines(self, data: bytes) -> bytes:
        """Lines of words with one to three words changed, or the bytes corrupt."""

        def made() -> bytes:
            lines = [line.split(" ") for line in data.decode().split("\n")]
            for _ in range(self.rng.choice((1, 1, 2, 3))):
                line = self.rng.choice(lines)
                line[self.rng.randrange(len(line))] = self.word()
            return _filled("\n".join(map(" ".join, lines)).encode("utf-8", "surrogatepass"))

        return self._either(data, made)

    def _dumped(self, tree: Any) -> bytes:
        return _json(self.tree(tree), self.rng.random() < 0.5)

    def again(self, data: bytes) -> bytes:
        """As json, of what may be corrupt already."""
        try:
            return self.json(data)
        except (ValueError, RecursionError):
            return self.file(data)

    def _either(self, data: bytes, made: Callable[[], bytes]) -> bytes:
        """What `made` gives, in three of ten cases what happens to files instead."""
        return made() if self.rng.random() < 0.7 else self.file(data)

    def file(self, data: bytes) -> bytes:
        """A file that came to grief on its way."""
        lines = data.splitlines(keepends=True) or [b""]
        at = self.rng.randrange(len(lines))
        return self.rng.choice(
            (
                lambda: mutate(data, self.rng),
                lambda: mutate(data, self.rng),
                lambda: mutate(data, self.rng),
                lambda: b"\xef\xbb\xbf" + data,
                lambda: data.replace(b"\n", b"\r\n"),
                lambda: data.replace(b"\n", b"\r"),
                lambda: data.decode("utf-8", "replace").encode("utf-16"),
                lambda: b"",
                lambda: data[: self.rng.randrange(len(data) + 1)],
                lambda: b"".join([*lines[:at], *lines[at + 1 :]]),
                lambda: b"".join([*lines[: at + 1], *lines[at:]]),
                lambda: b"".join(self.rng.sample(lines, len(lines))),
                lambda: data + data,
                lambda: bytes(1000),
                lambda: data[:at] + b"\0" + data[at:],
                lambda: base64.b64encode(data),
                lambda: b"[" * NEST,
                lambda: b"\x80\x04cos\nsystem\n.",
            )
        )()


def _places(tree: Any) -> Any:
    """(parent, key or number) of everything in the tree, which is a list."""
    todo = [tree]
    while todo:
        parent = todo.pop()
        for key, value in parent.items() if isinstance(parent, dict) else enumerate(parent):
            yield parent, key
            if isinstance(value, dict | list):
                todo.append(value)


def _json(tree: Any, ascii: bool) -> bytes:
    return _filled(json.dumps(tree, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))


def _filled(data: bytes) -> bytes:
    """With the nests and long texts that stood for themselves so far."""
    for mark, made in (
        (DEEP, b"[" * NEST + b"]" * NEST),
        (DEEPER, b'{"a":' * 950 + b"1" + b"}" * 950),
        (DIGITS, b"9" * 5000),
    ):
        data = data.replace(f'"{mark}"'.encode(), made).replace(mark.encode(), made)
    return data.replace(LONG.encode(), b"x" * 10_000_000)
