"""stdout and stderr that may be closed, full or gone: what cannot be printed is dropped, and the work continues."""

from __future__ import annotations

import io
import os
import sys


class _Lossy(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:  # a full disk, a pipe whose reader has ended, a terminal that was closed
            return len(data)


def protect_streams() -> None:
    """Make printing to stdout and stderr raise no error: neither here, nor in libraries, nor when the process ends."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by 2>&-; a file opened later would get its number, and what libraries print
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and os.name != "nt":  # a Windows console is no file
            raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True))
