"""Errors about files: one line that names the file, what is wrong and what was expected."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch


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
    """Turn a library's error about a file or a value, but for a full memory, into a CheckpointError after `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers and safetensors raise classes of their own
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {error}") from error


def check_file(path: Path) -> None:
    """Raise CheckpointError if `path` cannot be read: Hugging Face snapshots hold links, git clones LFS pointers."""
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(f"{path} is a link to a missing file: download it again")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing, or not a file")
    with error_context(f"{path} cannot be read"), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
