"""Cleaning of text from a model, a user or a file, so that it can be stored, sent and shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def clean(text: str) -> str:
    """Join the two halves of a character, and replace lone halves (surrogates) and NUL by U+FFFD.

    JSON can carry both, while UTF-8, and so every file, socket and database, cannot.
    """
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "\ufffd")


class CleanPieces:
    """Cleans a text that comes in pieces: half a character waits for its other half."""

    def __init__(self) -> None:
        self._half = ""

    def add(self, piece: str) -> str:
        """Return the complete text so far that was not returned before."""
        piece = self._half + piece
        self._half = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        return clean(piece[: len(piece) - len(self._half)])

    def end(self) -> str:
        """Return the rest: nothing, or the replacement of half a character."""
        return clean(self._half)


def _clean(value: Any) -> Any:
    return clean(value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_clean)]
"""Type of a record's field for text from outside, which is cleaned when the record is made."""
