"""The files for running sqlbench elsewhere agree with the code: variables, commands, paths, versions."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import yaml

import sqlbench.cli  # noqa: F401  (makes the commands)
from sqlbench.options import COMMANDS

LOOK_UP = r"(os\.)?environ\.get|os\.getenv|settings\.get"


def variables(repo: Path) -> set[str]:
    """Names that are looked up in an environment, literally or by a constant of the module.

    Those of a training's processes, which sqlbench and verl set themselves, are left out.
    """
    found: set[str] = set()
    packages = ("sqlbench", "sqlbench_chat", "sqlbench_data", "sqlbench_lab", "sql_env", "pocket")
    for path in (path for package in packages for path in (repo / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(LOOK_UP, ast.unparse(node.func)):
                key = node.args[0]
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                if ast.unparse(node.value) != "os.environ":
                    continue
                key = node.slice
            else:
                continue
            name = constants.get(key.id) if isinstance(key, ast.Name) else getattr(key, "value", None)
            assert isinstance(name, str), f"{path}:{node.lineno} looks up a name that this test cannot read"
            found.add(name)
    return found


def test_the_example_has_every_variable_that_is_read(repo: Path) -> None:
    named = re.findall(r"^([A-Z_]+)=$", (repo / ".env.example").read_text(), re.M)
    assert len(named) == len(set(named)) and set(named) == variables(repo)


def test_the_compose_file_starts_commands_that_exist(repo: Path) -> None:
    services = yaml.safe_load((repo / "compose.yaml").read_text())["services"]
    commands = {name: service.get("command") for name, service in services.items()}
    assert set(commands) == {"chat", "env", "api", "postgres"}
    for name in ("chat", "env", "api"):
        program, command, *options = commands[name]
        given = dict(zip(options[::2], options[1::2], strict=True))
        model = COMMANDS[command][0]
        model(**{flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()})
        assert program == "sqlbench"
        for port in services[name].get("ports", ()):
            assert port == "127.0.0.1:{0}:{0}".format(model.model_fields["port"].default)
    for volume in services["postgres"]["volumes"]:
        assert (repo / volume.split(":")[0]).is_file()


def test_the_images_copy_what_exists_and_do_not_run_as_root(repo: Path) -> None:
    for file in (repo / "Dockerfile", repo / "sql_env/server/Dockerfile"):
        lines = [shlex.split(line) for line in file.read_text().replace("\\\n", " ").splitlines() if line]
        context = repo if file.parent == repo else repo / "sql_env"
        assert ["FROM", "python:3.11-slim"] in lines
        assert [line[0] for line in lines].index("USER") < [line[0] for line in lines].index("CMD")
        for line in lines:
            if line[0] == "COPY":
                assert all((context / source).exists() for source in line[1:-1]), line


def test_the_workflow_runs_what_a_developer_runs(repo: Path) -> None:
    workflow = yaml.safe_load((repo / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["sh .ci/run"] and (repo / ".ci/run").is_file()
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    assert "TORCH_INDEX ?=" in (repo / "Makefile").read_text() and job["env"]["TORCH_INDEX"].startswith("https://")
