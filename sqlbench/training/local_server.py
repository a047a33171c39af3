"""Ray actors of the laptop profile that do without verl, so that they start quickly: the sampling server, the router.

Both speak verl's protocols by shape: `LocalServer` that of its rollout servers as far as the synchronous trainer calls
it, `Router` that of its load balancers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any


def server_name(rank: int) -> str:
    """Ray name of the server of one rank."""
    return f"sqlbench_local_{rank}"


@dataclass
class Answer:
    """verl's ``TokenOutput``, by shape."""

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str
    extra_fields: dict[str, Any] = field(default_factory=dict)


class LocalServer:
    """Samples from a checkpoint whose weights the trainer replaces."""

    def __init__(
        self,
        path: str,
        response_length: int,
        max_model_len: int,
        max_batch: int,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        wait_ms: float = 15.0,
    ) -> None:
        from sqlbench.models.local import BatchedEngine, LocalEngine

        engine = LocalEngine(path, device, dtype, threads, max_model_len)
        self.engine = BatchedEngine(engine, max_batch, wait_ms)
        self.response_length = response_length
        self.open = asyncio.Event()
        self.open.set()
        self.steps: int | None = None

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> Answer:
        """Sample one answer."""
        from sqlbench.models.local import GenerationRequest

        await self.open.wait()
        request = GenerationRequest(
            tuple(prompt_ids),
            sampling_params.get("max_tokens") or self.response_length,
            sampling_params.get("temperature", 1.0),
            sampling_params.get("top_p", 1.0),
            sampling_params.get("top_k", -1),
            sampling_params.get("seed"),
        )
        answer = await self.engine.generate(request)
        return Answer(answer.token_ids, answer.logprobs, answer.finish_reason, {"global_steps": self.steps})

    async def update_weights(self, named: list[tuple[str, Any]], steps: int | None) -> None:
        """Take over the trainer's weights; `steps` is the number of updates they have seen."""
        await self.engine.run(self.engine.engine.load, named)
        self.steps = self.steps if steps is None else steps

    async def set_global_steps(self, steps: int) -> None:  # noqa: D102
        self.steps = steps

    async def checksum(self) -> str:
        """Hash of the weights that sample."""
        return await self.engine.run(self.engine.engine.checksum)

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Hold new requests until `resume_generation`; what runs is finished."""
        self.open.clear()

    async def resume_generation(self) -> None:  # noqa: D102
        self.open.set()

    async def wake_up(self, tags: list[str] | None = None) -> None: ...  # noqa: D102

    async def sleep(self) -> None: ...  # noqa: D102

    async def clear_kv_cache(self) -> None: ...  # noqa: D102

    async def release_kv_cache(self) -> None: ...  # noqa: D102

    async def resume_kv_cache(self) -> None: ...  # noqa: D102

    async def start_profile(self, **_: Any) -> None: ...  # noqa: D102

    async def stop_profile(self) -> None: ...  # noqa: D102


class Router:
    """Sends every request to the next server in turn."""

    def __init__(self, servers: dict[str, Any], settings: dict[str, Any]) -> None:
        self.servers = dict(servers)
        self.turn = 0

    def require_acquire_fields(self) -> list[str]:  # noqa: D102
        return []

    def require_release_fields(self) -> list[str]:  # noqa: D102
        return []

    def acquire_server(self, request_id: str) -> tuple[str, Any]:  # noqa: D102
        names = sorted(self.servers)
        if not names:
            raise RuntimeError("No available servers in load balancer")
        self.turn += 1
        name = names[self.turn % len(names)]
        return name, self.servers[name]

    def release_server(self, server_id: str) -> None: ...  # noqa: D102

    def add_servers(self, servers: dict[str, Any]) -> None:  # noqa: D102
        self.servers.update(servers)

    def remove_servers(self, server_ids: list[str]) -> None:  # noqa: D102
        for name in server_ids:
            self.servers.pop(name, None)

    def get_all_servers(self) -> list[str]:  # noqa: D102
        return sorted(self.servers)

    def get_status(self) -> dict[str, Any]:  # noqa: D102
        return {"servers": {}, "total_inflight": 0, "active_servers": len(self.servers)}

    def clear_sticky_cache(self) -> dict[str, Any]:  # noqa: D102
        return {"cleared_entries": 0, "server_loads": {}}

    def get_total_inflight(self) -> int:  # noqa: D102
        return 0
