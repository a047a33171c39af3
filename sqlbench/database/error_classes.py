"""Classes of database error messages."""

from __future__ import annotations

import re

ERROR_CLASSES = (
    "no_such_column",
    "no_such_table",
    "syntax",
    "ambiguous_column",
    "type",
    "function",
    "aggregation",
    "timeout",
    "other",
)
_PATTERNS = [
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("timeout", r"no result within|timeout|timed out|interrupted"),
        ("ambiguous_column", r"ambiguous (column|reference)|column reference .* is ambiguous"),
        (
            "aggregation",
            r"misuse of (aggregate|window)|must appear in the group by|aggregate functions? (are|calls)|"
            r"a group by clause is required|having clause on a non-aggregate|group by terms|"
            r"window functions? are not allowed|aggregate function calls cannot|"
            r"cannot contain aggregates",
        ),
        (
            "function",
            r"no such function|wrong number of arguments|function .* does not exist|user-defined function|"
            r"function .* is not unique|not a(n aggregate| window)? function",
        ),
        (
            "no_such_column",
            r"no such column|column .* does not exist|referenced column|cannot join using column|unknown column|"
            r"has no column|invalid reference to from-clause entry",
        ),
        (
            "no_such_table",
            r"no such table|(relation|table with name) .* does not exist|referenced table|no such view|"
            r"missing from-clause entry|unknown table|no tables specified",
        ),
        (
            "type",
            r"datatype mismatch|operator does not exist|invalid input syntax|cannot be matched|cannot cast|"
            r"types? .* and .* cannot|must be type|out of range|division by zero|sub-select returns|"
            r"row value misused|subquery must return|same number of (result )?columns|cannot be cast|"
            r"in an equality|type .* does not exist|no function matches|could not (convert|determine|identify)",
        ),
        (
            "syntax",
            r"syntax error|incomplete input|unrecognized token|parser stack|expression tree|should come after|"
            r"unterminated|at or near",
        ),
    )
]


def error_class(message: str) -> str:
    """Classify an error message of SQLite, PostgreSQL or DuckDB as one of `ERROR_CLASSES`."""
    text = re.sub(r'".*"', '""', message, flags=re.DOTALL)[:1000]  # without the query's own words, which may be many
    return next((name for name, pattern in _PATTERNS if pattern.search(text)), "other")
