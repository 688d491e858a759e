"""`python -m baselines NAME ...`: train with baselines/NAME.py instead of RPO. `python -m baselines NAME --help`."""

from __future__ import annotations

from support import ranks  # first: Ctrl-C during the other imports is one line

# isort: split
import importlib
import pkgutil
import sys
from pathlib import Path

import train


def main() -> int:
    names = sorted(each.name for each in pkgutil.iter_modules([str(Path(__file__).parent)]) if each.name != "__main__")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in names:
        asked = name in ("-h", "--help")
        stream = sys.stdout if asked else sys.stderr
        print(f"usage: python -m baselines {{{','.join(names)}}} --subject FOLDER ...", file=stream)
        return 0 if asked else 2
    module = importlib.import_module(f"baselines.{name}")
    sys.argv = [f"python -m baselines {name}", *sys.argv[2:]]
    return train.main(module.METHOD, module.__doc__)


if __name__ == "__main__":
    sys.exit(ranks.distributed(main))
