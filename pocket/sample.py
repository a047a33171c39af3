"""Print random questions of each phrasing family from a written data set: ``python -m pocket.sample [FOLDER] [N]``."""

from __future__ import annotations

import sys
from random import Random

from sqlbench.data.tasks import DataSet


def main(folder: str = "data/pocket", count: str = "4") -> None:
    """Print `count` questions of each family of the open splits."""
    data, rng = DataSet(folder), Random(0)
    tasks = [t for s in ("train", "dev_unseen_never") for t in data.load(s) if not t.db_id.startswith("made_up")]
    for family in sorted({t.phrasing for t in tasks}):
        for task in rng.sample([t for t in tasks if t.phrasing == family], int(count)):
            print(f"- {family}: {task.question} `{task.gold}`")


if __name__ == "__main__":
    main(*sys.argv[1:])
