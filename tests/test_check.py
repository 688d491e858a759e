"""toy/check.py as a command: what it refuses at once, and its exit status."""

import pytest
from tiny import call, error_line

from model.files.errors import CheckpointError
from toy import check


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [("--sheet", "check"), ("--sheet", "check.txt"), ("--sheet", "none/check.png"), ("--prompts", 0), ("--seed", -1)],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(flags, monkeypatch, capsys):
    monkeypatch.setattr(check, "checks", lambda *_: pytest.fail("it ran"))
    assert call(check, monkeypatch, *flags) == 2
    assert flags[0] in error_line(capsys)


@pytest.mark.parametrize("value, status", [(28.0, 0), (27.9, 1)])
def test_the_exit_status_says_whether_every_bar_holds(value, status, monkeypatch):
    rows = [("VAE", value, 28, "dB"), ("ALIGN, only reported", 0.0, None, "%")]
    monkeypatch.setattr(check, "checks", lambda *_: iter(rows))
    assert call(check, monkeypatch, "--sheet", "check.JPG") == status


def test_missing_weights_and_ctrl_c_are_one_line(monkeypatch, capsys):
    def ended(error):
        def checks(*_):
            raise error

        monkeypatch.setattr(check, "checks", checks)
        return call(check, monkeypatch)

    assert ended(CheckpointError("weights/toy/vae is missing")) == 2
    assert error_line(capsys).endswith("weights/toy/vae is missing")
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
