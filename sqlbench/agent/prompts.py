"""The named prompt components of each model family, and how a prompt is put together from them.

Two families share one graph: ``chat`` (the long prompts that instruction-tuned models expect) and ``nano`` (the few
words on which the embedded policy was trained). A component is plain text with ``{fields}``; prompt evolution edits
components, never code. Only the known fields are filled in, so a component may hold any other braces.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from sqlbench.agent.trajectory import Execution, Message, Record
from sqlbench.database.schema import identifier, shown
from sqlbench.database.types import Schema
from sqlbench.errors import ModelError

CORRECT, INCORRECT = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"
DIALECTS = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
STRATEGIES = (
    "rewrite_full",
    "fix_column",
    "fix_table",
    "add_groupby",
    "rewrite_cte",
    "fix_syntax",
    "change_dialect",
    "relax_filter",
)
"""The repair strategies a rewrite can be told to follow; the component ``repair.<strategy>`` says each in words."""

NANO = {
    "write.system": "write {dialect}",
    "write.user": "{question}\n{schema}",
    "rewrite.system": "rewrite {dialect}",
    "rewrite.user": "{question}\n{schema}{history}\n query: {sql}\n result: {execution}{strategy}",
    "rewrite.history": "\n query: {sql}\n result: {execution}",
    "check.system": "check {dialect}",
    "check.user": "{question}\n{schema}\n query: {sql}\n result: {execution}",
    **{f"repair.{name}": f"\n repair: {name.replace('_', ' ')}" for name in STRATEGIES},
}

CHAT = {
    "write.system": """\
You are a senior data analyst who answers questions by writing one {dialect} query.

How to work:
- Use only the tables and columns of the schema below, spelled exactly as they are there.
- Return the columns the question asks for, in the order it names them, and no others.
- Prefer the simplest query that answers the question; join only the tables it needs.
- Write a single read-only statement: no comments, no second statement, no changes to the data.

Give the query in one block and nothing after it:
```sql
SELECT ...
```""",
    "write.user": "Schema ({dialect}):\n{schema}\n\nQuestion: {question}",
    "check.system": """\
You review {dialect} queries written by a colleague. You see the schema, the question, the query and what the database
answered. Decide whether the query answers the question.

Look for these mistakes in particular:
- a table or column that does not exist, or the wrong one of two similar columns
- a join that is missing, superfluous, or on the wrong columns
- conditions that are missing, inverted (> for <, AND for OR), or compare with the wrong value or type
- NOT IN over values that may be NULL; UNION where duplicates must stay; BETWEEN with the wrong ends
- grouping or aggregation at the wrong level, COUNT where COUNT(DISTINCT) is meant, HAVING mixed up with WHERE
- the wrong sort direction, a missing or wrong LIMIT
- columns that were not asked for, or asked for and absent
- functions or syntax that {dialect} does not have
- a result that is an error, or is empty or implausible for the question

Explain every mistake in a sentence or two. Then end with exactly one of these two lines:
THE QUERY IS CORRECT
THE QUERY IS INCORRECT""",
    "check.user": """\
Schema ({dialect}):
{schema}

Question: {question}

Query:
```sql
{sql}
```

Result:
{execution}""",
    "rewrite.system": """\
You are a senior data analyst. An earlier {dialect} query did not answer the question. Using the database's answer and
the reviewer's remarks, write a corrected query.

How to work:
- Fix the cause, not the symptom: if the approach was wrong, start afresh instead of patching it.
- Do not repeat the earlier query unchanged.
- Use only the tables and columns of the schema below, spelled exactly as they are there.
- Return the columns the question asks for, in the order it names them, and no others.
- Write a single read-only statement: no comments, no second statement, no changes to the data.

Give the corrected query in one block and nothing after it:
```sql
SELECT ...
```""",
    "rewrite.user": """\
Schema ({dialect}):
{schema}

Question: {question}{history}

Earlier query:
```sql
{sql}
```

Result:
{execution}

Reviewer's remarks:
{feedback}{strategy}""",
    "rewrite.history": """

A query before that, which failed too and must not come again:
```sql
{sql}
```

Result:
{execution}""",
    "repair.rewrite_full": """

This time, put the earlier query aside and write a new one from the question and the schema.""",
    "repair.fix_column": """

This time, check every column name against the schema and replace those that do not exist or belong to another table;
leave the rest as it is.""",
    "repair.fix_table": """

This time, check which tables hold what the question asks for and correct FROM and JOIN; leave the rest as it is.""",
    "repair.add_groupby": """

This time, look at the grouping: every plain column beside an aggregate belongs into GROUP BY, and conditions on
aggregates into HAVING.""",
    "repair.rewrite_cte": """

This time, take the query apart into named steps with WITH, one for each part of the question.""",
    "repair.fix_syntax": """

This time, change only what the parser objects to: quotes, commas, brackets, the order of clauses.""",
    "repair.change_dialect": """

This time, replace every function and every piece of syntax that {dialect} does not have.""",
    "repair.relax_filter": """

This time, look at the conditions: compare with values as they are stored (case, spelling, type), and drop conditions
that the question does not ask for.""",
}

FAMILIES = {"chat": CHAT, "nano": NANO}
_FIELD = re.compile(r"\{(dialect|question|schema|sql|execution|feedback|history|strategy)\}")


class Prompts(Record):
    """The prompt components in use: a family's own, or an edited copy of them."""

    family: str
    components: dict[str, str]

    def write(self, question: str, schema_text: str, dialect: str) -> list[Message]:
        """The prompt for the first query."""
        return self._fill("write", dialect=dialect, question=question, schema=schema_text)

    def check(self, question: str, schema_text: str, dialect: str, sql: str, execution_text: str) -> list[Message]:
        """The prompt for a verdict on an executed query."""
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
        """The prompt for the next query.

        Args:
            sql, execution_text: the last query and what the database answered.
            feedback: the check's answer.
            earlier: queries before the last one, oldest first, each with what the database answered.
            strategy: one of `STRATEGIES`, or None to leave the way to the model.
        """
        dialect_name = DIALECTS.get(dialect, dialect)
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

    def _component(self, name: str, **fields: str) -> str:
        return _FIELD.sub(lambda m: fields.get(m[1], m[0]), self.components[name])

    def _fill(self, agent: str, **fields: str) -> list[Message]:
        fields["dialect"] = DIALECTS.get(fields["dialect"], fields["dialect"])
        return [Message(role=r, content=self._component(f"{agent}.{r}", **fields)) for r in ("system", "user")]


def prompts_for(family: str) -> Prompts:
    """The shipped components of a family (``nano`` or ``chat``).

    Raises:
        ModelError: there is no such family.
    """
    if family not in FAMILIES:
        raise ModelError(f"unknown prompt family '{family}'; choose one of: {', '.join(sorted(FAMILIES))}")
    return Prompts(family=family, components=FAMILIES[family])


def schema_style(family: str) -> str:
    """The style of `sqlbench.database.schema.schema_text` that a family reads."""
    return "compact" if family == "nano" else "ddl"


def truncate(text: str, max_chars: int, mark: str = " ... (truncated)") -> str:
    """At most `max_chars` characters of a text, ending in `mark` where something was cut and the mark fits."""
    if len(text) <= max_chars:
        return text
    return text[: max_chars - len(mark)] + mark if max_chars > len(mark) else text[:max_chars]


def render_execution(
    execution: Execution, family: str, max_chars: int, schema: Schema | None = None, schema_text: str | None = None
) -> str:
    """What a prompt shows of an execution, in at most `max_chars` characters.

    Args:
        execution: the statement's recorded result.
        family: ``nano`` gives one line in its training form, anything else a small table.
        max_chars: cut here.
        schema: where given, an unknown table or column is answered with the closest names that exist, and a column of
            other tables than the query's with those.
        schema_text: what the prompt shows of the schema; only what it shows is named.
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
    found = next((m for pattern in _UNKNOWN if (m := pattern.search(message))), None)
    if schema is None or found is None:
        return ""
    if schema_text is not None:
        schema = shown(schema, schema_text, schema_style(family))
    if found[1] == "column":
        names = {c.name: identifier(c.name, schema.dialect) for table in schema.tables for c in table.columns}
        if found[2] in names:  # it exists, only not in the tables of the query
            tables = [table.label for table in schema.tables if found[2] in {column.name for column in table.columns}]
            return f", {found[2]} is in {' or '.join(tables[:2])}"
    else:  # of tables with the same name the first needs no schema before it, if any does not
        names = {t.name: identifier(t.name, schema.dialect, t.schema) for t in reversed(schema.tables)}
    close = difflib.get_close_matches(found[2], sorted(names), 2, 0.4)
    return f", use {' or '.join(map(names.__getitem__, close))}" if close else ""


# Hostile answers hold thousands of marks, so no pattern below can go back over what it has matched.
_FENCE = re.compile(r"`{3,}|^[ \t]*+~{3,}", re.MULTILINE)
_TAG = re.compile(
    r"[ \t]*+(?:(sql|sqlite|mysql|postgres|postgresql|pgsql)\b|(?!(?:select|with|values)\b)[\w+-]*+[ \t]*+\n)",
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
"""Labels that are looked at, from the last one back."""
_QUERY = re.compile(r"(?:\s|\(|--[^\n]*+|(?>/\*.*?\*/))*+(?:select|with|values)\b", re.IGNORECASE | re.DOTALL)


def extract_sql(text: str) -> str:
    """Return the query in a model's answer.

    It is looked for in elements such as ``<sql>``, then in blocks fenced by backticks or tildes, then after labels such
    as ``SQLQuery:``. The last one that begins like a query counts, among blocks first those that are marked as SQL;
    without any, the last block counts. A block left open (an answer cut at the token limit) reaches to the end. One
    trailing semicolon goes. Text with none of these is returned as it is: whether it is SQL is for the database to say.
    """
    text = text.rsplit("</think>", 1)[-1]
    if not _QUERY.match(text):
        for element in reversed(_ELEMENT.findall(text)):
            if _QUERY.match(sql := _innermost(element[1])):
                return _trim(sql)
    return _trim(_innermost(text))


def _innermost(text: str) -> str:
    best, rank = None, (False, False)
    for block in _blocks(text):
        tag = _TAG.match(block)
        body = _unlabelled(block[tag.end() :] if tag else block)
        found = _QUERY.match(body) is not None, bool(tag and tag[1])
        if body.strip() and (best is None or found >= rank):
            best, rank = body, found
    if rank[0] or best is None:
        return _unlabelled(text) if best is None else best
    labelled = _unlabelled(text)
    return labelled if labelled is not text else best


def _blocks(text: str) -> Iterator[str]:
    """What stands between fences; a fence is closed by one as long or, where there is none, by a shorter one."""
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
    """The query after the last label that is followed by one, up to the next label; else the text itself."""
    if not _QUERY.match(text):
        for label in list(_LABEL.finditer(text))[: -LABELS - 1 : -1]:
            if _QUERY.match(text, label.end()):
                return _NEXT_LABEL.split(text[label.end() :], maxsplit=1)[0]
    return text


def _trim(sql: str) -> str:
    return sql.strip().removesuffix(";").rstrip()


_VERDICT = re.compile(r"the query is[\s*_`\"':]*(not\s+|in)?correct\b", re.IGNORECASE)


def parse_verdict(text: str) -> bool:
    """Whether a check's answer calls the query correct. The last verdict wins; an answer without one means no.

    No verdict is treated as *incorrect* because a needless rewrite costs one call, while a missed one costs the task.
    """
    verdicts = _VERDICT.findall(text)
    return bool(verdicts) and not verdicts[-1]
