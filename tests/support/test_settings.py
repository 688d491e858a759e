"""settings.py: numbers as texts. test_train.py has the flags of a dataclass, and where a value is from."""

import argparse
import math
from pathlib import Path

import pytest

from support import settings
from support.settings import checked, count, positive


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
