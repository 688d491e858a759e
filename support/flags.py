"""Command lines: the parser, flags that several commands share, the device, one-line errors, broken streams."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from model.files.errors import is_out_of_memory
from model.tokenizer import CLIPTokenizer
from support import ranks

EMBEDDED_BASE = Path(__file__).parent.parent / "weights" / "toy"


class _Lossy(io.FileIO):
    """A raw stream that ignores write errors."""

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:  # a full disk, a pipe whose reader has ended, a terminal that was closed
            return len(data)


def _protect_streams() -> None:
    """Make printing to stdout and stderr raise no error: neither here, nor in libraries, nor when the process ends."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by 2>&-; a file opened later would get its number, and what libraries print
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is not getattr(sys, f"__{name}__"):
            continue
        elif os.name == "nt":  # a console is no file there; of a redirected stream the encoding may lack λ
            stream.reconfigure(errors="replace")
        else:
            raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True))


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and exit status 2."""

    def __init__(self, **options):
        _protect_streams()
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(fail(f"{message} (see {self.prog} --help)"))


def fail(message: object) -> int:
    """Print one line on stderr; return the exit status for bad input.

    The other ranks wait: most errors are the same in all of them, and torchrun ends all ranks when the first ends.
    """
    time.sleep(min(ranks.rank(), 1))
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def guarded(work: Callable[[], int | None], remedy: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Do the work; return its exit status. An error that a user can cause is one line on stderr and status 2.

    remedy: returns what to try when the memory is full. interrupted: printed after Ctrl-C (status 130), unless the
    KeyboardInterrupt has a message. SIGTERM, and SIGHUP unless nohup ignores it, count as Ctrl-C.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Not under torchrun, which sends SIGTERM to the other processes after an error in one.
        if ranks.world_size() == 1 and number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return work() or 0
    except Exception as error:
        if is_out_of_memory(error):
            return fail(f"the memory is full: {remedy()}")
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            return fail(error)
        raise  # a defect of the program: its traceback is needed
    except KeyboardInterrupt as error:
        if ranks.rank() == 0:
            print(f"\n{str(error) or interrupted}", file=sys.stderr)
        return 130


def path(name: str) -> Path:
    """A file or folder, with `~` expanded: in `--out=~/pics` the shell leaves it."""
    if not name:  # usually from an unset variable; it would mean the current folder
        raise argparse.ArgumentTypeError("is empty: give the name of a file or folder, or leave it out")
    return Path(os.path.expanduser(text(name)))  # text: the name is written into headers, PNGs and JSON files


def prompts(name: str) -> list[str]:
    """The lines of a text file, a prompt each, without the empty ones. Only {V} and {noun} may stand in braces."""
    try:
        lines = path(name).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is no text in UTF-8: give a file with a prompt a line") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{name} is empty: give a file with a prompt a line")
    for prompt in found:
        if set("{}") & set(re.sub(r"\{(V|noun)\}", "", prompt)):
            raise argparse.ArgumentTypeError(f"{name}: only {{V}} and {{noun}} may be in braces, not as in {prompt!r}")
    return found


def text(value: str) -> str:
    """Text in UTF-8, which a terminal in another encoding may not give."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def device(name: str | None) -> torch.device:
    """The device called `name`, or cuda if there is one, else cpu. Each of several processes gets its own GPU.

    Raises ValueError for a device that cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world_size() > 1:
        name = ranks.local_device(name)
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # the default of torch.cuda's functions
    return chosen


def add_base_flags(parser: argparse.ArgumentParser, default: Path | None, what: str) -> None:
    """--base and how it is read."""
    add = parser.add_argument
    add("--base", type=path, default=default, help=f"a folder with public weights, or a single file (default: {what})")
    add("--variant", help="take *.VARIANT.safetensors, such as fp16 (default: plain files, or the only ones)")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="of the U-Net (default: from its files)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    add, kinds = parser.add_argument, ("fp32", "bf16", "fp16")
    add("--device", help="cpu, cuda or mps; only cpu has been tried (default: cuda if there is one)")
    add("--precision", choices=kinds, help="(default: bf16 on cuda, or fp16 if it is old, else fp32)")


def warn_of_truncation(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> None:
    """Print a line on stderr for each prompt that is too long, with the part that is not read."""
    for prompt in dict.fromkeys(prompts):
        if (rest := tokenizer.overflow(prompt)) and ranks.rank() == 0:
            print(f"warning: a prompt fills its {tokenizer.length} tokens; not read: {rest!r}", file=sys.stderr)
