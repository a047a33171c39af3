"""How a question is said: the words of each phrasing family for an operation, and a sentence's slots being filled.

Families differ in sentence frames (`pocket.questions`) and in the words for operations:

- ``A``: the only one used in pretraining;
- ``B``, ``C``: first met in reinforcement learning;
- ``D``: never trained on. Its frames are its own; its operation words are partly those of B and C (``exceeding``,
  ``tally``), partly its own, so that learning B and C can carry over to some of D, but not to all of it.

As people do, B, C and D also use everyday frames and words of A, but no sentence is said by two families:
each has a frame or a word that no earlier family has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from pocket.domains import Domain

FAMILIES = ("A", "B", "C", "D")
Filler = Callable[[Random], str]
EVERYDAY = 0.7
"""How often B, C and D use a word of A, unless told otherwise."""
_VALUES = frozenset(("{v}", "'{v}'", "{w}", "{k}", "{cond}", "{cond2}", "{not}"))
_SMALL = frozenset((
    "the", "of", "is", "are", "with", "that", "have", "has", "having", "any", "for", "For", "whose", "there", "its",
    "in",
))  # fmt: skip
COMPARE = {">": "gt", "<": "lt", ">=": "ge", "<=": "le", "=": "eq"}
"""The operation that an SQL operator is said by."""
_OPPOSITE = {"max": "DESC", "min": "ASC"}

# The words of each family for an operation; B, C and D also use those of A, always where they have none of their own.
LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    "ask": {
        "A": (
            "What is",
            "What are",
            "Show",
            "Find",
            "List",
            "Give me",
            "Return",
            "Tell me",
            "Display",
            "Give",
            "Provide",
        ),
        "B": ("I would like to see", "Please show", "Present"),
        "C": ("Report", "We need", "Look up"),
        "D": ("Let me know", "Fetch", "Please present"),
    },
    "for": {
        "A": ("For", "Among", "Of", "Considering"),
        "B": ("Regarding", "With respect to"),
        "C": ("As to", "Going through"),
        "D": ("Looking at", "Concerning"),
    },
    "of": {
        "A": ("of", "of the", "for", "for the", "from the", "belonging to"),
        "B": ("recorded for", "across the"),
        "C": ("tied to the", "held by"),
        "D": ("listed for", "across"),
    },
    "gt": {
        "A": ("greater than", "above", "more than", "over", "larger than", "higher than", "bigger than", "exceeding"),
        "B": ("surpassing",),
        "C": ("beyond",),
        "D": ("surpassing", "beyond", "upwards of"),
    },
    "lt": {
        "A": ("less than", "below", "under", "smaller than", "lower than"),
        "B": ("beneath",),
        "C": ("not reaching",),
        "D": ("beneath", "not reaching"),
    },
    "ge": {
        "A": ("at least", "no less than", "not less than"),
        "B": ("a minimum of",),
        "C": ("not under",),
        "D": ("a minimum of", "not below"),
    },
    "le": {
        "A": ("at most", "no more than", "not more than"),
    },
    "eq": {
        "A": ("equal to", "of", "exactly"),
    },
    "after": {
        "A": ("after", "later than"),
    },
    "before": {
        "A": ("before", "earlier than"),
    },
    "number": {
        "A": (
            "with {c} {op} {v}",
            "with a {c} {op} {v}",
            "whose {c} is {op} {v}",
            "having {c} {op} {v}",
            "where the {c} is {op} {v}",
            "that have a {c} {op} {v}",
        ),
        "B": ("showing {c} {op} {v}",),
        "C": ("if their {c} is {op} {v}",),
        "D": ("that show a {c} {op} {v}",),
    },
    "is": {
        "A": (
            "whose {c} is {v}",
            "with {c} {v}",
            "with {c} '{v}'",
            "that have {c} {v}",
            "whose {c} equals {v}",
            "where the {c} is {v}",
            "having {c} {v}",
        ),
        "B": ("showing {c} {v}",),
        "C": ("if their {c} is {v}",),
        "D": ("that show a {c} of {v}",),
    },
    "is_not": {
        "A": (
            "whose {c} is not {v}",
            "with {c} other than {v}",
            "where the {c} is not {v}",
            "with a {c} different from {v}",
        ),
    },
    "avg": {
        "A": ("average", "mean"),
        "B": ("typical",),
        "C": ("averaged",),
        "D": ("typical",),
    },
    "max": {
        "A": ("maximum", "highest", "largest", "biggest", "greatest"),
        "B": ("top",),
        "C": ("peak",),
        "D": ("top", "peak"),
    },
    "min": {
        "A": ("minimum", "lowest", "smallest", "least"),
        "B": ("bottom",),
        "C": ("tiniest",),
        "D": ("bottom", "tiniest"),
    },
    "sum": {
        "A": ("total", "combined", "summed"),
    },
    "all": {
        "A": ("of all", "of the", "for all", "of all the", "across all"),
    },
    "each": {
        "A": ("for each", "per", "for every", "grouped by"),
        "B": ("broken down by",),
        "C": ("split by",),
        "D": ("broken down by", "split by"),
    },
    "distinct": {
        "A": ("different", "distinct", "unique"),
        "B": ("individual",),
        "C": ("non-repeated",),
        "D": ("individual", "non-repeated", "various"),
    },
    "ascending": {
        "A": (
            "in ascending order of {n}",
            "sorted by {n}",
            "from the lowest to the highest {n}",
            "ordered by increasing {n}",
            "in increasing order of {n}",
        ),
        "B": ("ranked by growing {n}",),
        "C": ("arranged by rising {n}",),
        "D": ("arranged by growing {n}",),
    },
    "descending": {
        "A": (
            "in descending order of {n}",
            "sorted by {n} in descending order",
            "from the highest to the lowest {n}",
            "ordered by decreasing {n}",
            "in decreasing order of {n}",
        ),
        "B": ("ranked by shrinking {n}",),
        "C": ("arranged by falling {n}",),
        "D": ("arranged by shrinking {n}",),
    },
    "most": {
        "A": ("the most", "the largest number of", "the highest number of", "the greatest number of"),
    },
    "fewest": {
        "A": ("the fewest", "the smallest number of", "the lowest number of", "the least number of"),
    },
    "lacking": {
        "A": ("that do not have any", "without any", "that have no", "with no", "lacking any"),
        "B": ("devoid of any",),
        "C": ("with zero",),
        "D": ("devoid of", "with zero"),
    },
    "count": {
        "A": ("the number of", "the total number of", "the count of"),
        "B": ("the tally of",),
        "C": ("the quantity of",),
        "D": ("the tally of", "the full number of"),
    },
}


class Skip(Exception):
    """The drawn construct does not fit the drawn tables; draw again."""


def say(identifier: str) -> str:
    """An identifier as words."""
    return identifier.replace("_", " ")


def plural(identifier: str) -> str:
    """An identifier as words, in the plural."""
    text = say(identifier)
    if text.endswith("s"):
        return text
    if text.endswith("y") and text[-2:-1] not in "aeiou":
        return text[:-1] + "ies"
    return text + ("es" if text.endswith(("x", "ch", "sh")) else "s")


def literal(value: object) -> str:
    """A value as an SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


class Scope:
    """What a construct draws from: a domain, a random generator and the words of one family."""

    def __init__(
        self,
        domain: Domain,
        rng: Random,
        family: str,
        everyday: float = EVERYDAY,
        filler: Filler | None = None,
        late: bool = False,
    ) -> None:
        self.domain, self.rng, self.family, self.everyday = domain, rng, family, everyday
        self.filler, self.late = filler, late
        self.slots: dict[str, str] = {}
        self.own: list[str] = []
        """Wordings drawn so far that no earlier family has."""
        self.keys = ""

    def word(self, operation: str) -> str:
        """One of the family's words for an operation."""
        family = "A" if self.rng.random() < self.everyday else self.family
        said = LEXICON[operation]
        words = self.rng.choice(said.get(family, said["A"]))
        earlier = FAMILIES[: FAMILIES.index(self.family)]
        if operation != "ask" and all(words not in said.get(f, ()) for f in earlier):
            self.own.append(words)
        if "{" in words:
            return self.disturb(words)
        if self.filler and self.late and self.rng.random() < (0.25 if operation == "ask" else 0.15):
            return self.filler(self.rng)
        return words

    def own_words_in(self, text: str) -> bool:
        """Whether a sentence holds a wording that no earlier family has."""
        said = text.lower()
        return any(all(piece.lower() in said for piece in re.split(r"\{\w+\}", own)) for own in self.own)

    def disturb(self, pattern: str) -> str:
        """A pattern with idle words put in and small words lost, late also replaced (where a filler is given)."""
        if self.filler is None:
            return pattern
        kept: list[str] = []
        for word in pattern.split(" "):
            beside_a_value = _VALUES.intersection((word, *kept[-1:]))
            if self.rng.random() < 0.07 and not beside_a_value:
                kept.append(self.filler(self.rng))
            fate = self.rng.random() if word in _SMALL else 1.0
            if fate > 0.2 or (self.late and fate > 0.12):
                kept.append(self.filler(self.rng) if self.late and fate < 0.24 and not beside_a_value else word)
        return " ".join(kept)

    def put(self, **slots: str) -> None:
        """Set slots of the sentence."""
        self.slots.update(slots)

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

    def columns(self, table: str, kinds: str, count: int = 1, nulls: bool = True) -> list[str]:
        """Choose columns by first letters of their kinds (n, c, i, r, y, d)."""
        found = [
            f.name
            for f in self.domain.tables[table]
            if f.kind[0] in kinds and f.kind not in ("id", "key") and (nulls or not f.nullable)
        ]
        if len(found) < count:
            raise Skip
        return self.rng.sample(found, count)

    def column(self, table: str, kinds: str, nulls: bool = True) -> str:
        """Choose one column."""
        return self.columns(table, kinds, 1, nulls)[0]

    def shown(self, table: str, kinds: str = "nciryd", counts: tuple[int, ...] = (1,)) -> list[str]:
        """Choose the columns to show; slot ``cols`` lists them."""
        names = self.columns(table, kinds, self.rng.choice(counts))
        self.put(cols=_listing([say(n) for n in names]))
        return names

    def label(self, table: str) -> str:
        """The name column of a table; slot ``cols`` names it."""
        names = [f.name for f in self.domain.tables[table] if f.kind == "name"]
        if not names:
            raise Skip
        self.put(cols=say(names[0]))
        return names[0]

    def kind(self, table: str, column: str) -> str:
        """Kind of a column."""
        return next(f.kind for f in self.domain.tables[table] if f.name == column)

    def value(self, table: str, column: str) -> int | float | str:
        """One of the values of a column."""
        return self.rng.choice(self.domain.values(table, column))

    def condition(self, table: str, prefix: str = "", avoid: str = "", row: int | None = None) -> tuple[str, str, str]:
        """A condition on one column, with a value of any row or the one given: its wording, its SQL and the column."""
        column = self.column(table, self.rng.choice("cciirynd"))
        if column == avoid:
            raise Skip
        kind = self.kind(table, column)
        value = self.value(table, column) if row is None else self.domain.cell(table, row, column)
        if value is None:
            raise Skip
        if kind in ("name", "category"):
            pattern = self.word("is")
            return pattern.format(c=say(column), v=value), f"{prefix}{column} = {literal(value)}", column
        operator = self.rng.choice((">", ">", "<", "<", ">=", "<=", "=") if kind in ("integer", "year") else (">", "<"))
        name = COMPARE[operator]
        if name in ("gt", "lt") and (kind == "date" or (kind == "year" and self.rng.random() < 0.5)):
            name = "after" if name == "gt" else "before"
        wording = self.word(name)
        pattern = "with {c} of {v}" if wording == "of" else self.word("number")
        return (
            pattern.format(c=say(column), op=wording, v=value),
            f"{prefix}{column} {operator} {literal(value)}",
            column,
        )

    def aggregate(self) -> str:
        """Choose an aggregate function; slot ``agg`` says it."""
        name = self.rng.choice(("avg", "max", "min", "sum"))
        self.put(agg=self.word(name))
        return name

    def extreme(self) -> str:
        """Choose ``DESC`` or ``ASC`` for a superlative; slot ``best`` says it."""
        name = self.rng.choice(("max", "min"))
        self.put(best=self.word(name))
        return _OPPOSITE[name]

    def quantity_of(self, share: float = 0.7) -> str:
        """Choose ``DESC`` or ``ASC`` for a count; slot ``most`` says it."""
        most = self.rng.random() < share
        self.put(most=self.word("most" if most else "fewest"))
        return "DESC" if most else "ASC"
