"""JSON configurations of public checkpoints, read into dataclasses; the type of every value is checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import TypeVar

from model.files.errors import CheckpointError, check_file, error_context

Config = TypeVar("Config")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if the file is missing, unreadable or holds something else."""
    check_file(Path(path))
    with error_context(f"{path} cannot be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def config_from(cls: type[Config], values: dict, source: Path | None = None) -> Config:
    """Make a configuration dataclass from the values of a config.json.

    Unknown keys are ignored, null means the default, and an object becomes the dataclass that its field has.
    Raises CheckpointError, naming the file `source`, for a value of another type than its field's, or one that the
    dataclass refuses.
    """
    try:
        return _config_from(cls, values)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # CheckpointError is a ValueError
        raise CheckpointError(f"{source or cls.__name__}: {error}") from error


def _config_from(cls: type[Config], values: dict) -> Config:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    known = {name: value for name, value in values.items() if name in fields and value is not None}
    for name, value in known.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            known[name] = _config_from(hints[name], value)
        elif not _fits(value, hints[name]):
            raise CheckpointError(f"{cls.__name__}: {name} is {value!r} and should be {fields[name].type}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _fits(value: object, hint: object) -> bool:
    """Return True if a JSON value has a field's type. An int is also a float; a bool is not a number."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def one_size(name: str, value: int | dict, *keys: str) -> int:
    """A size of preprocessor_config.json: a number, or the same number under each of `keys`.

    Raises CheckpointError for other keys, or for numbers that differ.
    """
    if isinstance(value, int):
        return value
    size = value.get(keys[0])
    if not isinstance(size, int) or value != dict.fromkeys(keys, size):
        raise CheckpointError(f"{name} {value} should be one number, or hold it as {' and '.join(keys)}")
    return size


def check_heads(width: int, heads: int) -> None:
    """Raise CheckpointError if `width` channels cannot be divided into so many attention heads."""
    if heads < 1 or width % heads:
        raise CheckpointError(f"hidden_size {width} does not divide into {heads} heads")


def refuse(values: dict, fixed: dict, path: Path) -> None:
    """Raise CheckpointError if a config.json sets a value that is `fixed` in our network to another one.

    Keys that are absent or null are accepted; of a list, every entry must be the fixed value.
    """
    for name, only in fixed.items():
        value = values.get(name)
        each = value if isinstance(value, list) else [value]
        if any(entry is not None and entry != only for entry in each):
            raise CheckpointError(f"{path}: {name} = {value!r} is not supported, only {only!r}")
