"""Supervised fine-tuning: what is imitated, the loss on known numbers, and a run that resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pocket import NANO_PATH
from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.errors import DataError
from sqlbench.evaluation import evaluate
from sqlbench.runs import METRICS, TRAJECTORIES
from sqlbench_train import sft as module
from sqlbench_train.sft import answer_loss, batch, right_answers, sft

pytestmark = pytest.mark.training
SPLIT = "dev_unseen_pretrain"


def made(agent: str, text: str, prompt: str) -> Transition:
    message = Message(role="user", content=prompt)
    return Transition(agent=agent, turn=1, messages=[message], completion=Completion(text=text))


def rollout(reward: float | None, *transitions: Transition, pred: str) -> Trajectory:
    runs = [Execution(turn=1, sql=pred, status="ok")]
    return Trajectory(
        task_key="k", task_id="t", db_id="d", question="q", gold="SELECT 1", reward=reward, pred=pred,
        transitions=list(transitions), executions=runs,
    )  # fmt: skip


def test_only_what_wrote_the_right_query_is_imitated() -> None:
    write, check = made("write", "SELECT 2", "a"), made("check", "THE QUERY IS INCORRECT", "b")
    rewrite = made("rewrite", "```sql\nSELECT 1\n```", "c")
    found = right_answers(
        [
            rollout(1.0, write, check, rewrite, pred="SELECT 1"),  # the rewrite, not the wrong query before it
            rollout(1.0, write, check, rewrite, pred="SELECT 1"),  # the same again
            rollout(1.0, made("write", "SELECT 1", "a"), made("check", "SELECT 1", "b"), pred="SELECT 1"),
            rollout(0.0, write, pred="SELECT 2"),
            rollout(None, write, pred="SELECT 2"),
        ]
    )
    assert [(messages[0].content, text) for messages, text in found] == [
        ("c", "```sql\nSELECT 1\n```"),
        ("a", "SELECT 1"),
    ]


def test_the_loss_is_of_the_answers_alone() -> None:
    class Known:
        """Gives the next token log 4 to 1 against the others, of three."""

        device = torch.device("cpu")

        def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> object:
            logits = torch.zeros(*ids.shape, 3)
            following = torch.roll(ids, -1, 1)
            logits.scatter_(2, following.unsqueeze(2), math.log(4.0))
            return type("Output", (), {"logits": logits})

    # Each token of an answer has 4 / (4 + 1 + 1); padding and prompts do not count, and long answers weigh more.
    assert answer_loss(Known(), [([0, 1], [2, 1, 0]), ([1], [2])]) == pytest.approx(-math.log(4 / 6))


def test_every_answer_comes_once_before_one_comes_again() -> None:
    drawn = [i for step in range(1, 6) for i in batch(10, 4, step, seed=3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and drawn != [i for step in range(1, 6) for i in batch(10, 4, step, seed=4)]


def test_a_policy_learns_the_gold_queries_and_an_interrupted_run_ends_with_the_same_weights(
    pocket: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = pocket.root
    monkeypatch.setattr(module, "SAVE_EVERY", 3)

    def train(run: str, steps: int) -> Path:
        return sft(few, run, split=SPLIT, steps=steps, batch_size=4, lr=5e-4, results=tmp_path)

    whole = train("whole", 8)
    losses = [json.loads(line)["data"]["sft/loss"] for line in (whole / METRICS).read_text().splitlines()]
    assert len(losses) == 8

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    real = module.batch
    monkeypatch.setattr(module, "batch", lambda rows, size, step, seed: stop(step) or real(rows, size, step, seed))
    with pytest.raises(KeyboardInterrupt):
        train("cut", 8)
    monkeypatch.setattr(module, "batch", real)
    cut = train("cut", 8)
    again = [json.loads(line)["data"]["sft/loss"] for line in (cut / METRICS).read_text().splitlines()]
    assert again == pytest.approx(losses)
    from safetensors.torch import load_file

    one, other = (load_file(folder / "policy/model.safetensors") for folder in (whole, cut))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in load_file(NANO_PATH / "model.safetensors").items())
    assert evaluate(few, SPLIT, str(whole), "e", results=tmp_path, limit=2, max_turns=1).score.n == 2


def test_a_policy_learns_from_its_own_right_answers(pocket: DataSet, tmp_path: Path) -> None:
    evaluate(pocket.root, SPLIT, "nano", "own", results=tmp_path, limit=12, max_turns=1)
    run = sft(pocket.root, "rs", source=tmp_path / "laptop/own", split=SPLIT, steps=1, batch_size=2, results=tmp_path)
    right = sum(json.loads(line)["reward"] == 1 for line in (tmp_path / f"laptop/own/{TRAJECTORIES}").open())
    assert json.loads((run / "summary.json").read_text())["answers"] == right > 0
    place = ["--data", str(pocket.root), "--split", SPLIT, "--results", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run", "cli", "--source", str(tmp_path / "laptop/own"), "--steps", "1", *place])
    assert end.value.code == 0 and (tmp_path / "laptop/cli/policy/model.safetensors").is_file()
    with pytest.raises(DataError, match="No right answer to imitate"):
        sft(pocket.root, "none", source=tmp_path / "laptop/own", split="headline", steps=1, results=tmp_path)
