"""Write a file beside its place, then rename it: a kill leaves the old file or the new one, whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.files.errors import is_out_of_memory


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path`, then rename: a kill leaves the old file or the new one, whole.

    Makes the folder if need be. Raises ValueError if the file cannot be written; a full memory's error stays as it is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} cannot be written ({error})") from None
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as `write_atomic` does. The same tensors and metadata give the same bytes."""

    def write(beside: Path) -> None:
        beside.touch()
        mode = beside.stat().st_mode  # as any new file's; safetensors would shut out everybody but the owner
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        beside.chmod(mode)
        _sort_metadata(beside)

    write_atomic(Path(path), write)


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which safetensors leaves to chance: the same tensors give the same bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: the header's length changed in sorting")
        file.seek(8)
        file.write(text)
