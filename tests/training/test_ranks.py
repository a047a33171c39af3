"""A real training with all that can go wrong in a rollout, on one rank and on two: what was sampled is what is trained.

Half of the prompts are over the limit, a third of the answers is cut, all sub-agents are trained, and rewards are drawn
by coin, so that groups divide whatever the policy answers. Two more trainings have credit by transition and by change,
and rewards that are earned.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import recorder
import torch

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.repair import repeated
from sqlbench.agent.trajectory import Trajectory
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import cached_database
from sqlbench.models.policy import latest_checkpoint
from sqlbench.reward import score
from sqlbench.runs import RunFolder
from sqlbench_train.credit import balanced, group_of
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows
from verl_cpu.engine import LocalEngine

pytestmark = pytest.mark.training

MICRO, STEPS, MOST_PROMPT, MOST_RESPONSE = 4, (1, 2), 190, 20
OVERRIDES = (
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={MICRO}",
    f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={MICRO}",
    "actor_rollout_ref.actor.policy_loss.loss_mode=token_mean",  # by rollout a loss is about 0, whatever is compared
    "actor_rollout_ref.rollout.n=4",
    "sqlbench.trained_agents=write|rewrite|check",
    "sqlbench.max_failed_share=0.9",
    "sqlbench.validation_tasks=1",
    "sqlbench.sampling=uniform",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    *recorder.OVERRIDES,
)
TIGHT = (f"data.max_prompt_length={MOST_PROMPT}", f"data.max_response_length={MOST_RESPONSE}")


@dataclass
class Ranks:
    """A finished training."""

    ranks: int
    folder: Path
    record: Path
    metrics: dict[int, dict[str, float]]
    rollouts: list[Trajectory]
    credit: str = "rollout"

    def sampled(self, step: int) -> dict[str, Any]:
        """Rows as the trainer took them from the buffer."""
        return torch.load(self.record / f"sampled-{step}")

    def trained(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Rows of all loss calls of a step, padding included, from all ranks."""
        calls = {
            s: int(self.metrics[s]["sqlbench/rows_updated"] + self.metrics[s]["sqlbench/rows_padding"])
            // (MICRO * self.ranks)
            for s in STEPS
        }
        first = sum(calls[s] for s in STEPS if s < step)
        assert len(list(self.record.glob("loss-*"))) == self.ranks * sum(calls.values()), "one optimizer step a batch"
        loaded = [
            torch.load(self.record / f"loss-{rank}-{number}")
            for rank in range(self.ranks)
            for number in range(first, first + calls[step])
        ]
        return [{name: t[row] for name, t in call.items()} for call in loaded for row in range(MICRO)]


@pytest.fixture(scope="module", params=["one rank", "two ranks"])
def run(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue(request.param.replace(" ", "_"))


@pytest.fixture(scope="module", params=["one rank", "two ranks", "by transition", "by change"])
def any_run(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue(request.param.replace(" ", "_"))


@pytest.fixture(scope="module")
def one_rank(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return trained(pocket, tmp_path_factory.mktemp("one"), 1, *TIGHT, "sqlbench.control=coin")


@pytest.fixture(scope="module")
def two_ranks(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The same training."""
    return trained(pocket, tmp_path_factory.mktemp("two"), 2, *TIGHT, "sqlbench.control=coin")


@pytest.fixture(scope="module")
def by_transition(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return trained(pocket, tmp_path_factory.mktemp("transition"), 1, "sqlbench.credit=transition")


@pytest.fixture(scope="module")
def by_change(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    # At a temperature of its own, so that samples of the first prompt after a repetition have another one.
    temperature = "actor_rollout_ref.rollout.temperature=1.1"
    run = trained(pocket, tmp_path_factory.mktemp("change"), 1, "sqlbench.credit=change", temperature)
    return replace(run, credit="change")


def trained(pocket: DataSet, folder: Path, ranks: int, *overrides: str) -> Ranks:
    """Train, with everything recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(recorder.__file__).parent))
        patch.setenv(recorder.FOLDER, str(folder))
        overrides = (*OVERRIDES, f"trainer.n_gpus_per_node={ranks}", *overrides)
        run = train("laptop", "run", pocket.root, overrides=[*overrides], results=folder / "results")
    return Ranks(ranks, run, folder, read_rows(run / "metrics.jsonl"), list(RunFolder(run).trajectories()))


def test_two_ranks_sample_the_same_and_give_the_same_losses_and_gradients(one_rank: Ranks, two_ranks: Ranks) -> None:
    """Tolerance: 1e-5 relative (measured: 1e-6); the sums of the two are rounded differently."""
    one, two = one_rank, two_ranks
    for step in STEPS:
        assert sorted(one.sampled(step)["input_ids"]) == sorted(two.sampled(step)["input_ids"])
        for name in ("actor/pg_loss", "actor/loss", "actor/grad_norm", "actor/entropy"):
            assert one.metrics[step][name] == pytest.approx(two.metrics[step][name], rel=1e-5, abs=1e-7), name
        for name in ("rows", "rows_updated", "failed_rollouts", "zero_variance_groups", "truncated_share"):
            assert one.metrics[step][f"sqlbench/{name}"] == two.metrics[step][f"sqlbench/{name}"], name
    assert any(abs(one.metrics[step]["actor/pg_loss"]) > 1e-3 for step in STEPS), "nothing was compared"
    weights = [LocalEngine(latest_checkpoint(run.folder)).model.state_dict() for run in (one, two)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-5), name


def test_what_was_sampled_is_what_the_trainer_gets_bit_by_bit(any_run: Ranks) -> None:
    run = any_run
    for step in STEPS:
        rows = run.sampled(step)
        assert recorder.handed_over(rows) == recorder.on_record(run.rollouts, step, "write|rewrite|check", run.credit)
        for prompt, response, ids in zip(rows["prompts"], rows["responses"], rows["input_ids"], strict=True):
            assert ids == prompt + response
        assert rows["loss_mask"] == rows["response_mask"] == [[1] * len(r) for r in rows["responses"]]
        assert run.metrics[step]["sqlbench/rows"] == len(rows["keys"])
    assert any(t.agent == "check" for record in run.rollouts for t in record.transitions), "no check was trained"


def expected_updates(rows: dict[str, Any]) -> list[tuple[float, list[float]]]:
    """Advantage and log-probabilities of each row of the groups that divide."""
    rewards: dict[str, dict[str, float]] = defaultdict(dict)
    assert not any(any(scores[:-1]) for scores in rows["rm_scores"])
    earned = {key: scores[-1] for key, scores in zip(rows["keys"], rows["rm_scores"], strict=True)}
    for key, reward in (earned | balanced(earned)).items():
        rewards[group_of(key)][key.rsplit("_", 1)[0]] = reward
    found = []
    for key, log_probs in zip(rows["keys"], rows["rollout_log_probs"], strict=True):
        group, sample = group_of(key), key.rsplit("_", 1)[0]
        values = torch.tensor(list(rewards[group].values()))
        if len(set(values.tolist())) > 1:
            found.append((float((rewards[group][sample] - values.mean()) / values.std()), log_probs))
    return found


def test_the_groups_that_divide_are_trained_on_with_their_rollouts_advantage(any_run: Ranks) -> None:
    """Each row once, its tokens only, as likely to the trainer as to the engine that sampled them; the loss by hand."""
    run = any_run
    for step in STEPS:
        expected, loss = expected_updates(run.sampled(step)), 0.0
        assert expected, "no group divides: the test proves nothing"
        assert run.metrics[step]["sqlbench/rows_updated"] == len(expected)
        for row in run.trained(step):
            mask = row["response_mask"].bool()
            count = int(mask.sum())
            if not count:
                assert not row["advantages"].any()
                continue
            assert mask[:count].all(), "a hole in the mask"
            same = [
                (advantage, sampled)
                for advantage, sampled in expected
                if len(sampled) == count
                and row["advantages"][:count].tolist() == pytest.approx([advantage] * count, rel=1e-4, abs=1e-6)
                and row["log_prob"][:count].tolist() == pytest.approx(sampled, abs=1e-4)
                and row["old_log_prob"][:count].tolist() == pytest.approx(sampled, abs=1e-4)
            ]
            assert same, "a row that no rollout on record explains"
            expected.remove(same[0])
            ratio = (row["log_prob"] - row["old_log_prob"])[:count].exp()
            loss -= same[0][0] * float(ratio.sum())
        assert not expected, "rows that were never trained on"
        tokens = sum(map(len, run.sampled(step)["responses"]))  # of all rows, those of other groups included
        assert run.metrics[step]["actor/pg_loss"] == pytest.approx(loss / tokens, abs=1e-5)


def test_by_transition_each_call_is_rewarded_for_itself_and_compared_with_its_like(
    by_transition: Ranks, pocket: DataSet
) -> None:
    divided = set()
    for step in STEPS:
        earned = {}
        for record in (r for r in by_transition.rollouts if r.step == step):
            database = cached_database(pocket.database(record.db_id))
            right = {e.turn: score(record.gold, e.sql, database).match == 1 for e in record.executions}
            again = repeated(record.transitions, record.executions)
            calls = [(c, a) for c, a in zip(record.transitions, again, strict=True) if c.completion.temperature is None]
            for number, (call, is_repeated) in enumerate(calls):
                said = parse_verdict(call.completion.text) if call.agent == "check" else True
                name = (record.sample, number, *map(tuple, (call.completion.prompt_ids, call.completion.response_ids)))
                reward = 0.0 if is_repeated else float(said == right.get(call.turn, False))
                earned[name] = (record.task_key, call.agent, reward)
        rows, groups = by_transition.sampled(step), defaultdict(list)
        assert len(rows["keys"]) == len(set(rows["keys"])) == len(earned)
        columns = [rows[name] for name in ("keys", "prompts", "responses", "rm_scores")]
        for key, prompt, response, scores in zip(*columns, strict=True):
            task, agent, reward = earned[*recorder.sample_and_number(key), tuple(prompt), tuple(response)]
            assert key.split("_")[1] == agent and scores[-1] == reward
            groups[key.rsplit("_", 2)[0]].append((task, agent, reward))
        assert all(len({row[:2] for row in group}) == 1 for group in groups.values())
        assert len({group[0][:2] for group in groups.values()}) == len(groups), "one group for a task and a sub-agent"
        divided |= {group[0][1] for group in groups.values() if len({row[2] for row in group}) > 1}
        assert by_transition.metrics[step]["sqlbench/groups"] == len(groups)
    assert {"write", "check"} <= divided, f"only {divided} were trained: the test proves too little"


def test_by_change_rewrites_and_checks_of_all_tasks_are_compared(by_change: Ranks) -> None:
    """Whether what they earned is right is for `test_credit`; here it comes from the rollouts to the update."""
    tasks: dict[str, set[str]] = defaultdict(set)
    for step in STEPS:
        rows = by_change.sampled(step)
        for key in rows["keys"]:
            tasks[group_of(key).partition("@")[0]].add(key.split("_")[0])
        assert by_change.metrics[step]["sqlbench/groups"] == len({group_of(key) for key in rows["keys"]})
        assert 0 <= by_change.metrics[step]["sqlbench/repeated_share"] <= 1
    assert len(tasks["check"]) > 1 and len(tasks["rewrite"]) > 1, "nothing was compared"
    assert any(call.completion.temperature for record in by_change.rollouts for call in record.transitions), (
        "no answer of another temperature: that it was left out proves nothing"
    )


def test_overlong_prompts_and_cut_answers_are_counted(run: Ranks) -> None:
    """A first prompt over the limit fails its rollout; a later one, or a cut answer, leaves it scored."""
    seen = [0, 0, 0]
    for step in STEPS:
        here = [r for r in run.rollouts if r.step == step]
        calls = [t.completion for r in here if not r.failed for t in r.transitions]
        failed, cut = [r for r in here if r.failed], [c for c in calls if c.finish_reason == "length"]
        overlong = [r for r in here if r.reason == "overlong"]
        assert all("PromptTooLongError" in (r.error or "") and r.reward is None and not r.transitions for r in failed)
        assert all(r.reward == 0 and r.transitions for r in overlong)
        assert all(c.response_tokens == MOST_RESPONSE for c in cut)
        metrics = run.metrics[step]
        assert metrics["sqlbench/rollouts"] == len(here) == 16
        assert metrics["sqlbench/failed_rollouts"] == len(failed)
        assert metrics["sqlbench/overlong_rollouts"] == len(overlong)
        assert metrics["sqlbench/truncated_share"] == pytest.approx(len(cut) / len(calls))
        assert metrics["actor/rollout_probs_gap"] < 1e-4
        seen = [count + len(found) for count, found in zip(seen, (failed, overlong, cut), strict=True)]
    assert all(seen), f"nothing was over a limit: {seen}"
