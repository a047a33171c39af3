"""Ctrl-C ends a command within seconds, also where Python or a library drops the exception for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

LONGEST_STOP = 4
"""Seconds in which an interrupted command may end by itself."""


def stop_when_told() -> None:
    """See to it that this process ends within seconds of Ctrl-C, also where the exception for it is lost.

    Python drops an exception that is raised while an object is being cleared away, as at the end of every task of an
    event loop and of every import: it is raised again. Some libraries catch it: the process then leaves by itself. That
    costs nothing that was written.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(LONGEST_STOP, leave)
        timer.daemon = True
        timer.start()
        signal.default_int_handler(number, frame)

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()  # right now, it would be dropped here
        else:
            usual(dropped)

    usual = sys.unraisablehook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job of a shell ignores it
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = again


def leave() -> NoReturn:
    """Say how an interrupted command is resumed, and end the process without waiting for its threads."""
    print("Interrupted. Run the same command again to resume (eval, train, ablate, notebooks).", file=sys.stderr)
    sys.stdout.flush()
    os._exit(130)  # a batch of answers takes seconds
