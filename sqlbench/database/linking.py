"""Schema linking: choice of the part of a schema beyond the budget that prompts about one question show.

Tables and columns are ranked by BM25 over the words of their names and comments, and by the values that the question
names. Tables that join two ranked ones come in between them, a shown table keeps its primary key, and shown tables keep
the columns that join them. A schema that fits is shown whole; values and sample rows get the remaining room.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import bm25s
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from sqlbench.database.schema import schema_text, with_rows
from sqlbench.database.types import ForeignKey, Schema
from sqlbench.database.values import STOP_WORDS, Place, Values, name_words, words

if TYPE_CHECKING:
    from sqlbench.config import SchemaConfig
    from sqlbench.interfaces import Database

WHOLE = 1 << 30
"""More characters than any schema has."""
SEEDS, HOPS = 8, 3
"""Number of best tables that are joined with each other, and the longest path between two of them."""
FIRST = 4
"""Number of best tables that are opened before columns that the question does not mention."""
FURTHER = 40
"""Number of columns that are tried where fewer fit, so that one that is too long does not hide the next."""
HINTS, HINTS_PER_COLUMN = 10, 2
"""Most columns that show values, and most values per column."""
LONGEST_TOKEN = 16
"""Most characters per token, on average over a text."""
_making = threading.Lock()
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each index


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text for a model that cannot count them: one per three characters."""
    return math.ceil(len(text) / 3)


def prompt_schema(
    schema: Schema,
    database: Database,
    question: str,
    style: str,
    shape: SchemaConfig,
    count: Callable[[str], int] = estimate_tokens,
) -> tuple[Schema, str]:
    """Return the part of a schema that prompts about a question show, and its text, which never exceeds the budget.

    Args:
        schema: the whole schema.
        database: source of sample rows and values.
        question: the question in words.
        style: ``compact`` or ``ddl`` (`sqlbench.database.schema.schema_text`); only ``ddl`` shows values.
        shape: the budget, and what is shown beside tables and columns.
        count: counts the tokens of a text, where the budget is in tokens.
    """
    tokens, most_rows = shape.schema_tokens, shape.sample_rows or 0
    room = shape.table_info_truncate if tokens is None else LONGEST_TOKEN * tokens

    def fits(some: Schema, characters: int = WHOLE) -> bool:
        text = schema_text(some, style, characters)
        return len(text) <= room and (tokens is None or count(text) <= tokens)

    def cut() -> tuple[Schema, str]:
        full = with_rows(schema, database, most_rows) if most_rows else schema
        longest = room if tokens is None else _most(room, lambda n: fits(full, n))
        return full, schema_text(full, style, longest)

    if not shape.schema_linking:
        return cut()
    whole_fits = fits(schema)
    if whole_fits and not most_rows and not shape.value_hints:
        return schema, schema_text(schema, style, WHOLE)
    linker = _linker(schema, database if shape.value_hints else None)
    named = linker.values.named_in(question) if linker.values else {}
    order = linker.order(question, named)
    shown = [place for place in order if place in named][:HINTS] if style == "ddl" else []
    hints = {place: tuple(map(_literal, named[place][:HINTS_PER_COLUMN])) for place in shown}
    if not whole_fits:
        part = linker.fill(order, hints, fits, room)
        return (part, schema_text(part, style, WHOLE)) if part.tables else cut()

    def with_values(number: int) -> Schema:
        return _with_values(schema, dict(list(hints.items())[:number]))

    valued = with_values(_most(len(hints), lambda n: fits(with_values(n))))
    rows = with_rows(schema, database, most_rows).tables if most_rows else ()
    tables = list(dict.fromkeys(t for t, _ in order))

    def illustrated(number: int) -> Schema:
        chosen = set(tables[:number])
        shown = (replace(t, rows=rows[i].rows) if i in chosen else t for i, t in enumerate(valued.tables))
        return replace(valued, tables=tuple(shown))

    best = illustrated(_most(len(tables) * bool(rows), lambda n: fits(illustrated(n))))
    return best, schema_text(best, style, WHOLE)


def _most(number: int, good: Callable[[int], bool]) -> int:
    """Return the largest number up to `number` that is good, where all smaller ones are good too, and 0 always is."""
    return bisect_left(range(1, number + 1), True, key=lambda n: not good(n))


def _literal(value: str) -> str:
    """Write a value as a query needs it."""
    return "'" + value.replace("'", "''") + "'"


def _with_values(schema: Schema, values: Mapping[Place, tuple[str, ...]]) -> Schema:
    tables = list(schema.tables)
    for (t, c), texts in values.items():
        columns = list(tables[t].columns)
        columns[c] = replace(columns[c], values=texts)
        tables[t] = replace(tables[t], columns=tuple(columns))
    return replace(schema, tables=tuple(tables))


def _linker(schema: Schema, database: Database | None) -> Linker:
    """Return the linker of a schema, made once; with the database given, it knows values."""
    has_values = database is not None
    with _making:  # many rollouts begin at the same time
        if has_values not in schema.linkers:
            schema.linkers[has_values] = Linker(schema, Values(schema, database) if database is not None else None)
        return schema.linkers[has_values]


class Linker:
    """Ranks the tables and columns of one schema by questions."""

    def __init__(self, schema: Schema, values: Values | None = None) -> None:
        self.schema, self.values = schema, values
        tables = schema.tables
        self.places: list[Place] = [(t, c) for t, table in enumerate(tables) for c in range(len(table.columns))]
        self.start = np.cumsum([0, *(len(table.columns) for table in tables)])
        names = [[name_words(c.name) + words(c.comment) for c in table.columns] for table in tables]
        # A table's own name says more about it than its columns do.
        own_and_columns = zip(tables, names, strict=True)
        self.tables = _index([3 * name_words(t.label) + list(chain(*columns)) for t, columns in own_and_columns])
        self.columns = _index([table_names[c] for table_names in names for c in range(len(table_names))])
        self.primary = [{c for c, column in enumerate(table.columns) if column.primary_key} for table in tables]
        self.links: list[list[tuple[ForeignKey, int, int, int | None]]] = [[] for _ in tables]
        """References of each table, with their column and the table and column referred to."""
        at = {(table.name.lower(), table.schema): t for t, table in enumerate(tables)}
        columns = [{column.name.lower(): c for c, column in enumerate(table.columns)} for table in tables]
        for t, table in enumerate(tables):
            for key in table.foreign_keys:
                c, target = columns[t].get(key.column.lower()), at.get((key.ref_table.lower(), key.ref_schema))
                if c is not None and target is not None:
                    self.links[t].append((key, c, target, columns[target].get(key.ref_column.lower())))
        self.edges = sorted({(t, target) for t, links in enumerate(self.links) for *_, target, _ in links})

    def order(self, question: str, named: Mapping[Place, Sequence[str]]) -> list[Place]:
        """Return all columns, those that the question most likely needs first.

        Args:
            question: the question in words.
            named: the values that the question names, by column.
        """
        spoken = [word for word in words(question) if word not in STOP_WORDS]
        fit = _scores(self.columns, spoken, len(self.places))
        shared = Counter(value for values in named.values() for value in values)
        for (t, c), values in named.items():  # a value of many columns says less about each
            fit[self.start[t] + c] += 2 * min(3, sum(len(value.split()) / shared[value] ** 0.5 for value in values))
        spans = [slice(*span) for span in zip(self.start, self.start[1:], strict=False)]
        table_fit = _scores(self.tables, spoken, len(spans))
        table_fit += 0.5 * np.array([max(fit[span], default=0.0) for span in spans])
        chances = self._joined(table_fit / (table_fit.max(initial=0) or 1))
        fit /= fit.max(initial=0) or 1
        worth, best = np.empty(len(fit)), set(np.argsort(-chances, kind="stable")[:FIRST])
        for t, span in enumerate(spans):
            if span.start < span.stop:
                worth[span] = chances[t] * (0.3 + 0.7 * fit[span])
                opening = span.start + (min(self.primary[t]) if self.primary[t] else int(worth[span].argmax()))
                worth[opening] = max(worth[opening], chances[t] * (2.0 if t in best else 0.9))
        return [self.places[i] for i in np.argsort(-worth, kind="stable")]

    def _joined(self, fit: Any) -> Any:
        """Return each table's chance of being needed, raised for tables that join good ones or are joined to one."""
        chances = np.maximum(fit, 1e-6)
        for a, b in self.edges:
            chances[a], chances[b] = max(chances[a], 0.4 * fit[b]), max(chances[b], 0.4 * fit[a])
        seeds = [int(t) for t in np.argsort(-fit, kind="stable")[:SEEDS] if fit[t] > 0]
        if not self.edges or not seeds:
            return chances
        graph = csr_array((np.ones(len(self.edges)), np.transpose(self.edges)), shape=(len(fit), len(fit)))
        how = {"directed": False, "unweighted": True, "limit": HOPS, "return_predecessors": True}
        for seed, before in zip(seeds, dijkstra(graph, indices=seeds, **how)[1], strict=True):
            for other in seeds:
                t = before[other]
                while t >= 0 and t != seed:  # a negative number is a missing predecessor
                    chances[t] = max(chances[t], 0.9 * min(fit[seed], fit[other]))
                    t = before[t]
        return chances

    def fill(
        self, order: list[Place], values: Mapping[Place, tuple[str, ...]], fits: Callable[[Schema], bool], room: int
    ) -> Schema:
        """Return the part of the schema that takes columns in an order until no more fit."""
        spent = np.cumsum([len(self.schema.tables[t].columns[c].name) for t, c in order])
        number = _most(int(np.searchsorted(spent, room, "right")), lambda n: fits(self.part(order[:n], values)))
        chosen = order[:number]
        for place in order[number : max(number, FURTHER)]:
            if fits(self.part([*chosen, place], values)):
                chosen.append(place)
        return self.part(chosen, values)

    def part(self, places: Iterable[Place], values: Mapping[Place, tuple[str, ...]]) -> Schema:
        """Return these columns, with primary keys and the columns that join their tables, in the schema's order."""
        shown: dict[int, set[int]] = defaultdict(set)
        for t, c in places:
            shown[t].add(c)
        for t in shown:
            shown[t] |= self.primary[t]
            for _, c, target, key in self.links[t]:
                if target in shown:
                    shown[t].add(c)
                    shown[target] |= set() if key is None else {key}
        tables = []
        for t, columns in sorted(shown.items()):
            table = self.schema.tables[t]
            parts = tuple(replace(table.columns[c], values=values.get((t, c), ())) for c in sorted(columns))
            links = tuple(key for key, _, target, _ in self.links[t] if target in shown)
            tables.append(replace(table, columns=parts, foreign_keys=links))
        return replace(self.schema, tables=tuple(tables), part=True)


def _index(texts: list[list[str]]) -> Any:
    if not texts:
        return None
    index = bm25s.BM25()
    index.index(texts, show_progress=False)
    return index


def _scores(index: Any, spoken: Sequence[str], number: int) -> Any:
    indexed = [word for word in spoken if index is not None and word in index.vocab_dict]
    return index.get_scores(indexed).astype(float) if indexed else np.zeros(number)
