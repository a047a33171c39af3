"""Measures the cost of a verdict on real (gold, predicted) pairs: ours against the reference's steps and bare SQLite.

    python benchmarks/reward.py --data SPIDER_FOLDER --pairs PAIRS.jsonl.gz [--limit N] [--repeat R]

All times are CPU time of one process per pair; the median of the repetitions is shown. Every text that is executed is
new (white space at its end differs), so nobody, bare SQLite included, profits from a statement compiled before. *Cold*
executes gold for every pair (nothing is kept between pairs), *warm* finds its answer in the cache, as in training,
where one gold query meets many predictions. *Bare* is SQLite alone on one cached read-only connection per database,
fetching all rows; pairs on which it needs more than 20 ms are left out, since they measure SQLite (ours stops at gold's
number of rows). *Reference* is
the published algorithm's steps, written anew from their description: a new connection per execution, the whole text
parsed to drop DISTINCT, results compared under one column order after the other. Throughput is in wall time, with
processes, over the same pairs; it means something only on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import count, permutations
from pathlib import Path

import sqlparse

from sqlbench.database.engine import cached_database
from sqlbench.reward import clear_gold_cache, score

Pair = tuple[str, str, str]


# ---- the reference's steps


def reference_verdict(path: str, gold: str, pred: str, keep_distinct: bool = False) -> int:
    """Compute one verdict, by the steps of the reference evaluator."""
    queries = [q.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=") for q in (gold, pred)]
    if not keep_distinct:
        words = [[t.value for t in sqlparse.parse(q)[0].flatten()] for q in queries]
        queries = ["".join(w for w in query if w.lower() != "distinct") for query in words]
    ordered = "order by" in queries[0].lower()
    expected, got = reference_run(path, queries[0]), reference_run(path, queries[1])
    if expected is None:
        raise ValueError(f"gold query fails: {gold}")
    return int(got is not None and reference_equal(expected, got, ordered))


def reference_run(path: str, sql: str) -> list[tuple] | None:
    """Fetch all rows through a new connection; None if the query fails."""
    connection = sqlite3.connect(path)
    connection.text_factory = lambda raw: raw.decode(errors="ignore")
    try:
        return connection.execute(re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", "2020", sql, flags=re.I)).fetchall()
    except Exception:
        return None
    finally:
        connection.close()


def reference_equal(expected: list[tuple], got: list[tuple], ordered: bool) -> bool:
    """Return whether results are equal under some column order; all are tried one after the other."""
    if not expected and not got:
        return True
    if len(expected) != len(got) or len(expected[0]) != len(got[0]):
        return False
    sort = lambda row: tuple(sorted(row, key=lambda cell: str(cell) + str(type(cell))))  # noqa: E731
    left, right = [sort(row) for row in expected], [sort(row) for row in got]
    if (left != right) if ordered else (set(left) != set(right)):
        return False
    values = [{row[i] for row in expected} for i in range(len(expected[0]))]
    for order in permutations(range(len(expected[0]))):
        if any(row[j] not in values[i] for row in got[:20] for i, j in enumerate(order)):
            continue
        table = [tuple(row[j] for j in order) for row in got]
        if expected == table or (not ordered and Counter(expected) == Counter(table)):
            return True
    return False


# ---- bare execution


def bare_runner(paths: dict[str, str]) -> Callable[[str, str], None]:
    """Return a function that executes one query and fetches its rows on the cached connection of a database."""
    connections = {db: sqlite3.connect(Path(p).absolute().as_uri() + "?mode=ro", uri=True) for db, p in paths.items()}

    def run(db_id: str, sql: str) -> None:
        with suppress(sqlite3.Error):
            connections[db_id].execute(sql).fetchall()

    return run


# ---- measuring

_texts = count()


def new_text(sql: str) -> str:
    """Return the query as a text that was never executed: with a number in blanks and tabs at its end."""
    return sql + f"{next(_texts):024b}".replace("0", " ").replace("1", "\t")


def cpu_per_pair(works: dict[str, Callable[[Pair], object]], pairs: list[Pair], repeat: int) -> dict[str, float]:
    """Measure the CPU milliseconds per pair: for each work, the median over repetitions.

    Each repetition does all works in turn, so that all see the same machine. A work is done once before its timing: the
    cold works empty the cache that the warm ones need.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            for pair in pairs:
                work(pair)
            start = time.process_time()
            for pair in pairs:
                work(pair)
            times[name].append((time.process_time() - start) / len(pairs) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def score_chunk(job: tuple[dict[str, str], list[Pair], int]) -> float:
    """Score some pairs several times; return the time at the end."""
    paths, pairs, times = job
    databases = {db: cached_database(path) for db, path in paths.items()}
    for _ in range(times):
        for db_id, gold, pred in pairs:
            score(gold, pred, databases[db_id], strict=False)
    return time.perf_counter()


def throughput(paths: dict[str, str], pairs: list[Pair], workers: int, times: int = 10) -> float:
    """Measure pairs per second with processes that have started and warmed up before the clock starts."""
    chunks = [pairs[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(score_chunk, [(paths, chunk, 1) for chunk in chunks]))
        start = time.perf_counter()
        list(pool.map(score_chunk, [(paths, chunk, times) for chunk in chunks]))
        return len(pairs) * times / (time.perf_counter() - start)


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{processor}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with database/<db_id>/<db_id>.sqlite")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines with db_id, gold, pred (may be .gz)")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()

    with gzip.open(options.pairs, "rt") if options.pairs.suffix == ".gz" else options.pairs.open() as lines:
        rows = [json.loads(line) for line in lines]
    # Every n-th of them, so that all predictors and databases take part.
    rows = (
        [rows[int(i * len(rows) / options.limit)] for i in range(options.limit)] if options.limit < len(rows) else rows
    )
    paths = {r["db_id"]: str(options.data / "database" / r["db_id"] / f"{r['db_id']}.sqlite") for r in rows}
    pairs: list[Pair] = [(r["db_id"], r["gold"], r["pred"]) for r in rows]
    databases = {db: cached_database(path) for db, path in paths.items()}
    bare = bare_runner(paths)

    def cold(pair: Pair, **mode: bool) -> None:
        clear_gold_cache()
        score(new_text(pair[1]), new_text(pair[2]), databases[pair[0]], **mode)

    def warm(pair: Pair, **mode: bool) -> None:
        score(pair[1], new_text(pair[2]), databases[pair[0]], **mode)

    def alone(pair: Pair) -> None:
        bare(pair[0], new_text(pair[2]))

    def both(pair: Pair) -> None:
        bare(pair[0], new_text(pair[1]))
        alone(pair)

    def heavy(pair: Pair) -> bool:
        start = time.process_time()
        both(pair)
        return time.process_time() - start > 0.02

    everything = len(pairs)
    pairs = [pair for pair in pairs if not heavy(pair)]
    agree = sum(
        reference_verdict(paths[db], gold, pred) == score(gold, pred, databases[db], strict=False).match
        for db, gold, pred in pairs
    )
    measured = cpu_per_pair(
        {
            "reference's steps": lambda p: reference_verdict(paths[p[0]], p[1], p[2]),
            "reference's steps, DISTINCT kept": lambda p: reference_verdict(paths[p[0]], p[1], p[2], True),
            "bare SQLite, gold and prediction": both,
            "bare SQLite, prediction alone": alone,
            "ours, reference mode, cold gold": lambda p: cold(p, strict=False),
            "ours, reference mode, warm gold": lambda p: warm(p, strict=False),
            "ours, DISTINCT kept, cold gold": lambda p: cold(p, strict=False, keep_distinct=True),
            "ours, DISTINCT kept, warm gold": lambda p: warm(p, strict=False, keep_distinct=True),
            "ours, strict mode, cold gold": lambda p: cold(p, strict=True),
            "ours, strict mode, warm gold": lambda p: warm(p, strict=True),
        },
        pairs,
        options.repeat,
    )
    execution, alone = measured["bare SQLite, gold and prediction"], measured["bare SQLite, prediction alone"]
    print(f"{len(pairs)} pairs ({everything - len(pairs)} heavy ones left out), {len(paths)} databases; {_machine()}")
    print(f"verdicts agree with the reference's steps on {agree} of {len(pairs)}\n")
    print("| CPU time a pair | ms | of bare execution | of prediction alone |\n|---|---|---|---|")
    for name, ms in measured.items():
        print(f"| {name} | {ms:.3f} | {ms / execution:.2f} | {ms / alone:.2f} |")
    speedup = measured["reference's steps"] / measured["ours, reference mode, cold gold"]
    print(f"\ncold gold, against the reference's steps: {speedup:.1f} times faster")
    clear_gold_cache()
    one, two = throughput(paths, pairs, 1), throughput(paths, pairs, 2)
    print(f"throughput, warm gold: {one:.0f} pairs/s with 1 process, {two:.0f} with 2 ({two / one:.2f} times)")


if __name__ == "__main__":
    main()
