"""The seed experiment's eight rows: by name, as a plan without GPU or data, and beside what was published."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.errors import RunError, TrainingError
from sqlbench.profiles import PROFILES
from sqlbench_lab.ablation import Workspace, ablate
from sqlbench_lab.sweep import GRIDS, Experiment
from sqlbench_lab.tables import CELL, SEED_FIGURES, CellResult, EvalStats, seed_comparison, write_seed_tables
from sqlbench_train.compose import TRACKERS, compose
from sqlbench_train.launch import train
from sqlbench_train.preflight import needs

ROWS = GRIDS["seed"].rows


def published() -> pd.DataFrame:
    return pd.read_csv(SEED_FIGURES, index_col="row")


def plan(out: str) -> tuple[dict, list[str]]:
    """The configuration and the needs that a dry run printed."""
    config = "\n".join(line for line in out.split("# needs")[0].splitlines())
    return yaml.safe_load(config), re.findall(r"(?m)^# needs (.*)$", out)


def test_every_row_is_one_of_the_published_table_and_no_other() -> None:
    table = published()
    assert list(ROWS) == table.index.tolist() and len(ROWS) == 8
    for name, cell in ROWS.items():
        row = table.loc[name]
        assert (cell.context, cell.turns, cell.agents, cell.steps) == (
            row["Context"], row["Max Turns"], row["Agents"], row["# Steps"],
        )  # fmt: skip
        assert row["Size"] in cell.model and row["Model"].replace("Llama3.2", "Llama-3.2") in cell.model
        assert cell == Experiment(
            credit="published", **{k: getattr(cell, k) for k in ("model", "context", "turns", "agents", "steps")}
        )


def test_the_published_figures_are_those_of_the_source(shared_root: Path) -> None:
    source = shared_root / "seeds" / "agent-lightning-sql-agent.md"
    if not source.is_file():
        pytest.skip(f"the seed experiment's text is absent: {source}")
    lines = [line for line in source.read_text().splitlines() if re.match(r"\| (Qwen|Llama)", line)]
    cells = [[c.strip().replace("&#124;", "|") for c in line.strip("|").split("|")] for line in lines]
    table = published().reset_index(drop=True)
    found = [[*map(str, row)] for row in table.itertuples(index=False)]
    numbers = [[c if not re.fullmatch(r"[\d.]+", c) else float(c) for c in row] for row in cells]
    ours = [[c if not re.fullmatch(r"[\d.]+", c) else float(c) for c in row] for row in found]
    assert [row[:10] for row in ours] == numbers[:8]
    assert [row[:5] + row[10:] for row in ours] == numbers[8:]


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_is_planned_without_gpu_data_or_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = ROWS[name]
    state = ablate("gpu", only=name, data=tmp_path / "none", results=tmp_path / "results", dry_run=True)
    config, lines = plan(capsys.readouterr().out)
    assert state["cell"].tolist() == [name] and not (tmp_path / "results").exists()
    assert config["actor_rollout_ref"]["model"]["path"] == cell.model
    ours = config["sqlbench"]
    assert (ours["max_turns"], ours["table_info_truncate"], ours["execution_truncate"], ours["trained_agents"]) == (
        cell.turns, cell.context, cell.context, cell.agents,
    )  # fmt: skip
    assert (ours["agent"], ours["credit"], ours["strict"], ours["sample_rows"]) == ("published", "published", False, 3)
    steps = {"write|rewrite": 2, "write|rewrite|check": 4}[cell.agents] if cell.turns > 1 else 1
    assert config["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"] == 32 // steps
    assert config["actor_rollout_ref"]["rollout"]["gpu_memory_utilization"] == 0.8
    assert config["data"]["train_batch_size"] == 32 and config["trainer"]["total_training_steps"] == 436
    text = "\n".join(lines)
    assert "436 steps of 32 tasks x 4 rollouts: 2 epochs of 218 steps (7,000 tasks as published)" in text
    assert "No data set in" in text and "of each GPU" in text and "of disk" in text


def test_a_row_can_be_named_by_its_folder_and_a_wrong_name_lists_them_all(tmp_path: Path) -> None:
    cell = ROWS["qwen-3b"]
    by_folder = ablate("gpu", only=cell.name, data=tmp_path, results=tmp_path, dry_run=True)
    assert by_folder["cell"].tolist() == ["qwen-3b"]
    with pytest.raises(RunError, match=f"Unknown cell of grid seed: qwen. Choose one of: {', '.join(ROWS)}"):
        ablate("gpu", only="qwen", results=tmp_path, dry_run=True)


def test_overrides_reach_the_training_of_a_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablate(
        "gpu", None, ["trainer.n_gpus_per_node=2"], only="qwen-3b", data=tmp_path, results=tmp_path, dry_run=True,
        track="tensorboard",
    )  # fmt: skip
    config, lines = plan(capsys.readouterr().out)
    assert config["trainer"]["n_gpus_per_node"] == 2 and lines[0].startswith("2 GPU(s)")
    assert config["trainer"]["logger"] == ["console", "file", "tensorboard"]


def test_steps_follow_the_data_at_hand(pocket: DataSet, tmp_path: Path) -> None:
    tasks = sum(task.scorable for task in pocket.load("train"))

    def lines(*overrides: str) -> str:
        config = compose(
            PROFILES["gpu"], run="r", folder=tmp_path, data=pocket.root, model="some/model", overrides=[*overrides]
        )
        return "\n".join(needs(PROFILES["gpu"], config))

    steps = tasks // 32
    assert f"{2 * steps} steps of 32 tasks x 4 rollouts: 2 epochs of {steps} steps ({tasks:,} tasks that" in lines()
    assert "40 steps of 32 tasks x 4 rollouts: 2 epochs of 20 steps" in lines("data.train_max_samples=650")
    assert f"{3 * steps} steps" in lines(f"trainer.total_training_steps={3 * steps}")
    assert "unknown for some/model" in lines()


def test_a_training_that_its_epochs_cannot_hold_is_refused(pocket: DataSet, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"Too many steps for trainer.total_epochs=1 of 10 steps: 20. Give trainer.total_epochs=2"
    ):
        train(
            "laptop", "r", pocket.root, results=tmp_path,
            overrides=["trainer.total_training_steps=20", "trainer.total_epochs=1", "data.train_max_samples=160"],
        )  # fmt: skip


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_refused(address: str, pocket: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"Cannot reach Ray at {address}: .*. Start a cluster") as caught:
        train("laptop", "r", pocket.root, results=tmp_path, overrides=[f"ray_kwargs.ray_init.address={address}"])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def result(cell: Experiment, split: str = "dev_500") -> CellResult:
    side = EvalStats(outcomes="1" * 300 + "0" * 200, transitions=1.5, prompt_tokens=800.0, response_tokens=30.0)
    return CellResult(
        cell=cell, size="3B", split=split, initial=side, final=side, gpus=1, steps=436, hours=9.0, step_seconds=70.0,
        rollout_percent=60.0, update_percent=30.0,
    )  # fmt: skip


def finish(bench: Workspace, found: CellResult) -> None:
    bench.cell(found.cell).mkdir(parents=True)
    (bench.cell(found.cell) / CELL).write_text(found.model_dump_json())


def test_what_was_not_run_stays_empty(tmp_path: Path) -> None:
    for table in seed_comparison(tmp_path):
        lines = table.set_index(["Row", "Source"])
        assert len(lines) == 16
        ours = lines.xs("sqlbench", level="Source").iloc[:, 5:]
        assert (ours == "").all(axis=None)
        theirs = lines.xs("published", level="Source").drop(columns="Tasks", errors="ignore")
        assert theirs.equals(published().astype(object)[theirs.columns].rename_axis("Row"))


def test_what_was_run_stands_below_what_was_published(tmp_path: Path) -> None:
    bench = Workspace(profile="gpu", run="seed", results=str(tmp_path))
    finish(bench, result(ROWS["qwen-3b"]))
    finish(bench, result(ROWS["qwen-3b-4096"], split="headline"))
    finish(bench, result(ROWS["llama-1b"].model_copy(update={"steps": 10})))
    finish(bench, result(ROWS["llama-3b"]).model_copy(update={"steps": 10}))  # cut short by an override
    accuracy, efficiency = write_seed_tables(bench.folder)
    ours = accuracy[accuracy["Source"] == "sqlbench"].set_index("Row")
    assert ours.loc["qwen-3b", ["Acc (Initial)", "Acc (Final)", "Tasks"]].tolist() == [60.0, 60.0, "500 of dev_500"]
    assert ours.loc["qwen-3b", "Transitions"] == "1.50 → 1.50"
    assert (ours.loc[[name for name in ROWS if name != "qwen-3b"], "Acc (Final)"] == "").all(), (
        "another split or length"
    )
    time = efficiency[efficiency["Source"] == "sqlbench"].set_index("Row").loc["qwen-3b"]
    assert (time["# GPUs"], time["# Steps"], time["Time/Step (s)"]) == (1, 436, 70.0)
    written = (bench.folder / "tables" / "seed_accuracy.md").read_text()
    assert "nan" not in written.lower() and written.count("| sqlbench |") == 8


def test_a_dry_run_of_the_grid_lists_the_rows_and_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_exit(["ablate", "--profile", "gpu", "--dry-run", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    for name in ROWS:
        assert len(re.findall(rf"(?m)^ *{re.escape(name)} .* published", out)) == 2
        assert re.search(rf"(?m)^ *{re.escape(name)} not started", out)


def main_exit(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", [["train", "--run", "r"], ["ablate", "--grid", "smoke"]])
def test_a_tracker_that_cannot_be_used_is_one_line_before_anything_starts(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {"clipboard": "Unknown tracker: clipboard. Choose one of: wandb, mlflow, tensorboard."}
    for name in TRACKERS:
        if importlib.util.find_spec(name) is None:
            cases[name] = f"Tracker is not installed: {name}. Run 'pip install {name}'."
    for name, text in cases.items():
        assert main_exit([*command, "--results", str(tmp_path / "results"), "--track", name]) == 1
        assert capsys.readouterr().err == f"error: {text}\n"
    assert not (tmp_path / "results").exists()
