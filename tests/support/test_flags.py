"""flags.py: the parser, one line for an error, signals, the device."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support import flags


def test_paths_and_texts():
    assert flags.path("a/b") == Path("a/b") and flags.text("a café in the snow, 犬") == "a café in the snow, 犬"
    assert flags.path("~/pics") == Path.home() / "pics"  # as in --out=~/pics
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        flags.path("")
    for kind in (flags.path, flags.text):
        with pytest.raises(argparse.ArgumentTypeError, match="not UTF-8"):
            kind(os.fsdecode(b"caf\xe9"))  # as a terminal in Latin-1 gives it


def test_an_output_without_a_lambda_gets_a_question_mark():
    command, environment = [sys.executable, train.__file__, "--help"], os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0 and b"? of the validation" in result.stdout and result.stderr == b""


@pytest.mark.parametrize("command", ["train.py", "sample.py", "evaluate.py", "-m baselines"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, command):
    """A module in torch's place says when the imports are there, and waits. A background job would ignore SIGINT."""
    torch = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nprint(flush=True)\n"
    (tmp_path / "torch.py").write_text(torch + "time.sleep(60)\n", encoding="utf-8")
    environment, pipe = os.environ | {"PYTHONPATH": str(tmp_path)}, subprocess.PIPE
    line, folder = [sys.executable, *command.split()], Path(train.__file__).parent
    with subprocess.Popen(line, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "\ninterrupted\n" and process.returncode == 130


def raising(error):
    def work():
        raise error

    return work


FULL = "the memory is full: use less"
ERRORS = [(ValueError("one\n  two"), "one two"), (OSError("no disk"), "no disk"), (FloatingPointError("nan"), "nan")]
ERRORS += [(MemoryError(), FULL), (OSError(12, "Cannot allocate memory"), FULL), (RuntimeError("out of memory"), FULL)]


def test_what_a_user_can_cause_is_one_line(capsys):
    for error, line in ERRORS:
        assert flags.guarded(raising(error), lambda: "use less") == 2
        assert capsys.readouterr().err.endswith(f"error: {line}\n")
    assert flags.guarded(raising(KeyboardInterrupt("kept step 2")), str) == 130
    assert capsys.readouterr().err == "\nkept step 2\n"
    assert flags.guarded(lambda: None, str) == 0 and flags.guarded(lambda: 1, str) == 1
    for defect in (RuntimeError("shapes"), TypeError("int")):
        with pytest.raises(type(defect)):  # with its traceback
            flags.guarded(raising(defect), str)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_to_end_is_as_ctrl_c(capsys, name, ignored):
    """So that what is half written is removed. What nohup ignores stays ignored."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        status = flags.guarded(lambda: os.kill(os.getpid(), number) or time.sleep(0.01) or 0, str)
    finally:
        signal.signal(number, before)
    assert (status, capsys.readouterr().err.strip()) == ((0, "") if ignored else (130, "interrupted"))


def test_device(monkeypatch):
    assert flags.device("cpu") == flags.device(None) == torch.device("cpu")
    for name in ("abacus", "meta", "cuda:99", "", "xla"):
        with pytest.raises(ValueError, match="--device"):
            flags.device(name)
    chosen = []  # a numbered GPU becomes torch's current one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    for name in ("cuda:1", "cuda", "cpu", None):
        assert flags.device(name) == torch.device(name or "cuda")
    assert chosen == [torch.device("cuda:1")]
