"""Commands for sweeps, notebooks and views of runs."""

from __future__ import annotations

from sqlbench.options import command
from sqlbench_lab.settings import AblateConfig, CompareConfig, NotebooksConfig, RunsConfig, ShowConfig


@command("ablate")
def _ablate(settings: AblateConfig) -> None:
    from sqlbench_lab.ablation import ablate

    print(ablate(settings).to_string(index=False))


@command("notebooks")
def _notebooks(settings: NotebooksConfig) -> None:
    from sqlbench_lab.notebooks import run_notebooks

    print(run_notebooks(settings).text())


@command("runs")
def _runs(settings: RunsConfig) -> None:
    from sqlbench_lab.terminal import runs

    print(runs(settings).to_string(index=False))


@command("show")
def _show(settings: ShowConfig) -> None:
    from sqlbench_lab.terminal import show

    show(settings)


@command("compare")
def _compare(settings: CompareConfig) -> None:
    from sqlbench_lab.terminal import compare

    compare(settings)
