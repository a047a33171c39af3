"""Strict headless notebooks: parameters are checked first, finished notebooks are skipped, failures are located.

papermill executes the notebooks; this module adds the rest. Unknown parameters and wrong types are refused (papermill
logs them and runs the defaults). A notebook is skipped if its executed copy was made from the same source with the same
parameters. A failing cell becomes a `NotebookError` with the notebook, the cell, the error and the partial notebook's
path. Every executed copy carries its provenance in ``metadata.sqlbench``.

The hash of a notebook does not cover the library's own code, so use ``force`` after a change of the library.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import nbformat

from sqlbench.checks import versions
from sqlbench.config import takes
from sqlbench.errors import DataError, NotebookError
from sqlbench.runs import lock, run_path
from sqlbench_lab.home import ensure_folders
from sqlbench_lab.settings import NotebooksConfig

Value = str | int | float | bool | None | list | dict

_SETTINGS = tomllib.loads((Path(__file__).parent / "assets" / "notebooks.toml").read_text(encoding="utf-8"))
ORDER: list[str] = _SETTINGS["order"]
PRESETS: dict[str, dict[str, dict[str, Value]]] = _SETTINGS["presets"]
"""Parameters by profile and notebook that differ from the notebook's defaults."""


# --- parameters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One ``name = literal`` line of a notebook's parameters cell."""

    name: str
    default: Value

    def parse(self, text: str) -> Value:
        """Parse the text of ``-p name=text`` by the type of the default."""
        if isinstance(self.default, str):
            return text
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return text

    def problem(self, value: Value) -> str:
        """Return the error text for a value that does not fit this parameter; empty if it fits."""
        if not _fits(value, self.default):
            return f"{value!r}. Give {_type_name(self.default)}."
        return ""


def _fits(value: Value, default: Value) -> bool:
    if default is None or value is None:
        return default is None
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list) and isinstance(value, list) and default:
        return all(_fits(item, default[0]) for item in value)
    return isinstance(value, type(default))


def _type_name(default: Value) -> str:
    if isinstance(default, list) and default:
        return f"a list of {type(default[0]).__name__}"
    return f"a value of type {type(default).__name__}"


def read_parameters(path: Path) -> dict[str, Parameter]:
    """Read the parameters of a notebook from its one cell tagged ``parameters``.

    Raises:
        NotebookError: the notebook or the cell is missing, or a line is not ``name = literal``.
    """
    cells = [c for c in _read(path).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"Wrong number of cells tagged 'parameters' in {path}: {len(cells)}. Tag exactly one.")
    parameters: dict[str, Parameter] = {}
    for node in ast.parse(cells[0].source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            raise NotebookError(f"Invalid parameters cell of {path}: line {node.lineno}. Write 'name = literal' only.")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise NotebookError(
                f"Invalid parameter '{target.id}' of {path}: {ast.unparse(node.value)}. Write a plain literal."
            ) from None
        parameters[target.id] = Parameter(target.id, default)
    return parameters


def check_parameters(path: Path, given: Mapping[str, Value]) -> dict[str, Value]:
    """Return all parameters of a notebook with `given` applied to its defaults.

    Raises:
        NotebookError: an unknown name or a value of the wrong type.
    """
    parameters = read_parameters(path)
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        raise NotebookError(f"Unknown parameter of {path.stem}: {unknown[0]}. Choose one of: {', '.join(parameters)}.")
    for name, value in given.items():
        if problem := parameters[name].problem(value):
            raise NotebookError(f"Invalid parameter '{name}' of {path.stem}: {problem}")
    return {name: given.get(name, parameter.default) for name, parameter in parameters.items()}


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Executed:
    """One notebook of a run: its executed copy, `skipped` if the copy was finished before."""

    name: str
    path: Path
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class NotebookRun:
    """Result of `run_notebooks`."""

    folder: Path
    """The run folder, ``results/<profile>/<run>``."""
    executed: list[Executed] = field(default_factory=list)

    def text(self) -> str:
        """List the folders of the run and its headline."""
        lines = [f"{name}: {self.folder / name}" for name in ("notebooks", "tables", "figures", "cells")]
        lines = [line for line in lines if Path(line.split(": ")[1]).is_dir()]
        try:
            from sqlbench_lab.tables import headline, load_results

            lines.append(headline(load_results(self.folder)))
        except DataError:
            lines.append("No training yet: accuracy before and after is unknown.")
        return "\n".join(lines)


@takes(NotebooksConfig, "profile", "run")
def run_notebooks(settings: NotebooksConfig) -> NotebookRun:
    """Execute the ordered notebooks into ``<results>/<profile>/<run>/notebooks/``.

    Raises:
        NotebookError: the call was refused before anything ran, or a cell failed.
    """
    profile, results = settings.profile, settings.results
    if profile not in PRESETS:
        raise NotebookError(f"Unknown profile: {profile}. Choose one of: {', '.join(PRESETS)}.")
    paths = _select(settings.folder, [name for item in settings.only for name in item.split(",")])
    root = results / "smoke" if profile == "smoke" else results
    base = run_path(root, "gpu" if profile == "gpu" else "laptop", settings.run)
    plan = _plan(paths, {"run": settings.run, "results": str(root)}, PRESETS[profile], settings.parameters)
    try:
        (base / "notebooks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotebookError(
            f"Cannot write the results folder {base}: {error.strerror}. Choose another with --results."
        ) from error
    ensure_folders()
    done: list[Executed] = []
    newest = ""
    with lock(base / "notebooks"):
        for number, (path, values) in enumerate(plan, 1):
            output = base / "notebooks" / path.name
            # A notebook reads the results of earlier ones: after one has run, in this call or in a killed one, the
            # later ones run too.
            stale = settings.force or any(not e.skipped for e in done) or _started(output) < newest
            title = f"[{number}/{len(plan)}] {path.stem}"
            done.append(run_notebook(path, output, values, force=stale, title=title))
            newest = max(newest, _started(output))
    return NotebookRun(base, done)


def _started(output: Path) -> str:
    """Return the start time of an executed notebook; empty if it was not executed."""
    return str(_read(output).metadata.get("sqlbench", {}).get("started", "")) if output.is_file() else ""


def _select(folder: Path, only: list[str]) -> list[Path]:
    paths = {p.stem: p for p in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not paths:
        raise NotebookError(f"No notebooks in {folder}. Run from the project folder, or name it with --folder.")
    if not only:
        ours = [paths[name] for name in ORDER if name in paths]
        if not ours:
            raise NotebookError(f"No ordered notebooks in {folder}. Name the notebooks to run with --only.")
        return ours
    chosen = []
    for name in only:
        match = [p for stem, p in paths.items() if stem == name or stem.split("_")[0] == name.zfill(2)]
        if not match:
            raise NotebookError(f"Unknown notebook of {folder}: {name}. Choose one of: {', '.join(paths)}.")
        chosen += match
    return sorted(set(chosen))


def _plan(
    paths: list[Path], given: dict[str, Value], preset: Mapping[str, dict[str, Value]], texts: list[str]
) -> list[tuple[Path, dict[str, Value]]]:
    """Pair each notebook with its parameters: defaults < run and profile < preset < ``name=value`` texts."""
    pairs = dict(_split(text) for text in texts)
    parameters_of = {path: read_parameters(path) for path in paths}
    for name in pairs:
        if not any(name in parameters for parameters in parameters_of.values()):
            names = sorted({n for parameters in parameters_of.values() for n in parameters})
            raise NotebookError(f"Unknown parameter of the notebooks: {name}. Choose one of: {', '.join(names)}.")
    plan = []
    for path, parameters in parameters_of.items():
        wanted = given | preset.get("*", {}) | preset.get(path.stem, {})
        values = {n: v for n, v in wanted.items() if n in parameters}
        values |= {n: parameters[n].parse(text) for n, text in pairs.items() if n in parameters}
        plan.append((path, check_parameters(path, values)))
    return plan


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise NotebookError(f"Invalid parameter: {text}. Write name=value.")
    return name.strip(), value


def run_notebook(
    path: Path,
    output: Path,
    parameters: Mapping[str, Value],
    *,
    force: bool = False,
    title: str = "",
) -> Executed:
    """Execute one notebook into `output`, or skip it if `output` is its finished copy for the same parameters.

    Args:
        path: the notebook.
        output: path of the executed copy, in the folder ``notebooks`` of a run folder.
        parameters: values that differ from the notebook's defaults.
        force: execute it even if it is finished.
        title: text before the progress bar; the notebook's name by default.

    Raises:
        NotebookError: a parameter is refused, or a cell failed.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    partial = output.with_name(f"{path.stem}.partial.ipynb")
    title = title or path.stem
    values = check_parameters(path, parameters)
    stamp = {"source_hash": source_hash(path), "config_hash": _digest(json.dumps(values, sort_keys=True))}
    if not force and output.is_file():
        seen = _read(output).metadata.get("sqlbench", {})
        if all(seen.get(k) == v for k, v in stamp.items()) and seen.get("finished"):
            print(f"{title}: done before with these parameters, skipped", file=sys.stderr, flush=True)
            return Executed(path.stem, output, 0.0, skipped=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    defaults = {name: p.default for name, p in read_parameters(path).items()}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    started, begin = datetime.now(UTC), time.monotonic()
    try:
        papermill.execute_notebook(
            path,
            partial,
            changed,
            kernel_name="python3",
            progress_bar={"desc": title},
            stdout_file=sys.stderr,  # a training cell takes minutes and prints a line per step
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        number = error.cell_index + 1 - bool(changed)
        message = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise NotebookError(
            f"Notebook {path.stem} failed in cell {number}: {message.rstrip('.')}. See {partial}."
        ) from error
    except DeadKernelError as error:
        raise NotebookError(f"Notebook {path.stem} failed: its kernel died. See {partial}.") from error
    seconds = time.monotonic() - begin
    provenance = stamp | {
        "finished": True,
        "parameters": values,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "git_commit": _git_commit(path.parent),
        "versions": versions(),
    }
    _finish(partial, output, path.name, provenance)
    return Executed(path.stem, output, seconds, skipped=False)


def source_hash(path: Path) -> str:
    """Hash a notebook's prose and code, without outputs and without an injected parameters cell."""
    cells = [c for c in _read(path).cells if "injected-parameters" not in c.metadata.get("tags", [])]
    return _digest("\x1f".join(f"{c.cell_type}\x1e{c.source}" for c in cells))


def _finish(partial: Path, output: Path, name: str, provenance: dict) -> None:
    """Turn the partial notebook into the finished one: add provenance, remove machine paths and cell timings."""
    notebook = _read(partial)
    notebook.metadata["sqlbench"] = provenance
    injected = notebook.metadata["papermill"]["parameters"]
    notebook.metadata["papermill"] = {"input_path": name, "parameters": injected}
    shown: set[str] = set()
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for cell_output in cell.get("outputs", []):
            data = cell_output.get("data", {})
            if "text/html" in data:  # keep the static form: a view without its kernel shows nothing
                data.pop("application/vnd.jupyter.widget-view+json", None)
            shown.update(data)
    if not any("widget-view" in kind for kind in shown):
        notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, partial)
    partial.replace(output)


def _read(path: Path) -> nbformat.NotebookNode:
    if not path.is_file():
        raise NotebookError(f"No such notebook: {path}. Check the path.")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise NotebookError(f"Not a notebook: {path} ({type(error).__name__}). Check the file.") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git_commit(folder: Path) -> str | None:
    """Return the commit of the working tree, with ``-dirty`` if it has changes; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
