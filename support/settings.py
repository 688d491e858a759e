"""Settings: declared once, as the fields of a frozen dataclass, with default, check, help text and source.

    lr: float = paper(5e-6, positive, "learning rate of AdamW")

Each field becomes a flag (`--lr`). A flag wins, then the recommendation of the base model (its file rpo.json), then the
default. Only `resolve` decides this; it prints each value with its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

S = TypeVar("S")
Check = Callable[[str], Any] | Sequence[str]  # parses a text, or names the possible words

LORA_LR = 1e-4  # the default of --lr with --lora-rank: usual for LoRA


def check_of(kind: type, is_good: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A function that parses a text. It raises ArgumentTypeError if the value is not good, with what is expected."""

    def check(text: str) -> Any:
        with suppress(ValueError):
            if is_good(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} should be {expected}")

    return check


count = check_of(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1, below 2^31")  # the libraries' largest
seed_number = check_of(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive = check_of(float, lambda x: 0 < x < math.inf, "a number above 0")
# Usual are 1 to 15; far larger ones make pixels that are not finite.
guidance_scale = check_of(float, lambda x: 0 < x <= 100, "a number above 0, at most 100")
at_least_0 = check_of(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = check_of(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def paper(default: Any, check: Check, help: str, source: str = "the paper") -> Any:
    """A dataclass field whose default is the paper's value. The check is also applied to the base's recommendation."""
    return dataclasses.field(default=default, metadata={"check": check, "help": help, "source": source})


def release(default: Any, check: Check, help: str) -> Any:
    """A dataclass field whose default is the released code's value; we know of none in the paper."""
    return paper(default, check, help, source="the release")


def ours(default: Any, check: Check | None, help: str) -> Any:
    """A dataclass field whose default is this project's choice. check: None for a switch, which only its flag sets."""
    return paper(default, check, help, source="our default")


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag for each field of the dataclass; an absent flag is None."""
    group = parser.add_argument_group("settings (a flag wins, then what the base recommends, then the default)")
    for field in dataclasses.fields(settings):
        flag, check, text = "--" + field.name.replace("_", "-"), field.metadata["check"], field.metadata["help"]
        if check is None:
            group.add_argument(flag, action="store_true", default=None, help=text)
            continue
        if field.default is not None:
            text += f" (default: {_shown(field.default)}, {field.metadata['source']})"
        kind = {"type": check} if callable(check) else {"choices": check}
        group.add_argument(flag, **kind, help=text)


def resolve(settings: type[S], args: argparse.Namespace, recommended: dict, source: object) -> S:
    """The settings of a run: flags, else what the base recommends, else the defaults. Prints each with its source.

    recommended: the content of the base's rpo.json, whose path is `source`; with LoRA its "lora_lr" is the learning
    rate. Raises ValueError, naming the file, for a recommended value that cannot be used.
    """
    values = {}
    for field in dataclasses.fields(settings):
        lora_lr = field.name == "lr" and args.lora_rank  # the only setting whose default depends on another flag
        key, check = "lora_lr" if lora_lr else field.name, field.metadata["check"]
        value, origin = (LORA_LR, "usual for LoRA") if lora_lr else (field.default, field.metadata["source"])
        if (given := getattr(args, field.name)) is not None:
            value, origin = given, "command line"
        elif key in recommended and check is not None:
            value, origin = checked(check, recommended, key, source), "this base's recommendation"
        values[field.name] = value
        if value is not None and value is not False:
            print(f"  {field.name:18} {_shown(value):<12} {origin}")
    return settings(**values)


def checked(check: Check, values: dict, name: str, source: object) -> Any:
    """The value called `name`, checked as its flag is. Raises ValueError, naming the file `source`."""
    if not callable(check):
        check = check_of(str, check.__contains__, f"one of {', '.join(check)}")
    try:
        return check(str(values[name]))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{source} is wrong about {name}: {error}") from None


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
