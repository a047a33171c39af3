"""Measures how long the inspector takes to open many rollouts and to filter them.

    python benchmarks/inspector.py --run RUN_FOLDER [--rollouts N] [--repeat R]

The rollouts of a real run are written again under new task ids until there are enough, so lines are as long as real
ones. *Open* is everything from the file to the first rollout on display; *filter* is one change of a filter with the
list and the first match on display, results executed live. Wall time, the median and the worst of the repetitions.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from sqlbench.runs import CONFIG, TRAJECTORIES, read_trajectories
from sqlbench_lab.inspector import Inspector

FILTERS = (
    {"outcome": "wrong"},
    {"text": "select count"},
    {"turns": (1, 1)},
    {"reward": (0.5, 1.0)},
    {"outcome": "wrong", "text": "where"},
    {},
)


def repeat(source: Path, target: Path, count: int) -> float:
    """Write `count` rollouts made of those in `source`; return the size of the file in megabytes."""
    shutil.copy2(source / CONFIG, target)
    rollouts = list(read_trajectories(source))
    with (target / TRAJECTORIES).open("w", encoding="utf-8") as file:
        for number, rollout in enumerate(islice(cycle(rollouts), count)):
            new = {"task_id": f"{number:06}", "task_key": f"{number:016x}"}
            file.write(rollout.model_copy(update=new).model_dump_json() + "\n")
    return (target / TRAJECTORIES).stat().st_size / 1e6


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run folder with rollouts")
    parser.add_argument("--rollouts", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sqlbench-bench-") as folder:
        size = repeat(options.run, Path(folder), options.rollouts)
        opened = [timed(lambda: Inspector(folder)) for _ in range(options.repeat)]
        inspector = Inspector(folder)
        filtered = [timed(lambda f=f: inspector.filter(**f)) for _ in range(options.repeat) for f in FILTERS]
    print(f"{options.rollouts} rollouts, {size:.0f} MB, {platform.machine()}, Python {platform.python_version()}\n")
    print("| | median (s) | worst (s) |\n|---|---|---|")
    for name, times in (("open", opened), ("filter", filtered)):
        print(f"| {name} | {statistics.median(times):.3f} | {max(times):.3f} |")


if __name__ == "__main__":
    main()
