"""Errors about files: one line that names the file, what is wrong and what was expected."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is always one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a library's message may have several


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for out-of-memory errors; on a CPU only the message shows it."""
    words = ("allocate memory", "out of memory", "alloc_failed", "unable to find an engine to execute")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error).lower() for text in words)


@contextmanager
def error_context(what: str):
    """Turn a library's error about a broken file or a bad value into a CheckpointError that starts with `what`.

    A CheckpointError and an out-of-memory error stay as they are.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {error}") from error


def check_file(path: Path) -> None:
    """Raise CheckpointError if `path` cannot be opened, is a link to a missing file, or is a Git LFS pointer.

    A Hugging Face snapshot holds links; a git clone without git-lfs holds pointers, short texts.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(f"{path} is a link to a missing file: download it again")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing, or not a file")
    with error_context(f"{path} cannot be read"), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
