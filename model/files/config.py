"""JSON configurations of public checkpoints, read into dataclasses with a check of every value's type."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import TypeVar

from model.files.errors import CheckpointError, error_context

Config = TypeVar("Config")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it is absent, unreadable or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {Path(path).parent} a complete checkpoint folder?") from None
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def config_from(cls: type[Config], values: dict, source: Path | None = None) -> Config:
    """A configuration dataclass from a config.json's object: unknown keys are passed over, null means the default.
    An object in it becomes the configuration that its field is.

    Raises CheckpointError, naming the file `source`, for a value of another type than its field's.
    """
    if source:
        try:
            return config_from(cls, values)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    known = {name: value for name, value in values.items() if name in fields and value is not None}
    for name, value in known.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            known[name] = config_from(hints[name], value)
        elif not _fits(value, hints[name]):
            raise CheckpointError(f"{cls.__name__}: {name} is {value!r} and should be {fields[name].type}")
    with error_context(f"{cls.__name__} has values that do not go together"):
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _fits(value: object, hint: object) -> bool:
    """Is a JSON value of a dataclass field's type? Whole numbers are floats too; true and false are no numbers."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if isinstance(value, bool) and hint is not bool:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def one_size(name: str, value: int | dict, *keys: str) -> int:
    """A size in preprocessor_config.json: a number, alone or under just these keys. Else raises CheckpointError."""
    if isinstance(value, int):
        return value
    size = value.get(keys[0])
    if not isinstance(size, int) or value != dict.fromkeys(keys, size):
        raise CheckpointError(f"{name} {value} should be one number, or hold it as {' and '.join(keys)}")
    return size


def check_heads(width: int, heads: int) -> None:
    """Raise CheckpointError if attention of this width does not divide into so many heads."""
    if heads < 1 or width % heads:
        raise CheckpointError(f"hidden_size {width} does not divide into {heads} heads")


def refuse(values: dict, fixed: dict, path: Path) -> None:
    """Raise CheckpointError if a config.json sets what our network has `fixed` to another value.

    Keys that are absent or null are fine; of a list, every entry must be the fixed value.
    """
    for name, only in fixed.items():
        value = values.get(name)
        each = value if isinstance(value, list) else [value]
        if any(entry is not None and entry != only for entry in each):
            raise CheckpointError(f"{path}: {name} = {value!r} is not supported, only {only!r}")
