"""cli.py: argument types, settings, the device, files written whole."""

import argparse
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from model.files.write import write_atomic
from support import flags

# ---------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            flags.count,
            {"1": 1, "400": 400, " 7 ": 7},
            ["0", "-3", "1.5", "1e3", "", "x", "nan", str(2**31), "9" * 5000],
        ),
        (flags.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "0.5", ""]),
        (flags.positive, {"1e-4": 1e-4, "7.5": 7.5, "3": 3.0}, ["0", "-1", "nan", "inf", "-inf", "", "fast"]),
        (flags.fraction, {"0": 0, "0.3": 0.3, "1": 1}, ["-0.1", "1.5", "nan", "inf", "", "x"]),
    ],
)
def test_numbers(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="should be a"):
            kind(text)


def test_an_empty_path_is_no_path():
    assert flags.path("a/b") == Path("a/b") and flags.path(".") == Path(".")
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        flags.path("")
    with pytest.raises(argparse.ArgumentTypeError, match="not UTF-8"):  # no header, PNG or JSON can name it
        flags.path(os.fsdecode(b"caf\xe9"))


def test_text_is_utf_8():
    assert flags.text("a café in the snow, 犬") == "a café in the snow, 犬"
    with pytest.raises(argparse.ArgumentTypeError, match="not UTF-8"):
        flags.text(os.fsdecode(b"caf\xe9"))  # as a terminal in Latin-1 gives it


def test_parser_has_one_line_for_an_error_and_no_abbreviations(capsys):
    parser = flags.Parser(description="a\nb")
    parser.add_argument("--steps", type=flags.count)
    for arguments in (["--steps", "many"], ["--step", "3"], ["--other"], ["more"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "--help" in error
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0 and "a\nb" in capsys.readouterr().out  # the text is left as it is


def test_fail_is_one_line(capsys):
    assert flags.fail(ValueError("one\n  two")) == 2
    assert capsys.readouterr().err.endswith("error: one two\n")


def test_number():
    settings = {"lr": 1e-4, "batch": 2, "guidance": 3, "text": "2.5"}
    assert flags.number(settings, "lr", 5e-6, "f") == 1e-4
    assert flags.number(settings, "steps", 20, "f") == 20
    assert flags.number(settings, "text", 1.0, "f") == 2.5  # a header holds texts
    assert isinstance(flags.number(settings, "batch", 1, "f"), int)
    assert isinstance(flags.number(settings, "guidance", 7.5, "f"), float)
    for value in ("fast", -1, 0, True, None, [], math.nan, math.inf):
        for default in (1, 1.0):
            with pytest.raises(ValueError, match=r"rpo\.json.*lr"):
                flags.number({"lr": value}, "lr", default, "rpo.json")
    with pytest.raises(ValueError, match="whole"):
        flags.number({"batch": 1.5}, "batch", 1, "rpo.json")


def test_base_names(tmp_path, monkeypatch):
    assert flags.base_name(flags.EMBEDDED_BASE) == "weights/toy"
    monkeypatch.chdir(flags.EMBEDDED_BASE.parent)
    assert flags.base_name(Path("toy")) == "weights/toy"
    assert flags.base_folder("weights/toy") == flags.EMBEDDED_BASE
    assert flags.base_folder(flags.base_name(tmp_path)) == tmp_path


def test_a_link_to_a_base_stays_a_link(tmp_path, monkeypatch):
    """Its tokenizer/ lies beside the link, not beside the file in some shared store."""
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    assert flags.base_name(Path("link.safetensors")) == str(tmp_path / "link.safetensors")


def test_the_prediction_type_is_the_unets(tmp_path):
    """A whole U-Net brings its own to any base; a LoRA stands on the base's."""
    header = {"base": str(tmp_path), "prediction_type": "v_prediction"}
    lora = header | {"lora_rank": "4"}
    for base, read, told in [
        (None, header, "v_prediction"),
        (None, lora, "v_prediction"),
        (tmp_path, header, "v_prediction"),
        (tmp_path, lora, None),
        (tmp_path, {}, None),
    ]:
        for flag in (None, "epsilon"):
            args = argparse.Namespace(base=base, variant=None, prediction_type=flag)
            ckpt = tmp_path / "best.safetensors" if read else None
            assert flags.base_of(args, ckpt, read) == (tmp_path, None, flag or told)


def test_device():
    assert flags.device("cpu") == torch.device("cpu")
    assert flags.device(None).type in ("cpu", "cuda", "mps")
    for name in ("abacus", "meta", "cuda:99", "cpu:x", "", "xla", "vulkan", "privateuseone"):
        with pytest.raises(ValueError, match="--device"):
            flags.device(name)


def test_an_output_that_has_no_lambda_is_no_reason_to_end(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, Path(flags.__file__).with_name("train.py"), "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0 and b"? of the validation" in result.stdout
    assert b"Traceback" not in result.stderr


def test_a_log_grows_line_by_line(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO()))  # as of a pipe or a file
    flags.Parser()
    print("step 40")
    assert sys.stdout.buffer.getvalue() == b"step 40\n"


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("out of memory")])
def test_a_full_memory_is_told_with_what_may_help(capsys, error):
    def work():
        raise error

    assert flags.guarded(work, lambda: "use less", "interrupted") == 2
    line = capsys.readouterr().err
    assert line.endswith("the memory is full: use less\n") and line.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("hidden", [False, True], ids=["seen", "hidden"])
def test_a_signal_to_end_is_as_ctrl_c(monkeypatch, capsys, name, hidden):
    """So that what is half written is removed; nohup's choice, to ignore it, stands."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN if hidden else signal.SIG_DFL)
    try:
        status = flags.guarded(lambda: os.kill(os.getpid(), number) or time.sleep(0.01) or 0, str, "interrupted")
    finally:
        signal.signal(number, before)
    assert (status, capsys.readouterr().err.strip()) == ((0, "") if hidden else (130, "interrupted"))


def test_device_makes_its_gpu_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    assert [flags.device(name) for name in ("cuda:1", "cuda", "cpu")] == [*map(torch.device, ("cuda:1", "cuda", "cpu"))]
    assert chosen == [torch.device("cuda:1")]


# ---------------------------------------------------------------------------------------------- files


def test_check_writable_leaves_nothing(tmp_path):
    for path in (tmp_path / "a.png", tmp_path / "new" / "deep" / "a.png"):
        flags.check_writable(path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.png").write_text("old", encoding="utf-8")
    flags.check_writable(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text(encoding="utf-8") == "old"


def test_check_writable_ends_where_the_drive_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = iter([False] * 9)  # as of Z: on Windows, whose parent is Z:; at last StopIteration
    monkeypatch.setattr(os.path, "lexists", lambda path: next(asked))
    flags.check_writable(Path("a") / "b.png")


def test_check_writable_refuses(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "not" / "mounted")
    nowhere = (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b", tmp_path / ("x" * 300), tmp_path / "link" / "a")
    for path in (tmp_path, *nowhere):
        with pytest.raises(ValueError, match=r"folder|cannot be written"):
            flags.check_writable(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 2**20))
    flags.check_writable(tmp_path / "a", 2**20)
    with pytest.raises(ValueError, match="GiB"):
        flags.check_writable(tmp_path / "a", 2**20 + 1)


def test_write_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, lambda beside: beside.write_text("one", encoding="utf-8"))
    write_atomic(path, lambda beside: beside.write_text("two", encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == "two" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        *[(error, ValueError) for error in (OSError(28, "full"), RuntimeError("full"), SafetensorError("full"))],
        *[(error, type(error)) for error in (KeyboardInterrupt(), TypeError("a mistake"))],
    ],
)
def test_write_whole_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch, raised, seen):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def half(beside):
        beside.write_text("ha", encoding="utf-8")
        raise raised

    def refuse(*args):
        raise raised

    with pytest.raises(seen):
        write_atomic(path, half)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(seen):
        write_atomic(path, lambda beside: beside.write_text("new", encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]
