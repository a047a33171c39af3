"""A change of structure changes no rollout, summary, configuration or table; see `golden` for how they are written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sqlbench.results import Summary
from sqlbench_train.metrics import read_rows

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("golden", HERE / "golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return golden.rollouts(tmp_path_factory.mktemp("golden"))


def test_greedy_rollouts_are_those_on_record(made):
    expected = [json.loads(line) for line in (HERE / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(expected) == 60 + golden.CHAT
    for new, old in zip(made[0], expected, strict=True):
        assert new == old, f"task {old['task_id']}"


def test_the_summary_is_the_one_on_record(made):
    assert made[1] == golden.read("summary.json")


@pytest.mark.parametrize("profile", ["laptop", "gpu"])
def test_training_configurations_are_those_on_record(profile):
    new = json.loads(json.dumps(golden.configuration(profile)))
    assert new == golden.read(f"{profile}.json")


def test_tables_of_stored_runs_are_those_on_record():
    assert golden.stored_tables() == golden.read("tables.json")


def test_every_stored_run_can_be_read():
    root = golden.REPO / "results"
    for path in root.rglob("summary.json"):
        if "split" in json.loads(path.read_text()):
            assert Summary.model_validate_json(path.read_text()).rollouts
    assert sum(bool(read_rows(path)) for path in root.rglob("metrics.jsonl")) >= 10
