"""Write a file under a temporary name, then rename it: an interruption leaves the old file or the new one, whole."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.files.errors import is_out_of_memory


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name in the same folder, then rename that file to `path`, or to its link's target.

    Makes the folder. Raises ValueError if the file cannot be written; an out-of-memory error stays as it is.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a full disk
        if is_out_of_memory(error):
            raise
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**16  # torch's errors do not say so
        raise ValueError(f"{path} cannot be written ({'no space left on the disk' if full else error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with `write_atomic`. The same tensors and metadata give the same bytes."""

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # of any new file; safetensors would let only the owner read it
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        if metadata:
            _sort_metadata(temporary)

    write_atomic(Path(path), write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header in place; safetensors writes it in a random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
