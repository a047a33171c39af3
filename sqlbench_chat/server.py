"""Voila server of the chat: keeps a kernel warm for the next page, ends those of closed pages, announces itself once.

A closing page asks to end its kernel, which Voila refuses with 403 unless the page was given a cookie for it.
Kernels of pages that could not ask (a crash, a lost network) end after `ABANDONED` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from traitlets.config import Config
from voila.app import Voila
from voila.tornado.handler import TornadoVoilaHandler

ABANDONED = 180
WARM = 60
"""Seconds to wait for a warm kernel before the address is announced; an earlier page gets a cold kernel."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss:"
"""Content security policy of the page: it loads nothing from elsewhere (Voila's template would wait for a CDN)."""


class _Page(TornadoVoilaHandler):
    async def get(self, path: str | None = None) -> None:
        _ = self.xsrf_token  # sets the cookie
        kernels = self.kernel_manager
        if len(kernels.list_kernel_ids()) - sum(map(len, kernels._pools.values())) >= Server.pages:
            self.set_status(503)
            await self.finish(
                f"Too many pages are open: {Server.pages}. Close one, or start the chat with more --pages."
            )
            return
        await super().get(path)


class Server(Voila):
    """Server of one notebook as a page."""

    announce: Callable[[], None] = staticmethod(lambda: None)
    pages = 20

    async def _wait_and_announce(self) -> None:
        with contextlib.suppress(Exception):  # the page reports why a kernel does not start
            async with asyncio.timeout(WARM):
                for pool in self.kernel_manager._pools.values():
                    await asyncio.shield((await asyncio.shield(pool[0]))["task"])
        type(self).announce()

    def init_handlers(self) -> list:
        """Return Voila's handlers, with a page that sets the cookie, and start the task that calls `announce`."""
        self._announcing = asyncio.get_event_loop().create_task(self._wait_and_announce())
        return [
            (path, _Page if handler is TornadoVoilaHandler else handler, *more)
            for path, handler, *more in super().init_handlers()
        ]


def serve_notebook(page: Path, host: str, port: int, token: str, pages: int, announce: Callable[[], None]) -> None:
    """Serve a notebook until interrupted.

    Args:
        page: the notebook.
        host: address to listen on.
        port: a free port.
        token: token that a browser must send; empty for none.
        pages: maximum number of open pages.
        announce: called when the first page is ready.
    """
    settings: dict[str, Any] = {
        "Voila": {
            "ip": host,
            "port": port,
            "port_retries": 0,
            "token": token,
            "open_browser": False,
            "log_level": "ERROR",
            "tornado_settings": {"headers": {"Content-Security-Policy": POLICY}},
        },
        "VoilaConfiguration": {"preheat_kernel": True, "default_pool_size": 1},
        "MappingKernelManager": {"cull_idle_timeout": ABANDONED, "cull_interval": 30, "cull_connected": False},
        "KernelManager": {"transport": "ipc"},  # between server and kernels: files of this user, no open ports
    }
    # Tornado warns about Jupyter's ping settings, because it reads their milliseconds as seconds.
    logging.getLogger("tornado.general").setLevel(logging.ERROR)
    Server.announce, Server.pages = staticmethod(announce), pages
    Server.launch_instance([str(page)], config=Config(settings))
