"""Reads a run's TOML file with --set overrides into train.config.Config, and writes the resolved configuration back."""

import difflib
import json
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.config import Config

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TABLES = get_type_hints(Config)
_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read path, apply overrides ("table.key=value", the value in TOML) and check every key.

    Raises FileNotFoundError for a missing file and ValueError, naming file and key, for everything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} is not a file; examples are in train/configs")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    for override in overrides:
        apply_override(tables, override)
    try:
        return parse_config(tables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Put one "table.key=value" into tables. A value that is not TOML is taken as a string: --set train.dtype=fp32."""
    name, equals, text = override.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"--set must look like table.key=value, got {override!r}; for example --set optim.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise ValueError(f"--set {override!r}: {part} must be a table, got {tables!r}")
    tables[parts[-1]] = value


def parse_config(tables: dict[str, Any]) -> Config:
    """Build the Config from nested dictionaries; ValueError naming the key on any mistake."""
    for name, value in tables.items():
        if name not in TABLES:
            raise ValueError(f"[{name}] is not a table of the configuration{_suggest(name, list(TABLES))}")
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a table, got {value!r}; write [{name}] on a line of its own")
    return Config(**{name: _parse_table(name, kind, tables.get(name, {})) for name, kind in TABLES.items()})


def _parse_table(name: str, kind: type, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            homes = [f"{table}.{key}" for table, other in TABLES.items() if key in get_type_hints(other)]
            known = [f"{name}.{other}" for other in hints]
            hint = f"; did you mean {homes[0]}?" if homes else _suggest(f"{name}.{key}", known)
            raise ValueError(f"{name}.{key} is not a key of the configuration{hint}")
    for item in fields(kind):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{name}.{item.name} is missing; it has no default")
    return kind(**{key: _convert(f"{name}.{key}", hints[key], value) for key, value in values.items()})


def _suggest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"


def _convert(key: str, hint: Any, value: Any) -> Any:
    """Check value against a field's type; whole floats (1e9) count as integers, a lone string as a list of one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:  # int | None: TOML has no null, so a given value is the int
        return _convert(key, arguments[0], value)
    if origin is Literal:
        if str(value) not in arguments:  # str: --set model.version=5.2 is a number in TOML
            legal = " or ".join(f'"{item}"' for item in arguments)
            raise ValueError(f"{key} must be {legal}, got {value!r}")
        return str(value)
    if origin is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            kind = "strings" if arguments[0] is str else "numbers"
            raise ValueError(f"{key} must be a list of {kind}, got {value!r}")
        return [_convert(key, arguments[0], item) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a table of numbers such as {{ unigram = 6.9 }}, got {value!r}")
        return {name: _convert(f"{key}.{name}", arguments[1], item) for name, item in value.items()}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and math.isfinite(value)
    if hint is int and number and int(value) == value:
        return int(value)
    if hint is float and number:
        return float(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError(f"{key} must be {_KINDS[hint]}, got {value!r}")


def dump_config(config: Config) -> str:
    """Return the resolved configuration as TOML that load_config reads back to an equal Config."""
    lines = []
    for name in TABLES:
        lines.append(f"[{name}]")
        table = getattr(config, name)
        for item in fields(table):
            value = getattr(table, item.name)
            if value is not None:
                lines.append(f"{item.name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's but for DEL
    return repr(value)
