"""The chat as a web page: one Voila server, bound to this machine, and one kernel for each page that is open."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import nbformat
from traitlets.config import Config

from sqlbench.config import ChatConfig
from sqlbench.errors import ServerError
from sqlbench.home import ensure_folders

HOST = "127.0.0.1"
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws:"
"""What the page may load: nothing from elsewhere (Voila's template would ask a CDN for icons and wait for it)."""


def serve_chat(settings: ChatConfig, folder: Path) -> None:
    """Serve the chat until it is interrupted.

    Raises:
        ServerError: Voila is not installed, or the port is taken.
    """
    try:
        from voila.app import Voila
    except ImportError as error:
        raise ServerError("the chat page needs Voila: pip install 'sqlbench[notebooks]'") from error
    try:
        with socket.create_server((HOST, settings.port)) as free:
            port = free.getsockname()[1]
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ServerError(f"cannot listen on port {settings.port}: {reason}; choose another with --port") from error
    ensure_folders()
    options = settings.model_dump(mode="json", include={"data", "model", "reflection", "agent", "prompts"}) | {
        "folder": str(folder)
    }
    code = f"import os\nos.chdir({os.getcwd()!r})\nfrom sqlbench.widgets.chat import ChatView\nChatView(**{options!r})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory(prefix="sqlbench-chat-") as home:
        page = Path(home) / "chat.ipynb"
        nbformat.write(notebook, page)
        print(f"sqlbench chat is at http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        server = {
            "ip": HOST,
            "port": port,
            "port_retries": 0,
            "open_browser": False,
            "log_level": "ERROR",
            "tornado_settings": {"headers": {"Content-Security-Policy": POLICY}},
        }
        sockets = {"transport": "ipc"}  # between server and kernels: files of this user instead of open ports
        Voila.launch_instance([str(page)], config=Config({"Voila": server, "KernelManager": sockets}))
