from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        (lambda root: DataSet(root).load("test"), "has no split 'test'; it has: dev"),
        (lambda root: DataSet(root).database("bank"), "no database 'bank'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path, use, says):
    with pytest.raises(DataError) as caught:
        use(folder(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_split_is_a_data_error(tmp_path):
    (folder(tmp_path) / "dev.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="write the data set again"):
        DataSet(tmp_path).load("dev")
