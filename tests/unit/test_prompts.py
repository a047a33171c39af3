"""Prompts are filled from named components; answers are parsed the same way whatever a model wraps around them."""

from __future__ import annotations

import re

import pytest

from sqlbench.agent.prompts import (
    CORRECT,
    INCORRECT,
    RESAMPLE,
    STRATEGIES,
    Prompts,
    extract_sql,
    parse_verdict,
    prompts_for,
    render_execution,
    schema_style,
    truncate,
)
from sqlbench.agent.trajectory import Execution
from sqlbench.database.schema import schema_text
from sqlbench.database.types import Column, Schema, Table
from sqlbench.errors import ModelError

SCHEMA = Schema(
    tables=(
        Table("singer", (Column("singer_id"), Column("name"), Column("net_worth"))),
        Table("stadium", (Column("stadium_id"), Column("capacity"), Column("town"))),
        Table("club", (Column("club_id"), Column("town"))),
        Table("bar", (Column("bar_id"), Column("town"))),
    )
)


def execution(**fields) -> Execution:
    return Execution(turn=1, sql="SELECT 1", **({"status": "ok"} | fields))


def nano(**fields) -> str:
    return render_execution(execution(**fields), "nano", 2048, SCHEMA)


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1 ;\n", "SELECT 1"),
        ("SELECT ';'", "SELECT ';'"),
        ("SELECT 1; SELECT 2;", "SELECT 1; SELECT 2"),
        ("Sure:\n```sql\nSELECT 1;\n```\nDone.", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nor better\n```SQL\nSELECT 2\n```", "SELECT 2"),
        ("```sql\nSELECT 1\n```\noutput\n```\n1\n```", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        ("```postgres\nSELECT 1\n```", "SELECT 1"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("```SELECT 1```", "SELECT 1"),
        ("```SELECT\nname FROM t```", "SELECT\nname FROM t"),
        ("```with\nx AS (SELECT 1) SELECT * FROM x\n```", "with\nx AS (SELECT 1) SELECT * FROM x"),
        ("```sql\nSELECT name FROM", "SELECT name FROM"),
        ("```sql\n```\nSELECT 1", "```sql\n```\nSELECT 1"),
        ("<think>```sql\nSELECT 0\n```</think>SELECT 1", "SELECT 1"),
        ("SQLQuery: SELECT 1", "SELECT 1"),
        ("SQL: SELECT 1;", "SELECT 1"),
        ("**SQL Query:** SELECT 1", "SELECT 1"),
        ("Here it is.\n\nFinal SQL:\nSELECT 1", "SELECT 1"),
        ("SQL: SELECT 1\nNo:\nSQL: SELECT 2", "SELECT 2"),
        ("Question: how many?\nSQLQuery: SELECT 1\nSQLResult: 3\nAnswer: three", "SELECT 1"),
        ("sql\nSELECT 1", "SELECT 1"),
        ("```sql\nSQL: SELECT 1\n```", "SELECT 1"),
        ("```python\nx = 1\n```\nSQL: SELECT 1", "SELECT 1"),
        ("The SQL: is hard", "The SQL: is hard"),
        ("SELECT '\nSQL: SELECT 2'", "SELECT '\nSQL: SELECT 2'"),
        ("<sql>SELECT 1</sql>", "SELECT 1"),
        ("<SQL>\nSELECT 1;\n</SQL>", "SELECT 1"),
        ("<sql>SELECT 1", "SELECT 1"),
        ("It is\n<answer>\nSELECT 1;\n</answer> as asked", "SELECT 1"),
        ("<query>SELECT 1</query> or <query>SELECT 2</query>", "SELECT 2"),
        ("```sql\nSELECT 0\n```\n<answer>```sql\nSELECT 1\n```</answer>", "SELECT 1"),
        ("```sql\nSELECT 1\n```\n<answer>about 3</answer>", "SELECT 1"),
        ("SELECT '<sql>SELECT 2</sql>'", "SELECT '<sql>SELECT 2</sql>'"),
        ("~~~sql\nSELECT 1\n~~~", "SELECT 1"),
        ("~~~\nSELECT a ~~~ b\n~~~~", "SELECT a ~~~ b"),
        ("````sql\nSELECT 1\n````", "SELECT 1"),
        ("````sql\nSELECT '```'\n````", "SELECT '```'"),
        ("````sql\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n``````", "SELECT 1"),
        ("```\nsql\nSELECT 1\n```", "SELECT 1"),
        ("```\n SQL \nSELECT 1\n```", "SELECT 1"),
        ("```sql\r\nSELECT 1\r\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nFaster with\n```sql\nCREATE INDEX i ON t (a);\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nFaster with\n```\nCREATE INDEX i ON t (a);\n```", "SELECT 1"),
        ("```sql\n-- all\n/* it */ (SELECT 1)\n```\n```sql\nANALYZE\n```", "-- all\n/* it */ (SELECT 1)"),
        ("```sql\nDROP TABLE t\n```", "DROP TABLE t"),
        ("I cannot answer that.", "I cannot answer that."),
        ("", ""),
    ],
)
def test_sql_is_taken_from_whatever_a_model_wraps_it_in(answer, sql):
    assert extract_sql(answer) == sql


MARKS = ["```", "~~~\n", "````\n```\n", "<sql>", "<sql>/*", "sql:/*\n", "sql\n", "/*", "/**/", "(", "--\n", "```sql\n/*",  # noqa: E501
         "</think>", "\n*", "\t\n", "sql:select\nanswer:\n", "the query is not ", "the query is ***", " "]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_an_answer_full_of_marks_is_read_to_its_end(mark):
    for before in ("", "x ", "sql: "):
        answer = before + mark * (100_000 // len(mark))
        assert extract_sql(answer) in answer and not parse_verdict(answer)
    ever_shorter = "".join("`" * n + "\n" for n in range(300, 3, -1))
    assert extract_sql(ever_shorter + mark * 10_000) is not None


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("THE QUERY IS CORRECT", True),
        ("THE QUERY IS INCORRECT", False),
        ("THE QUERY IS INCORRECT.\nOn reflection:\nTHE QUERY IS CORRECT.", True),
        ("THE QUERY IS CORRECT\nNo: THE QUERY IS INCORRECT", False),
        ("The query is **correct**", True),
        ("the query is not correct", False),
        ("It looks correct to me.", False),
        ("the query is correctable", False),
        ("", False),
    ],
)
def test_the_last_verdict_wins_and_none_means_incorrect(answer, correct):
    assert parse_verdict(answer) is correct


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "empty result"),
        ({"n_rows": 1, "rows": [[3]]}, "1 rows: 3"),
        ({"n_rows": 40, "rows": [["a" * 30, None, 1.5, "z"]]}, f"40 rows: {'a' * 20}, NULL, 1.5"),
        ({"status": "error", "error": "no such column: T1.nam"}, "error: no such column: T1.nam, use name"),
        ({"status": "error", "error": "no such column: T1.capacity"},
         "error: no such column: T1.capacity, capacity is in stadium"),
        ({"status": "error", "error": "no such table: stadiums"}, "error: no such table: stadiums, use stadium"),
        ({"status": "error", "error": 'column "capacty" does not exist'},
         'error: column "capacty" does not exist, use capacity'),
        ({"status": "error", "error": "no such column: cap"}, "error: no such column: cap, use capacity"),
        ({"status": "error", "error": "no such column: c"}, "error: no such column: c"),
        ({"status": "error", "error": "no such column: town"},
         "error: no such column: town, town is in stadium or club"),
        ({"status": "error", "error": "no such column: qqqq"}, "error: no such column: qqqq"),
        ({"status": "error", "error": 'near "FORM": syntax error'}, 'error: near "FORM": syntax error'),
        ({"status": "timeout", "error": None}, "error: timeout"),
    ],
)  # fmt: skip
def test_nano_execution_text_is_what_the_embedded_policy_was_trained_on(fields, text):
    assert nano(**fields) == text


@pytest.mark.parametrize("family", ["nano", "chat"])
def test_a_hint_names_only_what_the_prompt_shows_of_the_schema(family):
    style = schema_style(family)
    names = {"table": {t.name for t in SCHEMA.tables}, "column": {c.name for t in SCHEMA.tables for c in t.columns}}
    hinted = set()
    for size in range(len(schema_text(SCHEMA, style, 10_000)) + 1):
        text = schema_text(SCHEMA, style, size)
        for kind, known in names.items():
            for wrong in {*known, *(name + "s" for name in known)}:
                failed = execution(status="error", error=f"no such {kind}: {wrong}")
                hint = render_execution(failed, family, 2048, SCHEMA, text).partition(wrong)[2].replace(wrong, "")
                named = set(re.findall(r"\w+", hint)) & (names["table"] | names["column"])
                assert named <= set(re.findall(r"\w+", text)), (text, wrong, hint)
                hinted |= named
    assert hinted == names["table"] | names["column"]
    cut = max((schema_text(SCHEMA, style, size) for size in range(500)), key=lambda t: len(t) * ("club" not in t))
    assert "town" in cut
    failed = execution(status="error", error="no such column: town")
    assert "club" in render_execution(failed, family, 2048, SCHEMA)
    assert "club" not in render_execution(failed, family, 2048, SCHEMA, cut)


def test_chat_execution_text_shows_columns_rows_and_how_many_are_left_out():
    text = render_execution(execution(columns=["a", "b"], rows=[[1, None], ["x", 2]], n_rows=5), "chat", 2048)
    assert text == "5 rows\na | b\n1 | NULL\nx | 2\n... (3 more rows)"


def test_truncation_counts_characters_and_never_breaks_one():
    rows = [["é日本語🙂" * 50]]
    for limit in (0, 5, 17, 60, 5000):
        for family in ("nano", "chat"):
            text = render_execution(execution(columns=["a"], rows=rows, n_rows=1), family, limit)
            assert len(text) <= limit
            assert text.encode("utf-8").decode("utf-8") == text
    assert truncate("short", 5) == "short"
    assert truncate("x" * 100, 40).endswith("(truncated)")


@pytest.mark.parametrize("family", ["nano", "chat"])
def test_every_prompt_of_a_family_holds_what_it_is_about(family):
    prompts = prompts_for(family)
    fields = ("QUESTION", "SCHEMA", "sqlite")
    write = prompts.write(*fields)
    check = prompts.check(*fields, "SQL", "RESULT")
    rewrite = prompts.rewrite(*fields, "SQL", "RESULT", "FEEDBACK")
    for messages in (write, check, rewrite):
        assert [m.role for m in messages] == ["system", "user"]
        text = messages[0].content + messages[1].content
        assert "SQLite" in text and "QUESTION" in text and "SCHEMA" in text
    for messages in (check, rewrite):
        assert "SQL" in messages[1].content and "RESULT" in messages[1].content
    assert ("FEEDBACK" in rewrite[1].content) == (family == "chat")


def test_braces_in_values_and_components_survive():
    prompts = Prompts(family="nano", components={"write.system": "{json}", "write.user": "{question}"})
    system, user = prompts.write("what is {schema}?", "S", "sqlite")
    assert (system.content, user.content) == ("{json}", "what is {schema}?")


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="chat, nano"):
        prompts_for("gpt")


def test_the_components_of_a_family_are_read_from_its_file():
    nano = prompts_for("nano").components
    assert nano["rewrite.user"] == "{question}\n{schema}{history}\n query: {sql}\n result: {execution}{strategy}"
    worded = [name for name in STRATEGIES if name != RESAMPLE]
    assert {name: nano[f"repair.{name}"] for name in worded} == {
        name: f"\n repair: {name.replace('_', ' ')}" for name in worded
    }
    chat = prompts_for("chat").components
    assert chat.keys() - nano.keys() == {"conversation.user"}
    assert chat["check.system"].endswith(f"\n{CORRECT}\n{INCORRECT}")
    assert chat["rewrite.user"].endswith("remarks:\n{feedback}{strategy}")
    assert all(chat[name].startswith("\n\n") for name in chat if name.startswith(("repair.", "rewrite.history")))


def test_a_file_of_components_replaces_those_that_it_holds(tmp_path):
    (mine := tmp_path / "mine.toml").write_text("[check]\nsystem = 'Is this {dialect} right?'\n")
    prompts, chat = prompts_for(str(mine)), prompts_for("chat")
    assert prompts.check("Q", "S", "sqlite", "SQL", "R")[0].content == "Is this SQLite right?"
    assert prompts.family == "chat" and prompts.components == {
        **chat.components, "check.system": "Is this {dialect} right?"
    }  # fmt: skip
    mine.write_text("family = 'nano'\n")
    assert prompts_for(str(mine)) == prompts_for("nano")
    assert prompts_for("chat") == chat


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "Cannot read prompts from .*No such file"),
        ("[check", "Cannot read prompts from .*Expected"),
        ("family = 'mine.toml'", "Unknown prompt family: mine.toml."),
        ("[check]\nsytem = 'x'", r"Not a prompt component: check.sytem in .*\. Choose from: write.system, "),
        ("[check]\nsystem = 3", "Not a prompt component: check.system"),
        ("check = 'x'", "Not a prompt component: check in"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, text, says):
    mine = tmp_path / "mine.toml"
    if text is not None:
        mine.write_text(text)
    with pytest.raises(ModelError, match=says) as caught:
        prompts_for(str(mine))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["nano", "chat"])
def test_prompts_written_as_a_file_are_read_back_letter_for_letter(tmp_path, family):
    prompts = prompts_for(family)
    texts = [
        '"""',
        'ends in a quote"',
        "\n\n  indented\n",
        "C:\\new \x7f \x01",
        "naïve \U0001f600",
        "a\tb",
        "''' \"\"",
        "",
    ]
    for some in ({}, dict(zip(prompts.components, texts, strict=False))):
        edited = prompts.model_copy(update={"components": prompts.components | some})
        file = tmp_path / "mine.toml"
        file.write_text(edited.toml(), encoding="utf-8")
        assert prompts_for(str(file)) == edited
