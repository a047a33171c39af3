"""The house has no import circle, no arrow up, and no room knows another's private names."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = ("verl_cpu", "sqlbench", "pocket", "sqlbench_data", "sqlbench_train")
ROOMS += ("sqlbench_lab", "sqlbench_chat", "sql_env")
"""Each is built on those before it."""
ORDER = ("sqlbench.rollout", "sqlbench.agent.graph", "sqlbench.reward", "sqlbench.database.engine", "sqlbench.errors")
"""A rollout goes down these floors; none imports one above it, not even inside a function."""


def imports(path: Path, lazily: bool) -> list[tuple[str, str]]:
    """(module, name) of what a file imports when it runs; `lazily` adds what its functions import."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazily:
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                found.extend((child.module, alias.name) for alias in child.names)
            elif isinstance(child, ast.Import):
                found.extend((alias.name, "") for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module")
def files(repo) -> dict[str, Path]:
    """Files of all packages by module."""
    paths = [path for room in ROOMS for path in (repo / room).rglob("*.py") if "startup" not in path.parts]
    names = {path: ".".join(path.relative_to(repo).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: path for path in paths}


def graph(files: dict[str, Path], lazily: bool) -> dict[str, set[str]]:
    """Modules that each module imports."""
    return {
        name: {
            target
            for module, part in imports(path, lazily)
            if (target := f"{module}.{part}" if f"{module}.{part}" in files else module) in files and target != name
        }
        for name, path in files.items()
    }


def test_there_is_no_import_circle(files):
    try:
        TopologicalSorter(graph(files, lazily=False)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_rollout_goes_down_and_never_up(files):
    below = graph(files, lazily=True)

    def reach(start: str) -> set[str]:
        seen, queue = {start}, [start]
        while queue:
            queue += (new := below[queue.pop()] - seen)
            seen |= new
        return seen

    for number, name in enumerate(ORDER):
        assert not reach(name) & set(ORDER[:number]), name


def test_no_file_imports_a_private_name_of_another(files):
    private = [
        f"{name}: {module}.{part}"
        for name, path in files.items()
        for module, part in imports(path, lazily=True)
        if module.split(".")[0] in ROOMS and part.startswith("_") and not part.startswith("__")
    ]
    assert private == []


def test_a_package_imports_none_that_is_built_on_it(files):
    """`pocket` is opened by name in the library, which is what its names are for."""
    above = {
        f"{name} -> {target}"
        for name, targets in graph(files, lazily=True).items()
        for target in targets
        if (own := name.split(".")[0]) != (other := target.split(".")[0])
        and ROOMS.index(other) > ROOMS.index(own)
        and (own, other) != ("sqlbench", "pocket")
    }
    assert not above


def test_the_library_is_small(repo):
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (repo / "sqlbench").rglob("*.py"))
    assert lines <= 9500
