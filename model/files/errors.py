"""Errors about files: one line that says which file, what is wrong and what was expected."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: which file, what is wrong, what was expected."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a library's words, or a garbled name, may bring more


def is_out_of_memory(error: BaseException) -> bool:
    """Is it that? On a GPU torch has a kind of error for it, on the CPU only words."""
    words = ("allocate memory", "out of memory", "alloc_failed", "unable to find an engine to execute")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error).lower() for text in words)


@contextmanager
def error_context(what: str):
    """Whatever the libraries raise over a broken file or a bad number becomes a CheckpointError that blames `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {error}") from error
