"""What `pip install` gives: sdist and wheel hold every file of the packages, and work without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import sqlbench

NOT_SHIPPED = {"benchmarks", "docs", "examples", "tests"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked(repo: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=repo, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (repo / name).is_file()]


@pytest.fixture(scope="module")
def wheel(repo: Path, tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from what is tracked, and the wheel from the sdist; setuptools is the installed one."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        if not name.startswith(("results/", "notebooks/", "docs/", "tests/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repo / name, tree / name)
    build = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", out, cwd=tree)
    with tarfile.open(out / f"sqlbench-{sqlbench.__version__}.tar.gz") as sdist:
        sdist.extractall(tree / "unpacked", filter="data")
    run(sys.executable, "-c", build, "build_wheel", out, cwd=tree / f"unpacked/sqlbench-{sqlbench.__version__}")
    return out / f"sqlbench-{sqlbench.__version__}-py3-none-any.whl"


def test_the_wheel_holds_every_file_of_every_package(repo: Path, tracked: list[str], wheel: Path) -> None:
    packages = {path.parent.name for path in repo.glob("*/__init__.py")} - NOT_SHIPPED
    assert {"pocket", "sql_env", "sqlbench", "verl_cpu"} <= packages
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked if name.split("/")[0] in packages}
    assert wanted - shipped == set(), "not in the wheel"
    assert shipped - wanted == set(), "in the wheel and not of a package"


@pytest.mark.slow
def test_an_installed_wheel_evaluates_nano_without_the_repository(repo: Path, wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    # The dependencies of this environment, as a plain path: its editable install of the repository is not read.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    where = run(python, "-c", "import sqlbench, pocket, verl_cpu, sql_env; print(sqlbench.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    command = tmp_path / "env/bin/sqlbench"
    assert run(command, "--version", cwd=tmp_path).split()[-1] == sqlbench.__version__
    run(command, "data", "pocket", cwd=tmp_path)
    shown = run(command, "eval", "--model", "nano", "--limit", "5", "--run", "first", cwd=tmp_path)
    assert "n=5" in shown and "0 failed" in shown
    assert (tmp_path / "results/laptop/first/summary.json").is_file()


def test_one_version_stands_everywhere(repo: Path) -> None:
    version = sqlbench.__version__
    environment = tomllib.loads((repo / "sql_env/pyproject.toml").read_text())["project"]
    locked = tomllib.loads((repo / "sql_env/uv.lock").read_text())["package"]
    assert environment["version"] == version
    assert next(p for p in locked if p["name"] == environment["name"])["version"] == version
    assert yaml.safe_load((repo / "CITATION.cff").read_text())["version"] == version
    assert (repo / "CHANGELOG.md").read_text().split("\n## ")[1].splitlines()[0] == version
