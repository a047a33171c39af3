"""Answers of an endpoint kept in a folder: one file each, named by a hash of the whole request.

The request is address, model, messages and fields, without the key. Files are written whole under another name and
renamed, so that processes may share a folder. A damaged file is a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqlbench.agent.trajectory import Completion
from sqlbench.errors import ModelError


class AnswerCache:
    """A folder of answers."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        """Hash a request."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Completion | None:
        """Return an answer, marked as cached and without seconds; None if it is missing."""
        try:
            answer = Completion.model_validate_json(self._file(key).read_bytes())
        except (OSError, ValidationError):
            return None
        return answer.model_copy(update={"seconds": 0.0, "sent": {**(answer.sent or {}), "cached": True}})

    def put(self, key: str, answer: Completion) -> None:
        """Store an answer.

        Raises:
            ModelError: the folder cannot be written.
        """
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
                new.write(answer.model_dump_json())
            os.replace(new.name, file)
        except OSError as error:
            why = f"{self.folder}: {error.strerror}"
            raise ModelError(f"Cannot write the cache {why}. Choose another --cache.") from error

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
