"""Memory and disk of a training on GPUs: plain arithmetic on its configuration, before anything runs.

With P parameters, N GPUs on n nodes, tensor parallelism T, and 4 bytes for verl's own float32 (2 for bfloat16):

| where | what | bytes |
|---|---|---|
| each GPU, update | weights, gradients, Adam's two moments, sharded | (4 + 4 + 8) P / N |
| | layers of the longest micro-batch, with checkpointing | tokens 2 D L, and one layer of the next row |
| | without | (tokens (24 D + 8 F) + mask) L |
| | attention mask of packed rows, which sdpa makes dense | 2 tokens^2 |
| | logits, their log-probabilities and gradient | 6 V tokens |
| | with `use_fused_kernels` | 24 V for 512 tokens |
| each GPU, optimizer step | weights, gradients, moments, AdamW's temporaries | (4 + 4 + 8 + 4) P / N |
| each GPU, rollout | vLLM's copy of the weights | 2 P / T |
| | KV cache: what `gpu_memory_utilization` leaves | share x memory - weights |
| each node | offloaded weights; offloaded moments | 4 P / n; 8 P / n |
| | a checkpoint being collected as a Hugging Face model | (4 + 2) P |
| disk | a checkpoint: `model`, `optimizer`, `hf_model` | 4 P + 8 P + 4 P |
| | the exported policy | 4 P |
| | trajectories, at most | rollouts x 2 turns x (3 bytes per prompt character + 35 per response token) |

D is the hidden size, F that of the MLP, L the layers, V the vocabulary. A micro-batch has `ppo_max_token_len_per_gpu`
tokens with `use_dynamic_bsz`, and otherwise `ppo_micro_batch_size_per_gpu` rows of at most `max_prompt_length +
max_response_length`. A layer of Qwen2 keeps 24 D + 8 F for its gradient under bfloat16 autocast. Whatever is not
offloaded stays on the GPU during rollouts too. With LoRA of rank r on all linear layers, r L (7 D + 2 Q + 2 K + 3 F)
weights are added, where Q and K are the widths of queries and keys, and only these have gradients, moments and
temporaries. Everything in `LEFT_OUT` comes on top; `RESERVE` of a card is left for it. Measured on an H200: 3% more
than this for 0.5B, 3% less for 1.5B (`tests/unit/test_estimate.py`). LoRA was not measured.
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
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
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
"""Shapes from the ``config.json`` that each model is published with on the Hugging Face hub."""

GPU_BYTES = 80e9
"""Assumed memory of the GPU on a machine without one."""
RESERVE = 0.1
"""Share of a card that is left free for everything outside the estimate."""
FUSED_TOKENS = 512
"""Number of tokens whose logits verl's fused kernels hold at a time."""
_ACTOR = "actor_rollout_ref.actor.fsdp_config"
CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
SAVINGS = (f"{_ACTOR}.optimizer_offload", f"{_ACTOR}.param_offload", CHECKPOINTING)
"""Settings that trade time for GPU memory, the best trade first: the first two during rollouts, the last one during
the update."""
LEFT_OUT = (
    "CUDA context and NCCL (1 to 2 GB per GPU), the layers that FSDP gathers, entropy and attention buffers, vLLM's "
    "own activations and CUDA graphs, fragmentation, Python processes and Ray's object store, logs"
)
PROMPT_BYTES, RESPONSE_BYTES = 3, 35
"""Bytes in a line of trajectories: per character of prompt (its text, and its share of a token id), and per token of
response (text, id, log-probability)."""
OTHER_CHARACTERS, RESPONSE_TOKENS = 1500, 320
"""Characters of instructions and question in a prompt; longest mean response that the seed experiment published."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama, Qwen2 or Qwen3 kind; fields are those of its ``config.json``."""

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
        """Read the shape of a model in a folder, or of a published one in `SHAPES`; None for any other."""
        file = Path(model) / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else SHAPES.get(model)
        if config is None or config["model_type"] not in ("llama", "qwen2", "qwen3"):
            return None
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key != "head_dim"}, head_dim=head)

    @property
    def parameters(self) -> int:
        """Count all parameters: embeddings, attention (Qwen2's biases, Qwen3's norms), MLP, two norms per layer."""
        d, q, kv = self.hidden_size, self.head_dim * self.num_attention_heads, self.head_dim * self.num_key_value_heads
        special = {"qwen2": q + 2 * kv, "qwen3": 2 * self.head_dim}.get(self.model_type, 0)
        layer = 2 * d * q + 2 * d * kv + 3 * d * self.intermediate_size + 2 * d + special
        return self.embedding * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + d

    def adapters(self, rank: int) -> int:
        """Count the parameters of LoRA on every linear layer but the last; 0 for rank 0."""
        heads = self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return rank * self.num_hidden_layers * (7 * self.hidden_size + 2 * heads + 3 * self.intermediate_size)

    @property
    def embedding(self) -> int:
        """Count the parameters of one embedding matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Compute the bytes of one token's KV cache in bfloat16."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2


@dataclass(frozen=True)
class Estimate:
    """Estimated bytes by use."""

    parameters: int
    """Number of trained parameters."""
    update: dict[str, float]
    """Bytes on each GPU while the policy is updated."""
    rollout: dict[str, float]
    """Bytes on each GPU while rollouts are sampled."""
    kv_tokens: int
    """Tokens that the KV cache of one GPU holds; 0 if the weights alone do not fit."""
    host: dict[str, float]
    """Bytes of memory on each node."""
    disk: dict[str, float]
    gpu_bytes: float
    unused: tuple[str, ...] = ()
    """`SAVINGS` that the configuration does not use."""

    @property
    def update_peak(self) -> float:
        """Compute the peak bytes of each GPU during the update: at the last micro-batch, or the optimizer's step."""
        parts = self.update
        state = parts["weights"] + parts["gradients"] + parts["Adam"]
        return state + max(parts["longest micro-batch"], parts["gradients"])

    def too_large(self) -> dict[str, tuple[str, ...]]:
        """Describe each peak that does not fit the card, with the `SAVINGS` that would reduce it."""
        peaks = {"rollouts": (sum(self.rollout.values()), SAVINGS[:2]), "the update": (self.update_peak, SAVINGS[2:])}
        room = (1 - RESERVE) * self.gpu_bytes
        return {f"{_gb(peak)} for {what}": keys for what, (peak, keys) in peaks.items() if peak > room}

    def needed(self, key: str) -> bool:
        """Return whether one of `SAVINGS` would reduce a peak that does not fit."""
        return any(key in keys for keys in self.too_large().values())

    def warning(self) -> str | None:
        """Return a one-line warning if the card is too small, else None."""
        if not (peaks := self.too_large()):
            return None
        savings = [f"{key}=true" for key in self.unused if self.needed(key)]
        advice = [*savings, "fewer tokens per micro-batch", "less gpu_memory_utilization", "more GPUs"]
        return (
            f"This may not fit GPUs of {_gb(self.gpu_bytes)}: it takes about {' and '.join(peaks)}, and {RESERVE:.0%} "
            f"should stay free. Give {', '.join(advice[:-1])} or {advice[-1]}."
        )

    def lines(self) -> list[str]:
        """Describe the estimate in lines of text."""
        rows = {
            f"each GPU, while {self.parameters / 1e9:.3g}B parameters are updated": self.update,
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
    """Estimate a resolved training configuration for a number of steps; None if the model's shape is unknown."""
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    model = config.actor_rollout_ref.model
    shape = Shape.of(model.path)
    if shape is None:
        return None
    p, gpus = shape.parameters + shape.adapters(model.lora_rank), trainer.n_gpus_per_node * trainer.nnodes
    trained = shape.adapters(model.lora_rank) or p
    parallel = rollout.tensor_model_parallel_size
    row = config.data.max_prompt_length + config.data.max_response_length
    tokens = actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu * row
    layer = tokens * (24 * shape.hidden_size + 8 * shape.intermediate_size) + 2 * tokens**2
    if model.enable_gradient_checkpointing:
        layers = tokens * 2 * shape.hidden_size * shape.num_hidden_layers + layer
    else:
        layers = layer * shape.num_hidden_layers
    logits = shape.vocab_size * (24 * FUSED_TOKENS if model.use_fused_kernels else 6 * tokens)
    off_weights, off_moments = actor.fsdp_config.param_offload, actor.fsdp_config.optimizer_offload
    in_use = off_moments, off_weights, model.enable_gradient_checkpointing
    cache = max(0.0, rollout.gpu_memory_utilization * gpu_bytes - 2 * p / parallel)

    saves = -(-steps // trainer.save_freq) if trainer.save_freq > 0 else 0
    saved = min(saves, max(trainer.max_actor_ckpt_to_keep or saves, 2))  # with 1, the old one is removed last
    contents = {"model": 4 * p, "optimizer": 8 * trained, "hf_model": 4 * p}
    tests = trainer.val_before_train + (-(-steps // trainer.test_freq) if trainer.test_freq > 0 else 0)
    rollouts = steps * config.data.train_batch_size * rollout.n + tests * config.sqlbench.validation_tasks
    characters = config.sqlbench.table_info_truncate + config.sqlbench.execution_truncate + OTHER_CHARACTERS
    call = PROMPT_BYTES * characters + RESPONSE_BYTES * min(RESPONSE_TOKENS, config.data.max_response_length)
    return Estimate(
        parameters=trained,
        update={
            "weights": 4 * p / gpus,
            "gradients": 4 * trained / gpus,
            "Adam": 8 * trained / gpus,
            "longest micro-batch": layers + logits,
        },
        rollout={"weights": 2 * p / parallel, "KV cache": cache}
        | ({} if off_weights else {"trainer's weights": 4 * p / gpus})
        | ({} if off_moments else {"Adam": 8 * trained / gpus}),
        kv_tokens=int(cache // (shape.kv_bytes / parallel)),
        host=({"weights": 4 * p / trainer.nnodes} if off_weights else {})
        | ({"Adam": 8 * trained / trainer.nnodes} if off_moments else {})
        | {"saving": 6 * p},
        disk={
            f"{saved} checkpoints": saved * sum(contents.get(name, 0) for name in actor.checkpoint.save_contents),
            "policy": 4 * p,
            "trajectories, at most": rollouts * 2 * config.sqlbench.max_turns * call,
        },
        gpu_bytes=gpu_bytes,
        unused=tuple(key for key, used in zip(SAVINGS, in_use, strict=True) if not used),
    )


def gpu_bytes() -> int:
    """Return the memory of this machine's first GPU; 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
