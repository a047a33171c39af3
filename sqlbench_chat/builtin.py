"""Databases of a data set, with questions that have known answers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from sqlbench.data.tasks import Task, open_dataset
from sqlbench.errors import DataError
from sqlbench_chat.connection import Connection, Example, connect

LEVELS = ("easy", "medium", "hard")
PER_LEVEL = 20
"""Maximum number of benchmark questions per level."""
CANDIDATES = 12
"""Maximum number of questions per database that may become examples."""


class BuiltIn:
    """The databases of a data set.

    Raises:
        DataError: there is no data set, it is damaged, or none of its questions can be offered.
    """

    def __init__(self, root: Path | str) -> None:
        self.data = open_dataset(root)
        splits = self.data.splits()
        self._tasks: dict[str, dict[str, Task]] = defaultdict(dict)
        for split in [s for s in splits if s != "train"] or splits:
            for task in self.data.load(split):
                if task.scorable and task.hardness in LEVELS:
                    self._tasks[task.db_id][task.key] = task
        if not self._tasks:
            raise DataError(
                f"No question of the levels {', '.join(LEVELS)}: {root}. Run 'sqlbench data audit', which finds levels."
            )
        self.names = sorted(self._tasks)

    def tasks(self) -> list[Task]:
        """Return all questions."""
        return [task for tasks in self._tasks.values() for task in tasks.values()]

    def connect(self, name: str) -> Connection:
        """Open a database, with questions of the data set as examples, alternating between levels.

        Raises:
            DatabaseError: its file is missing or damaged.
        """
        pools = [
            sorted((t for t in self._tasks[name].values() if t.hardness == level), key=lambda t: (t.phrasing, t.key))
            for level in LEVELS
        ]
        mixed = [t for t in chain.from_iterable(zip_longest(*pools)) if t is not None]
        examples = tuple(Example(t.question, t.gold) for t in mixed[:CANDIDATES])
        return replace(connect(self.data.database(name)), examples=examples)

    def benchmark(self, name: str) -> list[Task]:
        """Return the benchmark of a database: always the same questions per level."""
        tasks = [self._tasks[name][key] for key in sorted(self._tasks[name])]
        return [t for level in LEVELS for t in [t for t in tasks if t.hardness == level][:PER_LEVEL]]
