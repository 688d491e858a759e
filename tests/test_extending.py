"""docs/extending.md: its code runs as it stands on the page."""

import re
from pathlib import Path

import pytest
from tiny import call
from trainings import history, train_tiny

import baselines.__main__
import evaluate

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# baselines/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_baseline_is_one_file(name, world, tmp_path, monkeypatch):
    """As `python -m baselines NAME`, in another folder than baselines/."""
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.py").write_text(BLOCKS[name], encoding="utf-8")
    monkeypatch.setattr(baselines.__main__, "__file__", str(tmp_path / "__main__.py"))
    monkeypatch.setattr(baselines, "__path__", [str(tmp_path)])
    assert train_tiny(world, monkeypatch, "--steps", 2, baseline=name) == 0
    assert Path(f"{name}.safetensors").is_file() and len(history(tmp_path, f"{name}.jsonl")) == 4


def test_the_metric_runs(measured, world, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n# saturation\.py\n(.*?)```", PAGE, re.DOTALL)[1]
    for name in ("Metrics", "TITLES"):
        monkeypatch.setattr(evaluate, name, getattr(evaluate, name))  # undone at the end
    exec(compile(code, "<saturation>", "exec"), {"__name__": "saturation"})
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, monkeypatch, "--subject", world / "dog", "--base", measured, "--n", 1, "--steps", 1) == 0
    assert re.search(r"^Saturation +0\.\d+ +0\.\d+ *$", capsys.readouterr().out, re.MULTILINE)


def test_every_section_has_code():
    assert len(BLOCKS) == 4 and PAGE.count("```python") == 5
