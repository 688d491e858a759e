"""settings.py: numbers as texts, and the flags of a dataclass. test_train.py has where a value is from."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import settings
from support.settings import add_settings, checked, count, ours, paper, positive, resolve


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (count, {"1": 1, "400": 400, " 7 ": 7}, ["0", "-3", "1.5", "1e3", "", "x", "nan", str(2**31), "9" * 5000]),
        (settings.seed_number, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "0.5", ""]),
        (positive, {"1e-4": 1e-4, "7.5": 7.5, "3": 3.0}, ["0", "-1", "nan", "inf", "-inf", "", "fast"]),
        (settings.at_least_0, {"0": 0, "2.5": 2.5}, ["-1", "nan", "inf", "", "x"]),
        (settings.fraction, {"0": 0, "0.3": 0.3, "1": 1}, ["-0.1", "1.5", "nan", "inf", "", "x"]),
    ],
)
def test_numbers(check, good, bad):
    for text, value in good.items():
        assert check(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="should be a"):
            check(text)


@pytest.mark.parametrize("value", ["fast", -1, 0, True, None, [], math.nan, math.inf])
def test_a_value_that_cannot_be_names_the_file(value):
    for check in (count, positive, ("one", "two")):
        with pytest.raises(ValueError, match=r"rpo\.json is wrong about lr: .* should be"):
            checked(check, {"lr": value}, "lr", Path("rpo.json"))
    assert checked(positive, {"lr": "2.5"}, "lr", "f") == 2.5  # a header holds texts


@dataclass(frozen=True)
class Some:
    lr: float = paper(5e-6, positive, "learning rate")
    patience: int | None = ours(None, count, "validations (default: never)")
    keep_last: bool = ours(False, None, "keep the last")


def test_flags_of_a_dataclass():
    """A switch is set by its flag alone, not by the base."""
    parser = argparse.ArgumentParser()
    add_settings(parser, Some)
    text = " ".join(parser.format_help().split())
    assert "rate (default: 5e-06, the paper)" in text and "validations (default: never)" in text
    args = argparse.Namespace(**vars(parser.parse_args([])), lora_rank=None)
    assert resolve(Some, args, {"lr": 1, "keep_last": True, "unknown": 1}, "rpo.json") == Some(lr=1.0)
