"""An agent and a reward of one's own are trained by verl, by their names alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder
from sqlbench_lab.sweep import SMALLEST
from sqlbench_train.metrics import read_rows

pytestmark = pytest.mark.training

REWARD = "sqlbench.reward=examples.soft_f1:soft_f1"


def test_an_own_agent_takes_two_steps_with_an_own_reward(
    pocket: DataSet, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo)
    words = ["train", "--run", "own", "--data", str(pocket.root), "--results", str(tmp_path), *SMALLEST]
    words += ["trainer.total_training_steps=2", "sqlbench.agent=examples.self_consistency:SelfConsistency"]
    with pytest.raises(SystemExit) as ended:
        main([*words, REWARD])
    assert ended.value.code == 0
    folder = RunFolder(tmp_path / "laptop/own")
    assert (folder.root / "policy/model.safetensors").is_file()
    rows = read_rows(folder.root / "metrics.jsonl")
    for step in (1, 2):
        made = [t for t in folder.trajectories() if t.step == step and not t.validation]
        assert len(made) == 4 and not any(t.failed for t in made)
        assert all([x.agent for x in t.transitions] == ["write"] * 3 and 0 <= t.reward <= 1 for t in made)
        assert rows[step]["sqlbench/rows"] == 12
        assert rows[step]["sqlbench/reward"] == pytest.approx(mean(t.reward for t in made))
        assert rows[step]["sqlbench/ex"] == pytest.approx(mean(t.match for t in made))
    (folder.root / "summary.json").unlink()  # as if it had been killed at its end
    with pytest.raises(SystemExit):
        main(words)
    refused = 'sqlbench.reward was "examples.soft_f1:soft_f1", is now "execution-match"'
    assert refused in capsys.readouterr().err
