"""One real training through verl on the laptop profile: killed after a checkpoint, resumed, then looked at."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import recorder
import torch

from pocket import NANO_PATH
from sqlbench.agent.trajectory import Completion, Transition
from sqlbench.data.tasks import DataSet
from sqlbench.errors import RunError, TrainingError
from sqlbench.models.checkpoint import checkpoint_family
from sqlbench.models.policy import latest_checkpoint
from sqlbench.runs import RunFolder
from sqlbench_lab.monitor import Monitor
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows
from sqlbench_train.processes import RAY_FOLDER, WORKER
from verl_cpu.engine import GenerationRequest, LocalEngine

pytestmark = pytest.mark.training

Watched = tuple[Monitor, list[str], list[str]]

TINY = [
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.n=4",
    "sqlbench.validation_tasks=4",
    "sqlbench.sampling=uniform",
    "trainer.total_training_steps=3",
    "trainer.save_freq=1",
    "trainer.test_freq=3",
    "actor_rollout_ref.actor.policy_loss.loss_mode=per_rollout_mean",
]
RECORDED = [*TINY, *recorder.OVERRIDES]
CALL = """
import json, sys
from sqlbench_train.launch import train
train("laptop", "run", sys.argv[1], results=sys.argv[2], overrides=json.loads(sys.argv[3]))
"""


def training_processes(owner: int) -> list[str]:
    """Command lines that name Ray's folder of a launching process."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"{RAY_FOLDER}{owner}-" in line:
            found.append(line[:120])
    return found


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the training writes down what it samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(recorder.__file__).parent))
        patch.setenv(recorder.FOLDER, str(tmp_path_factory.mktemp("record")))
        yield Path(os.environ[recorder.FOLDER])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A monitor of a run that is not there yet, and all that it shows later: its status lines and its curves."""
    monitor = Monitor(tmp_path_factory.mktemp("results") / "laptop/run", every=0.1)
    shown = [[part.value] for part in monitor.children]
    for part, values in zip(monitor.children, shown, strict=True):
        part.observe(lambda change, values=values: values.append(change["new"]), "value")
    yield monitor, *shown
    monitor.close()


@pytest.fixture(scope="module")
def killed_and_resumed(pocket: DataSet, record: Path, watched: Watched) -> tuple[Path, int]:
    """Run folder, and the step at which the first attempt was killed."""
    folder = watched[0].folder
    results = folder.parents[1]
    saved = folder / "checkpoints/latest_checkpointed_iteration.txt"
    arguments = [str(pocket.root), str(results), json.dumps(RECORDED)]
    first = subprocess.Popen([sys.executable, "-c", CALL, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.time() + 900
    while not saved.is_file() and first.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    assert first.poll() is None and saved.is_file(), (folder / "logs/train.log").read_text()[-3000:]
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.time() + 200
    while training_processes(first.pid) and time.time() < deadline:
        time.sleep(0.2)
    assert not training_processes(first.pid), "processes outlive the kill of the launching process"
    step = int(saved.read_text())
    assert train("laptop", "run", pocket.root, results=results, overrides=RECORDED) == folder
    return folder, step


def test_resumes_at_the_saved_step_and_logs_every_step_once(killed_and_resumed: tuple[Path, int]) -> None:
    folder, step = killed_and_resumed
    assert 1 <= step < 3 and RunFolder(folder).summary()["resumed_at"] == step
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2, 3]


def test_keeps_as_many_checkpoints_as_were_asked_for(killed_and_resumed: tuple[Path, int]) -> None:
    saved = {path.name for path in (killed_and_resumed[0] / "checkpoints").glob("global_step_*")}
    assert saved == {"global_step_2", "global_step_3"}


def test_a_monitor_beside_it_follows_the_run_to_its_end(killed_and_resumed: tuple[Path, int], watched: Watched) -> None:
    """The trainings ran in other processes; the monitor had their folder and nothing else."""
    monitor, said, drawn = watched
    monitor.refresh()
    assert "not started yet" in said[0] and "finished after 3 steps" in said[-1]
    steps = [int(found[1]) for text in said if (found := re.search(r"step (\d) of 3, about 0:\d\d:\d\d left", text))]
    assert steps == sorted(steps), said  # how many of them are seen depends on how busy the machine is
    assert "data:image/png" in drawn[-1]
    again = Monitor(killed_and_resumed[0])
    assert [part.value for part in again.children] == [said[-1], drawn[-1]]


def test_rollouts_are_on_record_once_and_none_failed(killed_and_resumed: tuple[Path, int]) -> None:
    records = list(RunFolder(killed_and_resumed[0]).trajectories())
    assert Counter((r.step, r.validation) for r in records) == {
        (0, True): 4,
        (1, False): 8,
        (2, False): 8,
        (3, False): 8,
        (3, True): 4,
    }
    assert not any(r.failed for r in records)
    for step in (1, 2, 3):
        groups = Counter((r.task_key, r.sample) for r in records if r.step == step and not r.validation)
        assert set(groups.values()) == {1} and {sample for _, sample in groups} == {0, 1, 2, 3}
    for record in records:
        for call in (t.completion for t in record.transitions):
            assert call.response_ids and call.logprobs and len(call.response_ids) == len(call.logprobs)


def trained(transition: Transition) -> bool:
    """Whether a transition is a row of this training; a repetition may be sampled again at another temperature."""
    return transition.agent != "check" and transition.completion.temperature is None


def test_only_writes_and_rewrites_reach_the_trainer_with_the_reward_on_record(
    killed_and_resumed: tuple[Path, int], record: Path
) -> None:
    """Ids and log-probabilities are those on record, bit by bit; checks and answers at another temperature are not."""
    records = list(RunFolder(killed_and_resumed[0]).trajectories())
    assert any(t.agent == "check" for r in records if not r.validation for t in r.transitions)
    for step in (1, 2, 3):
        rows = torch.load(record / f"sampled-{step}")
        assert recorder.handed_over(rows) == recorder.on_record(records, step, "^(write|rewrite)$")
        scores = Counter((int(k.split("_")[1]), s[-1]) for k, s in zip(rows["keys"], rows["rm_scores"], strict=True))
        here = [r for r in records if r.step == step and not r.validation]
        assert scores == Counter((r.sample, r.reward) for r in here for t in r.transitions if trained(t))


def test_every_step_logs_all_that_was_promised(killed_and_resumed: tuple[Path, int]) -> None:
    """verl saves before it logs: of the step that was just saved at the kill, only what is on record is known."""
    folder, killed = killed_and_resumed
    rows = read_rows(folder / "metrics.jsonl")
    records = list(RunFolder(folder).trajectories())
    assert rows[killed]["sqlbench/rollouts"] == 8 and 0 <= rows[killed]["sqlbench/ex"] <= 1
    for step in {1, 2, 3} - {killed}:
        row, here = rows[step], [r for r in records if r.step == step and not r.validation]
        written = sum(trained(t) for r in here for t in r.transitions)
        assert row["sqlbench/rollouts"] == 8 and row["sqlbench/failed_rollouts"] == 0
        assert row["sqlbench/rows"] == written and row["sqlbench/rows_padding"] == 0
        assert 1 <= row["sqlbench/rows_updated"] <= written
        assert row["sqlbench/ex"] == pytest.approx(sum(r.reward or 0 for r in here) / 8)
        assert row["sqlbench/transitions"] == pytest.approx(written / 8)
        parts = [row[f"sqlbench/{part}_percent"] for part in ("rollout", "update", "other")]
        assert sum(parts) == pytest.approx(100) and min(parts) >= 0
        assert row["sqlbench/overlong_rollouts"] == 0
        for name in ("zero_variance_groups", "prompt_tokens", "response_tokens", "truncated_share", "seconds"):
            assert f"sqlbench/{name}" in row
        assert row["sqlbench/advantage_bias"] == pytest.approx(0, abs=1e-6), "advantages cancel, rollout by rollout"
        for name in ("actor/entropy", "actor/pg_clipfrac", "actor/grad_norm", "timing_s/step"):
            assert name in row
    for step in (0, 3):
        greedy = [r.reward for r in records if r.step == step and r.validation]
        assert rows[step]["sqlbench/val_ex"] == pytest.approx(sum(r or 0 for r in greedy) / 4)


def test_rollout_and_trainer_probabilities_agree(killed_and_resumed: tuple[Path, int]) -> None:
    rows = read_rows(killed_and_resumed[0] / "metrics.jsonl")
    checked = [
        row["training/rollout_probs_diff_max"] for row in rows.values() if "training/rollout_probs_diff_max" in row
    ]
    gaps = [row["actor/rollout_probs_gap"] for row in rows.values() if "actor/rollout_probs_gap" in row]
    assert checked and max(checked) < 1e-4  # of steps 1 and 3, and the first may be the one that was killed
    assert len(gaps) >= 2 and max(gaps) < 1e-4


def test_validation_is_greedy_and_training_is_not(killed_and_resumed: tuple[Path, int]) -> None:
    """What each step 0 and 3 answered, beside what its weights answer greedily; repetitions sampled again left out."""
    folder, records = killed_and_resumed[0], list(RunFolder(killed_and_resumed[0]).trajectories())

    def greedy(weights: Path, calls: list[Completion]) -> list[bool]:
        asked = [GenerationRequest(tuple(call.prompt_ids or ()), 128) for call in calls]
        answers = LocalEngine(weights, max_model_len=768).generate(asked)
        return [answer.token_ids == call.response_ids for answer, call in zip(answers, calls, strict=True)]

    def calls(step: int, validation: bool) -> list[Completion]:
        here = (r for r in records if r.step == step and r.validation == validation)
        return [t.completion for r in here for t in r.transitions if t.completion.temperature is None]

    for step, weights in ((0, NANO_PATH), (3, latest_checkpoint(folder))):
        assert calls(step, True) and all(greedy(weights, calls(step, True)))
    assert not all(greedy(NANO_PATH, calls(1, False))), "nothing was compared"


def test_the_policy_has_learned_weights_and_loads_as_it_is(killed_and_resumed: tuple[Path, int]) -> None:
    policy = latest_checkpoint(killed_and_resumed[0])
    assert LocalEngine(policy).checksum() != LocalEngine(NANO_PATH).checksum()
    assert checkpoint_family(policy) == "nano"
    assert (policy / "tokenizer.json").read_bytes() == (NANO_PATH / "tokenizer.json").read_bytes()


def test_a_finished_run_is_refused(killed_and_resumed: tuple[Path, int], pocket: DataSet) -> None:
    results = killed_and_resumed[0].parents[1]
    with pytest.raises(RunError, match="is already finished"):
        train("laptop", "run", pocket.root, results=results, overrides=RECORDED)


def test_too_many_failed_rollouts_stop_the_run_with_their_reason(pocket: DataSet, tmp_path: Path) -> None:
    """No prompt fits into 20 tokens: every rollout fails, nothing becomes reward 0, nothing is left running."""
    with pytest.raises(TrainingError, match=r"4 of 4 rollouts of step 0 failed.*data.max_prompt_length is 20"):
        train("laptop", "bad", pocket.root, results=tmp_path, overrides=[*TINY, "data.max_prompt_length=20"])
    records = list(RunFolder(tmp_path / "laptop/bad").trajectories())
    assert len(records) == 4 and all(r.failed and r.reward is None for r in records)
    assert not training_processes(os.getpid())


def test_a_rollout_worker_that_the_system_kills_ends_the_run(pocket: DataSet, tmp_path: Path) -> None:
    """verl waits forever for the answers of such a worker."""
    endless = [*TINY, "trainer.total_training_steps=1000", "trainer.val_before_train=false", "trainer.save_freq=99"]
    arguments = [str(pocket.root), str(tmp_path), json.dumps(endless)]
    launcher = subprocess.Popen([sys.executable, "-c", CALL, *arguments], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "laptop/run/metrics.jsonl"
    while launcher.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    below = psutil.Process(launcher.pid).children(recursive=True)
    (worker,) = (process for process in below if "SqlAgentLoopWorker" in process.name())
    worker.kill()
    errors = launcher.communicate(timeout=200)[1]
    assert launcher.returncode == 1 and "a process of the training is gone (agent_loop_worker_0" in errors
    assert "the memory may have been used up. See " in errors


def test_a_resumed_training_ends_with_the_weights_of_one_that_was_not(pocket: DataSet, tmp_path: Path) -> None:
    steps = [
        "trainer.total_training_steps=3",
        "trainer.save_freq=2",
        "trainer.test_freq=-1",
        "sqlbench.control=coin",
        "sqlbench.max_turns=1",  # with more, which prompts are answered in one batch depends on the time
    ]
    overrides = [*TINY, *steps, "trainer.val_before_train=false"]

    def weights() -> bytes:
        train("laptop", "run", pocket.root, results=tmp_path, overrides=overrides)
        return (tmp_path / "laptop/run/policy/model.safetensors").read_bytes()

    undisturbed = weights()
    assert read_rows(tmp_path / "laptop/run/metrics.jsonl")[3]["actor/grad_norm"] > 0
    (tmp_path / "laptop/run/summary.json").unlink()  # as a kill between two checkpoints leaves it
    (tmp_path / "laptop/run/checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    assert weights() == undisturbed and RunFolder(tmp_path / "laptop/run").summary()["resumed_at"] == 2


def test_an_earlier_attempt_that_still_writes_leaves_nothing_in_a_run_that_begins_anew(
    pocket: DataSet, tmp_path: Path
) -> None:
    run = tmp_path / "laptop/run"
    writes = "while True: time.sleep(0.005); note.parent.mkdir(parents=True, exist_ok=True); note.write_text('2')"
    code = f"import sys, time, pathlib\nnote = pathlib.Path(sys.argv[1])\n{writes}"
    note = run / "checkpoints/latest_checkpointed_iteration.txt"
    earlier = subprocess.Popen([sys.executable, "-c", code, note, "-m", WORKER, run / "data/verl.yaml"])
    refused = [*TINY, "actor_rollout_ref.actor.ppo_mini_batch_size=3"]  # by verl, as soon as it starts
    try:
        while not note.exists():
            time.sleep(0.01)
        with pytest.raises(TrainingError, match="must be >= actor"):
            train("laptop", "run", pocket.root, results=tmp_path, overrides=refused, overwrite=True)
    finally:
        earlier.kill()
        earlier.wait()
    assert not note.exists()


def test_a_ray_that_dies_while_it_starts_is_started_again(tmp_path: Path, pocket: DataSet) -> None:
    ended: list[int] = []

    def end_first_raylet() -> None:  # as Ray itself does where its agent takes more than 15 s to start
        me = psutil.Process()
        while not ended:
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name() == "raylet":
                        process.kill()
                        ended.append(process.pid)
                        return
            time.sleep(0.01)

    threading.Thread(target=end_first_raylet, daemon=True).start()
    overrides = [*TINY, "sqlbench.max_turns=1", "trainer.total_training_steps=1", "trainer.val_before_train=False"]
    folder = RunFolder(train("laptop", "r", pocket.root, results=tmp_path, overrides=overrides))
    assert ended and folder.summary()["steps"] == 1
    log = (folder.root / "logs/train.log").read_text()
    assert log.count("sqlbench: Ray did not start in time.") == 1
