"""LoRA adapters, added to the weights that they were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def merged(adapters: Mapping[str, Any], base: Mapping[str, Any], scale: float) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each weight that the adapters change.

    Args:
        adapters: peft's tensors ``lora_A`` and ``lora_B`` under peft's names; others are left out.
        base: the weights, under the model's own names.
        scale: ``lora_alpha / r``.
    """
    named = {name.removeprefix("base_model.model.").replace(".default.", "."): t for name, t in adapters.items()}
    for name, down in named.items():
        layer, is_down, _ = name.partition(".lora_A.weight")
        if is_down:
            yield f"{layer}.weight", base[f"{layer}.weight"] + scale * (named[f"{layer}.lora_B.weight"] @ down)
