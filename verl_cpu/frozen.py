"""Speed-ups of an engine whose weights never change: packed weights, and keys and values of earlier prompts.

Prompts of one agent on one database begin with the same instructions and schema, which are most of their tokens.
"""

from __future__ import annotations

from typing import Any

import torch

_KEPT_BYTES = 2**29


def half_precision() -> bool:
    """Return whether this CPU computes in bfloat16; elsewhere bfloat16 is slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PackedLinear(torch.nn.Module):
    """A linear layer with its weight in the layout of oneDNN, which reorders a plain one at every product."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: torch.nn.Module) -> None:
    """Replace the linear layers of a bfloat16 model by packed ones: three times faster for a few tokens."""
    with torch.inference_mode():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(module, name, _PackedLinear(child))


def common_start(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Count the tokens that two prompts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


class PromptCache:
    """Keys and values of prompts, of all layers, up to a number of bytes; the least recently used one goes first."""

    def __init__(self, limit: int = _KEPT_BYTES) -> None:
        self.limit = limit
        self._kept: dict[tuple[int, ...], Any] = {}

    def find(self, prompt: tuple[int, ...]) -> tuple[int, Any]:
        """Return the number of the prompt's first tokens in the cache, and their layers; one token is always left."""
        shared, best = 0, None
        for other in self._kept:
            if (common := common_start(prompt[:-1], other)) > shared:
                shared, best = common, other
        if best is None:
            return 0, None
        layers = self._kept.pop(best)
        if 2 * shared < len(best):  # else the prompt takes its place
            self._kept[best] = layers
        return shared, [tuple(t[:, :, :shared] for t in pair) for pair in layers]

    def add(self, prompt: tuple[int, ...], layers: Any) -> None:
        """Keep the layers of a whole prompt."""
        self._kept[prompt] = layers
        while sum(t.nbytes for entry in self._kept.values() for pair in entry for t in pair) > self.limit:
            del self._kept[next(iter(self._kept))]
