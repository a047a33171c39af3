"""What can run on this machine, and where something cannot, why not and what to do about it."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from dotenv import dotenv_values, find_dotenv


def capabilities(data: Path | str = "data") -> pd.DataFrame:
    """One row for each thing the workbench can do: whether it runs here, and what it lacks.

    Nothing is imported and nothing is contacted: an installed library can still be broken, an endpoint down.

    Args:
        data: folder of data sets.
    """
    gpu = "" if Path("/dev/nvidiactl").exists() else "a GPU with CUDA"
    settings = {**dotenv_values(find_dotenv(usecwd=True)), **os.environ}
    endpoint = "" if settings.get("OPENAI_BASE_URL") or settings.get("OPENAI_API_KEY") else "OPENAI_BASE_URL in .env"
    spider = "" if (Path(data) / "spider/dataset.json").is_file() else "sqlbench data spider --download"
    browser = "" if find_browser() else "Chromium on the PATH"
    needs = {
        "evaluate the shipped policy": [*_missing("torch", "transformers", "tokenizers")],
        "train it with GRPO on this CPU": [*_missing("torch", "verl", "ray")],
        "train a large model (profile gpu)": [gpu, *_missing("vllm", "verl", "ray")],
        "use a model behind an endpoint": [*_missing("langchain_openai"), endpoint],
        "work on Spider": [spider],
        "work on a PostgreSQL database": [*_missing("psycopg")],
        "evolve prompts": [*_missing("gepa")],
        "serve the OpenEnv environment": [*_missing("openenv")],
        "run the notebooks headless": [*_missing("papermill", "ipykernel")],
        "test in a real browser": [*_missing("playwright"), browser],
    }
    missing = {what: ", ".join(filter(None, some)) for what, some in needs.items()}
    return pd.DataFrame(
        {"to": what, "runs here": "no" if lacks else "yes", "missing": lacks} for what, lacks in missing.items()
    )


def find_browser() -> str | None:
    """The Chromium that browser tests use."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _missing(*modules: str) -> list[str]:
    return [f"the package {name}" for name in modules if find_spec(name) is None]
