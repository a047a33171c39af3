from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = (
    "pocket",
    "sql_env",
    "sqlbench",
    "sqlbench_chat",
    "sqlbench_data",
    "sqlbench_lab",
    "sqlbench_train",
    "verl_cpu",
)
NAMED = {"jupyterlab", "ipywidgets", "pandas", "matplotlib", "langgraph", "langchain-openai"}
NAMED |= {"verl", "vllm", "torch", "sqlparse", "papermill", "nbval"}


def requirements(repo: Path) -> dict[str, list[Requirement]]:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {group: [Requirement(r) for r in rows if not r.startswith("sqlbench[")] for group, rows in groups.items()}


def environment(repo: Path) -> dict[str, Requirement]:
    rows = yaml.safe_load((repo / "environment.yml").read_text())["dependencies"]
    pip = next(row["pip"] for row in rows if isinstance(row, dict))
    return {canonicalize_name(r.name): r for r in map(Requirement, pip)}


def constraints(repo: Path) -> dict[str, str]:
    lines = (repo / "constraints-laptop.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def pinned(requirement: Requirement) -> str | None:
    exact = [s.version for s in requirement.specifier if s.operator == "=="]
    return exact[0] if exact else None


def test_environment_holds_every_requirement_of_pyproject_and_nothing_else(repo):
    declared = {canonicalize_name(r.name) for rows in requirements(repo).values() for r in rows}
    assert set(environment(repo)) == declared
    assert declared >= NAMED


def test_environment_agrees_with_pyproject_on_versions(repo):
    env, gpu = environment(repo), {canonicalize_name(r.name): r for r in requirements(repo)["gpu"]}
    for rows in requirements(repo).values():
        for requirement in rows:
            entry = env[canonicalize_name(requirement.name)]
            version = pinned(entry)
            if version is None:
                assert entry.specifier == requirement.specifier, entry.name
            else:
                assert version in requirement.specifier, f"{entry} does not satisfy {requirement}"
    assert all(str(env[name].specifier) == str(r.specifier) for name, r in gpu.items())


def test_every_laptop_requirement_has_a_constraint_that_satisfies_it(repo):
    pins = constraints(repo)
    for group, rows in requirements(repo).items():
        for requirement in rows if group != "gpu" else []:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_constraints_are_what_is_installed(repo):
    installed = {canonicalize_name(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()}
    pins = constraints(repo)
    wrong = {n: (v, pins[n]) for n, v in installed.items() if n in pins and v != pins[n].split("+")[0]}
    assert not wrong, f"installed and pinned versions differ: {wrong}; run make install"


def test_the_lock_of_the_environment_has_the_measured_versions(repo):
    locked = {p["name"]: p.get("version") for p in tomllib.loads((repo / "sql_env/uv.lock").read_text())["package"]}
    pins = constraints(repo)
    assert {"openenv-core", "sqlbench", "torch"} <= locked.keys()
    assert not {name: (v, pins[name]) for name, v in locked.items() if name in pins and v != pins[name]}


def test_every_upper_bound_of_training_says_why(repo):
    text = (repo / "pyproject.toml").read_text()
    block = text[text.index("train = [") : text.index("\n]", text.index("train = ["))]
    for line in block.splitlines()[1:]:
        if re.search(r"<[\d=]", line):
            assert "#" in line, f"no reason beside {line.strip()}"


def imported(folder: Path) -> set[str]:
    modules: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return modules - sys.stdlib_module_names - set(PACKAGES)


@pytest.mark.parametrize(
    ("folder", "groups"),
    [
        ("sqlbench", {"core", "local", "agent", "duckdb"}),
        ("sqlbench_chat", {"core", "agent", "environment", "notebooks"}),
        ("sqlbench_data", {"core"}),
        ("sqlbench_lab", {"core", "agent", "notebooks"}),
        ("sqlbench_train", {"core", "local", "train", "gpu", "agent"}),
        ("pocket", {"core", "local"}),
        ("verl_cpu", {"core", "local", "train", "gpu"}),
        ("sql_env", {"core", "environment"}),
        ("tests", {"core", "local", "train", "gpu", "agent", "environment", "notebooks", "duckdb", "test"}),
    ],
)
def test_what_is_imported_is_declared(repo, folder, groups):
    declared = {canonicalize_name(r.name) for g, rows in requirements(repo).items() if g in groups for r in rows}
    providers = metadata.packages_distributions()
    unknown = {
        module
        for module in imported(repo / folder)
        # What is not installed (vllm on a laptop) is looked for by the module's own name.
        if not declared & {canonicalize_name(name) for name in providers.get(module, [module])}
    }
    local = {path.stem for place in ("tests", "benchmarks") for path in (repo / place).rglob("*.py")}
    assert unknown <= local, f"imported and not declared in pyproject.toml: {unknown - local}"


def test_only_training_imports_verl_and_ray(repo):
    for package in set(PACKAGES) - {"sqlbench_train", "verl_cpu"}:
        for path in (repo / package).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) (verl|ray)\b", path.read_text(), re.M), path


def tracked(repo: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=repo, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [repo / name for name in listed.stdout.splitlines() if (repo / name).is_file()]


def test_no_path_of_a_machine_is_in_the_repository(repo):
    # Written in pieces, so that this file does not contain what it looks for.
    path = re.compile("|".join(f"(?<![\\w./-])/{p}/" for p in ("work", "root", "home/[a-z]+")))
    found = []
    for file in tracked(repo):
        if file.suffix in {".png", ".safetensors", ".parquet", ".sqlite", ".gz"}:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if path.search(line):
                found.append(f"{file.relative_to(repo)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = ["torch", "verl", "ray", "transformers", "langgraph", "pandas", "matplotlib"]
    code = f"import sys, sqlbench; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
