"""Examples for pretraining the nano policy: prompt messages and answer, endless and deterministic from a seed.

Only phrasing family ``A`` is used, only seen and synthetic domains, and no (database, gold) pair that is held out
for evaluation (`held_out`) appears, neither as an answer nor as a corrupted query.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import dataclass
from random import Random

from pocket.domains import Domain, SchemaGenerator, fill, read_domains, read_toml
from pocket.questions import Question, draw
from sqlbench.agent.prompts import CORRECT, INCORRECT, prompts_for, render_execution
from sqlbench.agent.trajectory import Execution, Message
from sqlbench.database.schema import schema_text
from sqlbench.database.types import Column, ForeignKey, Schema, Table

_MISTAKES: dict[str, list[list[str]]] = read_toml("mistakes.toml")
_TYPES = {"id": "INTEGER", "key": "INTEGER", "integer": "INTEGER", "year": "INTEGER", "real": "REAL"}


def held_out(db_id: str, sql: str) -> bool:
    """Return whether a gold query of a seen database is held out for evaluation (one in five, by content)."""
    return int(hashlib.sha256(f"{db_id}\x1f{sql}".encode()).hexdigest()[:8], 16) % 5 == 0


def connect(domain: Domain, path: str = ":memory:") -> sqlite3.Connection:
    """Write a filled domain to a SQLite database."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN")
    for table, fields in domain.tables.items():
        columns = [f"{f.name} {_TYPES.get(f.kind, 'TEXT')}{' PRIMARY KEY' * (f.kind == 'id')}" for f in fields]
        columns += [
            f"FOREIGN KEY ({f.name}) REFERENCES {f.ref}({domain.primary(f.ref)})" for f in fields if f.kind == "key"
        ]
        connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(fields))})", domain.rows[table])
    connection.execute("COMMIT")
    return connection


def schema_of(domain: Domain, tables: list[str] | None = None) -> Schema:
    """Return the schema of a domain (or of some of its tables, in this order), as introspection would find it."""
    return Schema(
        tuple(
            Table(
                table,
                tuple(Column(f.name, _TYPES.get(f.kind, "TEXT"), True, f.kind == "id") for f in domain.tables[table]),
                tuple(
                    ForeignKey(f.name, f.ref, domain.primary(f.ref) or "")
                    for f in domain.tables[table]
                    if f.kind == "key"
                ),
            )
            for table in tables or domain.tables
        )
    )


def execute(connection: sqlite3.Connection, sql: str) -> Execution:
    """Run a short query of ours or a corruption of one, with a bound on work."""
    connection.set_progress_handler(lambda: 1, 2_000_000)
    try:
        rows = connection.execute(sql).fetchmany(2000)
    except sqlite3.Error as error:
        return Execution(turn=1, sql=sql, status="error", error=str(error))
    return Execution(turn=1, sql=sql, status="ok", rows=[list(row) for row in rows[:20]], n_rows=len(rows))


def same_result(connection: sqlite3.Connection, first: str, second: str) -> bool:
    """Return whether both queries run and give the same rows (in the same order if the second one orders)."""
    connection.set_progress_handler(lambda: 1, 2_000_000)
    try:
        a, b = (connection.execute(q).fetchmany(2000) for q in (first, second))
    except sqlite3.Error:
        return False
    return a == b if "ORDER BY" in second else sorted(map(repr, a)) == sorted(map(repr, b))


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn."""

    agent: str
    messages: list[Message]
    answer: str


class Examples:
    """An endless source of pretraining examples.

    Args:
        seed: seed of everything drawn here.
        starts, middles: word pieces for pseudo-words (see `SchemaGenerator`).
        made_up: share of synthetic schemas at the top level (nearly all below it).
        rewrite, check: shares of these prompts at the top level.
        disturbed: share of questions with idle words inserted and small words dropped, so that the policy learns to
            look a word up in the schema before it takes it for a name.
    """

    def __init__(
        self,
        seed: int,
        starts: list[str] | None = None,
        middles: list[str] | None = None,
        made_up: float = 0.7,
        rewrite: float = 0.15,
        check: float = 0.08,
        disturbed: float = 0.6,
    ) -> None:
        self.rng = Random(f"pretraining {seed}")
        self.inventor = SchemaGenerator(starts, middles)
        self.made_up, self.rewrite, self.check, self.disturbed = made_up, rewrite, check, disturbed
        self.prompts = prompts_for("nano")
        self.seen = [fill(d, self.rng) for d in read_domains("seen")]

    def draw(self, level: int) -> Example:
        """Draw one example; level 2 also mixes in easier ones, level 3 is level 2 with more disturbed questions."""
        rng = self.rng
        late, level = level == 3, min(level, 2)
        agent = "write"
        if level == 2:
            share = rng.random()
            agent = "rewrite" if share < self.rewrite else "check" if share < self.rewrite + self.check else "write"
            level = rng.choice((0, 1)) if rng.random() < 0.12 else 2
        from_seen = rng.random() >= (self.made_up if level == 2 else 0.9)
        if from_seen:
            domain = rng.choice(self.seen)
            if rng.random() < 0.02:
                fill(domain, rng)
        else:
            domain = self.inventor.domain(rng, level)
        question = self.question(domain, level, late)
        schema = self.shown_schema(domain, question.sql, 0.4 if level == 2 else 0.9)
        if agent == "write":
            return Example(agent, self.prompts.write(question.text, schema, "sqlite"), question.sql)
        connection = connect(domain)

        def shown(sql: str) -> str:
            return render_execution(execute(connection, sql), "nano", 2048, schema_of(domain))

        (sql, strategy), answer = self._corrupt(domain, question), question.sql
        if agent == "check":
            sql = question.sql if rng.random() < 0.5 else sql
            answer = CORRECT if sql == question.sql or same_result(connection, sql, question.sql) else INCORRECT
            messages = self.prompts.check(question.text, schema, "sqlite", sql, shown(sql))
        else:
            earlier = [self._corrupt(domain, question)[0] for _ in range(rng.choice((0, 0, 0, 1, 2)))]
            share = rng.random()
            advice = None if share < 0.5 else strategy if share < 0.85 else "rewrite_full"
            messages = self.prompts.rewrite(
                question.text, schema, "sqlite", sql, shown(sql), INCORRECT, [(q, shown(q)) for q in earlier], advice
            )
        connection.close()
        return Example(agent, messages, answer)

    def question(self, domain: Domain, level: int, late: bool = False) -> Question:
        """Draw a question of family A and its query, which is not held out."""
        while True:
            filler = self.inventor.word if self.rng.random() < self.disturbed else None
            question = draw(domain, self.rng, "A", level=level, filler=filler, late=late)
            if not held_out(domain.name, question.sql) or domain.name == "made_up":
                return question

    def shown_schema(self, domain: Domain, sql: str, drop: float) -> str:
        """Write the schema in declared or shuffled order, sometimes without some of the tables that are not needed."""
        tables = list(domain.tables)
        if self.rng.random() < drop:
            words = set(re.findall(r"\w+", sql))
            tables = [t for t in tables if t in words or self.rng.random() < 0.3]
        if self.rng.random() < 0.5:
            self.rng.shuffle(tables)
        return schema_text(schema_of(domain, tables), "compact")

    def _corrupt(self, domain: Domain, question: Question) -> tuple[str, str]:
        for _ in range(20):
            sql, strategy = self._damage(domain, question.sql)
            sql = sql.strip()
            if sql and sql != question.sql and (domain.name == "made_up" or not held_out(domain.name, sql)):
                return sql, strategy
        return question.sql + " LIMIT", "fix_syntax"

    def _damage(self, domain: Domain, sql: str) -> tuple[str, str]:
        """Make one mistake of a small model (a wrong name or operator, a lost part); return it with what repairs it."""
        rng, kind = self.rng, self.rng.random()
        tokens = re.findall(r"'(?:[^']|'')*'|\w+|[^\w\s]+|\s+", sql)
        functions = ("count", "avg", "max", "min", "sum")
        names = [i for i, t in enumerate(tokens) if re.fullmatch(r"[a-z_]+", t) and t not in functions]
        at = rng.choice(names)
        mend = "fix_table" if tokens[at] in domain.tables else "fix_column"
        if kind < 0.25:  # a name miscopied, everywhere
            parts = tokens[at].split("_")
            j = rng.randrange(len(parts))
            word, cut = parts[j], rng.randint(1, max(1, len(parts[j]) - 1))
            foreign, ending = self.inventor.word(rng)[-rng.randint(1, 5) :], word[-rng.randint(1, 3) :]
            parts[j] = word[:cut] + rng.choice(("", foreign, ending))
            return re.sub(rf"\b{tokens[at]}\b", "_".join(parts), sql), mend
        if kind < 0.40:  # another name of this schema
            tokens[at] = rng.choice([*domain.tables, *(f.name for fields in domain.tables.values() for f in fields)])
        elif kind < 0.47:  # a name with a part lost or gained
            name = tokens[at]
            tokens[at] = name.split("_")[0] if "_" in name else name + rng.choice(("s", "_id", "_name"))
        elif kind < 0.56:  # an operator swapped
            pairs = [(a, b) for a, b in _MISTAKES["swaps"] if a in sql]
            return sql.replace(*rng.choice(pairs), 1) if pairs else sql, "rewrite_full"
        elif kind < 0.61:  # a spelling of another dialect
            pairs = [(a, b) for a, b in _MISTAKES["foreign"] if a in sql]
            return sql.replace(*rng.choice(pairs)) if pairs else sql, "change_dialect"
        elif kind < 0.69:  # the end lost
            grouped = "add_groupby" if "GROUP BY" in sql else "rewrite_full"
            return re.sub(r" (WHERE|GROUP BY|ORDER BY|HAVING|LIMIT)\b.*$", "", sql), grouped
        elif kind < 0.77:  # a literal broken
            texts = [i for i, t in enumerate(tokens) if t.startswith("'")]
            if not texts:
                return sql, "relax_filter"
            text = tokens[i := rng.choice(texts)]
            tokens[i] = rng.choice((text.lower(), text[:-2] + "'", text[1:-1]))
            mend = "relax_filter"
        elif kind < 0.86:  # a token lost
            i = rng.choice([i for i, t in enumerate(tokens) if not t.isspace()])
            return "".join(tokens[:i] + tokens[i + 1 :]).replace("  ", " "), "fix_syntax"
        else:  # the answer to another question
            nested = sql.count("SELECT") > 1
            return self.question(domain, 2).sql, "rewrite_cte" if nested else "rewrite_full"
        return "".join(tokens), mend
