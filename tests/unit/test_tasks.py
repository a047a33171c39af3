from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.errors import DataError

TASKS = [
    Task(task_id="a", db_id="shop", question="How many?", gold="select count(*) from t", split="dev"),
    Task(task_id="b", db_id="shop", question='Wer heißt "Zoë"?', gold="select 'O''Hara'", split="dev", scorable=False),
]


def folder(root: Path) -> Path:
    write_split(root, "dev", TASKS)
    (root / "dataset.json").write_text("{}")
    return root


def test_a_split_comes_back_as_it_was_written(tmp_path):
    assert DataSet(folder(tmp_path)).load("dev") == TASKS


def test_equal_tasks_give_equal_bytes_in_another_process(tmp_path):
    here = write_split(tmp_path, "dev", TASKS).read_bytes()
    code = (
        "import sys; from pathlib import Path; from sqlbench.data.tasks import DataSet, write_split; "
        "root = Path(sys.argv[1]); write_split(root, 'copy', DataSet(root).load('dev'))"
    )
    folder(tmp_path)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    assert (tmp_path / "copy.parquet").read_bytes() == here


def test_the_key_depends_on_content_and_not_on_place():
    moved = TASKS[0].model_copy(update={"task_id": "z", "split": "train", "hardness": "easy"})
    assert moved.key == TASKS[0].key
    assert TASKS[0].model_copy(update={"gold": "select 1"}).key != TASKS[0].key


def test_tasks_are_frozen_and_refuse_unknown_fields():
    with pytest.raises(ValidationError):
        TASKS[0].gold = "select 1"
    with pytest.raises(ValidationError):
        Task(task_id="a", db_id="b", question="c", gold="d", split="e", surprise=1)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda root: DataSet(root / "nowhere"), "sqlbench data pocket"),
        (lambda root: DataSet(root).load("test"), ": test. Choose one of: dev"),
        (lambda root: DataSet(root).database("bank"), "No database 'bank'"),
        (lambda root: (root / "dataset.json").write_text("{torn") and DataSet(root), "make the data set again"),
        (lambda root: (root / "dataset.json").write_text("[1]") and DataSet(root), "make the data set again"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path, use, says):
    with pytest.raises(DataError) as caught:
        use(folder(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_split_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    folder(tmp_path)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if the disk were full after 1000 bytes
        try:
            write_split(tmp_path, "dev", TASKS * 100)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert DataSet(tmp_path).load("dev") == TASKS and DataSet(tmp_path).splits() == ["dev"]


def test_a_damaged_split_is_a_data_error(tmp_path):
    (folder(tmp_path) / "dev.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="Make the data set again"):
        DataSet(tmp_path).load("dev")


ROW = {"task_id": 7, "db_id": 3, "question": "How many?", "gold": "select 1", "split": "dev"}


def test_numbers_name_tasks_and_a_hint_is_part_of_the_question(tmp_path):
    rows = [ROW | {"evidence": "a girl is F"}, ROW | {"task_id": 8, "evidence": None}]
    pd.DataFrame(rows).to_parquet(folder(tmp_path) / "dev.parquet")
    first, second = DataSet(tmp_path).load("dev")
    assert (first.task_id, first.db_id, first.question) == ("7", "3", "How many? Hint: a girl is F")
    assert (second.task_id, second.question) == ("8", "How many?")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([ROW | {"surprise": 1}], "field 'surprise': Extra inputs are not permitted, not 1"),
        ([ROW, ROW | {"question": None}], "Invalid row 2 of "),
        ([ROW | {"gold": 5}], "field 'gold': Input should be a valid string, not 5"),
        ([ROW | {"task_id": 1.5}], "field 'task_id': Input should be a valid string, not 1.5"),
        ([{"task_id": "a\nb"}], "field 'db_id': Field required"),
    ],
)
def test_a_row_that_is_no_task_is_named(tmp_path, rows, says):
    pd.DataFrame(rows).to_parquet(folder(tmp_path) / "dev.parquet")
    with pytest.raises(DataError) as caught:
        DataSet(tmp_path).load("dev")
    assert says in str(caught.value) and "\n" not in str(caught.value)
