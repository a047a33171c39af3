"""Scoring of a file of (gold, predicted) query pairs, for ``sqlbench score``.

Every input row comes out once and in order, with ``match``, ``reason``, ``pred_error`` where there is one, and ``ms``;
its other fields are carried through. Rows are written as they are scored. A prediction that is null counts as empty. A
line that is not a pair comes out as ``{"line": number, "match": null, "reason": "bad_row", ...}`` and stops nothing.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import islice
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from sqlbench.config import ScoreConfig, takes
from sqlbench.data.tasks import DataSet, find_databases, headline_split
from sqlbench.database.engine import cached_database
from sqlbench.database.types import Limits
from sqlbench.errors import DatabaseError, DataError
from sqlbench.metrics import measure
from sqlbench.predictions import read_predictions
from sqlbench.results import mean
from sqlbench.reward import Verdict, score
from sqlbench.text import clean

FIELDS = ("db_id", "gold", "pred")


@takes(ScoreConfig, "data", "pairs", "out")
def score_pairs(settings: ScoreConfig) -> dict[str, int | float]:
    """Score every row of a file of pairs; return how often each reason occurred, and the means of the metrics.

    Raises:
        DataError: an input is missing, or no line of it is a pair.
    """
    data, pairs, out, workers = settings.data, settings.pairs, settings.out, settings.workers
    if not (data / "database").is_dir():
        raise DataError(f"No databases in {data}. Put them at database/<db_id>/<db_id>.sqlite.")
    if pairs.suffix in (".txt", ".json"):
        dataset = DataSet(data)
        split = headline_split(dataset) if settings.split == "headline" else settings.split
        rows = [(row, "") for row in read_predictions(pairs, dataset.load(split))]
    else:
        rows = list(_read(pairs))
    usable = [row for row, fault in rows if not fault]
    if not usable:
        why = f" ({rows[0][1]})" if rows else ""
        raise DataError(f"No pairs in {pairs}{why}. Write one JSON object with db_id, gold and pred per line.")
    if out.exists() and out.samefile(pairs):
        raise DataError(f"Output would overwrite the pairs: {out}. Choose another file with --out.")
    if not any(_databases(data, row["db_id"]) for row in usable):
        named = usable[0]["db_id"]
        raise DataError(f"No database of {pairs} in {data / 'database'}, for example: {named}. Check --data.")
    counts: Counter[str] = Counter()
    if workers is None:  # forking is safe, and worth it, only from a process without threads
        workers = len(os.sched_getaffinity(0)) if len(rows) > 1000 and threading.active_count() == 1 else 1
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sink = out.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write {out}: {error.strerror}. Choose another file with --out.") from error
    how = settings.keep_distinct, settings.strict, Limits(seconds=settings.query_timeout), settings.metrics
    metrics: dict[str, list[float | None]] = {name: [] for name in settings.metrics}
    jobs = ((data, fault, [row.get(k) for k in FIELDS], *how) for row, fault in rows)
    with sink, tqdm(total=len(rows), desc="score", unit="pair", mininterval=0.5) as progress:
        for (row, _), (verdict, values) in zip(rows, _verdicts(jobs, workers), strict=True):
            row |= {"match": verdict.match, "reason": verdict.reason} | values
            for name in metrics:
                metrics[name].append(values.get(name))
            if verdict.pred_error is not None:
                row["pred_error"] = verdict.pred_error
            row["ms"] = round(verdict.ms, 3)
            sink.write(clean(json.dumps(row, ensure_ascii=False)) + "\n")
            sink.flush()
            counts[verdict.reason] += 1
            progress.update()
    matches = [row["match"] for row, _ in rows]
    scored = len(rows) - matches.count(None)
    means = {k: value for k, scores in metrics.items() if (value := mean(pd.Series(scores, dtype=float))) is not None}
    return {"pairs": len(rows), "scored": scored, "matched": matches.count(1)} | dict(counts) | means


def _verdicts(jobs: Iterator[tuple], workers: int) -> Iterator[tuple[Verdict, dict]]:
    if workers == 1:
        yield from map(_verdict, jobs)
        return
    # Short statements are mostly Python time, so a second core needs a second process.
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            for chunk in pool.map(_verdict_chunk, iter(lambda: list(islice(jobs, 50)), [])):
                yield from chunk
    except BrokenProcessPool as error:
        raise DataError(
            "Scoring process killed, perhaps for memory. Free some memory and rerun the command."
        ) from error


def _verdict_chunk(jobs: list[tuple]) -> list[tuple[Verdict, dict]]:
    return [_verdict(job) for job in jobs]


def _verdict(job: tuple) -> tuple[Verdict, dict]:
    """Score one pair; where the gold query can be scored, compute the metrics too."""
    data, fault, texts, keep_distinct, strict, limits, metrics = job
    if fault:
        return Verdict(None, "bad_row", fault), {}
    db_id, gold, pred = [clean(text or "") for text in texts]
    try:
        databases = [cached_database(path) for path in _databases(data, db_id)]
        if not databases:
            return Verdict(None, "no_database", f"no database {db_id!r}"), {}
        how = {"strict": strict, "keep_distinct": keep_distinct, "limits": limits}
        verdict = score(gold, pred, databases, **how)
        if verdict.match is None or not metrics:
            return verdict, {}
        databases.sort(key=lambda database: database.name != db_id)  # the task's own first
        return verdict, measure(metrics, gold, pred, databases, **how)
    except DatabaseError as error:
        return Verdict(None, "no_database", str(error)), {}


_databases = cache(find_databases)
"""Function that returns every database of one name, as the reference evaluator takes them."""


def _read(path: Path) -> Iterator[tuple[dict, str]]:
    """Yield for every line that is not empty the pair without a fault, or the line's number with its fault."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row, fault = json.loads(line), ""  # from bytes, to ignore a byte order mark
                        texts = [row.get(k, 0) if isinstance(row, dict) else 0 for k in FIELDS]
                        if not all(isinstance(text, str) for text in texts[:2]) or not isinstance(texts[2], str | None):
                            fault = "needs text in db_id, gold and pred"
                    except (ValueError, RecursionError) as error:
                        fault = f"not JSON: {error}"
                    yield ({"line": number}, f"line {number}: {fault}") if fault else (row, "")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {path}: {error}. Check the path and the file.") from error
