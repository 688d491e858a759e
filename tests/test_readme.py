"""README.md: its table of files is that of the project."""

import re
from pathlib import Path

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def lines(path):
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_table_of_files():
    """Every file of the program is in it, with its length, to a twentieth."""
    rows = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE))
    for name, count in rows.items():
        assert abs(int(count) - lines(PROJECT / name)) <= max(3, lines(PROJECT / name) / 20), name
    program = [*PROJECT.glob("*.py"), *PROJECT.glob("model/*.py"), *PROJECT.glob("baselines/*.py")]
    named = {path.relative_to(PROJECT).as_posix() for path in program if path.name != "__init__.py"}
    assert {name for name in rows if not name.endswith("/")} == named
    total = re.search(r"^([\d,]+) lines without", README, re.MULTILINE)[1].replace(",", "")
    assert abs(int(total) - sum(map(lines, program))) <= 100
