"""A JupyterLab of its own on a free port, and headless Chromium in front of it; skipped where there is no Chromium.

Run alone: ``pytest tests/browser``. Set ``SQLBENCH_SCREENSHOTS`` to a folder to keep the pictures.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sqlbench.checks import find_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 400_000
"""Milliseconds after which something that should happen will not; a busy machine is slow."""
SETTINGS = {  # no news over the network; every cell is in the page, whether or not it is in view
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its files, and how to open one."""

    folder: Path
    address: str
    token: str

    def open(self, page: Page, notebook: str) -> None:
        """Open a notebook and wait until its kernel answers."""
        page.goto(f"{self.address}/lab/tree/{notebook}?token={self.token}&reset")
        page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()  # cells that are run earlier are lost


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = driver.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page, in which nothing outside this machine can be reached."""
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    context.route(lambda url: not url.startswith(("http://127.0.0.1", "file:", "data:")), lambda route: route.abort())
    context.set_default_timeout(PATIENCE)
    context.set_default_navigation_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def lab(browser: Browser, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab over copies of the notebooks, with settings and kernels of its own."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(repo / "notebooks", home / "notebooks")
    for name, text in SETTINGS.items():
        file = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "DATA_DIR": "data"}
    environment = os.environ | {f"JUPYTER_{name}": str(home / folder) for name, folder in own.items()}
    environment |= {"JUPYTER_TOKEN": token, "IPYTHONDIR": str(home / "ipython")}
    environment |= {f"JUPYTERLAB_{name.upper()}_DIR": str(home / name) for name in ("settings", "workspaces")}
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{name}={value}" for name, value in options.items())]
    command += [f"--ServerApp.root_dir={home / 'notebooks'}", "--LabApp.expose_app_in_browser=True"]
    with (home / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=home)
    try:
        _wait(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "lab.log")
        yield Lab(home / "notebooks", f"http://127.0.0.1:{port}", token)
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)


@pytest.fixture
def picture(tmp_path: Path):
    """Takes a picture of an element or page under a name."""
    folder = Path(os.environ.get("SQLBENCH_SCREENSHOTS", tmp_path))

    def take(what, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        what.screenshot(path=folder / f"{name}.png")
        return folder / f"{name}.png"

    return take
