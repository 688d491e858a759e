"""JSON files into dataclasses: what is missing, unreadable or of a wrong type is named in one line."""

import re
from dataclasses import dataclass

import pytest

from model.files.config import config_from, read_json
from model.files.errors import CheckpointError


@dataclass(frozen=True)
class Config:
    width: int = 4
    layers: tuple[int, ...] = (1, 2)
    eps: float = 1e-5
    heads: int | tuple[int, ...] = 2
    act: str = "silu"
    linear: bool = False

    def __post_init__(self):
        self.width % (self.heads if isinstance(self.heads, int) else self.heads[0])


@dataclass(frozen=True)
class Tower:
    config: Config = Config()


def refused(*parts):
    return pytest.raises(CheckpointError, match=".*".join(re.escape(str(part)) for part in parts))


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert read_json(path) == {"é": [1]}
    for text in (b"", b"{", b"\xff", b"{'a': 1}"):
        path.write_bytes(text)
        with refused(path, "cannot be read as JSON"):
            read_json(path)
    for text, kind in (("[]", "list"), ("null", "NoneType"), ("3", "int")):
        path.write_text(text)
        with refused(path, kind):
            read_json(path)
    path.unlink()
    with refused(path, "is missing"):
        read_json(path)


def test_config_from():
    assert config_from(Config, {}) == Config()
    values = {"width": 8, "layers": [3], "eps": 1, "heads": [1, 2], "act": None, "linear": True, "_class_name": "X"}
    before = dict(values)
    assert config_from(Config, values) == Config(8, (3,), 1, (1, 2), "silu", True)
    assert values == before
    assert config_from(Tower, {"config": {"width": 6}}) == Tower(Config(6))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("width", value) for value in ("8", 8.0, True, [8])],
        *[("layers", 3), ("layers", [1, "2"]), ("heads", {}), ("heads", [1.5])],
        *[("eps", "1e-5"), ("act", 1), ("linear", 0)],
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with refused("Config", name, repr(value), Config.__dataclass_fields__[name].type):
        config_from(Config, {name: value})


def test_the_file_is_named(tmp_path):
    for values in ({"config": {"heads": 0}}, {"config": {"heads": "x"}}):  # the dataclass fails, the type is wrong
        with refused("FILE: "):
            config_from(Tower, values, "FILE")
