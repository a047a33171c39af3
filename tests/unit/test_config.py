"""An option exists once: a field of a settings model is an option, an argument and a stored setting."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field, ValidationError

import sqlbench
from sqlbench import options
from sqlbench.config import EvalConfig, RolloutConfig, ScoreConfig, takes
from sqlbench.data.tasks import Task, write_split
from sqlbench_lab.settings import AblateConfig
from sqlbench_train.settings import TrainConfig

FIELD = '    patience: int = Field(7, ge=1, le=9, description="How long to wait.")\n'
BEFORE = "    max_turns: int = "


@takes(TrainConfig, "profile", "run", "data", "model", "overrides")
def asked(settings: TrainConfig) -> TrainConfig:
    """Return what a call asked for."""
    return settings


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a copy of the package whose settings have one line more, and with a data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "changed"), *sys.path]))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(sqlbench.__file__).parent, "changed/sqlbench", ignore=ignored)
    file = Path("changed/sqlbench/config.py")
    text = file.read_text(encoding="utf-8")
    assert text.count(BEFORE) == 1
    file.write_text(text.replace(BEFORE, FIELD + BEFORE), encoding="utf-8")
    (tmp_path / "data/database").mkdir(parents=True)
    (tmp_path / "data/dataset.json").write_text("{}")
    write_split(tmp_path / "data", "dev", [Task(task_id="1", db_id="d", question="?", gold="SELECT 1", split="dev")])


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def stored(run: str) -> tuple[dict[str, object], object]:
    """Return what a run stored, and how patient it was."""
    config = json.loads(Path(f"results/laptop/{run}/config.json").read_text())
    return config, config["rollout"].pop("patience")


def test_one_line_makes_an_option_an_argument_and_a_stored_setting(changed: None) -> None:
    command = ["-m", "sqlbench", "eval", "--data", "data", "--split", "dev", "--model", "openai:m", "--run"]
    shown = python(*command, "typed", "--help").stdout
    assert "--patience N How long to wait. [default: 7, at least 1, at most 9]" in " ".join(shown.split())
    python(*command, "typed", "--patience", "8")
    wrong = python(*command, "wrong", "--patience", "10")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: '--patience': ") and "not '10'" in wrong.stderr
    call = "from sqlbench.evaluation import evaluate; help(evaluate); evaluate('data', 'dev', 'openai:m', 'called'{})"
    assert "patience: How long to wait." in python("-c", call.format(", patience=5")).stdout
    typed, called = stored("typed"), stored("called")
    assert (typed[1], called[1]) == (8, 5) and typed[0] == called[0]


def test_fields_are_arguments_by_name_and_the_first_by_position() -> None:
    given = asked("gpu", "r", "data", "nano", ("a=1",), dry_run=True)
    assert given == TrainConfig(
        profile="gpu", run="r", data=Path("data"), model="nano", overrides=["a=1"], dry_run=True
    )
    assert asked(given) is given and asked("laptop", "r") == TrainConfig(run="r")
    for wrong in ({"nosuch": 1}, {"run": "twice"}):
        with pytest.raises(TypeError):
            asked("laptop", "r", **wrong)
    with pytest.raises(TypeError, match="'profile'"):
        asked(run="r")
    with pytest.raises(ValidationError):
        asked("laptop", "r", query_timeout="soon")


@pytest.mark.parametrize("line", ["a=[1,2] b='{c: 1}' --run r --dry-run", "a=[1,2] --run r b='{c: 1}' --dry-run"])
def test_overrides_may_stand_anywhere_among_the_options(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(options, "COMMANDS", {})
    seen = []

    @options.command("try")
    def attempt(settings: TrainConfig, times: Annotated[int, Field(description="How often.")] = 2) -> None:
        seen.append((type(settings), settings.run, settings.dry_run, settings.overrides, times))

    options.run_command({"": "Try."}, ["try", *shlex.split(line)])
    assert seen == [(TrainConfig, "r", True, ["a=[1,2]", "b={c: 1}"], 2)]


def test_help_shows_the_settings_of_a_function() -> None:
    assert str(inspect.signature(asked)).startswith("(profile: str, run: str, data: pathlib.Path | None = None, ")
    for name, field in TrainConfig.model_fields.items():
        assert f"    {name}: {field.description}" in (asked.__doc__ or "")


@pytest.mark.parametrize("model", [AblateConfig, EvalConfig, ScoreConfig, TrainConfig])
def test_every_field_is_described(model: type[EvalConfig]) -> None:
    assert all(field.description for field in model.model_fields.values())


def test_a_training_rolls_out_as_an_evaluation_does(repo: Path) -> None:
    common = yaml.safe_load((repo / "sqlbench_train/config/common.yaml").read_text())["sqlbench"]
    assert RolloutConfig.of(common) == RolloutConfig().decided("nano")
