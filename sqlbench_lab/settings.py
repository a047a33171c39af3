"""Settings of sweeps, notebooks and the views of runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sqlbench.config import RESULTS, Overrides, OwnData, Prices, Profile, Results, Run, Settings, Track


class AblateConfig(Settings):
    """Run or resume a grid of trainings and write the accuracy and efficiency tables."""

    overrides: Overrides = Field([])
    profile: Profile = "laptop"
    grid: str | None = Field(None, description="short (default), full or smoke; seed (default of the profile gpu).")
    data: OwnData = None
    run: str | None = Field(None, description="Name of the run; the grid's name by default.")
    only: str | None = Field(None, description="One cell by name, as a dry run lists them.")
    parallel: int = Field(1, ge=1, description="Cells trained at the same time, each with its output in its cell.log.")
    track: Track = None
    results: Results = RESULTS
    dry_run: bool = Field(False, description="Only say what there is to do; with --only, the cell's config and needs.")


class NotebooksConfig(Settings):
    """Execute the ordered notebooks and keep them with their results."""

    profile: str = Field(
        "laptop", description="laptop, gpu, or smoke: as laptop, with everything as small as it can be."
    )
    run: Run = "demo"
    only: list[str] = Field([], description="A notebook by number or name; repeatable.")
    parameters: list[str] = Field(
        [],
        description="name=value for the parameters cells; repeatable.",
        json_schema_extra={"flags": ["--parameter", "-p"]},
    )
    folder: Path = Field(Path("notebooks"), description="Folder of the notebooks.")
    results: Results = RESULTS
    force: bool = Field(False, description="Run finished notebooks again.")


class RunsConfig(Settings):
    """List runs, the newest first."""

    filter: str = Field("", description="Part of a run's name.", json_schema_extra={"flags": ["--filter"]})
    kind: str | None = Field(None, description="eval, training, sft or evolve.")
    best: bool = Field(False, description="The most accurate first.")
    results: Results = RESULTS


class ShowConfig(Settings):
    """Show the rollouts of a run in the terminal, or one task's step by step."""

    run: Path = Field(description="Folder of a run, as results/laptop/baseline.", json_schema_extra={"flags": []})
    task: str | None = Field(None, description="Only this task, step by step.")
    wrong: bool = Field(False, description="Only wrong rollouts, by cause, with an example of each.")
    verbose: bool = Field(False, description="Show prompts and whole answers; with --wrong, all rollouts.")
    html: Path | None = Field(None, description="Write the inspector's page to this file instead.")
    limit: int = Field(40, ge=1, description="Rollouts to list, of each cause with --wrong.")
    prices: Prices = None


class CompareConfig(Settings):
    """Compare two evaluations over the same tasks, task by task."""

    first: Path = Field(description="Folder of an evaluation.", json_schema_extra={"flags": []})
    second: Path = Field(description="Folder of the other.", json_schema_extra={"flags": []})
    limit: int = Field(20, ge=1, description="Changed tasks to list.")
