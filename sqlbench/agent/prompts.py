"""Builds prompts from named components, and parses the answers of models.

Two families share one graph: ``chat`` (the long prompts that instruction-tuned models expect) and ``nano`` (the few
words on which the embedded policy was trained). ``prompts/chat.toml`` and ``prompts/nano.toml`` hold their components:
plain text with ``{fields}``, of which only the known ones are filled in, so a component may hold any other braces.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from sqlbench.agent.trajectory import Execution, Message, Record
from sqlbench.config import Strategy
from sqlbench.database.schema import identifier, shown
from sqlbench.database.types import Schema
from sqlbench.errors import ModelError

CORRECT, INCORRECT = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"


class _Names(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


DIALECTS = _Names(sqlite="SQLite", postgresql="PostgreSQL", duckdb="DuckDB")
"""Dialects as prompts call them; one of your own keeps its name."""
RESAMPLE = "resample"
STRATEGIES: tuple[str, ...] = get_args(Strategy)
"""Repair strategies that a rewrite can follow.

`RESAMPLE` forgets the query and samples another from the prompt of the first one. The component ``repair.<strategy>``
holds the words of any other.
"""

FAMILIES = ("chat", "nano")
_FIELD = re.compile(r"\{(dialect|question|schema|sql|execution|feedback|history|strategy)\}")


class Prompts(Record):
    """The prompt components in use: a family's own, or an edited copy of them."""

    family: str
    components: dict[str, str]

    def write(self, question: str, schema_text: str, dialect: str) -> list[Message]:
        """Return the prompt for the first query."""
        return self._fill("write", dialect=dialect, question=question, schema=schema_text)

    def check(self, question: str, schema_text: str, dialect: str, sql: str, execution_text: str) -> list[Message]:
        """Return the prompt for a verdict on an executed query."""
        return self._fill(
            "check", dialect=dialect, question=question, schema=schema_text, sql=sql, execution=execution_text
        )

    def rewrite(
        self,
        question: str,
        schema_text: str,
        dialect: str,
        sql: str,
        execution_text: str,
        feedback: str,
        earlier: Sequence[tuple[str, str]] = (),
        strategy: str | None = None,
    ) -> list[Message]:
        """Return the prompt for the next query.

        Args:
            sql, execution_text: the last query and the database's reply.
            feedback: the check's answer.
            earlier: queries before the last one, oldest first, each with the database's reply.
            strategy: one of `STRATEGIES` other than `RESAMPLE`, or None to leave the choice to the model.
        """
        dialect_name = DIALECTS[dialect]
        return self._fill(
            "rewrite",
            dialect=dialect,
            question=question,
            schema=schema_text,
            sql=sql,
            execution=execution_text,
            feedback=feedback,
            history="".join(self._component("rewrite.history", sql=q, execution=result) for q, result in earlier),
            strategy=self._component(f"repair.{strategy}", dialect=dialect_name) if strategy else "",
        )

    def result(self, execution_text: str) -> Message:
        """Return the next message of a conversation: the database's reply."""
        return Message(role="user", content=self._component("conversation.user", execution=execution_text))

    def toml(self) -> str:
        """Write all components as a file that `prompts_for` reads."""
        import tomli_w

        tables: dict[str, Any] = {"family": self.family}
        for name, text in self.components.items():
            table, _, key = name.partition(".")
            tables.setdefault(table, {})[key] = text
        return tomli_w.dumps(tables, multiline_strings=True)

    def _component(self, name: str, **fields: str) -> str:
        return _FIELD.sub(lambda m: fields.get(m[1], m[0]), self.components[name])

    def _fill(self, agent: str, **fields: str) -> list[Message]:
        fields["dialect"] = DIALECTS[fields["dialect"]]
        return [Message(role=r, content=self._component(f"{agent}.{r}", **fields)) for r in ("system", "user")]


def prompts_for(name: str) -> Prompts:
    """Read the components of a family (``nano`` or ``chat``), or of a TOML file of one's own.

    A file holds some components in the form of ``prompts/chat.toml``; the others are those of the family that its key
    ``family`` names, by default ``chat``.

    Raises:
        ModelError: the family is unknown, or the file does not hold prompt components.
    """
    family, edits = name, {}
    if name.endswith(".toml"):
        try:
            edits = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot read prompts from {name}: {error}. Write them as in prompts/chat.toml."
            ) from error
        family = edits.pop("family", "chat")
    if family not in FAMILIES:
        choices = ", ".join(FAMILIES)
        raise ModelError(f"Unknown prompt family: {family}. Choose one of {choices}, or a .toml file of components.")
    components = dict(_shipped(family))
    for key, text in _flat(edits).items():
        if key not in components or not isinstance(text, str):
            raise ModelError(f"Not a prompt component: {key} in {name}. Choose from: {', '.join(components)}.")
        components[key] = text
    return Prompts(family=family, components=components)


@cache
def _shipped(family: str) -> dict[str, str]:
    return _flat(tomllib.loads((Path(__file__).with_suffix("") / f"{family}.toml").read_text(encoding="utf-8")))


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Name the components of TOML tables ``<table>.<key>``."""
    pairs = ((table, texts if isinstance(texts, dict) else {"": texts}) for table, texts in tables.items())
    return {f"{table}.{key}".rstrip("."): text for table, texts in pairs for key, text in texts.items()}


def schema_style(family: str) -> str:
    """Return the style of `sqlbench.database.schema.schema_text` that a family reads."""
    return "compact" if family == "nano" else "ddl"


def truncate(text: str, max_chars: int, mark: str = " ... (truncated)") -> str:
    """Cut a text to at most `max_chars` characters, ending in `mark` if it is cut and the mark fits."""
    if len(text) <= max_chars:
        return text
    return text[: max_chars - len(mark)] + mark if max_chars > len(mark) else text[:max_chars]


def render_execution(
    execution: Execution, family: str, max_chars: int, schema: Schema | None = None, schema_text: str | None = None
) -> str:
    """Render an execution as a prompt shows it, in at most `max_chars` characters.

    Args:
        execution: the statement's recorded result.
        family: ``nano`` gives one line in its training form, anything else a small table.
        max_chars: length at which the text is cut.
        schema: if given, an unknown table or column is followed by the closest existing names, and a column that only
            other tables have by those tables.
        schema_text: text of the schema in the prompt; only names that it shows are suggested.
    """
    if not execution.answered:
        message = " ".join((execution.error or execution.status).split())
        text = f"error: {message}{_hint(message, schema, family, schema_text)}"
    elif execution.n_rows == 0:
        text = "empty result"
    elif family == "nano":
        cells = ["NULL" if cell is None else str(cell)[:20] for cell in execution.rows[0][:3]]
        text = f"{execution.size if execution.cut else f'{execution.n_rows} rows'}: {', '.join(cells)}"
    else:
        lines = [" | ".join("NULL" if cell is None else str(cell) for cell in row) for row in execution.rows]
        more = execution.n_rows - len(execution.rows)
        tail = ["... (more rows)"] if execution.cut else [f"... ({more} more rows)"] if more > 0 else []
        text = "\n".join([execution.size, " | ".join(execution.columns), *lines, *tail])
    return truncate(text, max_chars, "" if family == "nano" else " ... (truncated)")


_UNKNOWN = (
    re.compile(r"no such (table|column): (?:\w+\.)?(\w+)$"),
    re.compile(r"(relation|column) \"?(?:\w+\.)?(\w+)\"? does not exist"),
)


def _hint(message: str, schema: Schema | None, family: str, schema_text: str | None) -> str:
    match = next((m for pattern in _UNKNOWN if (m := pattern.search(message))), None)
    if schema is None or match is None:
        return ""
    if schema_text is not None:
        schema = shown(schema, schema_text, schema_style(family))
    if match[1] == "column":
        names = {c.name: identifier(c.name, schema.dialect) for table in schema.tables for c in table.columns}
        if match[2] in names:  # it exists, but not in the tables of the query
            tables = [table.label for table in schema.tables if match[2] in {column.name for column in table.columns}]
            return f", {match[2]} is in {' or '.join(tables[:2])}"
    else:  # among tables with the same name, the first has no schema prefix if any has none
        names = {t.name: identifier(t.name, schema.dialect, t.schema) for t in reversed(schema.tables)}
    close = difflib.get_close_matches(match[2], sorted(names), 2, 0.4)
    return f", use {' or '.join(map(names.__getitem__, close))}" if close else ""


# Hostile answers hold thousands of marks, so no pattern below can backtrack over what it has matched.
_FENCE = re.compile(r"`{3,}|^[ \t]*+~{3,}", re.MULTILINE)
_TAG = re.compile(
    r"[ \t]*+(?:(sql|sqlite|mysql|postgres|postgresql|pgsql|duckdb)\b|(?!(?:select|with|values)\b)[\w+-]*+[ \t]*+\n)",
    re.IGNORECASE,
)
_ELEMENT = re.compile(
    r"<(sql|query|sql_?query|answer|final_answer|solution)>(.*?)(?:</\1>|\Z)", re.IGNORECASE | re.DOTALL
)
_LABEL = re.compile(
    r"^[ \t*_#>]*+(?:(?:final|corrected) )?(?:sql[ _]?query|sql|query)(?:[*_`]*+[ \t]*+:[*_`]*+|[ \t]*+$)",
    re.IGNORECASE | re.MULTILINE,
)
_NEXT_LABEL = re.compile(r"\n[ \t*_#>]*+(?:sql ?result|result|answer|explanation|question)[*_]*+:", re.IGNORECASE)
LABELS = 20
"""Most labels that are tried, from the last one back."""
_QUERY = re.compile(r"(?:\s|\(|--[^\n]*+|(?>/\*.*?\*/))*+(?:select|with|values)\b", re.IGNORECASE | re.DOTALL)


def extract_sql(text: str) -> str:
    """Return the query in a model's answer.

    It is looked for in elements such as ``<sql>``, then in blocks fenced by backticks or tildes, then after labels such
    as ``SQLQuery:``. The last one that begins like a query counts, with preference for blocks marked as SQL; without
    any, the last block counts. A block left open (an answer cut at the token limit) reaches to the end. One trailing
    semicolon is removed. Text with none of these is returned as it is: the database decides whether it is SQL.
    """
    text = text.rsplit("</think>", 1)[-1]
    if not _QUERY.match(text):
        for element in reversed(_ELEMENT.findall(text)):
            if _QUERY.match(sql := _innermost(element[1])):
                return _trim(sql)
    return _trim(_innermost(text))


def is_query(text: str) -> bool:
    """Tell whether a text begins like a query; the database decides whether it is one."""
    return _QUERY.match(text) is not None


def _innermost(text: str) -> str:
    best, rank = None, (False, False)
    for block in _blocks(text):
        tag = _TAG.match(block)
        body = _unlabelled(block[tag.end() :] if tag else block)
        body_rank = _QUERY.match(body) is not None, bool(tag and tag[1])
        if body.strip() and (best is None or body_rank >= rank):
            best, rank = body, body_rank
    if rank[0] or best is None:
        return _unlabelled(text) if best is None else best
    labelled = _unlabelled(text)
    return labelled if labelled is not text else best


def _blocks(text: str) -> Iterator[str]:
    """Yield the text between fences; a fence is closed by one at least as long or, without any, by a shorter one."""
    fences = [(mark.start(), mark.end(), mark[0].strip()) for mark in _FENCE.finditer(text)]
    fences.append((len(text), len(text), ""))
    at = 0
    while at < len(fences) - 1:
        _, start, opening = fences[at]
        end, shorter = at + 1, 0
        while end < len(fences) - 1 and not fences[end][2].startswith(opening):
            if not shorter and fences[end][2][0] == opening[0]:
                shorter = end
            end += 1
        if end == len(fences) - 1:
            end = shorter or end
        yield text[start : fences[end][0]]
        at = end + 1


def _unlabelled(text: str) -> str:
    """Return the query after the last label that is followed by one, up to the next label; else the text itself."""
    if not _QUERY.match(text):
        for label in list(_LABEL.finditer(text))[: -LABELS - 1 : -1]:
            if _QUERY.match(text, label.end()):
                return _NEXT_LABEL.split(text[label.end() :], maxsplit=1)[0]
    return text


def _trim(sql: str) -> str:
    return sql.strip().removesuffix(";").rstrip()


_VERDICT = re.compile(r"the query is[\s*_`\"':]*(not\s+|in)?correct\b", re.IGNORECASE)


def parse_verdict(text: str) -> bool:
    """Return whether a check's answer calls the query correct. The last verdict wins; an answer without one means no.

    A missing verdict counts as *incorrect* because a needless rewrite costs one call, and a missed one costs the task.
    """
    verdicts = _VERDICT.findall(text)
    return bool(verdicts) and not verdicts[-1]
