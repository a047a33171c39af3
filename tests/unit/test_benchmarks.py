"""What the benchmarks of speed compare is the same work on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocket import NANO_PATH
from sqlbench.data.tasks import DataSet
from verl_cpu.engine import GenerationRequest, LocalEngine


@pytest.fixture(autouse=True)
def scripts(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def test_a_widened_nano_is_larger_and_answers_as_nano_does(tmp_path: Path) -> None:
    import training

    nano, wide = LocalEngine(NANO_PATH), LocalEngine(training.widened(2_000_000, tmp_path))
    size = sum(p.numel() for p in wide.model.parameters())
    assert 1_800_000 <= size <= 3_000_000
    prompts = [tuple(nano.tokenizer(text)["input_ids"]) for text in ("the names of all singers", "how many cars")]
    sampled = [e.generate([GenerationRequest(p, 20, 1.0, seed=1) for p in prompts]) for e in (nano, wide)]
    for ours, theirs in zip(*sampled, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def test_both_agents_answer_every_task_with_a_model_that_knows_the_answers(pocket: DataSet) -> None:
    pytest.importorskip("sqlalchemy", reason="the plain agent needs SQLAlchemy, which sqlbench does not")
    import plain_agent
    import rollout

    tasks = [task for task in pocket.load("train") if task.scorable][:20]
    works = {
        "ours, in the process": lambda some: rollout.ours(pocket.root, plain_agent.IN_PROCESS, 8, some),
        "plain, in the process": lambda some: rollout.plain(pocket.root, plain_agent.IN_PROCESS, None, some),
    }
    rates = rollout.compare(works, tasks, 1)  # asserts that all rollouts of both are right
    assert rates["ours, in the process"]["per_cpu_second"] > 2 * rates["plain, in the process"]["per_cpu_second"]
