"""Settings from defaults, presets, YAML files and the command line, strictly.

Order of precedence, lowest first: config.py's defaults, the preset, the YAML file, `key=value` words of the command line.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from clip4vla.config import OFFICIAL, DataConfig, ImportConfig, RunConfig, UserError

Config = TypeVar("Config", RunConfig, DataConfig, ImportConfig)


def load(cls: type[Config], path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """The settings of a YAML file with `a.b=value` overrides; raises UserError that names file, key and nearest key."""
    layers = [(str(path), _read_yaml(path))] if path else []
    layers += [(f"command line: {word}", _override(word)) for word in overrides]
    config = cls()
    preset = next((tree["preset"] for _, tree in reversed(layers) if "preset" in tree), config.preset)
    if preset == "official":
        keys = {name for name, _, _ in describe(cls)}
        layers = [("preset official", _override(k, v)) for k, v in OFFICIAL.items() if k in keys] + layers
    for where, tree in layers:
        _merge(config, tree, where, "")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary, fit for YAML."""
    return dataclasses.asdict(config)


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, `type = default`, meaning) of every setting."""
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
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this config file ({getattr(error, 'strerror', error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | types.NoneType):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    return tree or {}


def _override(word: str, value: Any = None) -> dict[str, Any]:
    key, sign, text = word.partition("=")
    if value is None:
        if not sign:
            raise UserError(f"command line: {word!r} is neither a .yaml file nor KEY=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"command line: {word}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(config: Any, tree: dict[str, Any], where: str, prefix: str) -> None:
    hints = typing.get_type_hints(type(config))
    known = {item.name: item for item in dataclasses.fields(config)}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0) or sorted(hints)[:1]
            raise UserError(f"{where}: unknown key {prefix}{key}; the nearest is {prefix}{near[0]} (see --help)")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix}{key} holds settings, not {value!r}")
            _merge(getattr(config, key), value, where, f"{prefix}{key}.")
        else:
            value, low = _coerce(value, hints[key], where, prefix + key), known[key].metadata["low"]
            if low is not None and value < low:
                raise UserError(f"{where}: {prefix}{key} must be at least {low}, not {value}")
            setattr(config, key, value)


def _coerce(value: Any, kind: Any, where: str, key: str) -> Any:
    """The value as the field's type, or a UserError; `1e-4` is a string to YAML and a number to everybody else."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and isinstance(value, bool):  # YAML 1.1 reads on, off, yes and no so
        value = next((word for word in (("yes", "on") if value else ("no", "off")) if word in args), value)
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and value is None:  # KEY= on the command line
        return ""
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if origin is list and isinstance(value, list | str | int | float):
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, args[0], where, key) for item in items]
    names = [value] if isinstance(value, str) else value
    if origin is dict and isinstance(names, dict | list) and all(isinstance(name, str) for name in names):
        shares = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
        return {name: _coerce(share, args[1], where, f"{key}.{name}") for name, share in shares.items()}
    raise UserError(f"{where}: {key} must be {_type_name(kind)}, not {value!r}")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is Union:
        return " or ".join(map(_type_name, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
