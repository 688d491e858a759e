"""The layout of the program: what may import what, how long a file and a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = "model/files < model < rpo reward subject < support < train sample evaluate < baselines < toy benchmarks"
LEVEL = {room: level for level, rooms in enumerate(ORDER.split(" < ")) for room in rooms.split()}
TOP = ["evaluate.py", "reward.py", "rpo.py", "sample.py", "subject.py", "train.py"]
FOUND = [path for folder in ("model", "support", "baselines") for path in (ROOT / folder).rglob("*.py")]
FILES = [*TOP, *(str(path.relative_to(ROOT)) for path in FOUND)]


def room(module):
    """The room of "model.files.tensors" is "model/files"."""
    return "model/files" if module.startswith("model.files") else module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards_and_nothing_is_long(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    nodes, own = [*ast.walk(ast.parse(text))], room(name.removesuffix(".py").replace("/", "."))
    used = {room(alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            used |= {room(f"{node.module}.{alias.name}") for alias in node.names}
    same = {own} if "/" in name else set()
    assert all(LEVEL[other] < LEVEL[own] for other in used & LEVEL.keys() - same)
    assert not used & {"diffusers", "transformers", "peft"}
    assert own != "support" or not used & {"rpo", "reward"}
    assert own != "rpo" or used == {"__future__", "typing", "torch"}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(text.splitlines()) <= 350 and all(node.end_lineno - node.lineno < 40 for node in functions)


def test_only_these_files_are_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(TOP)
