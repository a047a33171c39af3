"""Ray actors that do not import verl, so that they start quickly: the sampling server, the router.

`LocalServer` answers whole batches, which `verl_cpu.client.LocalClient` collects: one remote call per batch instead of
three per prompt. The other methods are those that verl's synchronous trainer calls on a rollout server. Calls are
served one after another, so weights never change under a batch. `Router` is the load balancer that verl requires; the
client does not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_cpu.engine import Generation, GenerationRequest


def server_name(rank: int) -> str:
    """Return the Ray name of the server of one rank."""
    return f"verl_cpu_server_{rank}"


class LocalServer:
    """Samples from a checkpoint whose weights the trainer replaces."""

    def __init__(
        self, path: str, max_model_len: int, dtype: str = "float32", device: str = "cpu", threads: int = 1
    ) -> None:
        from verl_cpu.engine import LocalEngine

        self.engine = LocalEngine(path, device, dtype, threads, max_model_len)
        self.steps = 0
        self._base: dict[str, Any] = {}  # weights of the checkpoint, if adapters to them arrive

    def node(self) -> str:
        """Return the id of the node that this server runs on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def generate_batch(self, requests: list[GenerationRequest]) -> tuple[list[Generation], int]:
        """Return the answers, and the number of updates that the sampling weights had seen."""
        return self.engine.generate(requests), self.steps

    def update_weights(self, named: list[tuple[str, Any]], steps: int | None, scale: float | None = None) -> None:
        """Load the trainer's weights; `steps` is the number of updates they have seen.

        With a `scale` they are LoRA adapters to the weights of the checkpoint.
        """
        if scale is not None:
            from verl_cpu.lora import merged

            self._base = self._base or {name: t.clone() for name, t in self.engine.model.state_dict().items()}
            named = list(merged({name: t.to(self.engine.device) for name, t in named}, self._base, scale))
        self.engine.load(named)
        self.steps = self.steps if steps is None else steps

    def set_global_steps(self, steps: int) -> None:  # noqa: D102
        self.steps = steps

    def checksum(self) -> str:
        """Hash the sampling weights."""
        return self.engine.checksum()

    def abort_all_requests(self, reject_request: bool = False) -> None: ...  # noqa: D102

    def resume_generation(self) -> None: ...  # noqa: D102

    def wake_up(self, tags: list[str] | None = None) -> None: ...  # noqa: D102

    def sleep(self) -> None: ...  # noqa: D102

    def clear_kv_cache(self) -> None: ...  # noqa: D102

    def release_kv_cache(self) -> None: ...  # noqa: D102

    def resume_kv_cache(self) -> None: ...  # noqa: D102

    def start_profile(self, **_: Any) -> None: ...  # noqa: D102

    def stop_profile(self) -> None: ...  # noqa: D102


class Router:
    """Stub load balancer: verl requires one, but our client calls the servers directly."""

    def __init__(self, servers: dict[str, Any], settings: dict[str, Any]) -> None:
        self.servers = sorted(servers)

    def get_all_servers(self) -> list[str]:  # noqa: D102
        return self.servers

    def clear_sticky_cache(self) -> dict[str, Any]:  # noqa: D102
        return {"cleared_entries": 0, "server_loads": {}}

    def get_total_inflight(self) -> int:  # noqa: D102
        return 0
