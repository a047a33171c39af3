"""Conversations on disk: one file each, with a line appended for every turn, verdict and new name."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from sqlbench.errors import DataError, RunError
from sqlbench.runs import append_line, read_jsonl
from sqlbench_chat.turn import Turn

_NAME = re.compile(r"[\w-]{1,60}", re.ASCII)
_TITLE = 60


class Conversation:
    """One conversation; its file is created with its first turn.

    Args:
        folder: folder of the conversations.
        name: name of a stored conversation; an empty or invalid name starts a new one.

    Raises:
        DataError: its file is damaged.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self.name = name if _NAME.fullmatch(name) else f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self._title = ""
        self._turns: dict[str, Turn] = {}
        try:
            for line in read_jsonl(self.path):
                if "title" in line:
                    self._title = str(line["title"])
                else:
                    turn = Turn.model_validate(line["turn"])
                    self._turns[turn.key] = turn  # the last line about a turn counts
        except (ValidationError, KeyError) as error:
            raise DataError(f"Damaged conversation: {self.path}. Move it away.") from error

    @property
    def path(self) -> Path:
        """File of the conversation."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def turns(self) -> list[Turn]:
        """Turns of the conversation, newest last."""
        return list(self._turns.values())

    @property
    def title(self) -> str:
        """Name given by the user, else the first question."""
        title = self._title or next((turn.question for turn in self.turns), "New conversation")
        return title if len(title) <= _TITLE else title[: _TITLE - 1] + "…"

    def keep(self, turn: Turn) -> None:
        """Store a turn, new or changed.

        Raises:
            RunError: the file cannot be written.
        """
        self._turns[turn.key] = turn
        self._append({"turn": turn.model_dump(mode="json")})

    def rename(self, title: str) -> None:
        """Rename the conversation.

        Raises:
            RunError: the file cannot be written.
        """
        self._title = " ".join(title.split())
        self._append({"title": self._title})

    def _append(self, line: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"Cannot write {self.folder}: {error.strerror}. Make it writable and try again.") from error
        append_line(self.path, line)

    def delete(self) -> None:
        """Delete the file, but not the feedback and lessons from it."""
        self.path.unlink(missing_ok=True)

    def markdown(self) -> str:
        """Render the conversation as a document: questions, queries, first rows, verdicts."""
        parts = [f"# {_line(self.title)}"]
        for turn in self.turns:
            final = turn.found
            parts += [
                f"## {_line(turn.question)}",
                f"{turn.database}, {turn.model}, prompt generation {turn.generation}",
            ]
            parts += [f"````sql\n{turn.sql}\n````"] if turn.sql else []
            parts += [final.size, _grid(final.columns, final.rows)] if final and final.answered else []
            parts += [_line(turn.summary)] if turn.summary else []
            parts += [f"No answer: {_line(turn.error)}"] if turn.error else []
            parts += [f"Marked {turn.verdict}. {_line(turn.remark)}".strip()] if turn.verdict else []
        return "\n\n".join(parts) + "\n"

    def jsonl(self) -> str:
        """Render the turns as JSON, one per line."""
        return "".join(turn.model_dump_json() + "\n" for turn in self.turns)


def _line(value: object) -> str:
    """Escape a value for a line of Markdown or a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def _grid(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *(["NULL" if v is None else v for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_line, line))} |" for line in lines)


def conversations(folder: Path) -> dict[str, str]:
    """Return the titles of all conversations by name, newest first; damaged ones are left out."""
    titles = {}
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        try:
            titles[path.stem] = Conversation(folder, path.stem).title
        except DataError:
            continue
    return titles
