"""Final queries in the formats of published evaluators: Spider's ``predict.txt`` and BIRD's ``predict_dev.json``.

Both have one entry per task of a split, in its order, including tasks that the gold audit excludes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from sqlbench.config import ExportConfig
from sqlbench.data.tasks import Task, headline_split, open_dataset
from sqlbench.errors import DataError
from sqlbench.runs import RunFolder, write_whole
from sqlbench.sql_analysis import parse

MARK = "\t----- bird -----\t"
NONE = "SELECT"
"""Text for a missing prediction; it is not a query, so every evaluator scores it as wrong."""
LONGEST = 50_000
"""Most characters of a query that is rewritten: unclosed brackets take time quadratic in their number."""
_PARTS = re.compile(
    r"(?P<text>'(?:''|[^'])*')|(?P<name>\"(?:\"\"|[^\"])*\"|`(?:``|[^`])*`|\[[^\]]*\])"
    r"|(?P<space>--[^\n]*|/\*.*?(?:\*/|\Z)|[ \t\n\r\f]+)",
    re.DOTALL,
)
_BREAKS = re.compile(r"[\t\n\r]")


def one_line(sql: str) -> str | None:
    """Write a SQLite query on one line without a tab and with the same meaning; None if that is impossible.

    Comments and white space become a space; a line break in a text becomes ``char(10)``.
    """
    hard = len(sql) > LONGEST

    def write(part: re.Match) -> str:
        nonlocal hard
        if part["space"]:
            return " "
        if part["name"] or not _BREAKS.search(part[0]):
            hard = hard or bool(_BREAKS.search(part[0]))
            return part[0]
        joined = _BREAKS.sub(lambda found: f"'||char({ord(found[0])})||'", part[0])
        return f"({joined})"

    line = "" if hard else _PARTS.sub(write, sql).strip(" ")
    if hard or _BREAKS.search(line) or ("char(" in line and "char(" not in sql and parse(line) is None):
        return None
    return line


def export_predictions(settings: ExportConfig) -> str:
    """Write the final queries of an evaluation for another evaluator; return a message with their counts.

    Raises:
        DataError: the run is not an evaluation, its data set is missing, or the file's kind is unknown.
    """
    folder, kind = RunFolder(settings.run), settings.out.suffix
    if kind not in (".txt", ".json"):
        raise DataError(f"Unknown format: {settings.out}. Give a .txt file for Spider's or a .json file for BIRD's.")
    config = folder.config()
    if config.get("kind") != "eval":
        raise DataError(f"Not an evaluation: {settings.run}. Give the folder of one.")
    dataset = open_dataset(config["data"])
    tasks = dataset.load(headline_split(dataset) if config["split"] == "headline" else config["split"])
    answers: defaultdict[str, deque[str]] = defaultdict(deque)
    for record in folder.trajectories():
        if record.sample == 0 and not record.failed:
            answers[record.task_key].append(record.pred or "")
    lines, missing = [], 0
    for task in tasks:
        sql = answers[task.key].popleft() if answers[task.key] else ""
        text = (one_line(sql) or "") if kind == ".txt" else sql.strip()
        missing += not text
        lines.append(text or NONE)
    if kind == ".txt":
        text = "".join(f"{line}\n" for line in lines)
    else:
        rows = {str(n): f"{line}{MARK}{task.db_id}" for n, (line, task) in enumerate(zip(lines, tasks, strict=True))}
        text = json.dumps(rows, indent=4, ensure_ascii=False) + "\n"
    write_whole(settings.out, [text])
    why = f"; {missing} without one (excluded, failed or not run) are written as {NONE}, which scores 0" * bool(missing)
    return f"{len(lines)} predictions{why}"


def read_predictions(path: Path, tasks: list[Task]) -> list[dict[str, Any]]:
    """Read a ``predict.txt`` or ``predict_dev.json`` as pairs of gold and prediction.

    Raises:
        DataError: the file cannot be read, or is not about these tasks.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, dict):
                raise ValueError("not an object")
            pairs = [row.partition(MARK)[::2] if isinstance(row, str) else ("", "") for row in rows.values()]
        else:
            lines = text.split("\n")
            pairs = [(line.strip().partition("\t")[0], "") for line in lines[: len(lines) - (not lines[-1].strip())]]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Cannot read {path}: {error}. Check the path and the file.") from error
    if len(pairs) != len(tasks):
        raise DataError(f"{path} has {len(pairs)} predictions, the split {len(tasks)} tasks. Choose another --split.")
    for number, ((_, db_id), task) in enumerate(zip(pairs, tasks, strict=True), 1):
        if db_id.strip() not in ("", task.db_id):
            raise DataError(
                f"Prediction {number} of {path} is for database '{db_id.strip()}', the split has '{task.db_id}'. "
                "Choose another --split."
            )
    return [
        {"task_id": task.task_id, "db_id": task.db_id, "gold": task.gold, "pred": pred, "hardness": task.hardness}
        for (pred, _), task in zip(pairs, tasks, strict=True)
    ]
