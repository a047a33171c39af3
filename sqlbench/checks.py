"""Report of which parts of the workbench can run on this machine, and of what the others lack."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from dotenv import dotenv_values, find_dotenv

from sqlbench import __version__

_REPORTED = ("torch", "transformers", "verl", "ray", "vllm", "langgraph", "gepa", "papermill", "pandas", "matplotlib")


def capabilities(data: Path | str = "data") -> pd.DataFrame:
    """List each capability of the workbench, whether it runs here, and what it lacks.

    Nothing is imported and nothing is contacted: an installed library can still be broken, and an endpoint down.

    Args:
        data: folder of data sets.
    """
    gpu = "" if Path("/dev/nvidiactl").exists() else "a GPU with CUDA"
    try:
        settings = {**dotenv_values(find_dotenv(usecwd=True)), **os.environ}
        named = settings.get("OPENAI_BASE_URL") or settings.get("OPENAI_API_KEY")
        endpoint = "" if named else "an endpoint: OPENAI_BASE_URL or OPENAI_API_KEY in .env"
    except UnicodeDecodeError:
        endpoint = f"{find_dotenv(usecwd=True)} in UTF-8"
    spider = "" if (Path(data) / "spider/dataset.json").is_file() else "sqlbench data spider --download"
    browser = "" if find_browser() else "Chromium on the PATH"
    needs = {
        "evaluate the shipped policy": [_missing("local", "torch", "transformers", "tokenizers")],
        "train it with GRPO on this CPU": [_missing("train", "torch", "verl", "ray")],
        "train a large model (profile gpu)": [gpu, _missing("gpu", "vllm", "verl", "ray")],
        "use a model behind an endpoint": [endpoint],
        "work on Spider": [spider],
        "work on a PostgreSQL database": [],
        "learn repair strategies in use": [_missing("agent", "mabwiser")],
        "evolve prompts": [_missing("agent", "gepa"), endpoint],
        "serve the OpenEnv environment": [_missing("environment", "openenv")],
        "run the notebooks headless": [_missing("notebooks", "papermill", "ipykernel")],
        "test in a real browser": [_missing("test", "playwright"), browser],
    }
    missing = {what: "; ".join(filter(None, parts)) for what, parts in needs.items()}
    return pd.DataFrame(
        {"to": what, "runs here": "no" if lacks else "yes", "missing": lacks} for what, lacks in missing.items()
    )


def versions() -> dict[str, str]:
    """Return the versions of sqlbench, Python and the installed libraries that results depend on."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    base = {"sqlbench": __version__, "python": platform.python_version()}
    return base | {name: installed[name] for name in _REPORTED if name in installed}


def find_browser() -> str | None:
    """Find the Chromium that browser tests use."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _missing(extra: str, *modules: str) -> str:
    absent = [name for name in modules if find_spec(name) is None]
    return f"{', '.join(absent)}: pip install 'sqlbench[{extra}]'" if absent else ""
