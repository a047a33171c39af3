"""The ablation grid, run or resumed cell by cell.

A cell is one training run and the evaluations before and after it, on the same tasks with the same rollout settings::

    results/<profile>/<run>/cells/before_t3_c2048/                    shared by cells that differ only in training
    results/<profile>/<run>/cells/t3_c2048_write-rewrite/train/       the training run
    results/<profile>/<run>/cells/t3_c2048_write-rewrite/after/       the evaluation of the trained policy
    results/<profile>/<run>/cells/t3_c2048_write-rewrite/cell.json    everything the tables need; its presence = done

A cell's name states every difference from the default cell, so equal names mean equal settings. An interrupted run
resumes where it stopped: finished cells are skipped, an unfinished training resumes at its last checkpoint, and an
unfinished evaluation at its last rollout.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from sqlbench.config import CUT, RolloutConfig, takes
from sqlbench.errors import DataError, RunError, SqlbenchError
from sqlbench.evaluation import evaluate
from sqlbench.profiles import find_profile
from sqlbench.results import Rollouts
from sqlbench.runs import RunFolder, differences, lock, run_path, write_whole
from sqlbench_lab.figures import read_metrics, time_shares
from sqlbench_lab.settings import AblateConfig
from sqlbench_lab.sweep import GRIDS, Experiment, Sweep, slug
from sqlbench_lab.tables import (
    CELL,
    CellResult,
    eval_stats,
    model_size,
    paired,
    seed_comparison,
    write_seed_tables,
    write_tables,
)


@takes(AblateConfig, "profile", "grid", "overrides")
def ablate(settings: AblateConfig) -> pd.DataFrame:
    """Run or resume the cells of a grid, write both tables, and return the state of every cell.

    A dry run of the grid ``seed`` prints the results so far next to the published figures.

    Raises:
        RunError: the profile, grid or cell is unknown, or a cell failed (the others are run first).
    """
    profile, only = settings.profile, settings.only
    grid = settings.grid or ("seed" if profile == "gpu" else "short")
    if grid not in GRIDS:
        raise RunError(f"Unknown grid: {grid}. Choose one of: {', '.join(GRIDS)}.")
    rows = {name: cell for name, cell in GRIDS[grid].rows.items() if only in (None, name, cell.name)}
    cells = list(rows.values())
    if not cells:
        raise RunError(f"Unknown cell of grid {grid}: {only}. Choose one of: {', '.join(GRIDS[grid].rows)}.")
    data = settings.data or find_profile(profile).data
    bench = Workspace(profile, settings.run or grid, str(data), str(settings.results))
    chosen = replace(GRIDS[grid], overrides=(*GRIDS[grid].overrides, *settings.overrides))
    if settings.track:
        from sqlbench_train.compose import tracking

        chosen = replace(chosen, overrides=(*chosen.overrides, *tracking(settings.track)))
    if settings.dry_run and only:
        train_cell(cells[0], bench, chosen, dry_run=True)
    elif settings.dry_run and grid == "seed":
        print(*(table.to_string(index=False) for table in seed_comparison(bench.folder)), sep="\n\n", end="\n\n")
    elif not settings.dry_run:
        with ExitStack() as locks:
            for cell in cells:
                locks.enter_context(lock(bench.cell(cell)))
            failed = _run_cells(cells, chosen, bench, settings.parallel)
        if any(bench.state(cell) == "finished" for cell in cells):
            write_tables(bench.folder)
            if grid == "seed":
                write_seed_tables(bench.folder)
        for name, error in failed.items():
            raise RunError(
                f"{len(failed)} of {len(cells)} cells failed, first {name}: {str(error).rstrip('.')}. "
                "Rerun the same call to resume."
            ) from error
    return pd.DataFrame([{"cell": n, "state": bench.state(c), "folder": str(bench.cell(c))} for n, c in rows.items()])


@dataclass(frozen=True)
class Workspace:
    """Profile and data that cells train on, and the run folder that holds them."""

    profile: str = "laptop"
    run: str = "demo"
    data: str = "data/pocket"
    results: str = "results"

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return run_path(self.results, self.profile, self.run)

    def cell(self, cell: Experiment) -> Path:
        """Return a cell's folder."""
        return self.folder / "cells" / cell.name

    def state(self, cell: Experiment) -> str:
        """Describe the progress of a cell."""
        if (self.cell(cell) / CELL).is_file():
            return "finished"
        try:
            return f"trained to step {read_metrics(self.cell(cell) / 'train').index.max()} of {cell.steps}"
        except DataError:
            return "not started"


def _run_cells(cells: list[Experiment], grid: Sweep, bench: Workspace, parallel: int) -> dict[str, SqlbenchError]:
    """Run the unfinished cells and return the errors by cell; a failed cell does not stop the others."""
    todo = [cell for cell in cells if bench.state(cell) != "finished"]
    failed: dict[str, SqlbenchError] = {}
    have = len(cells) - len(todo)
    with tqdm(total=len(cells), initial=have, desc="cells", unit="cell", disable=not todo) as bar:
        if parallel <= 1 or len(todo) <= 1:
            for cell in todo:
                bar.set_postfix_str(cell.name)
                try:
                    run_cell(cell, bench, grid)
                except SqlbenchError as error:
                    failed[cell.name] = error
                bar.update()
            return failed
        # Cells share the evaluations before training. They run first, so that no two processes run the same one.
        if bench.profile != "gpu":
            for cell in {before_name(c): c for c in todo}.values():
                evaluate_before(cell, bench, grid)
        with ProcessPoolExecutor(parallel, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(_run_cell_apart, cell, bench, grid): cell for cell in todo}
            try:
                for job in as_completed(jobs):
                    problem = job.exception()
                    if isinstance(problem, SqlbenchError):
                        failed[jobs[job].name] = problem
                    elif problem is not None:
                        raise problem
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failed


def _run_cell_apart(cell: Experiment, bench: Workspace, grid: Sweep) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bench.cell(cell).mkdir(parents=True, exist_ok=True)
    with (bench.cell(cell) / "cell.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        run_cell(cell, bench, grid)


def _end_with_parent() -> None:
    """End this process with its parent, so that no training outlives its caller."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def run_cell(cell: Experiment, bench: Workspace, grid: Sweep) -> CellResult:
    """Evaluate, train and evaluate again; skip the parts that are finished.

    On a GPU both accuracies are those of the trainer's own greedy validation, before the first and after the last step,
    because no second engine is available to load the policy into.
    """
    place = bench.cell(cell)
    if (place / CELL).is_file():
        return CellResult.model_validate_json((place / CELL).read_text(encoding="utf-8"))
    if bench.profile == "gpu":
        train_cell(cell, bench, grid)
        ends = (0, read_metrics(place / "train").index.max())
        checks = [
            Rollouts.of(t for t in RunFolder(place / "train").trajectories() if t.validation and t.step == step)
            for step in ends
        ]
        if any(side.rollouts.empty for side in checks):
            raise RunError(
                f"Training not validated before its first and after its last step: {place / 'train'}. Leave "
                "trainer.val_before_train and trainer.test_freq on, and choose another run name."
            )
    else:
        before = evaluate_before(cell, bench, grid)
        train_cell(cell, bench, grid)
        after = evaluate_after(cell, bench, grid)
        checks = [Rollouts.of(folder.trajectories()) for folder in (before, after)]
    metrics, trainer = read_metrics(place / "train"), RunFolder(place / "train").config()["config"]["trainer"]
    times = time_shares(metrics)
    result = CellResult(
        cell=cell,
        size=model_size(cell.model),
        split=grid.split,
        initial=eval_stats(checks[0], cell.agents),
        final=eval_stats(checks[1], cell.agents),
        gpus=0 if trainer["device"] == "cpu" else trainer["n_gpus_per_node"] * trainer["nnodes"],
        steps=int(metrics.index.max()),
        hours=metrics.filter(["timing_s/step", "timing_s/testing"]).sum().sum() / 3600,
        step_seconds=times["step_s"],
        rollout_percent=times["rollout"],
        update_percent=times["update"],
    )
    write_whole(place / CELL, [result.model_dump_json(indent=2) + "\n"])
    return result


def train_cell(cell: Experiment, bench: Workspace, grid: Sweep, *, dry_run: bool = False) -> Path:
    """Train a cell, or resume its training, and return its run folder (at once if it is finished)."""
    from sqlbench_train.launch import train

    place = bench.cell(cell) / "train"
    if RunFolder(place).finished and not dry_run:
        return place
    settings = {
        "sqlbench.max_turns": cell.turns,
        "sqlbench.table_info_truncate": cell.context,
        "sqlbench.schema_linking": False,  # a schema is cut at the context length instead
        "sqlbench.execution_truncate": cell.context,
        "sqlbench.trained_agents": f"'{cell.agents}'",
        "sqlbench.seed": cell.seed,
        "sqlbench.credit": cell.credit,
        "trainer.total_training_steps": cell.steps,
    }
    if grid.recipe == "seed":
        settings["actor_rollout_ref.actor.ppo_mini_batch_size"] = cell.mini_batch
    return train(
        bench.profile,
        f"{bench.run}/cells/{cell.name}/train",
        bench.data,
        cell.model,
        [*(f"{key}={value}" for key, value in settings.items()), *grid.overrides],
        results=bench.results,
        recipe=grid.recipe,
        control=cell.control,
        dry_run=dry_run,
    )


def evaluate_before(cell: Experiment, bench: Workspace, grid: Sweep) -> RunFolder:
    """Return the evaluation of a cell's model before training; run it if it is missing."""
    return _evaluate_once(cell, cell.model, f"cells/{before_name(cell, grid.split)}", bench, grid)


def evaluate_after(cell: Experiment, bench: Workspace, grid: Sweep) -> RunFolder:
    """Return the evaluation of a trained cell's policy; run it if it is missing."""
    name = f"cells/{cell.name}/after" + _suffix(grid.split)
    return _evaluate_once(cell, str(bench.cell(cell) / "train"), name, bench, grid)


def before_name(cell: Experiment, split: str = "headline") -> str:
    """Name the folder of the evaluation before training; cells that differ only in training share it."""
    model = "" if cell.model == "nano" else "_" + slug(cell.model)
    return f"before_t{cell.turns}_c{cell.context}{model}{_suffix(split)}"


def _suffix(split: str) -> str:
    return "" if split == "headline" else f"_{split}"


def _evaluate_once(cell: Experiment, model: str, name: str, bench: Workspace, grid: Sweep) -> RunFolder:
    folder = RunFolder(bench.folder / name)
    wanted = {"split": grid.split, "limit": grid.limit, "rollout": cell.rollout.model_dump()}
    if folder.finished:
        seen = folder.config()
        # A setting newer than the run had its default value then, or was off.
        seen["rollout"] = RolloutConfig.model_validate(CUT | seen.get("rollout", {})).model_dump()
        if changed := differences({key: seen.get(key) for key in wanted}, wanted):
            raise RunError(f"Another evaluation is in {folder.root}: {'; '.join(changed)}. Choose another run name.")
        return folder
    evaluate(
        bench.data,
        grid.split,
        model,
        f"{bench.run}/{name}",
        results=bench.results,
        profile=bench.profile,
        limit=grid.limit,
        **cell.rollout.model_dump(),
    )
    return folder


def compare_splits(cell: Experiment, bench: Workspace, splits: Iterable[str], limit: int | None = None) -> pd.DataFrame:
    """Compare a trained cell before and after on several splits, one row each; run missing evaluations."""
    rows = []
    for split in splits:
        grid = Sweep((cell,), split=split, limit=limit)
        before, after = (
            eval_stats(Rollouts.of(make(cell, bench, grid).trajectories()), cell.agents)
            for make in (evaluate_before, evaluate_after)
        )
        rows.append({"Split": split} | paired(before, after))
    return pd.DataFrame(rows)
