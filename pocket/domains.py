"""Domains: abstract schemas with seeded rows, read from ``schemas/*.txt`` or generated for pretraining.

All schemas, word lists and value pools are our own; nothing is taken from another data set. The same `random.Random`
state always gives the same domain and rows. ``seen`` domains may be used in pretraining and training, ``unseen`` ones
only in evaluation, ``sealed`` ones only in the sealed split: the words of both are kept out of the synthetic schemas
too (`NOVEL_WORDS`).

A line of a schema file is a table; a column is ``name[~style][?][=values]``, where ``?`` says that it may be NULL, or
``name>table [relation]`` for a foreign key. The style says how people speak of the column (see `pocket.phrasing`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any

Row = tuple[int | float | str | None, ...]

_HERE = Path(__file__).parent


def read_toml(name: str) -> dict[str, Any]:
    """Read a data file of this package."""
    return tomllib.loads((_HERE / name).read_text(encoding="utf-8"))


_POOLS: dict[str, dict[str, list[str]]] = read_toml("names.toml")
_MADE_UP = read_toml("made_up.toml")
_CATEGORIES, _QUANTITIES, _YEARS = (_MADE_UP[kind] for kind in ("categories", "quantities", "years"))

KEYWORDS = frozenset((_HERE / "keywords.txt").read_text(encoding="utf-8").split())
"""Words never used as synthetic identifiers: SQL keywords and the operation words of the questions."""

_NAMES = ("name", "title")


@dataclass(frozen=True)
class Field:
    """One column of a domain: its meaning, not only its storage."""

    name: str
    kind: str
    """``id``, ``key`` (foreign), ``name``, ``category``, ``integer``, ``real``, ``year`` or ``date``."""
    pool: tuple[str, ...] = ()
    """Categories to draw from, or for a ``name`` the way in which it is made."""
    low: float = 0
    high: float = 0
    nullable: bool = False
    ref: str = ""
    """Table that a ``key`` refers to (its ``id`` column)."""
    style: str = ""
    """Wording for the column in speech; for a ``key``, words that join the two tables in a sentence ("held at")."""


@dataclass
class Domain:
    """Tables in dependency order (a key refers to an earlier table), and their rows once filled."""

    name: str
    tables: dict[str, list[Field]]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    pools: str = "open"
    """Pools of names, cities and so on that fill it: ``open`` or ``sealed``."""

    def field(self, table: str, column: str) -> Field:
        """Return one column."""
        return next(f for f in self.tables[table] if f.name == column)

    def primary(self, table: str) -> str | None:
        """Return the name of the id column, None for a pure link table."""
        return next((f.name for f in self.tables[table] if f.kind == "id"), None)

    def links(self) -> list[tuple[str, str, str, str]]:
        """Return all foreign keys as (table, column, referred table, its id column)."""
        return [
            (table, f.name, f.ref, self.primary(f.ref) or "")
            for table, fields in self.tables.items()
            for f in fields
            if f.kind == "key"
        ]

    def values(self, table: str, column: str) -> list:
        """Return the values of a column that are not NULL, in row order."""
        cells = (self.cell(table, i, column) for i in range(len(self.rows[table])))
        return [cell for cell in cells if cell is not None]

    def cell(self, table: str, row: int, column: str) -> int | float | str | None:
        """Return one value."""
        return self.rows[table][row][[f.name for f in self.tables[table]].index(column)]


def _parse_field(text: str, pools: str) -> Field:
    if ">" in text:
        name, ref = text.split(">")
        ref, _, relation = ref.partition(" ")
        return Field(name, "key", ref=ref, style=relation)
    name, _, values = text.partition("=")
    if not values:
        return Field(name, "id")
    name, nullable = name.removesuffix("?"), name.endswith("?")
    name, _, style = name.partition("~")
    if values in ("person", "surname", "first", "title", "firm", "place"):
        return Field(name, "name", (values,), nullable=nullable)
    if values == "date":
        return Field(name, "date", nullable=nullable, style=style)
    if span := re.fullmatch(r"([\d.]+)-([\d.]+)", values):
        kind = "real" if "." in values else "year" if re.search(r"year|vintage", name) else "integer"
        kind = "integer" if style == "count" else kind
        return Field(name, kind, low=float(span[1]), high=float(span[2]), nullable=nullable, style=style)
    pool = _POOLS[pools].get(values) or values.split("|")
    return Field(name, "category", tuple(pool), nullable=nullable, style=style)


def read_domains(group: str) -> list[Domain]:
    """Read fresh copies of the domains of ``seen``, ``unseen`` or ``sealed``, without rows."""
    domains: list[Domain] = []
    pools = "sealed" if group == "sealed" else "open"
    for line in (_HERE / "schemas" / f"{group}.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            domains.append(Domain(line, {}, pools=pools))
            continue
        table, columns = line.strip().split(": ")
        domains[-1].tables[table] = [_parse_field(c, pools) for c in columns.split("; ")]
    return domains


def _identifier_words(*groups: str) -> set[str]:
    domains = [d for group in groups for d in read_domains(group)]
    names = {n for d in domains for table, fields in d.tables.items() for n in (table, *(f.name for f in fields))}
    return {word for name in names for word in name.split("_")}


NOVEL_WORDS = (
    _identifier_words("unseen", "sealed") - _identifier_words("seen") - {*_QUANTITIES, *_CATEGORIES, "of", "at"}
)
"""Words of unseen and sealed schemas that no pretraining identifier may use."""
WORDS = sorted(set((_HERE / "words.txt").read_text(encoding="utf-8").split()) - NOVEL_WORDS - KEYWORDS)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _name(rng: Random, style: str, pools: str = "open") -> str:
    words = _POOLS[pools]
    if style == "surname":
        return rng.choice(words["last"])
    if style == "first":
        return rng.choice(words["first"])
    if style == "person":
        return f"{rng.choice(words['first'])} {rng.choice(words['last'])}"
    if style == "firm":
        return f"{rng.choice(words['back'])} {rng.choice(words['firm'])}"
    front = "last" if style == "place" and rng.random() >= 0.7 else "front"
    return f"{rng.choice(words[front])} {rng.choice(words['back'])}"


def _unique(rng: Random, size: int, make: Callable[[], Any]) -> list:
    values: dict = {}
    for _ in range(size * 40):
        values.setdefault(make(), None)
        if len(values) == size:
            break
    distinct = list(values)
    return [distinct[i % len(distinct)] for i in range(size)]


def _column(rng: Random, f: Field, size: int, domain: Domain) -> list:
    if f.kind == "id":
        first = rng.choice((1, 1, 101))
        return list(range(first, first + size))
    if f.kind == "key":
        ids = domain.values(f.ref, domain.primary(f.ref) or "")
        used = rng.sample(ids, max(2, len(ids) * 3 // 4))
        return rng.choices(used, [1 + rng.random() * 3 for _ in used], k=size)
    if f.kind == "name":
        if f.pool[0] != "made":
            return _unique(rng, size, lambda: _name(rng, f.pool[0], domain.pools))
        names = f.pool[1:]
        return rng.sample(names, size) if size <= len(names) else [names[i % len(names)] for i in range(size)]
    if f.kind == "category":
        pool = rng.sample(f.pool, min(len(f.pool), rng.randint(4, 7)))
        return rng.choices(pool, [1 + rng.random() * 2 for _ in pool], k=size)
    if f.kind == "date":
        start = date(2015, 1, 1)
        return _unique(rng, size, lambda: (start + timedelta(days=rng.randrange(3200))).isoformat())
    if f.kind == "real":
        return _unique(rng, size, lambda: round(rng.uniform(f.low, f.high), 1))
    return _unique(rng, size, lambda: rng.randint(int(f.low), int(f.high)))


def fill(domain: Domain, rng: Random, size: int | None = None) -> Domain:
    """Fill every table with rows (numbers distinct where their range allows it) and return the domain.

    Args:
        size: rows per table; by default 18-30, and 45-70 in tables that refer to two others.
    """
    domain.rows = {}
    for table, fields in domain.tables.items():
        many = sum(f.kind == "key" for f in fields) > 1
        n = size or (rng.randint(45, 70) if many else rng.randint(18, 30))
        columns = []
        for f in fields:
            column = _column(rng, f, n, domain)
            if f.nullable and size is None:
                column = [None if rng.random() < 0.12 else v for v in column]
            columns.append(column)
        domain.rows[table] = list(zip(*columns, strict=True))
    return domain


# ---- synthetic domains for pretraining ------------------------------------------------------------------------------


def _past(word: str) -> str:
    return word + ("d" if word.endswith("e") else "ed")


class SchemaGenerator:
    """Generates schemas whose identifiers are partly real words, partly pseudo-words, so that a model learns to copy.

    Args:
        starts, middles: word pieces of the tokenizer (with and without a leading space); syllables are used without.
    """

    def __init__(self, starts: list[str] | None = None, middles: list[str] | None = None) -> None:
        self.starts, self.middles = starts or [], middles or []

    def word(self, rng: Random) -> str:
        """Draw a word of the list or, in 45 of 100 cases, a pseudo-word."""
        for _ in range(20 if rng.random() < 0.45 else 0):
            if self.starts and rng.random() < 0.75:
                word = rng.choice(self.starts) + "".join(rng.choices(self.middles, k=rng.choice((1, 2, 2, 3, 3, 4))))
            else:
                syllables = rng.choice((2, 2, 3))
                word = "".join(
                    rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "t"))
                    for _ in range(syllables)
                )
            word += rng.choices(("", "s", "y", "ch", "x"), (86, 4, 6, 2, 2))[0]
            if 4 <= len(word) <= 13 and not word.endswith("ss") and word not in KEYWORDS and word not in NOVEL_WORDS:
                return word
        return rng.choice(WORDS)

    def identifier(self, rng: Random) -> str:
        """Draw one word, two joined by ``_``, or rarely three."""
        style = rng.random()
        if style < 0.6:
            return self.word(rng)
        return self.word(rng) + ("_" if style < 0.95 else "_of_") + self.word(rng)

    def text(self, rng: Random, is_name: bool) -> str:
        """Draw a value of a text column."""
        style = rng.random()
        if is_name:
            if style < 0.55:
                return _name(rng, "person")
            if style < 0.7:
                return _name(rng, rng.choice(("first", "place", "firm", "title")))
            return self.word(rng).capitalize() + (" " + self.word(rng).capitalize() if style < 0.85 else "")
        if style < 0.4:
            return rng.choice(_POOLS["open"]["city"] + _POOLS["open"]["country"])
        if style < 0.65:
            return self.word(rng).capitalize()
        if style < 0.85:
            return self.word(rng)
        return self.word(rng) + " " + self.word(rng) if style < 0.93 else self.word(rng)[: rng.choice((1, 2))].upper()

    def _quantity(self, rng: Random) -> tuple[str, str]:
        """Draw the name and style of a column of numbers."""
        if rng.random() < 0.25:
            return rng.choice(list(_QUANTITIES.items()))
        name, style = self.identifier(rng), rng.choices(("count", "level", ""), (35, 20, 45))[0]
        if style == "count" and not name.endswith("s"):
            return (name, "") if f"{name}s" in KEYWORDS else (f"{name}s", style)
        return name, style

    def _moment(self, rng: Random, unit: str) -> tuple[str, str]:
        """Draw the name and style of a column of years or dates."""
        word = self.word(rng)
        return f"{word}_{unit}", _past(word) if rng.random() < 0.5 else ""

    def _fields(self, rng: Random, table: str, key: str, level: int) -> list[Field]:
        fields: dict[str, Field] = {}

        def add(name: str, kind: str, style: str = "", pool=(), low=0.0, high=0.0, nullable=False) -> None:
            if name not in fields and name != key:
                fields[name] = Field(name, kind, tuple(pool), low, high, nullable, style=style)

        def texts(is_name: bool, size: int) -> list[str]:
            return _unique(rng, size, lambda: self.text(rng, is_name))

        name = rng.choice(_NAMES)
        if rng.random() < 0.5:
            name = f"{table}_name" if rng.random() < 0.7 else self.identifier(rng)
        add(name, "name", pool=["made", *texts(True, 14)])
        for _ in range(rng.choice((1, 1, 2)) if level else 1):
            column, style = self.identifier(rng), "the" if rng.random() < 0.2 else ""
            if rng.random() < 0.25:
                column, style = rng.choice(list(_CATEGORIES.items()))
            add(column, "category", style, texts(False, rng.randint(4, 6)), nullable=rng.random() < 0.1)
        for _ in range(rng.choice((1, 1, 2))):
            column, style = self._quantity(rng)
            high = rng.choice((10, 50, 60, 100, 500, 1000, 5000, 9900, 90000))
            if rng.random() < 0.15 and style != "count":
                add(column, "real", style, (), 1.0, rng.choice((5.0, 50.0)), rng.random() < 0.15)
            else:
                add(column, "integer", style, (), max(1, high // 10), high, rng.random() < 0.15)
        if rng.random() < 0.25:
            column, style = rng.choice(list(_YEARS.items())) if rng.random() < 0.5 else self._moment(rng, "year")
            add(column, "year", style, (), 1950, 2023)
        if level and rng.random() < 0.2:
            column, style = self._moment(rng, "date") if rng.random() < 0.7 else ("date_of_" + self.word(rng), "")
            add(column, "date", style)
        body = list(fields.values())
        rng.shuffle(body)
        return [Field(key, "id"), *body]

    def domain(self, rng: Random, level: int) -> Domain:
        """Draw a schema of 1-2 tables at level 0, 1-3 at level 1 and 2-4 at level 2, with ten rows per table."""
        while True:
            count = rng.choice(((1, 1, 2), (1, 2, 2, 3), (2, 2, 3, 3, 4))[level])
            names = _unique(rng, count, lambda: self.identifier(rng) if rng.random() < 0.35 else self.word(rng))
            if len(set(names)) == count and sum(map(len, names)) <= 45:
                break
        domain = Domain("made_up", {})
        style = rng.random()
        for i, table in enumerate(names):
            key = "id" if style < 0.12 else f"{table}_code" if style > 0.88 else f"{table}_id"
            fields = self._fields(rng, table, key, level)
            link = i >= 2 and i == count - 1 and rng.random() < 0.5
            if link:
                fields = rng.sample(fields[1:], rng.randint(0, 2))
                if rng.random() < 0.5:
                    fields.insert(0, Field(key, "id"))
            for ref in rng.sample(names[:i], 2 if link else 1) if i else []:
                target = domain.primary(ref)
                if target:
                    column = f"{ref}_id" if target == "id" else target
                    reference = Field(column, "key", ref=ref, style=rng.choice(_MADE_UP["relations"]))
                    fields.insert(rng.randint(min(1, len(fields)), len(fields)), reference)
            domain.tables[table] = [f for f in fields if f.name not in names or f.kind in ("id", "key")]
        return fill(domain, rng, 10)
