"""Counts where a training samples: named in its settings (`OVERRIDES`), it is verl's own replay buffer besides."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_cpu.server import server_name

FILE = "SQLBENCH_TEST_COUNTED"
"""Environment variable: the file that is written after each step."""
OVERRIDES = (
    "trainer.v1.sampler.custom_sampler.path=pkg://counted",
    "trainer.v1.sampler.custom_sampler.name=Buffer",
)


def count_prompts(server: Any) -> None:
    """Let a rollout server count from now on."""
    usual, server.prompts = server.engine.generate, 0

    def generate(requests: list[Any]) -> Any:
        server.prompts += len(requests)
        return usual(requests)

    server.engine.generate = generate


def node_and_prompts(server: Any) -> tuple[str, int]:
    """Where a rollout server runs, and what it has counted."""
    return server.node(), server.prompts


def node(_: Any) -> str:
    """Where an actor runs."""
    return ray.get_runtime_context().get_node_id()


class Buffer(ReplayBuffer):
    """Counts from the first validation on: prompts sampled and agent loop workers, by node."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        names = ray.util.list_named_actors()
        servers = [ray.get_actor(name) for name in names if name.startswith(server_name(0)[:-1])]
        if partition_id == "val":
            ray.get([server.__ray_call__.remote(count_prompts) for server in servers])
        found = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "train":
            prompts: Counter[str] = Counter()
            for where, count in ray.get([server.__ray_call__.remote(node_and_prompts) for server in servers]):
                prompts[where] += count
            workers = [ray.get_actor(name) for name in names if name.startswith("agent_loop_worker")]
            loops = Counter(ray.get([worker.__ray_call__.remote(node) for worker in workers]))
            Path(os.environ[FILE]).write_text(json.dumps({"prompts": prompts, "workers": loops}))
        return found
