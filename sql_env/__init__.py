"""The self-correcting SQL task as an OpenEnv environment."""

from importlib import import_module
from typing import Any

_HOME = {"SqlEnvClient": "client", "SqlAction": "models", "SqlObservation": "models", "SqlState": "models"}
__all__ = ["SqlAction", "SqlEnvClient", "SqlObservation", "SqlState"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: OpenEnv takes seconds, and the command line imports this package."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
