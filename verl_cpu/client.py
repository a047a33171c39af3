"""verl's client of rollout servers, for the servers of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from verl_cpu.batching import BatchedEngine
from verl_cpu.engine import Generation, GenerationRequest
from verl_cpu.server import server_name


@dataclass(frozen=True)
class _Answer:
    """verl's ``TokenOutput``, by shape."""

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str
    extra_fields: dict[str, Any]


class _RemoteEngine:
    """The servers of this node (or of all nodes, if it has none) as a `LocalEngine`: one batch to each in turn."""

    def __init__(self, servers: int) -> None:
        every = [ray.get_actor(server_name(rank)) for rank in range(servers)]
        nodes, here = ray.get([server.node.remote() for server in every]), ray.get_runtime_context().get_node_id()
        self.servers = [server for server, node in zip(every, nodes, strict=True) if node == here] or every
        self.steps = 0
        self._turn = 0

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        self._turn += 1
        server = self.servers[self._turn % len(self.servers)]
        answers, self.steps = ray.get(server.generate_batch.remote(requests))
        return answers


class LocalClient:
    """verl's client of rollout servers, for local ones: collects prompts into batches."""

    def __init__(self, config: Any, servers: int) -> None:
        self.config, self.servers = config, servers
        self._batched: BatchedEngine | None = None

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> _Answer:
        """Sample one answer."""
        rollout = self.config.actor_rollout_ref.rollout
        if self._batched is None:
            self._engine = _RemoteEngine(self.servers)
            self._batched = BatchedEngine(self._engine, rollout.max_num_seqs)  # type: ignore[arg-type]
        request = GenerationRequest(
            tuple(prompt_ids),
            rollout.response_length,
            sampling_params["temperature"],
            sampling_params["top_p"],
            sampling_params["top_k"],
            sampling_params.get("seed"),
        )
        answer = await self._batched.generate(request)
        steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), self._engine.steps)
        return _Answer(answer.token_ids, answer.logprobs, answer.finish_reason, steps)
