"""Cells are resumed by what lies in their folders, and the tables say what those folders hold."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import DataError, RunError
from sqlbench.results import Rollouts
from sqlbench.runs import TRAJECTORIES, RunFolder
from sqlbench_lab.ablation import Workspace, ablate, before_name, run_cell
from sqlbench_lab.notebooks import run_notebooks
from sqlbench_lab.self_correction import correction_table
from sqlbench_lab.sweep import AGENTS, AGENTS_CHECK, GRIDS, Experiment, Sweep
from sqlbench_lab.tables import (
    CELL,
    accuracy_rows,
    accuracy_table,
    answers,
    difference_table,
    efficiency_table,
    eval_stats,
    headline,
    load_results,
    markdown,
    model_size,
    training_runs,
    write_tables,
)
from sqlbench_train.credit import CREDITS
from sqlbench_train.metrics import write_rows

SEED_ACCURACY = (
    "Model, Size, Context, Max Turns, Agents, Acc (Initial), Acc (Final), Transitions, Prompt Length, Response Length"
)
SEED_EFFICIENCY = (
    "Model, Size, Context, Max Turns, Agents, # GPUs, # Steps, Time (h), Time/Step (s), Rollout Time (%), "
    "Update Actor Time (%)"
)


def rollouts(outcomes: str, agents: str = "write", tokens: int = 30) -> list[Trajectory]:
    """One rollout an outcome; every rollout has one transition of each of the comma-separated agents."""
    completion = Completion(text="SELECT 1", prompt_tokens=100, response_tokens=tokens)
    calls = [Transition(agent=a, turn=1, messages=[], completion=completion) for a in agents.split(",")]
    rewards = {"1": 1.0, "0": 0.0, "x": None}
    return [
        Trajectory(
            task_key=f"{number:04d}", task_id=str(number), db_id="d", question="q", gold="SELECT 1",
            transitions=calls, executions=[Execution(turn=1, sql=f"SELECT {mark}", status="ok")] * (mark != "x"),
            reward=rewards[mark], error="model: gone" if mark == "x" else None,
        )
        for number, mark in enumerate(outcomes)
    ]  # fmt: skip


def evaluation(place: Path, cell: Experiment, records: list[Trajectory], limit: int | None = None) -> None:
    config = {
        "kind": "eval",
        "data": "elsewhere",
        "model": "nano",
        "split": "headline",
        "limit": limit,
        "rollout": cell.rollout.model_dump(),
    }
    with RunFolder(place).open(config) as folder:
        for record in records:
            folder.append(TRAJECTORIES, record)
        folder.finish({})


def finished(
    bench: Workspace, cell: Experiment, before: str, after: str, agents: str = "write", limit: int | None = None
) -> None:
    """The folders that a cell's evaluations and training leave."""
    if not (bench.folder / "cells" / before_name(cell)).exists():
        evaluation(bench.folder / "cells" / before_name(cell), cell, rollouts(before, agents), limit)
    evaluation(bench.cell(cell) / "after", cell, rollouts(after, agents, tokens=20), limit)
    trainer = {"device": "cpu", "n_gpus_per_node": 1, "nnodes": 1}
    with RunFolder(bench.cell(cell) / "train").open({"config": {"trainer": trainer}}) as folder:
        step = {"timing_s/step": 4.0, "timing_s/gen": 2.0, "timing_s/update_actor": 1.0, "sqlbench/ex": 0.5}
        rows = {n: dict(step) for n in range(1, cell.steps + 1)} | {0: {"sqlbench/val_ex": 0.4}}
        rows[cell.steps]["timing_s/testing"] = 12.0
        write_rows(folder.root / "metrics.jsonl", rows)
        folder.finish({"steps": cell.steps})
    run_cell(cell, bench, Sweep((cell,), limit=limit))


@pytest.fixture
def bench(tmp_path: Path) -> Workspace:
    return Workspace(results=str(tmp_path))


def test_names_are_unique_and_say_what_differs() -> None:
    for grid in GRIDS.values():
        names = [cell.name for cell in grid.cells]
        assert len(set(names)) == len(names)
    assert Experiment().name == "t3_c2048_write-rewrite"
    assert (
        Experiment(agents=AGENTS_CHECK, context=128, steps=9, seed=2).name == "t3_c128_write-rewrite-check_9steps_seed2"
    )
    cells = [Experiment(credit=credit) for credit in CREDITS]
    assert len({cell.name for cell in cells}) == len({cell.title for cell in cells}) == len(CREDITS)


def test_cells_that_were_stored_when_the_coin_was_the_only_control_are_read() -> None:
    stored = json.loads(Experiment(control="coin").model_dump_json())
    del stored["control"]
    assert Experiment.model_validate(stored | {"random_reward": True}) == Experiment(control="coin")
    assert Experiment.model_validate(stored | {"random_reward": False}) == Experiment()
    assert Experiment(control="permuted").name == "t3_c2048_write-rewrite_permuted-reward"
    assert (Experiment(control="permuted").label, Experiment(control="coin", seed=2).label) == (
        "nano (permuted reward)",
        "nano (seed 2, random reward)",
    )


def test_the_full_grid_is_the_factorial_with_seeds_and_control() -> None:
    cells = GRIDS["full"].cells
    plain = {(c.turns, c.context, c.agents) for c in cells if c.seed == 1 and c.control is None}
    assert {turns for turns, _, _ in plain} == {1, 3}
    assert len({context for _, context, _ in plain}) == 2
    assert {agents for _, _, agents in plain} == {AGENTS, AGENTS_CHECK}
    assert len(plain) == 8
    assert sorted(c.seed for c in cells if c.title == Experiment().title) == [1, 2, 3]
    assert [c.control for c in cells].count("coin") == 1


def test_measure_counts_trained_transitions_of_scored_rollouts_only() -> None:
    found = Rollouts.of(rollouts("110x", agents="write,check,rewrite"))
    with_check, without = eval_stats(found, AGENTS_CHECK), eval_stats(found, AGENTS)
    assert (with_check.transitions, without.transitions) == (3.0, 2.0)
    assert (without.score.n, without.score.correct, without.outcomes) == (3, 2, "110x")
    assert eval_stats(found, "write").transitions == 2.0, "write finds rewrite, as in the seed experiment"


def test_measure_does_not_depend_on_the_order_of_rollouts() -> None:
    records = rollouts("1100x1")
    assert eval_stats(Rollouts.of(records[::-1]), AGENTS) == eval_stats(Rollouts.of(records), AGENTS)


def test_tables_have_the_columns_of_the_seed_experiment(bench: Workspace) -> None:
    finished(bench, Experiment(), "0" * 60 + "1" * 40, "0" * 45 + "1" * 55, agents="write,check")
    accuracy, efficiency = write_tables(bench.folder)
    assert [c for c in accuracy.columns if c in SEED_ACCURACY.split(", ")] == SEED_ACCURACY.split(", ")
    assert list(efficiency.columns) == SEED_EFFICIENCY.split(", ")
    row = accuracy.iloc[0]
    assert (row["Acc (Initial)"], row["Acc (Final)"], row["Context"], row["Max Turns"]) == (40.0, 55.0, 2048, 3)
    assert (row["Transitions"], row["Response Length"]) == ("1.00 → 1.00", "30.0 → 20.0")
    assert row["95% CI (Initial)"] == "30.9 to 49.8"
    time = efficiency.iloc[0]
    assert (time["# GPUs"], time["# Steps"], time["Time/Step (s)"]) == (0, 40, 4.0)
    assert (time["Rollout Time (%)"], time["Update Actor Time (%)"]) == (50.0, 25.0)
    assert time["Time (h)"] == pytest.approx((40 * 4 + 12) / 3600, abs=1e-3)


def test_a_cell_of_which_no_times_are_known_can_be_read_again(bench: Workspace) -> None:
    """A kill between the save and the log of its only step leaves a row without them."""
    cell = Experiment(steps=1)
    for name, outcomes in ((f"cells/{before_name(cell)}", "01"), (f"cells/{cell.name}/after", "11")):
        evaluation(bench.folder / name, cell, rollouts(outcomes))
    trainer = {"device": "cpu", "n_gpus_per_node": 1, "nnodes": 1}
    with RunFolder(bench.cell(cell) / "train").open({"config": {"trainer": trainer}}) as folder:
        write_rows(folder.root / "metrics.jsonl", {0: {"sqlbench/val_ex": 0.4}, 1: {"sqlbench/ex": 0.5}})
        folder.finish({"steps": 1})
    run_cell(cell, bench, Sweep((cell,)))
    assert pd.isna(write_tables(bench.folder)[1]["Time/Step (s)"][0])


@pytest.mark.parametrize("first", [0, 2])
def test_on_a_gpu_both_sides_are_the_trainers_own_validation(first: int, tmp_path: Path) -> None:
    """Before the first step and after the last; another step does not stand for them."""
    bench, cell = Workspace(profile="gpu", results=str(tmp_path)), Experiment(steps=4)
    trainer = {"device": "cuda", "n_gpus_per_node": 2, "nnodes": 1}
    with RunFolder(bench.cell(cell) / "train").open({"config": {"trainer": trainer}}) as folder:
        for step, outcomes in ((first, "01"), (3, "00"), (4, "11")):
            for record in rollouts(outcomes):
                folder.append(TRAJECTORIES, record.model_copy(update={"step": step, "validation": True}))
        folder.append(TRAJECTORIES, rollouts("0")[0].model_copy(update={"step": 4}))
        write_rows(folder.root / "metrics.jsonl", {step: {"sqlbench/ex": 0.5} for step in range(1, 5)})
        folder.finish({"steps": 4})
    if first:
        with pytest.raises(RunError, match="not validated before its first"):
            run_cell(cell, bench, Sweep((cell,)))
    else:
        result = run_cell(cell, bench, Sweep((cell,)))
        assert (result.initial.outcomes, result.final.outcomes, result.gpus) == ("01", "11", 2)


def test_tables_are_written_as_csv_and_markdown(bench: Workspace) -> None:
    finished(bench, Experiment(), "0011", "0111")
    accuracy, _ = write_tables(bench.folder)
    again = pd.read_csv(bench.folder / "tables" / "accuracy.csv")
    assert again["Agents"].tolist() == accuracy["Agents"].tolist() == [AGENTS]
    lines = (bench.folder / "tables" / "accuracy.md").read_text().splitlines()
    assert lines[0].startswith("| Model | Size | Context |")
    assert {line.count("|") for line in lines} == {len(accuracy.columns) + 1}, "bars inside cells are escaped"
    assert markdown(accuracy).splitlines() == lines


def test_a_finished_cell_is_not_run_again(bench: Workspace) -> None:
    finished(bench, GRIDS["smoke"].cells[0], "01", "11")
    finished(bench, GRIDS["smoke"].cells[1], "01", "11")
    state = ablate(grid="smoke", run=bench.run, data="no/such/data", results=bench.results)
    assert state["state"].tolist() == ["finished", "finished"]


def test_a_dry_run_says_how_far_each_cell_is_and_runs_nothing(bench: Workspace) -> None:
    first, second = GRIDS["smoke"].cells
    finished(bench, first, "01", "11")
    write_rows_of = bench.cell(second) / "train"
    write_rows_of.mkdir(parents=True)
    write_rows(write_rows_of / "metrics.jsonl", {1: {"sqlbench/ex": 0.5}})
    state = ablate(grid="smoke", run=bench.run, results=bench.results, dry_run=True)
    assert state["state"].tolist() == ["finished", "trained to step 1 of 1"]
    assert not (bench.folder / "tables").exists()


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_cell_that_fails_does_not_stop_the_others(bench: Workspace, parallel: int) -> None:
    first, second = GRIDS["smoke"].cells
    evaluation(bench.folder / "cells" / before_name(first), first, rollouts("01"), limit=8)
    finished(bench, second, "01", "11", limit=8)
    again = bench.cell(second) / "cell.json"
    again.unlink()
    with pytest.raises(RunError, match=rf"1 of 2 cells failed, first {first.name}: .*No data set in .*such"):
        ablate(grid="smoke", run=bench.run, data="no/such/data", results=bench.results, parallel=parallel)
    assert again.is_file()
    assert (bench.folder / "tables" / "accuracy.csv").is_file()


def test_an_evaluation_of_something_else_is_refused(bench: Workspace) -> None:
    cell = Experiment()
    evaluation(bench.folder / "cells" / before_name(cell), cell, rollouts("01"), limit=2)
    with pytest.raises(RunError, match=r"Another evaluation .*limit was 2"):
        run_cell(cell, bench, Sweep((cell,)))


def test_unknown_grid_cell_and_profile_are_refused(bench: Workspace) -> None:
    with pytest.raises(RunError, match=r"Unknown grid: huge. Choose one of: smoke, short, full, seed"):
        ablate(grid="huge", results=bench.results)
    with pytest.raises(RunError, match=r"Unknown cell of grid .*: t9. Choose one of: t3_c2048"):
        ablate(grid="smoke", only="t9", results=bench.results)
    with pytest.raises(RunError, match="Unknown profile: tpu"):
        ablate("tpu", results=bench.results)
    with pytest.raises(RunError, match=r"Invalid run name: '../x'"):
        ablate(run="../x", results=bench.results)
    with pytest.raises(DataError, match="No trained cell"):
        load_results(bench.folder)


def test_a_gain_is_paired_and_leaves_failed_tasks_out(bench: Workspace) -> None:
    finished(bench, Experiment(), "0000011x1", "111111111")
    (result,) = load_results(bench.folder)
    assert (result.gain.gained, result.gain.lost, result.gain.points) == (5, 0, 62.5)
    assert result.gain.p == pytest.approx(2 * 0.5**5)
    other = result.model_copy(update={"final": eval_stats(Rollouts.of(rollouts("1")), AGENTS)})
    with pytest.raises(DataError, match="9 and 1 tasks"):
        other.gain


def test_differences_are_those_of_training_and_of_one_setting(bench: Workspace) -> None:
    low, high = "0" * 200 + "1" * 100, "0" * 100 + "1" * 200
    finished(bench, Experiment(), low, high)
    finished(bench, Experiment(seed=2), low, high[1:] + "1")
    finished(bench, Experiment(turns=1), low, high)
    finished(bench, Experiment(control="coin"), low, low)
    table = difference_table(load_results(bench.folder)).set_index(["Cell", "Change"])
    training = table.xs("before → after training", level="Change")
    assert training["Gain"].to_dict() == {
        "t1_c2048_write-rewrite": 33.3,
        "t3_c2048_write-rewrite": 33.3,
        "t3_c2048_write-rewrite_seed2": 33.7,
        "t3_c2048_write-rewrite_random-reward": 0.0,
    }
    assert training.loc["t3_c2048_write-rewrite", ["Gained / lost", "McNemar p"]].tolist() == ["100 / 0", "< 0.001"]
    others = table.drop(index="before → after training", level="Change")
    assert others.index.tolist() == [("t3_c2048_write-rewrite", "turns 1 → 3")]
    assert others[["Acc (First)", "Acc (Second)", "McNemar p"]].values.tolist() == [[66.7, 66.7, "1.000"]]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("0" * 100, "Accuracy with 3 turns is lower than with 1 turn by 50.0 points"),
        ("1" * 100, "Accuracy with 3 turns is higher than with 1 turn by 50.0 points"),
        ("01" * 50, "The same tasks are right with 3 turns as with 1 turn."),
        ("10" + "01" * 49, "Accuracy with 3 turns is the same as with 1 turn"),
        ("11" + "01" * 49, "Accuracy with 3 turns is higher than with 1 turn by 1.0 points"),
    ],
)
def test_the_three_questions_are_answered_from_the_data(bench: Workspace, after: str, said: str) -> None:
    finished(bench, Experiment(), "0" * 100, after)
    finished(bench, Experiment(turns=1), "0" * 100, "01" * 50)
    finished(bench, Experiment(agents=AGENTS_CHECK, steps=10), "0" * 100, "1" + "0" * 99)
    finished(bench, Experiment(control="coin", turns=1), "0" * 100, "0" * 100)
    turns, context, agents = answers(load_results(bench.folder)).splitlines()
    assert turns.startswith(f"- **Turns.** {said}")
    assert ("that is more than noise" in turns) == ("50.0 points" in turns)
    assert ("that is not more than noise" in turns) == ("1.0 points" in turns)
    assert context == "- **Context.** Not asked here: every training is with a context of 2048 characters."
    assert "Not answered here" in agents and "higher than before training by 1.0 points" in agents
    finished(bench, Experiment(agents=AGENTS_CHECK), "0" * 100, "0" * 100)
    assert "with `write|rewrite` trained" in answers(load_results(bench.folder)).splitlines()[2]


def test_seeds_of_one_configuration_are_drawn_as_one(bench: Workspace) -> None:
    for seed in (1, 2):
        finished(bench, Experiment(seed=seed), "01", "11")
    finished(bench, Experiment(control="coin"), "01", "01")
    runs = training_runs(bench.folder)
    assert [len(folders) for folders in runs.values()] == [2, 1]
    assert len(accuracy_rows(load_results(bench.folder))) == 3
    models = accuracy_table(load_results(bench.folder))["Model"].tolist()
    assert models == ["nano", "nano (seed 2)", "nano (random reward)"]
    assert efficiency_table(load_results(bench.folder)).shape == (3, 11)


def test_the_headline_is_the_longest_trained_main_cell(bench: Workspace) -> None:
    finished(bench, Experiment(steps=15), "0011", "0011")
    finished(bench, Experiment(), "0011", "0111")
    finished(bench, Experiment(turns=1), "0011", "0000")
    finished(bench, Experiment(control="coin"), "0011", "0000")
    text = headline(load_results(bench.folder))
    assert text.startswith("accuracy on 4 headline tasks: 50.0% (95% CI 15.0 to 85.0) before training, 75.0% (95% CI")
    assert "after 40 steps" in text


@pytest.mark.slow
def test_the_notebooks_show_a_run_in_which_all_was_right(bench: Workspace, tmp_path: Path, repo: Path) -> None:
    """An empty list of splits is the headline split."""
    for cell in GRIDS["smoke"].cells:
        finished(bench, cell, "1" * 8, "1" * 8, "write,check", limit=8)
    given = ["splits=[]", "steps=2", "limit=8", "grid=smoke", f"data={one_database(tmp_path)}"]
    run_notebooks(only=["03", "05"], folder=repo / "notebooks", results=bench.results, parameters=given)
    tables = {name: pd.read_csv(bench.folder / f"tables/{name}.csv") for name in ("before_after", "self_correction")}
    assert tables["before_after"]["Split"].tolist() == ["headline"]
    assert tables["self_correction"]["Last query (%)"].tolist() == [100.0]
    assert tables["self_correction"]["Check: recall (%)"].isna().all(), "there was nothing to find"


@pytest.mark.slow
def test_the_notebook_shows_cells_whose_repair_cannot_be_judged(bench: Workspace, tmp_path: Path, repo: Path) -> None:
    """A GPU cell has no evaluation of its own; a cell of one turn has nothing to repair."""
    finished(bench, Experiment(turns=1), "0011", "0111")
    data, result = one_database(tmp_path), run_cell(Experiment(turns=1), bench, Sweep((Experiment(turns=1),)))
    gpu = Workspace("gpu", results=bench.results)
    for cell in GRIDS["seed"].cells:
        gpu.cell(cell).mkdir(parents=True)
        (gpu.cell(cell) / CELL).write_text(result.model_copy(update={"cell": cell}).model_dump_json())
    run_notebooks("gpu", only=["05"], folder=repo / "notebooks", results=bench.results, parameters=[f"data={data}"])
    tables = [pd.read_csv(gpu.folder / "tables/self_correction.csv"), correction_table(bench.folder, data)]
    assert [(len(table), table.columns[0]) for table in tables] == [(0, "Training")] * 2


def one_database(folder: Path) -> Path:
    """A data set whose only database is that of `rollouts`."""
    (folder / "data/database/d").mkdir(parents=True)
    sqlite3.connect(folder / "data/database/d/d.sqlite").close()
    write_split(folder / "data", "dev", [Task(task_id="1", db_id="d", question="q", gold="SELECT 1", split="dev")])
    (folder / "data/dataset.json").write_text('{"headline": "dev"}')
    return folder / "data"


def test_sizes_are_counted_from_weights_or_read_off_the_name(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1000, 500), "b": torch.zeros(70_000)}, tmp_path / "model.safetensors")
    assert model_size(str(tmp_path)) == "0.57M"
    assert model_size("Qwen/Qwen2.5-Coder-1.5B-Instruct") == "1.5B"
    assert model_size("meta-llama/Llama-3.2-3B-Instruct") == "3B"
