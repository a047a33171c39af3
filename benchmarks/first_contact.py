"""Counts how many of twenty typed questions a model answers on a database that it has never seen.

    sqlbench data import benchmarks/chinook.jsonl --db Chinook_Sqlite.sqlite --out data/chinook
    python benchmarks/first_contact.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct

Settings are those of ``sqlbench ask``, with one turn unless ``--max-turns`` says otherwise. The run is resumed where
it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from sqlbench.agent.trajectory import Trajectory
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder
from sqlbench_chat.connection import LARGE
from sqlbench_lab.tables import markdown


def table(rollouts: Iterable[Trajectory]) -> pd.DataFrame:
    """Return one row per question: the question, its verdict and the query."""
    rows = [
        (t.question, "right" if t.correct else t.error or t.reason, " ".join((t.pred or "").split())) for t in rollouts
    ]
    return pd.DataFrame(rows, columns=["question", "verdict", "query"])


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/chinook"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-turns", type=int, default=1)
    parser.add_argument("--run", default="chinook")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    evaluate(**vars(options), split="dev", table_info_truncate=LARGE, concurrency=1)
    frame = table(RunFolder(options.results / "laptop" / options.run).trajectories())
    print(markdown(frame.replace(r"\|", r"\|", regex=True)))
    print(f"{(frame.verdict == 'right').sum()} of {len(frame)} right")


if __name__ == "__main__":
    main()
