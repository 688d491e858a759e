"""Settings: declared once, as the fields of a frozen dataclass, with default, check, help text and source.

    lr: float = paper(5e-6, positive, "learning rate of AdamW")

Each field becomes a flag (`--lr`). A flag wins; then the base model's recommendation, its file rpo.json; then the
default. `resolve` is the one place where this is decided, and prints each value with its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

S = TypeVar("S")

LORA_LR = 1e-4  # the default of --lr with --lora-rank: usual for LoRA


# ------------------------------------------------------------------------------------------------ checks of a value


def count(text: str) -> int:
    """A whole number of at least 1, and below 2^31, the largest that the libraries take."""
    return _number(text, int, lambda value: 1 <= value < 2**31, "a whole number of at least 1, below 2^31")


def seed_number(text: str) -> int:
    """A whole number in 0 .. 2^63 - 1; 0 is a seed like any other."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def guidance_scale(text: str) -> float:
    """A classifier-free guidance in (0, 100]. Usual are 1 to 15; far larger ones make pixels that are not finite."""
    return _number(text, float, lambda value: 0 < value <= 100, "a number above 0, at most 100")


def at_least_0(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, kind: type, is_good: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_good(value):
        raise argparse.ArgumentTypeError(f"{text!r} should be {expected}")
    return value


# ------------------------------------------------------------------------------------------------------ declaration


def paper(default: Any, check: Callable[[str], Any] | Sequence[str], help: str) -> Any:
    """A dataclass field whose default is the paper's value. check: parses a flag's text, or the possible words."""
    return _setting(default, check, help, "the paper")


def ours(default: Any, check: Callable[[str], Any] | Sequence[str] | None, help: str) -> Any:
    """A dataclass field whose default is this project's choice. check: as in `paper`; None for a switch."""
    return _setting(default, check, help, "our default")


def _setting(default: Any, check: Any, help: str, source: str) -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "help": help, "source": source})


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag for each field of the dataclass; an absent flag is None."""
    add = parser.add_argument_group("settings (a flag wins, then what the base recommends, then the default)")
    for field in dataclasses.fields(settings):
        flag, check = "--" + field.name.replace("_", "-"), field.metadata["check"]
        if check is None:
            add.add_argument(flag, action="store_true", default=None, help=field.metadata["help"])
            continue
        default = (
            f" (default: {_shown(field.default)}, {field.metadata['source']})" if field.default is not None else ""
        )
        kind = {"type": check} if callable(check) else {"choices": tuple(check)}
        add.add_argument(flag, **kind, help=field.metadata["help"] + default)


# ------------------------------------------------------------------------------------------------------- resolution


def resolve(settings: type[S], args: argparse.Namespace, recommended: dict, source: object) -> S:
    """The settings of a run: flags, else what the base recommends, else the defaults. Prints each with its source.

    recommended: the content of the base's rpo.json, which the file `source` holds. With LoRA the recommended learning
    rate is its "lora_lr". Raises ValueError, naming the file, for a recommended value that cannot be used.
    """
    values = {}
    for field in dataclasses.fields(settings):
        key, value, origin = field.name, field.default, field.metadata["source"]
        if key == "lr" and args.lora_rank:
            key, value, origin = "lora_lr", LORA_LR, "usual for LoRA"
        if (given := getattr(args, field.name)) is not None:
            value, origin = given, "command line"
        elif key in recommended:
            value, origin = checked(field.metadata["check"], recommended, key, source), "this base's recommendation"
        values[field.name] = value
        if value is not None and value is not False:
            print(f"  {field.name:18} {_shown(value):<12} {origin}")
    return settings(**values)


def checked(check: Callable[[str], Any] | Sequence[str], values: dict, name: str, source: object) -> Any:
    """The value called `name`, as a flag would check it. Raises ValueError, naming the file `source`."""
    text = str(values[name])
    try:
        if not callable(check) and text not in check:
            raise argparse.ArgumentTypeError(f"{text!r} should be one of {', '.join(check)}")
        return check(text) if callable(check) else text
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{source} is wrong about {name}: {error}") from None


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
