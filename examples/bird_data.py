"""Data of your own: BIRD's layout, one JSON file of questions per split and a folder of databases.

    sqlbench eval --run bird --data examples.bird_data:Bird --split dev

Questions are ``data/bird/<split>.json``, databases ``data/bird/<split>_databases/<db_id>/<db_id>.sqlite``. For another
folder, name an object of your own in place of the class: ``mine = Bird("/somewhere/else")``.
"""

import json
from pathlib import Path

from sqlbench.data.tasks import Task
from sqlbench.errors import DataError

HARDNESS = {"simple": "easy", "moderate": "medium", "challenging": "hard"}


class Bird:
    """Questions with their evidence as one text."""

    def __init__(self, root: str = "data/bird") -> None:
        self.root = Path(root)

    def splits(self) -> list[str]:
        """Return the names of the JSON files."""
        return sorted(path.stem for path in self.root.glob("*.json"))

    def load(self, split: str) -> list[Task]:
        """Return the questions of one file."""
        if split not in self.splits():
            raise DataError(f"No split '{split}' in {self.root}. There are: {', '.join(self.splits()) or 'none'}.")
        return [
            Task(
                task_id=str(row["question_id"]),
                db_id=row["db_id"],
                question=f"{row['question']} {row.get('evidence', '')}".strip(),
                gold=row["SQL"],
                split=split,
                hardness=HARDNESS.get(row.get("difficulty", ""), ""),
            )
            for row in json.loads((self.root / f"{split}.json").read_text(encoding="utf-8"))
        ]

    def database(self, db_id: str) -> Path:
        """Return the path of one SQLite file."""
        return next(self.root.glob(f"*_databases/{db_id}/{db_id}.sqlite"), self.root / f"{db_id}.sqlite")
