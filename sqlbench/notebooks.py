"""Strict headless notebooks: parameters are checked before anything runs, what is done is skipped, failures say where.

papermill executes; this module adds what it leaves out. Unknown parameters and wrong types are refused (papermill logs
them and runs the defaults). A notebook is skipped when its executed copy was made from the same source with the same
parameters. A failing cell becomes a `NotebookError` with the notebook, the cell, the error and the partial notebook's
path. Every executed copy carries its provenance in ``metadata.sqlbench``.

Not covered: the hash of a notebook does not see the library's own code, so after a change of the library use ``force``.
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
from sqlbench.config import NotebooksConfig, takes
from sqlbench.errors import DataError, NotebookError
from sqlbench.home import ensure_folders
from sqlbench.runs import lock, run_path

Value = str | int | float | bool | None | list | dict

_SETTINGS = tomllib.loads((Path(__file__).parent / "assets" / "notebooks.toml").read_text(encoding="utf-8"))
ORDER: list[str] = _SETTINGS["order"]
PRESETS: dict[str, dict[str, dict[str, Value]]] = _SETTINGS["presets"]
"""Parameters of each profile, by notebook, where they are not the notebook's own."""


# --- parameters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One ``name = literal`` line of a notebook's parameters cell."""

    name: str
    default: Value

    def parse(self, text: str) -> Value:
        """The value that ``-p name=text`` means, by the type of the default."""
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
        """Why `value` cannot stand for this parameter; empty where it can."""
        if not _fits(value, self.default):
            return f"parameter '{self.name}' must be {_type_name(self.default)}, got {value!r}"
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
    return f"of type {type(default).__name__}"


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its one cell tagged ``parameters``.

    Raises:
        NotebookError: no such notebook, no such cell, or a line that is not ``name = literal``.
    """
    cells = [c for c in _read(path).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{path} has {len(cells)} cells tagged 'parameters'; it needs exactly one")
    found: dict[str, Parameter] = {}
    for node in ast.parse(cells[0].source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            raise NotebookError(f"{path}: parameters cell, line {node.lineno}: write 'name = literal' and nothing else")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise NotebookError(
                f"{path}: parameter '{target.id}' is {ast.unparse(node.value)!r}; it must be a plain literal"
            ) from None
        found[target.id] = Parameter(target.id, default)
    return found


def check_parameters(path: Path, given: Mapping[str, Value]) -> dict[str, Value]:
    """All parameters of a notebook with `given` applied to its defaults.

    Raises:
        NotebookError: an unknown name or a value of the wrong type.
    """
    known = read_parameters(path)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise NotebookError(f"{path.stem} has no parameter '{unknown[0]}'; it has: {', '.join(known)}")
    for name, value in given.items():
        if problem := known[name].problem(value):
            raise NotebookError(f"{path.stem}: {problem}")
    return {name: given.get(name, parameter.default) for name, parameter in known.items()}


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Executed:
    """One notebook of a run: where its executed copy lies, and whether it was `skipped` because that was done."""

    name: str
    path: Path
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class NotebookRun:
    """What `run_notebooks` did."""

    folder: Path
    """The run folder, ``results/<profile>/<run>``."""
    executed: list[Executed] = field(default_factory=list)

    def text(self) -> str:
        """Where everything is, and the headline."""
        lines = [f"{name}: {self.folder / name}" for name in ("notebooks", "tables", "figures", "cells")]
        lines = [line for line in lines if Path(line.split(": ")[1]).is_dir()]
        try:
            from sqlbench.tables import headline, load_results

            lines.append(headline(load_results(self.folder)))
        except DataError:
            lines.append("no training yet, so there is no accuracy before and after to report")
        return "\n".join(lines)


@takes(NotebooksConfig, "profile", "run")
def run_notebooks(settings: NotebooksConfig) -> NotebookRun:
    """Execute the ordered notebooks into ``<results>/<profile>/<run>/notebooks/``.

    Raises:
        NotebookError: refused before anything ran, or a cell failed.
    """
    profile, results = settings.profile, settings.results
    if profile not in PRESETS:
        raise NotebookError(f"unknown profile '{profile}'; choose one of {', '.join(PRESETS)}")
    paths = _select(settings.folder, [name for item in settings.only for name in item.split(",")])
    root = results / "smoke" if profile == "smoke" else results
    base = run_path(root, "gpu" if profile == "gpu" else "laptop", settings.run)
    plan = _plan(paths, {"run": settings.run, "results": str(root)}, PRESETS[profile], settings.parameters)
    try:
        (base / "notebooks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotebookError(
            f"cannot write the results folder {base}: {error.strerror}; choose another with --results"
        ) from error
    ensure_folders()
    done: list[Executed] = []
    newest = ""
    with lock(base / "notebooks"):
        for number, (path, values) in enumerate(plan, 1):
            output = base / "notebooks" / path.name
            # A notebook reads what the ones before it left: once one has run, in this call or in one that was killed
            # after it, those after it run too.
            stale = settings.force or any(not e.skipped for e in done) or _started(output) < newest
            title = f"[{number}/{len(plan)}] {path.stem}"
            done.append(run_notebook(path, output, values, force=stale, title=title))
            newest = max(newest, _started(output))
    return NotebookRun(base, done)


def _started(output: Path) -> str:
    """When the run began that left an executed notebook; empty where there is none."""
    return str(_read(output).metadata.get("sqlbench", {}).get("started", "")) if output.is_file() else ""


def _select(folder: Path, only: list[str]) -> list[Path]:
    paths = {p.stem: p for p in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not paths:
        raise NotebookError(f"no notebooks in {folder}; run from the project folder or name it with --folder")
    if not only:
        ours = [paths[name] for name in ORDER if name in paths]
        if not ours:
            raise NotebookError(f"{folder} has none of the ordered notebooks; name what to run with --only")
        return ours
    chosen = []
    for name in only:
        match = [p for stem, p in paths.items() if stem == name or stem.split("_")[0] == name.zfill(2)]
        if not match:
            raise NotebookError(f"no notebook '{name}' in {folder}; there are: {', '.join(paths)}")
        chosen += match
    return sorted(set(chosen))


def _plan(
    paths: list[Path], given: dict[str, Value], preset: Mapping[str, dict[str, Value]], texts: list[str]
) -> list[tuple[Path, dict[str, Value]]]:
    """Each notebook with its full parameters: defaults < run and profile < preset < ``name=value`` texts."""
    pairs = dict(_split(text) for text in texts)
    known = {path: read_parameters(path) for path in paths}
    for name in pairs:
        if not any(name in parameters for parameters in known.values()):
            names = sorted({n for parameters in known.values() for n in parameters})
            raise NotebookError(f"no chosen notebook has a parameter '{name}'; they have: {', '.join(names)}")
    plan = []
    for path, parameters in known.items():
        wanted = given | preset.get("*", {}) | preset.get(path.stem, {})
        values = {n: v for n, v in wanted.items() if n in parameters}
        values |= {n: parameters[n].parse(text) for n, text in pairs.items() if n in parameters}
        plan.append((path, check_parameters(path, values)))
    return plan


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise NotebookError(f"parameter '{text}' is not of the form name=value")
    return name.strip(), value


def run_notebook(
    path: Path,
    output: Path,
    parameters: Mapping[str, Value],
    *,
    force: bool = False,
    title: str = "",
) -> Executed:
    """Execute one notebook into `output`, or skip it where `output` is its finished copy for the same parameters.

    Args:
        path: the notebook.
        output: in the folder ``notebooks`` of a run folder.
        parameters: where they are not its own.
        force: execute it also where it is done.
        title: what stands before its progress bar; its name by default.

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
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        number = error.cell_index + 1 - bool(changed)
        message = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise NotebookError(f"notebook {path.stem}, cell {number}: {message}; partial notebook: {partial}") from error
    except DeadKernelError as error:
        raise NotebookError(f"notebook {path.stem}: its kernel died; partial notebook: {partial}") from error
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
    """Hash of a notebook's prose and code, without outputs and without an injected parameters cell."""
    cells = [c for c in _read(path).cells if "injected-parameters" not in c.metadata.get("tags", [])]
    return _digest("\x1f".join(f"{c.cell_type}\x1e{c.source}" for c in cells))


def _finish(partial: Path, output: Path, name: str, provenance: dict) -> None:
    """Turn the partial notebook into the finished one: provenance in, machine paths and per-cell clocks out."""
    notebook = _read(partial)
    notebook.metadata["sqlbench"] = provenance
    injected = notebook.metadata["papermill"]["parameters"]
    notebook.metadata["papermill"] = {"input_path": name, "parameters": injected}
    shown: set[str] = set()
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for left in cell.get("outputs", []):
            data = left.get("data", {})
            if "text/html" in data:  # the static form: a view without its kernel shows nothing
                data.pop("application/vnd.jupyter.widget-view+json", None)
            shown.update(data)
    if not any("widget-view" in kind for kind in shown):
        notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, partial)
    partial.replace(output)


def _read(path: Path) -> nbformat.NotebookNode:
    if not path.is_file():
        raise NotebookError(f"no notebook {path}")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise NotebookError(f"{path} is not a notebook: {type(error).__name__}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git_commit(folder: Path) -> str | None:
    """Commit of the working tree, with ``-dirty`` where it has changes; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
