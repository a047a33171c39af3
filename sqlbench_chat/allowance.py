"""Limit of questions per hour and browser, for a chat that several people reach.

A browser that forgets its name starts anew: the limit shares a model among users, but does not stop attackers.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

from sqlbench.errors import RunError
from sqlbench.runs import append_line, read_jsonl

HOUR = 3600.0
_FILE = "asked.jsonl"


def spend(folder: Path, questions: int, hourly: int) -> None:
    """Count questions that the model is about to answer.

    Args:
        folder: folder of the browser, shared by its pages.
        questions: number of questions.
        hourly: maximum number of questions within an hour.

    Raises:
        RunError: the limit would be exceeded, or the count cannot be stored.
    """
    now = time.time()
    recent = [(row["at"], row["questions"]) for row in read_jsonl(folder / _FILE) if now - HOUR < row["at"] <= now]
    remaining = hourly - sum(count for _, count in recent)
    if questions > remaining:
        freed = itertools.accumulate(count for _, count in recent)
        enough = [at for (at, _), total in zip(recent, freed, strict=True) if remaining + total >= questions]
        advice = f"Try again in {math.ceil((enough[0] + HOUR - now) / 60)} min" if enough else "Choose fewer questions"
        raise RunError(f"Questions left this hour: {remaining} of {hourly}, needed: {questions}. {advice}.")
    append_line(folder / _FILE, {"at": now, "questions": questions})
