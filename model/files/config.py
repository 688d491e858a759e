"""JSON configurations of public checkpoints, read into dataclasses; the type of every value is checked."""

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
    check_file(path)
    with error_context(f"{path} cannot be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(cls: type[Config], path: Path) -> Config:
    """`config_from` a JSON file. Raises CheckpointError, naming the file."""
    return config_from(cls, read_json(path), path)


def config_from(cls: type[Config], values: dict, source: Path | str | None = None) -> Config:
    """Make a configuration dataclass from the values of a config.json.

    Unknown keys are ignored, null means the default, and an object becomes the dataclass that its field has.
    Raises CheckpointError, naming the file `source`, for a value of another type, or one that the dataclass refuses.
    """
    source = source or cls.__name__
    hints = typing.get_type_hints(cls)
    known = {}
    for field in dataclasses.fields(cls):
        name, value = field.name, values.get(field.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            value = config_from(hints[name], value, source)
        elif not _fits(value, hints[name]):
            raise CheckpointError(f"{source}: {name} is {value!r} and should be {field.type}")
        known[name] = tuple(value) if isinstance(value, list) else value
    with error_context(str(source)):
        return cls(**known)


def _fits(value: object, hint: object) -> bool:
    """Return True if a JSON value has a field's type. An int is also a float; a bool is not a number."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
