"""docs/extending.md: its code runs as it stands on the page."""

import re
import sys
import types
from pathlib import Path

import pytest
from tiny import call, write_base, write_metrics, write_photos

import evaluate
import train

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# baselines/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
QUICK = ("--steps", 2, "--validate-every", 2, "--images-per-prompt", 1, "--solver-steps", 1)


@pytest.mark.parametrize("name, code", BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_page_runs(name, code, tmp_path, monkeypatch):
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, f"<{name}>", "exec"), module.__dict__)
    base, subject = write_base(tmp_path / "base"), write_photos(tmp_path / "dog")
    monkeypatch.chdir(tmp_path)
    flags = ("train.py", "--subject", subject, "--base", base, *QUICK)
    monkeypatch.setattr(sys, "argv", [str(flag) for flag in flags])
    assert train.main(module.METHOD) == 0
    assert Path(f"{name}.safetensors").is_file()
    assert len(Path(f"{name}.jsonl").read_text().splitlines()) == 4


def test_the_metric_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n# saturation\.py\n(.*?)```", PAGE, re.DOTALL)[1]
    for name in ("Metrics", "TITLES"):
        monkeypatch.setattr(evaluate, name, getattr(evaluate, name))  # undone at the end
    exec(compile(code, "<saturation>", "exec"), {"__name__": "saturation"})
    base, subject = write_base(tmp_path / "base"), write_photos(tmp_path / "dog")
    write_metrics(base / "metrics", base / "tokenizer")
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, monkeypatch, "--subject", subject, "--base", base, "--n", 1, "--steps", 1) == 0
    assert re.search(r"^Saturation +0\.\d+ +0\.\d+ *$", capsys.readouterr().out, re.MULTILINE)


def test_every_section_has_code():
    assert len(BLOCKS) == 4 and PAGE.count("```python") == 5
