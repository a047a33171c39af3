"""What a training on GPUs takes in memory and on disk: plain arithmetic on its configuration, before anything runs.

With P parameters, N GPUs on n nodes, tensor parallelism T, and 4 bytes for verl's own float32 (2 for bfloat16):

| where | what | bytes |
|---|---|---|
| each GPU, update | weights, gradients, Adam's two moments, sharded | (4 + 4 + 8) P / N |
| | longest micro-batch: layer inputs kept for recomputing | tokens 2 D L |
| | and, without `use_fused_kernels`: logits, float32 log-probabilities, gradient | tokens (2 + 4 + 2) V |
| each GPU, rollout | vLLM's copy of the weights | 2 P / T |
| | KV cache: what `gpu_memory_utilization` leaves | share x memory - weights |
| each node | offloaded weights; offloaded moments | 4 P / n; 8 P / n |
| | a checkpoint being collected as a Hugging Face model | (4 + 2) P |
| disk | a checkpoint: `model`, `optimizer`, `hf_model` | 4 P + 8 P + 4 P |
| | the exported policy | 4 P |
| | trajectories, at most | rollouts x 2 turns x (3 bytes a prompt character + 35 a response token) |

D is the hidden size, L the layers, V the vocabulary; a micro-batch has `ppo_micro_batch_size_per_gpu` rows of at most
`max_prompt_length + max_response_length` tokens. What is not offloaded stays on the GPU during rollouts too.
Everything in `LEFT_OUT` comes on top. None of it has been compared with a GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-3B-Instruct": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-Coder-3B-Instruct": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""From the ``config.json`` that each model is published with on the Hugging Face hub."""

GPU_BYTES = 80e9
"""Memory of the GPU that is assumed."""
LEFT_OUT = (
    "CUDA context and NCCL (1 to 2 GB a GPU), the layers that FSDP gathers, entropy and attention buffers, vLLM's own "
    "activations and CUDA graphs, fragmentation, Python processes and Ray's object store, logs"
)
PROMPT_BYTES, RESPONSE_BYTES = 3, 35
"""Of a line of trajectories: a character of prompt (its text, and its share of a token id), a token of response (text,
id, log-probability)."""
OTHER_CHARACTERS, RESPONSE_TOKENS = 1500, 320
"""Instructions and question of a prompt; the longest mean response that the seed experiment published."""


@dataclass(frozen=True)
class Shape:
    """What counts of a model of the Llama, Qwen2 or Qwen3 kind; fields are those of its ``config.json``."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    head_dim: int

    @classmethod
    def of(cls, model: str) -> Shape | None:
        """The shape of a model in a folder, or of a published one in `SHAPES`; None for any other."""
        file = Path(model) / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else SHAPES.get(model)
        if config is None or config["model_type"] not in ("llama", "qwen2", "qwen3"):
            return None
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key != "head_dim"}, head_dim=head)

    @property
    def parameters(self) -> int:
        """All parameters: embeddings, attention (with Qwen2's biases, Qwen3's norms), gated MLP, two norms a layer."""
        d, q, kv = self.hidden_size, self.head_dim * self.num_attention_heads, self.head_dim * self.num_key_value_heads
        special = {"qwen2": q + 2 * kv, "qwen3": 2 * self.head_dim}.get(self.model_type, 0)
        layer = 2 * d * q + 2 * d * kv + 3 * d * self.intermediate_size + 2 * d + special
        return self.embedding * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + d

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """KV cache of one token in bfloat16."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2


@dataclass(frozen=True)
class Estimate:
    """Bytes by what takes them."""

    parameters: int
    update: dict[str, float]
    """On each GPU while the policy is updated."""
    rollout: dict[str, float]
    """On each GPU while rollouts are sampled."""
    kv_tokens: int
    """Tokens that the KV cache of one GPU holds; 0 where the weights do not even fit."""
    host: dict[str, float]
    """Memory of each node."""
    disk: dict[str, float]
    gpu_bytes: float

    def lines(self) -> list[str]:
        """The estimate for people."""
        rows = {
            f"each GPU, while {self.parameters / 1e9:.2f}B parameters are updated": self.update,
            f"each GPU of {_gb(self.gpu_bytes)}, while rollouts are sampled": self.rollout,
            "memory of each node": self.host,
            "disk": self.disk,
        }
        return [
            *(
                f"about {_gb(sum(parts.values()))} of {where}: {', '.join(f'{k} {_gb(v)}' for k, v in parts.items())}"
                for where, parts in rows.items()
            ),
            f"(the KV cache of a GPU holds {self.kv_tokens:,} tokens; not in these figures: {LEFT_OUT})",
        ]


def estimate(config: Any, steps: int, gpu_bytes: float = GPU_BYTES) -> Estimate | None:
    """What a resolved training configuration takes for a number of steps; None where the model's shape is not known."""
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    shape = Shape.of(config.actor_rollout_ref.model.path)
    if shape is None:
        return None
    p, gpus = shape.parameters, trainer.n_gpus_per_node * trainer.nnodes
    parallel = rollout.tensor_model_parallel_size
    tokens = actor.ppo_micro_batch_size_per_gpu * (config.data.max_prompt_length + config.data.max_response_length)
    layers = shape.hidden_size * shape.num_hidden_layers
    logits = 0 if config.actor_rollout_ref.model.use_fused_kernels else 8 * shape.vocab_size
    off_weights, off_moments = actor.fsdp_config.param_offload, actor.fsdp_config.optimizer_offload
    cache = max(0.0, rollout.gpu_memory_utilization * gpu_bytes - 2 * p / parallel)

    saves = -(-steps // trainer.save_freq) if trainer.save_freq > 0 else 0
    kept = min(saves, max(trainer.max_actor_ckpt_to_keep or saves, 2))  # with 1, the old one goes after the new one
    contents = {"model": 4 * p, "optimizer": 8 * p, "hf_model": 4 * p}
    tests = trainer.val_before_train + (-(-steps // trainer.test_freq) if trainer.test_freq > 0 else 0)
    rollouts = steps * config.data.train_batch_size * rollout.n + tests * config.sqlbench.validation_tasks
    characters = config.sqlbench.table_info_truncate + config.sqlbench.execution_truncate + OTHER_CHARACTERS
    call = PROMPT_BYTES * characters + RESPONSE_BYTES * min(RESPONSE_TOKENS, config.data.max_response_length)
    return Estimate(
        parameters=p,
        update={
            "weights": 4 * p / gpus,
            "gradients": 4 * p / gpus,
            "Adam": 8 * p / gpus,
            "longest micro-batch": tokens * (2 * layers + logits),
        },
        rollout={"weights": 2 * p / parallel, "KV cache": cache}
        | ({} if off_weights else {"trainer's weights": 4 * p / gpus})
        | ({} if off_moments else {"Adam": 8 * p / gpus}),
        kv_tokens=int(cache // (shape.kv_bytes / parallel)),
        host=({"weights": 4 * p / trainer.nnodes} if off_weights else {})
        | ({"Adam": 8 * p / trainer.nnodes} if off_moments else {})
        | {"saving": 6 * p},
        disk={
            f"{kept} checkpoints": kept * sum(contents.get(name, 0) for name in actor.checkpoint.save_contents),
            "policy": 4 * p,
            "trajectories, at most": rollouts * 2 * config.sqlbench.max_turns * call,
        },
        gpu_bytes=gpu_bytes,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
