"""Tasks as rows of a verl data file, and back.

A row holds the whole task as JSON; its chat prompt is only the question, because the agent writes the real prompts.
Only tasks with a trustworthy verdict become rows. Validation is a seeded sample, the same for every run of a data set.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sqlbench.data.tasks import Task
from sqlbench.errors import DataError
from sqlbench.interfaces import Dataset

VALIDATION_SEED = 0


def validation_tasks(dataset: Dataset, split: str, count: int) -> list[Task]:
    """Return the first `count` scorable tasks of a split, in an order that depends only on the tasks."""
    tasks = [t for t in dataset.load(split) if t.scorable]
    if not tasks:
        raise DataError(f"No scorable task in the split: {split}. Choose another split.")
    tasks.sort(key=lambda t: (t.key, t.task_id))
    random.Random(VALIDATION_SEED).shuffle(tasks)
    return tasks[:count]


def write_tasks(path: Path, source: str, tasks: list[Task], validation: bool) -> Path:
    """Write tasks as a data file for verl."""
    rows = [
        {
            "data_source": source,
            "agent_name": "sqlbench",
            "prompt": [{"role": "user", "content": task.question}],
            "reward_model": {"style": "rule", "ground_truth": task.gold},
            "extra_info": {"index": i, "task": task.model_dump_json(), "validation": validation},
        }
        for i, task in enumerate(tasks)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, index=False)
    return path


class TaskRows(torch.utils.data.Dataset):
    """verl's view of a file of `write_tasks` (``data.custom_cls``): nothing is tokenized, filtered or cached."""

    def __init__(self, data_files: Any, max_samples: int = -1, **_: Any) -> None:
        files = [data_files] if isinstance(data_files, str) else list(data_files)
        frame = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)
        self.rows = frame.head(max_samples if max_samples > 0 else len(frame)).to_dict("records")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {
            **row,
            "prompt": list(row["prompt"]),
            "raw_prompt": list(row["prompt"]),
            "index": row["extra_info"]["index"],
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),  # verl wants one tensor in every batch
        }
