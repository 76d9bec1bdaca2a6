"""Read settings from defaults, presets, YAML files and the command line, strictly.

Order of precedence, lowest first: config.py's defaults, the preset, the YAML file, `key=value` words of the command line.
Text is taken as it stands, never as YAML's number, truth value or date; ~ and $VARIABLES are expanded in paths.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

import yaml

from clip4vla.config import OFFICIAL, DataConfig, ImportConfig, RunConfig
from clip4vla.errors import UserError, one_line

Config = TypeVar("Config", RunConfig, DataConfig, ImportConfig)
DEEPEST = 100  # levels of a file's lists and mappings
MOST = 10_000_000  # values in a file, those that YAML's aliases repeat counted each time
LONGEST = 1 << 19  # characters of a YAML file: its parser takes a second for 100 KB
NOT_UTF8 = "not UTF-8 text; convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (or -f UTF-16, or what it is in)"
HALF = re.compile("[\ud800-\udfff]")  # of a character, or a byte that is no UTF-8: no file can hold it
QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""")
VARIABLE = re.compile(r"\$(\{[^}]*\}|[A-Za-z_]\w*)", re.ASCII)
_shown = reprlib.Repr()  # YAML's aliases can make a value too long to be printed
_shown.maxstring = _shown.maxother = 200
_shown.maxlist, _shown.maxdict, _shown.maxlevel = 12, 12, 3


def load(cls: type[Config], path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read the settings of a YAML file with `a.b=value` overrides; raises UserError that names file, key and nearest key."""
    layers = [(str(path), _read_yaml(expand_path(str(path))))] if path else []
    layers += [(f"command line: {word}", _override(cls, word)) for word in overrides]
    config = cls()
    preset = next((tree["preset"] for _, tree in reversed(layers) if "preset" in tree), config.preset)
    if preset == "official":
        keys = {name for name, _, _ in describe(cls)}
        layers = [("preset official", _nested(k, v)) for k, v in OFFICIAL.items() if k in keys] + layers
    for where, tree in layers:
        _merge(config, tree, where, "")
    _expand_paths(config, "")
    return config


def from_tree(cls: type[Any], tree: dict[str, Any], where: str | Path, prefix: str) -> Any:
    """Make a section of the settings from names and values, by the same rules as `load`."""
    config = cls()
    _merge(config, tree, str(where), prefix)
    return config


def expand_path(text: str, key: str = "") -> str:
    """Expand ~ and $VARIABLES in a path or URL, the value of the setting `key`; UserError for one that is empty or not set.

    A file whose very name looks like that is taken as it is called.
    """
    path, name = os.path.expanduser(text), f"{key}={text}" if key else text
    unset = [variable for variable in VARIABLE.findall(path) if not os.environ.get(variable.strip("{}"))]
    if (unset or path.startswith("~")) and os.path.exists(path):
        return path
    if path.startswith("~"):
        raise UserError(f"{name}: there is no user {path.partition('/')[0][1:]}: write the path out")
    if unset:
        raise UserError(f"{name}: ${unset[0]} is empty or not set: export it, or write the path out")
    return os.path.expandvars(path)


def _expand_paths(config: Any, prefix: str) -> None:
    """Expand the settings that config.py marks as paths: texts, lists of texts, and the names of dictionaries."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            _expand_paths(value, f"{key}.")
        elif item.metadata["path"] and isinstance(value, dict):
            setattr(config, item.name, {expand_path(name, key): share for name, share in value.items()})
        elif item.metadata["path"] and isinstance(value, list):
            setattr(config, item.name, [expand_path(name, key) for name in value])
        elif item.metadata["path"]:
            setattr(config, item.name, expand_path(value, key))


def to_dict(config: Any) -> dict[str, Any]:
    """Turn settings into a plain nested dictionary, fit for YAML."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one with dotted keys; an empty dictionary stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """List (dotted key, `type = default`, meaning) of every setting."""
    rows, default = [], cls()
    for item in dataclasses.fields(cls):
        value = getattr(default, item.name)
        if dataclasses.is_dataclass(value):
            rows += describe(type(value), f"{prefix}{item.name}.")
        else:
            rows.append((prefix + item.name, f"{_type_name(item.type)} = {value!r}", item.metadata["help"]))
    return rows


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(decode(Path(path).read_bytes()))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error, 300)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read this config file ({getattr(error, 'strerror', error)})") from None
    if not isinstance(tree, dict | types.NoneType):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    return tree or {}


class _Loader(yaml.SafeLoader):
    """Data alone, as SafeLoader; merge keys of merge keys of merge keys end before they fill the memory.

    A key that is given twice is an error, as the first of its values would be lost.
    """

    pairs = 0

    def __init__(self, text: str):
        super().__init__(text)
        self.flat: set[int] = set()  # mappings by id() that hold what << brought, which their own keys may repeat

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if id(node) not in self.flat and (twice := repeated(keys)):
            raise yaml.YAMLError(f"the key {twice} is given twice, line {node.start_mark.line + 1} and after it")
        self.flat.add(id(node))
        super().flatten_mapping(node)
        self.pairs += len(node.value)
        if self.pairs > LONGEST:
            raise yaml.YAMLError("<< brings too much")

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return a number, or as Ambiguous what YAML 1.1 reads in base 8 or 60."""
        if ":" in node.value or re.fullmatch(r"[-+]?0[\d_]+", node.value):
            return Ambiguous(node.value)
        is_int = node.tag.endswith("int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


class Ambiguous(str):
    """Holds the text of a number that means another one to YAML 1.1 than to its reader: 010 is 8, 1:30 is 90."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text: str, loader: type = _Loader) -> Any:
    """Parse a YAML text, data alone; yaml.YAMLError if it is not YAML, is too long, or nested too deeply."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text)} characters, {LONGEST} at most")
    try:
        tree = yaml.load(text, loader)
        _check_size(tree)
        if "\\" in text:  # half characters
            json.dumps(tree, ensure_ascii=False, default=str, skipkeys=True).encode()
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML passes on whatever int(), datetime() and deep nesting raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    return tree


def decode(data: bytes) -> str:
    """Decode UTF-8 text, less the mark at its beginning; ValueError that names the first line that is something else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is {NOT_UTF8}") from None


def repeated(names: Iterable[str]) -> str:
    """Return the first name that is there more than once, "" if none is."""
    return next((name for name, count in Counter(names).items() if name and count > 1), "")


def parse_json(text: str | bytes, most: float = MOST, **hooks: Any) -> Any:
    """Parse a JSON text; ValueError if it is not JSON, nested too deeply, or has half characters, which cannot be written.

    hooks: those of json.loads.
    """
    text = text if isinstance(text, str) else decode(text)
    try:
        tree = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    _check_size(tree, most)
    try:
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its text or path is not valid Unicode") from None
    return tree


class _Size(NamedTuple):
    """Counts what a list or mapping holds, itself included."""

    values: int
    levels: int


def _check_size(tree: Any, most: float = MOST) -> None:
    """Raise ValueError for a tree of more than `most` values or DEEPEST levels; what YAML's aliases share counts each time."""
    _measure([tree], 0, {}, most)


def _measure(tree: dict | list, depth: int, measured: dict[int, _Size], most: float) -> _Size:
    """Measure a list or mapping that lies `depth` levels deep; `measured` remembers the sizes of all by id()."""
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    values = levels = 1
    for item in tree.values() if isinstance(tree, dict) else tree:
        if not isinstance(item, dict | list):
            values += 1
            continue
        inner = measured.get(id(item)) or _measure(item, depth + 1, measured, most)
        values += inner.values
        levels = max(levels, inner.levels + 1)
    if depth + levels > DEEPEST + 1 or values > most:
        raise ValueError(f"{values} values in {depth + levels} levels: {most} in {DEEPEST} at most")
    measured[id(tree)] = _Size(values, levels)
    return measured[id(tree)]


def read_tree(path: Path, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
    """Read the names and values in a file that the program wrote; UserError if it cannot be read."""
    try:
        tree = parse(decode(path.read_bytes()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = "valid YAML" if isinstance(error, yaml.YAMLError) else "readable"
        raise UserError(f"{path}: not {kind} ({error}); correct it or write it again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected names with values, found {type(tree).__name__}; write it again")
    return tree


def _override(cls: type, word: str) -> dict[str, Any]:
    """Turn KEY=VALUE of the command line into a nested dictionary."""
    key, sign, text = word.partition("=")
    if not sign:
        raise UserError(f"command line: {word!r} is neither a .yaml file nor KEY=VALUE")
    if len(text) > LONGEST or HALF.search(word):
        raise UserError(f"command line: {word}: not valid Unicode, or more than {LONGEST} characters")
    try:
        return _nested(key, _parse_word(text, _type_of(cls, key)))
    except yaml.YAMLError:
        raise UserError(f"command line: {word}: the value is not valid YAML") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Turn a dotted key and its value into nested dictionaries."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _type_of(cls: Any, key: str) -> Any:
    """Return the type of the setting with a dotted key; None if there is no such setting."""
    for part in key.split("."):
        cls = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
    return cls


def _parse_word(text: str, kind: Any) -> Any:
    """Parse the value of a command line: text as it stands, in quotes without them, by itself or in [...] or {...}; else YAML."""
    several = kind == list[str] or typing.get_origin(kind) is dict
    if QUOTED.fullmatch(text) or not (kind is str or several):
        return parse_yaml(text)
    if kind is str or text.lstrip()[:1] not in ("", "[", "{"):
        return text
    tree = parse_yaml(text, yaml.BaseLoader)  # which makes text of everything
    if not isinstance(tree, dict):
        return tree
    return {name: parse_yaml(value) if isinstance(value, str) else value for name, value in tree.items()}


def _merge(config: Any, tree: dict[str, Any], where: str, prefix: str) -> None:
    hints = typing.get_type_hints(type(config))
    known = {item.name: item for item in dataclasses.fields(config)}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key)[:100], hints, n=1, cutoff=0) or sorted(hints)[:1]
            raise UserError(f"{where}: unknown key {prefix}{key}; the nearest is {prefix}{near[0]} (see --help)")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix}{key} holds settings, not {_shown.repr(value)}")
            _merge(getattr(config, key), value, where, f"{prefix}{key}.")
        else:
            value, low = _coerce(value, hints[key], where, prefix + key), known[key].metadata["low"]
            if low is not None and not value >= low:
                raise UserError(f"{where}: {prefix}{key} must be at least {low}, not {value}")
            setattr(config, key, value)


def _coerce(value: Any, kind: Any, where: str, key: str) -> Any:
    """Convert a value to the field's type, or raise UserError; `1e-4` is a string to YAML and a number to everybody else."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and isinstance(value, bool):  # YAML 1.1 reads on, off, yes and no so
        value = next((word for word in (("yes", "on") if value else ("no", "off")) if word in args), value)
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if not math.isnan(number := float(value)):
                return number
        except (ValueError, OverflowError):
            pass
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind is str and not isinstance(value, list | dict):
        raise UserError(
            f"{where}: {key} is text, and YAML reads {_shown.repr(value)} ({type(value).__name__}): put it in quotes"
        )
    if origin is list and not isinstance(value, dict | types.NoneType):
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, args[0], where, key) for item in items]
    if origin is dict and value is not None:
        names = [_coerce(name, str, where, key) for name in (value if isinstance(value, dict | list) else [value])]
        shares = value.values() if isinstance(value, dict) else [1.0] * len(names)
        pairs = zip(names, shares, strict=True)
        return {name: _coerce(share, args[1], where, f"{key}.{name}") for name, share in pairs}
    raise UserError(f"{where}: {key} must be {_type_name(kind)}, not {_shown.repr(value)}")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is Union:
        return " or ".join(map(_type_name, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
