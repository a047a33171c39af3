"""verl's own vLLM replica on vLLM's CPU build: the code path of a GPU, without one.

One thing differs from verl's replica: the CPU build packs its linear layers for its kernels when it loads them. New
weights, which come by verl's own transfer, therefore go through vLLM's reload, which packs them again, instead of
straight into the parameters.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class WorkerExtension(vLLMColocateWorkerExtension):
    """Mixin for vLLM's worker."""

    def update_weights_from_ipc(
        self, peft_config: Any = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Load the trainer's weights."""
        named: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        # Clones, because the sender uses its buffer again.
        receiver.receive_weights(lambda weights, is_last: named.extend((name, t.clone()) for name, t in weights))
        self.model_runner.reload_weights(weights_iterator=iter(named))
        # An output layer that shares its weight with the input embedding is not reloaded itself: pack it again.
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, VocabParallelEmbedding):
                layer.quant_method.process_weights_after_loading(layer)


class Server(vLLMHttpServer):
    """verl's server, with our worker extension."""

    def _get_worker_extension_cls(self) -> str:
        return f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"


class Replica(vLLMReplica):
    """verl's replica, with our server."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.server_class = ray.remote(Server)
