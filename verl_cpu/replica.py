"""`verl_cpu.engine` as a rollout engine of verl: the replica that verl starts, and the trainer's connection to it.

Guarantees: the weights that sample are those of the last `update_weights` (every answer carries the step they belong
to), tokens and log-probabilities go to the trainer as they were sampled, and requests with a seed are reproducible.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica

from verl_cpu.server import LocalServer, server_name

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def _whereabouts(_: Any) -> tuple[str, str]:
    """Return the node of the calling Ray actor, and the GPU that Ray gave it."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


class LocalReplica(RolloutReplica):
    """Starts one `LocalServer` beside the trainer worker of its rank: on the same node and, on GPUs, the same GPU."""

    async def launch_servers(self) -> None:  # noqa: D102
        settings = dict(self.config.engine_kwargs.get("local", {}))
        node, gpu = await self.workers[0].__ray_call__.remote(_whereabouts)
        options = {}
        if settings.get("device") == "cuda":
            # The worker holds the whole GPU, so the server asks Ray for none, and Ray would hide them all from it.
            options["runtime_env"] = {"env_vars": {NOSET: "1", "CUDA_VISIBLE_DEVICES": gpu}}
        server = (
            ray.remote(LocalServer)
            .options(
                name=server_name(self.replica_rank),
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                **options,
            )
            .remote(
                omega_conf_to_dataclass(self.model_config).local_path,
                max_model_len=self.config.max_model_len or self.config.prompt_length + self.config.response_length,
                dtype=self.config.dtype,
                **settings,
            )
        )
        await server.checksum.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"local://{self.replica_rank}"


class LocalAdapter(BaseRollout):
    """The trainer worker's side: hands weights to the server of its rank through Ray's object store."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    def _server(self) -> Any:
        return ray.get_actor(server_name(self.rank))

    async def resume(self, tags: list[str]) -> None:  # noqa: D102
        await self._server().wake_up.remote(tags=tags)

    async def release(self) -> None:  # noqa: D102
        await self._server().sleep.remote()

    @torch.no_grad()
    async def update_weights(  # noqa: D102
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"Unsupported wire_format of the local rollout engine: {wire_format}. Use named_tensors.")
        named = [(name, tensor.detach().cpu()) for name, tensor in weights]
        scale = None if peft_config is None else peft_config["lora_alpha"] / peft_config["r"]
        await self._server().update_weights.remote(named, global_steps, scale)
