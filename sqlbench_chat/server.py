"""Voila as the chat needs it: a warm kernel for the next page, none left of a page that is gone, the address told once.

A page that closes asks to end its kernel, which Voila refuses with 403 unless the page was given a cookie for it.
Kernels of pages that could not ask (a crash, a network that is gone) end after `ABANDONED` seconds.
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
"""Seconds after which the address is told though no kernel is warm; a page that comes earlier gets a cold one."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss:"
"""What the page may load: nothing from elsewhere (Voila's template would ask a CDN for icons and wait for it)."""


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
    """One notebook as a page."""

    announce: Callable[[], None] = staticmethod(lambda: None)
    pages = 20

    async def _wait_and_announce(self) -> None:
        with contextlib.suppress(Exception):  # what keeps a kernel from starting is for the page to say
            async with asyncio.timeout(WARM):
                for pool in self.kernel_manager._pools.values():
                    await asyncio.shield((await asyncio.shield(pool[0]))["task"])
        type(self).announce()

    def init_handlers(self) -> list:
        """Voila's handlers, with the page that gives its cookie; whoever started it hears when a page is ready."""
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
        port: a free one.
        token: what a browser has to know; empty for nothing.
        pages: open at a time.
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
    # Tornado warns of Jupyter's settings for pings: they are in milliseconds, and it takes them for seconds.
    logging.getLogger("tornado.general").setLevel(logging.ERROR)
    Server.announce, Server.pages = staticmethod(announce), pages
    Server.launch_instance([str(page)], config=Config(settings))
