"""One decoding step of a small llama-like model in about twenty operations per layer.

The general model code of transformers spends 5 to 8 ms per step on Python for a model whose arithmetic takes 1 ms;
batches of short answers with a long tail are mostly such steps. `Decoder` computes the same numbers (up to the rounding
of floating-point sums) from the same weights for the families it knows; for others `Decoder.of` gives None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

FAMILIES = ("llama", "qwen2", "qwen3")
LARGEST = 50_000_000
"""Maximum number of parameters: larger models are bound by arithmetic, and the joined weights here are copies."""


class Decoder:
    """A model's weights, joined for few large products. Build it again when weights change."""

    @classmethod
    def of(cls, model: Any) -> Decoder | None:
        """Make a decoder of a transformers model, or None if its family or its settings are unknown."""
        config = model.config
        rope = config.rope_parameters or {}
        supported = (
            config.model_type in FAMILIES
            and model.dtype == torch.float32  # the general code mixes precisions with more care
            and config.hidden_act == "silu"
            and rope.get("rope_type", "default") == "default"
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and not getattr(config, "mlp_bias", False)
            and sum(p.numel() for p in model.parameters()) <= LARGEST
        )
        return cls(model) if supported else None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.frequencies = model.model.rotary_emb.inv_freq.float()
        self.embedding, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.last_norm = model.model.norm.weight
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            bias = torch.cat([p.bias for p in projections]) if attention.q_proj.bias is not None else None
            self.layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat([p.weight for p in projections]),
                    bias,
                    self._qk_norm(attention) if config.model_type == "qwen3" else None,
                    (attention.o_proj.weight, attention.o_proj.bias),
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )

    def _qk_norm(self, attention: Any) -> torch.Tensor:
        """Return the norm weights of every query and key head."""
        q, k = attention.q_norm.weight, attention.k_norm.weight
        return torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])

    def step(self, ids: torch.Tensor, position: torch.Tensor, mask: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        """Compute the logits after one more token in every row; append keys and values to the caches.

        Args:
            ids: the tokens, one per row.
            position: their positions, one per row (a column).
            mask: columns of the cache, the new one included, that each row may see.
            caches: key-value caches of the layers, with a method ``update``.
        """
        rows, heads, kv_heads, size = len(ids), self.heads, self.kv_heads, self.size
        angle = position.float() * self.frequencies
        angle = torch.cat([angle, angle], 1).unsqueeze(1)
        cos, sin = angle.cos(), angle.sin()
        seen = mask.bool()[:, None, None, :]
        hidden = embedding(ids, self.embedding)
        for (norm, joined, bias, qk_norm, (out, out_bias), mlp_norm, up, down), cache in zip(
            self.layers, caches, strict=True
        ):
            heads_of = linear(_normed(hidden, norm, self.eps), joined, bias).view(rows, -1, size)
            qk, value = heads_of[:, : heads + kv_heads], heads_of[:, heads + kv_heads :]
            if qk_norm is not None:
                qk = _normed(qk, qk_norm, self.eps)
            turned = torch.cat([-qk[..., size // 2 :], qk[..., : size // 2]], -1)
            qk = (qk * cos + turned * sin).unsqueeze(2)
            keys, values = cache.update(qk[:, heads:], value.unsqueeze(2))
            attended = scaled_dot_product_attention(qk[:, :heads], keys, values, attn_mask=seen, enable_gqa=True)
            hidden = hidden + linear(attended.reshape(rows, heads * size), out, out_bias)
            gate, value = linear(_normed(hidden, mlp_norm, self.eps), up).chunk(2, 1)
            hidden = hidden + linear(silu(gate) * value, down)
        return linear(_normed(hidden, self.last_norm, self.eps), self.head).float()


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply the root-mean-square norm over the last axis (torch's own takes three times as long on a CPU)."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
