"""Command lines: the parser, flags that several commands share, the device, one-line errors."""

from __future__ import annotations

import argparse
import io
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from model.files.errors import is_out_of_memory
from model.tokenizer import CLIPTokenizer
from support import ranks
from support.streams import protect_streams

EMBEDDED_BASE = Path(__file__).parent.parent / "weights" / "toy"


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line (and exit status 2)."""

    def __init__(self, **options):
        protect_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A λ must not end a run where the output's encoding has none; a log should grow line by line.
                stream.reconfigure(errors="replace", line_buffering=True)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)  # argparse lacks -1e-4

    def error(self, message: str):
        line = f"{self.prog}: error: {message} (see {self.prog} --help)\n"
        self.exit(2, line if ranks.rank() == 0 else None)


def fail(message: object) -> int:
    """Print one line on stderr; return the exit status for bad input."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def guarded(work: Callable[[], int | None], remedy: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Return `work`'s exit status. What a user can cause becomes one line on stderr and 2, or 130 for Ctrl-C.

    remedy: returns what to try when the memory is full. interrupted: what to print after Ctrl-C, unless the
    KeyboardInterrupt has a message. SIGTERM, and SIGHUP unless nohup ignores it, count as Ctrl-C.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # torchrun ends its processes itself
        if ranks.world_size() == 1 and number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return work() or 0
    except (ValueError, OSError) as error:  # the same in every process: the first reports it
        return fail(error) if ranks.rank() == 0 else 2
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return fail(f"the memory is full: {remedy()}")
        if not isinstance(error, FloatingPointError):
            raise
        return fail(error)
    except KeyboardInterrupt as error:
        if ranks.rank() == 0:
            print(f"\n{str(error) or interrupted}", file=sys.stderr)
        return 130


def path(name: str) -> Path:
    """A file or folder. An empty name, usually of an unset variable, would be the current folder."""
    if not name:
        raise argparse.ArgumentTypeError("is empty: give the name of a file or folder, or leave it out")
    return Path(text(name))  # headers, PNGs and JSON files name it


def text(value: str) -> str:
    """Text that a tokenizer can read: a terminal of another encoding gives bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def device(name: str | None) -> torch.device:
    """The device called `name`, or cuda if there is one, else cpu; of several processes each gets its own GPU.

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
        torch.cuda.set_device(chosen)  # functions that ask about "the GPU" mean this one
    return chosen


# ----------------------------------------------------------------------------------------------------- shared flags


def add_base_flags(parser: argparse.ArgumentParser, default: Path | None, what: str) -> None:
    """--base and how it is read."""
    add = parser.add_argument
    add("--base", type=path, default=default, help=f"a folder with public weights, or a single file (default: {what})")
    add("--variant", help="take *.VARIANT.safetensors, such as fp16 (default: plain files, or the only ones)")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="of the U-Net (default: as its files say)")


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
