"""The wording of questions: the words of each phrasing family for an operation, and the slots of a sentence.

The words are data: ``wording.toml`` (operations) and ``frames.toml`` (sentences). Families differ in both:

- ``A``: the only one used in pretraining;
- ``B``, ``C``: first met in reinforcement learning;
- ``D``: never trained on; its operation words are partly those of B and C, partly its own, so that learning B and C can
  carry over to some of D, but not to all of it;
- ``E``: of the sealed split; none of its own words is another family's.

Like people, B to E also use everyday frames and words of A, but no two families share a sentence: each one has a frame
or a word that no earlier family has.

A column's style (in the schema files) says how people speak of it. ``count`` counts things ("with over 9 workers"),
``level`` is never summed; ``in``, ``from`` and ``the`` phrase a text ("in Paris", "from the Green party"). An operation
such as ``age.gt`` in ``wording.toml`` gives a style its own words. Any other style is a verb ("built after 1990").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from pocket.domains import Domain, Field, read_toml

FAMILIES = ("A", "B", "C", "D", "E")
Filler = Callable[[Random], str]
EVERYDAY = 0.8
"""Default probability that B to E use a word of A."""
STYLED = 0.65
"""Probability that a column's own wording is used where it has one."""
_VALUES = frozenset(("{v}", "{w}", "{op}", "{S}", "{cond}", "{cond2}"))
_SMALL = frozenset(read_toml("mistakes.toml")["small_words"])
OPERATIONS = {">": "gt", "<": "lt", ">=": "ge", "<=": "le", "=": "eq"}
"""Operation that phrases an SQL operator."""


def _read(name: str) -> dict[str, dict[str, tuple[str, ...]]]:
    return {key: {f: tuple(words) for f, words in by_family.items()} for key, by_family in read_toml(name).items()}


LEXICON = _read("wording.toml")
FRAMES = _read("frames.toml")


class Skip(Exception):
    """Drawn construct that does not fit the drawn tables; another one is drawn."""


def say(identifier: str) -> str:
    """Write an identifier as words."""
    return identifier.replace("_", " ")


def plural(identifier: str) -> str:
    """Write an identifier as words, in the plural."""
    text = say(identifier)
    if text == "aircraft":
        return text
    if " of " in text:
        head, _, tail = text.partition(" of ")
        return f"{plural(head)} of {tail}"
    if text.endswith(("ss", "us", "x", "ch", "sh")):
        return text + "es"
    if text.endswith("s"):
        return text
    return text[:-1] + "ies" if re.search("[^aeiou]y$", text) else text + "s"


def article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return ("an " if re.match(r"[aeio]|u(?!ni|se|ti)|(hour|mpg)\b", noun) else "a ") + noun


def literal(value: object) -> str:
    """Write a value as an SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


class QuestionBuilder:
    """Source of a construct: a domain, a random generator and the words of one family."""

    def __init__(
        self,
        domain: Domain,
        rng: Random,
        family: str,
        everyday: float = EVERYDAY,
        filler: Filler | None = None,
        late: bool = False,
        telling: bool = False,
    ) -> None:
        self.domain, self.rng, self.family, self.everyday = domain, rng, family, everyday
        self.filler, self.late, self.telling = filler, late, telling
        self.form = ""
        self.slots: dict[str, str] = {}
        self.n_shown = 1
        self.own: list[str] = []
        """Wordings drawn so far that no earlier family has."""

    # ---- words

    def word(self, operation: str) -> str:
        """Draw one of the family's words for an operation."""
        family = "A" if self.rng.random() < self.everyday else self.family
        by_family = LEXICON[operation]
        words = self.rng.choice(by_family.get(family, by_family["A"]))
        earlier = FAMILIES[: FAMILIES.index(self.family)]
        if operation not in ("ask", "tell") and all(words not in by_family.get(f, ()) for f in earlier):
            self.own.append(words)
        if "{" in words and operation != "ask":
            return self.disturb(words)
        if self.filler and self.late and self.rng.random() < (0.25 if operation in ("ask", "tell") else 0.15):
            return self.filler(self.rng)
        return words

    def own_words_in(self, text: str) -> bool:
        """Return whether a sentence holds a wording that no earlier family has."""
        lowered = text.lower()
        return any(all(piece.lower() in lowered for piece in re.split(r"\{\w+\}", wording)) for wording in self.own)

    def disturb(self, pattern: str) -> str:
        """Insert idle words into a pattern and drop small ones (if a filler is given); late, also replace some."""
        if self.filler is None:
            return pattern
        words: list[str] = []
        for word in pattern.split(" "):
            beside_a_value = _VALUES.intersection(w.rstrip("?.,") for w in (word, *words[-1:]))
            if self.rng.random() < 0.07 and not beside_a_value:
                words.append(self.filler(self.rng))
            fate = self.rng.random() if word in _SMALL else 1.0
            if fate > 0.2 or (self.late and fate > 0.12):
                words.append(self.filler(self.rng) if self.late and fate < 0.24 and not beside_a_value else word)
        return " ".join(words)

    def put(self, **slots: str) -> None:
        """Set slots of the sentence."""
        self.slots.update(slots)

    def about(self, table: str, said: str = "") -> None:
        """Set the subject of the question: a table, with a phrase about its rows; slots ``S`` and ``s``."""
        self.put(S=f"{plural(table)} {said}".strip(), s=f"{say(table)} {said}".strip())

    # ---- tables and columns

    def noun(self, table: str, column: str, many: bool = False) -> str:
        """Name a column in a sentence; the ``maker_name`` of makers is often just their name."""
        if self.domain.field(table, column).style == "count":
            return f"number of {say(column)}"
        short = column == f"{table}_name" and self.rng.random() < 0.5
        return (plural if many else say)("name" if short else column)

    def entity(self) -> str:
        """Choose a table that has an id; slots ``T`` and ``t`` name it."""
        table = self.rng.choice([t for t in self.domain.tables if self.domain.primary(t)])
        self.put(T=plural(table), t=say(table))
        return table

    def link(self, needs_id: bool = True) -> tuple[str, str, str, str]:
        """Choose a foreign key; slots ``T``, ``t`` name the referring table, ``P``, ``p`` the one referred to."""
        links = [k for k in self.domain.links() if self.domain.primary(k[0]) or not needs_id]
        if not links:
            raise Skip
        child, column, parent, key = self.rng.choice(links)
        self.put(T=plural(child), t=say(child), P=plural(parent), p=say(parent))
        return child, column, parent, key

    def relation(self, child: str, key: str) -> str:
        """Draw the word that joins two tables in a sentence."""
        relation = self.domain.field(child, key).style
        return relation if relation and self.rng.random() < STYLED else self.rng.choice(("of", "of", "for"))

    def columns(self, table: str, kinds: str, count: int = 1, nulls: bool = True) -> list[str]:
        """Choose columns by first letters of their kinds (n, c, i, r, y, d)."""
        names = [
            f.name
            for f in self.domain.tables[table]
            if f.kind[0] in kinds and f.kind not in ("id", "key") and (nulls or not f.nullable)
        ]
        if len(names) < count:
            raise Skip
        return self.rng.sample(names, count)

    def column(self, table: str, kinds: str, nulls: bool = True) -> str:
        """Choose one column."""
        return self.columns(table, kinds, 1, nulls)[0]

    def _show(self, table: str, names: list[str]) -> None:
        self.n_shown = len(names)
        self.put(
            cols=_listing([self.noun(table, n) for n in names]),
            COLS=_listing([self.noun(table, n, many=True) for n in names]),
        )

    def shown(self, table: str, kinds: str = "nciryd", counts: Sequence[int] = (1,)) -> list[str]:
        """Choose the columns to show; slots ``cols`` and ``COLS`` list them."""
        names = self.columns(table, kinds, self.rng.choice(counts))
        self._show(table, names)
        return names

    def label(self, table: str) -> str:
        """Choose the name column of a table; slots ``cols`` and ``COLS`` name it."""
        names = [f.name for f in self.domain.tables[table] if f.kind == "name"]
        if not names:
            raise Skip
        self._show(table, names[:1])
        return names[0]

    def value(self, table: str, column: str) -> int | float | str:
        """Draw one of the values of a column."""
        return self.rng.choice(self.domain.values(table, column))

    # ---- phrases about a column

    def _fill(self, pattern: str, table: str, column: str, **slots: object) -> str:
        noun = self.noun(table, column)
        return pattern.format(c=noun, ac=article(noun), C=say(column), **slots)

    def _styled(self, f: Field, operation: str) -> str | None:
        """Return the operation for the column's own words if it has any (always for counts, which have no others)."""
        styled = f"{f.style}.{operation}"
        return styled if styled in LEXICON and (f.style == "count" or self.rng.random() < STYLED) else None

    def number(self, table: str, column: str, operator: str, value: object) -> str:
        """Phrase a comparison with a number, a year or a date."""
        f, name = self.domain.field(table, column), OPERATIONS[operator]
        styled = self._styled(f, name)
        if styled and f.style != "count" and isinstance(value, int | float):
            return self._fill(self.word(styled), table, column, v=value)
        moment = f.kind in ("year", "date")
        op = self.word(styled if styled and f.style == "count" else f"year.{name}" if moment else name)
        op = op.format(v=value) if "{v}" in op else f"{op} {value}".strip()
        if f.style == "count":
            return self._fill(self.word("count"), table, column, op=op)
        within = "in " if name in ("ge", "le", "eq") else ""
        if moment and f.style and self.rng.random() < STYLED:
            return f"{f.style} {within}{op}"
        pattern = self.word("number")
        return self._fill(pattern, table, column, op=f"of {op}" if within and "{ac} {op}" in pattern else op)

    def between(self, table: str, column: str, low: object, high: object) -> str:
        """Phrase a range."""
        f = self.domain.field(table, column)
        if f.kind in ("year", "date") and f.style and self.rng.random() < STYLED:
            return self.word("year.between").format(verb=f.style, v=low, w=high)
        return self._fill(self.word(self._styled(f, "between") or "between"), table, column, v=low, w=high)

    def text(self, table: str, column: str, value: object, operation: str = "is") -> str:
        """Phrase that a text is (or is not) a value."""
        f = self.domain.field(table, column)
        if f.kind == "name" and operation == "is" and re.search("name$|title$|label$", column):
            operation = "named" if column.endswith("name") else "titled"
        quoted = f"'{value}'" if f.kind == "name" and self.rng.random() < 0.15 else value
        return self._fill(self.word(self._styled(f, operation) or operation), table, column, v=quoted)

    def said_of(self, table: str, column: str, operation: str, value: object = "") -> str:
        """Phrase another operation on a column: ``contains``, ``prefix``, ``missing``."""
        f = self.domain.field(table, column)
        return self._fill(self.word(self._styled(f, operation) or operation), table, column, v=value)

    def condition(
        self, table: str, prefix: str = "", avoid: str = "", row: int | None = None, kinds: str = "ccciirryd"
    ) -> tuple[str, str, str]:
        """Draw a condition on one column with a value of any row or the given one: wording, SQL and column."""
        column = self.column(table, self.rng.choice(kinds))
        if column == avoid:
            raise Skip
        f = self.domain.field(table, column)
        value = self.value(table, column) if row is None else self.domain.cell(table, row, column)
        if value is None or (self.telling and f.style == "count" and value == 1):  # "with 1 tickets"
            raise Skip
        if f.kind in ("name", "category"):
            return self.text(table, column, value), f"{prefix}{column} = {literal(value)}", column
        operator = self.rng.choice((">", ">", "<", "<", ">=", "<=", "=") if f.kind in ("integer", "year") else "><")
        phrase = self.number(table, column, operator, value)
        return phrase, f"{prefix}{column} {operator} {literal(value)}", column

    def above(self, table: str, column: str, operator: str) -> str:
        """Phrase that a number is above or below the average."""
        f, name = self.domain.field(table, column), OPERATIONS[operator]
        average = self.word("avg")
        if f.style == "count":
            op = f"{self.word(f'count.{name}')} the {average} number of"
            return self._fill(self.word("count"), table, column, op=op)
        of_what = "" if average == "average" and self.rng.random() < 0.6 else f" {say(column)}"
        op = f"{self.word(name)} the {average}{of_what}"
        return self._fill(self.word("number"), table, column, op=op)

    def aggregate(self, table: str, column: str, function: str = "") -> str:
        """Choose an aggregate function (one that makes sense for the column); slot ``value`` says it."""
        f = self.domain.field(table, column)
        summed = not f.style or f.style == "count"
        name = function or self.rng.choice(("avg", "max", "min", "sum") if summed else ("avg", "max", "min"))
        self.put(value=f"{self.word(name)} {self.noun(table, column)}")
        return name

    def best(self, table: str, column: str, many: str = "") -> str:
        """Choose ``DESC`` or ``ASC`` for a superlative; slots ``S`` and ``s`` name the rows (`many`: their number)."""
        f, name = self.domain.field(table, column), self.rng.choice(("max", "min"))
        rows = f"{many} {plural(table)}" if many else say(table)
        styled = self._styled(f, name) if f.style != "count" else None
        if styled:
            phrase = f"{many} {self.word(styled)} {plural(table) if many else say(table)}".strip()
        elif f.style == "count" and self.rng.random() < 0.8:
            phrase = f"{rows} with {self.word('most' if name == 'max' else 'fewest')} {say(column)}"
        else:
            word = self.word(f"year.{name}" if f.kind == "year" else name)
            phrase = f"{rows} with the {word} {self.noun(table, column)}"
        self.put(S=phrase, s=phrase)
        return "DESC" if name == "max" else "ASC"

    def ordering(self, table: str, column: str) -> str:
        """Choose ``ASC`` or ``DESC``; slot ``order`` says it."""
        way = self.rng.choice(("ASC", "DESC"))
        name = "ascending" if way == "ASC" else "descending"
        if not table:  # by the count of rows
            self.put(order=self.word(name).format(c="number"))
            return way
        f = self.domain.field(table, column)
        general = f"year.{name}" if f.kind == "year" else f"name.{name}" if f.kind == "name" else name
        self.put(order=self._fill(self.word(self._styled(f, name) or general), table, column))
        return way

    def quantity_of(self, share: float = 0.7) -> str:
        """Choose ``DESC`` or ``ASC`` for a count; slots ``most`` and ``rarity`` say it."""
        descending = self.rng.random() < share
        self.put(most=self.word("most" if descending else "fewest"), rarity="most" if descending else "least")
        return "DESC" if descending else "ASC"
