"""The chat as a web page: one Voila server, one process with the model, and one kernel per open page."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat

from sqlbench.errors import ServerError
from sqlbench_chat.settings import ChatConfig
from sqlbench_lab.home import ensure_folders
from sqlbench_train.serve import LOCAL

READY = 10.0
"""Seconds that a page may prepare before it is shown; changes while a browser loads it may not reach it."""


def serve_chat(settings: ChatConfig, folder: Path) -> None:
    """Serve the chat until interrupted.

    Raises:
        ServerError: Voila is not installed, or the address cannot be used.
    """
    from sqlbench_train.serve import listen

    try:
        from sqlbench_chat.server import serve_notebook
    except ImportError as error:
        raise ServerError("Not installed: Voila. Run pip install 'sqlbench[notebooks]'.") from error
    with listen(settings.host, settings.port) as free:
        port = free.getsockname()[1]
    ensure_folders()
    token = settings.token
    if token is None:
        token = "" if settings.host in LOCAL else secrets.token_urlsafe(16)
    shown = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    address = f"http://{shown}:{port}" + (f"/?token={token}" if token else "")
    with tempfile.TemporaryDirectory(prefix="sqlbench-chat-") as home, _model(settings.model, Path(home)) as model:
        page = Path(home) / "chat.ipynb"
        nbformat.write(_notebook(settings, folder, model), page)
        serve_notebook(
            page,
            settings.host,
            port,
            token,
            settings.pages,
            lambda: print(f"sqlbench chat is at {address} (Ctrl-C ends it)", flush=True),
        )


def _notebook(settings: ChatConfig, folder: Path, model: str) -> nbformat.NotebookNode:
    options = settings.model_dump(mode="json", include={"data", "reflection", "every", "agent", "prompts"})
    private = settings.host not in LOCAL and not settings.shared
    options |= {"folder": str(folder), "private": private, "hourly": settings.hourly if private else None}
    code = (
        f"import os\nos.chdir({os.getcwd()!r})\nfrom sqlbench_chat.hosted import HostedModel\n"
        f"from sqlbench_chat.view import ChatView\nview = ChatView(model={model}, **{options!r})\n"
        f"await view.wait({READY})\nview"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.title = "sqlbench chat"
    return notebook


@contextlib.contextmanager
def _model(spec: str, home: Path) -> Iterator[str]:
    """Yield the expression for the model in a page; one process holds a checkpoint for all pages."""
    from sqlbench.interfaces import is_plugin
    from sqlbench.models import policy_folder
    from sqlbench.models.checkpoint import checkpoint_family
    from sqlbench_chat.hosted import start_host

    if spec.startswith("openai:") or is_plugin(spec):
        yield repr(spec)
        return
    path, family = home / "model", checkpoint_family(policy_folder(spec))
    process = start_host(path, spec)
    try:
        yield f"HostedModel({str(path)!r}, {spec!r}, {family!r})"
    finally:
        process.kill()
        process.wait()
