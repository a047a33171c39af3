"""Registers two missing parts with verl for a machine without an accelerator: a CPU platform and a rollout engine.

verl imports this module in every process (``VERL_USE_EXTERNAL_MODULES``), so it must stay cheap and must not import
verl's trainer. The platform is chosen only by ``VERL_PLATFORM=cpu``, never detected, so nothing changes on a machine
with a GPU. The one thing touched here that verl does not publish is the table of trainer-side rollout adapters.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry


@cache
def _device_module() -> types.ModuleType:
    """Extend ``torch.cpu`` by the members of ``torch.cuda`` that verl calls anyway; memory is this process's."""
    module = types.ModuleType("verl_cpu_torch_cpu")
    for name in dir(torch.cpu):
        setattr(module, name, getattr(torch.cpu, name))

    def resident(*_: Any) -> int:
        return int(psutil.Process().memory_info().rss)

    def free_and_total(*_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def nothing(*_: Any, **__: Any) -> None:
        return None

    members: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "CPU",
        "mem_get_info": free_and_total,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    members |= dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), resident
    )
    members |= dict.fromkeys(
        ("empty_cache", "ipc_collect", "synchronize", "set_device", "reset_peak_memory_stats"), nothing
    )
    for name, member in members.items():
        setattr(module, name, member)
    return module


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """A CPU that takes part in training; Ray counts it as one logical GPU, because verl places by GPUs."""

    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _device_module())

    def is_available(self) -> bool:  # noqa: D102
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:  # noqa: D102
        return False

    def current_device(self) -> torch.device:  # noqa: D102
        return torch.device("cpu")  # verl moves tensors to this; a number would mean an accelerator

    def device_count(self) -> int:  # noqa: D102
        return 1

    def set_device(self, device_index: int) -> None: ...  # noqa: D102

    def synchronize(self, device_index: int | None = None) -> None: ...  # noqa: D102

    def manual_seed(self, seed: int) -> None:  # noqa: D102
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:  # noqa: D102
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...  # noqa: D102

    def empty_cache(self) -> None: ...  # noqa: D102

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:  # noqa: D102
        return None, None

    def communication_backend_name(self) -> str:
        """Form the process group and return the name of its backend.

        verl asks for the name right before it tests whether a group exists, and would otherwise form one for
        ``cpu:gloo,cpu:gloo``, which torch refuses.
        """
        wanted = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        if wanted <= os.environ.keys() and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:  # noqa: D102
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:  # noqa: D102
        yield

    def profiler_start(self) -> None: ...  # noqa: D102

    def profiler_stop(self) -> None: ...  # noqa: D102

    def ray_resource_name(self) -> str:  # noqa: D102
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, float]:  # noqa: D102
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:  # noqa: D102
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:  # noqa: D102
        return False

    def cudart(self) -> None:  # noqa: D102
        return None


if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
    # The FSDP engine works on a CPU but is registered for cuda and npu only; this is verl's own override.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")


def _local_replica() -> type:
    from verl_cpu.replica import LocalReplica

    return LocalReplica


def _vllm_replica() -> type:
    from verl_cpu.vllm_replica import Replica

    return Replica


RolloutReplicaRegistry.register("local", _local_replica)
if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
    RolloutReplicaRegistry.register("vllm", _vllm_replica)
_ROLLOUT_REGISTRY[("local", "async")] = "verl_cpu.replica.LocalAdapter"
