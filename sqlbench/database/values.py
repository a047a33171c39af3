"""Values of text columns that a question names, from an index made once for each content of a database."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING

from bm25s.stopwords import STOPWORDS_EN

from sqlbench.database.schema import quote
from sqlbench.database.types import Limits, Schema
from sqlbench.text import clean

if TYPE_CHECKING:
    from sqlbench.interfaces import Database

SECONDS, SECONDS_PER_COLUMN = 10.0, 0.5
"""Longest time for the index of a database, and for one of its columns; the index then has the values read so far."""
MOST_VALUES, MOST_PER_COLUMN, ROWS_PER_COLUMN = 200_000, 5_000, 20_000
LONGEST = 64
"""Most characters of a value that is indexed."""
MOST_WORDS = 400
"""Most words of a question that are looked up."""
STOP_WORDS = frozenset(STOPWORDS_EN)
_WORD = re.compile(r"[^\W\d_]+|\d+")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_TEXT = ("CHAR", "TEXT", "CLOB", "STRING")

Place = tuple[int, int]
"""The position of a table in a schema, and of a column in the table."""


def words(text: str) -> list[str]:
    """Split a text into lower-case words without their plural endings, and numbers."""
    return [_singular(word) for word in _WORD.findall(text[:10_000].lower())]


def name_words(name: str) -> list[str]:
    """Split a name like `words`, and at capitals; add the name itself, since it may have no letters."""
    return [*words(_HUMP.sub(" ", name[:1000])), name.lower()]


@lru_cache(maxsize=65_536)
def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class Values:
    """Index of values by their words, with the columns that hold them."""

    def __init__(self, schema: Schema, database: Database) -> None:
        self.places: dict[tuple[str, ...], dict[Place, str]] = defaultdict(dict)
        columns = [
            (t, c)
            for t, table in enumerate(schema.tables)
            for c, column in enumerate(table.columns)
            if not column.type or any(kind in column.type.upper() for kind in _TEXT)
        ]
        limit = min(MOST_PER_COLUMN, MOST_VALUES // max(len(columns), 1))
        deadline = time.monotonic() + SECONDS
        for t, c in columns:
            seconds = min(SECONDS_PER_COLUMN, deadline - time.monotonic())
            if seconds <= 0 or limit == 0:
                break
            table, name = schema.tables[t], quote(schema.tables[t].columns[c].name)
            first = f"SELECT {name} FROM {quote(table.name, table.schema)} LIMIT {ROWS_PER_COLUMN}"
            sql = f"SELECT DISTINCT {name} FROM ({first}) AS x WHERE length({name}) BETWEEN 2 AND {LONGEST} ORDER BY 1"
            result = database.execute(f"{sql} LIMIT {limit}", Limits(seconds, limit + 1))
            for (value,) in result.rows if result.ok else ():
                key = tuple(words(value)) if isinstance(value, str) else ()
                if set(key) - STOP_WORDS:
                    self.places[key].setdefault((t, c), clean(" ".join(value.split())))
        self.longest = max(map(len, self.places), default=0)

    def named_in(self, question: str) -> dict[Place, list[str]]:
        """Find the values that a question names, by column; those of more words come first."""
        spoken = words(question)[:MOST_WORDS]
        named: dict[Place, list[str]] = defaultdict(list)
        for size in range(min(self.longest, len(spoken)), 0, -1):
            for key in dict.fromkeys(zip(*(spoken[i:] for i in range(size)), strict=False)):
                for place, value in self.places.get(key, {}).items():
                    named[place].append(value)
        return named
