"""Standard output and error that never stop the work, even if the reader is gone or reads another encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)
"""Error numbers of a pipe whose reader has ended, or of a closed terminal."""


class _Stream(io.FileIO):
    """The file below a standard stream; drops output that cannot be written. A full disk raises an error, once."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.failed or self.fileno() == 2 or error.errno in GONE:
                return len(data)
            self.failed = True
            raise


def harden() -> None:
    """Replace this process's standard output and error, even where they were closed before it began."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # or the next file to be opened, a socket or a run's own, would be taken for a standard stream
    os.close(free)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # None where closed: now the null device
            buffer = io.BufferedWriter(_Stream(number, "w", closefd=False))
            encoding = stream.encoding if stream else "utf-8"
            at_once = number == 2 or bool(stream and (stream.line_buffering or stream.write_through))
            new = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=at_once)
            setattr(sys, name, new)
