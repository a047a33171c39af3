"""Ends a command within seconds of Ctrl-C, even where Python or a library drops the exception."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

LONGEST_STOP = 4
"""Grace period in which an interrupted command may end by itself, in seconds."""


def stop_when_told() -> None:
    """Make this process end within seconds of Ctrl-C, even where the exception is lost.

    Python drops an exception that is raised while an object is being finalised, as at the end of every task of an event
    loop and of every import: it is raised again. Some libraries catch the exception: the process then exits after
    `LONGEST_STOP`. Neither loses anything that was written.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(LONGEST_STOP, leave)
        timer.daemon = True
        timer.start()
        signal.default_int_handler(number, frame)

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()  # right now it would be dropped again
        else:
            usual(dropped)

    usual = sys.unraisablehook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job of a shell ignores it
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = again


def leave() -> NoReturn:
    """Print how to resume an interrupted command, and end the process without waiting for its threads."""
    print("Interrupted. Run the same command again to resume (eval, train, ablate, notebooks).", file=sys.stderr)
    sys.stdout.flush()
    os._exit(130)  # waiting for a batch of answers would take seconds
