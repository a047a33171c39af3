"""Hugging Face checkpoint folders: their completeness, and the prompts that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

from sqlbench.errors import ModelError


def checkpoint_family(path: str | Path) -> str:
    """Read the prompt family of a checkpoint folder from its ``sqlbench.json``; ``chat`` if it has none."""
    note = Path(path) / "sqlbench.json"
    return str(json.loads(note.read_text()).get("family", "chat")) if note.is_file() else "chat"


def check_checkpoint(path: str | Path) -> Path:
    """Return the path of a usable checkpoint folder.

    Raises:
        ModelError: not a folder, only a LoRA adapter, or weights, config or tokenizer are missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"No checkpoint folder: {path}. Give 'nano', a folder in Hugging Face format or a name on the hub "
            "(owner/name); an endpoint, where it can be used, is openai:NAME."
        )
    weights = [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if (folder / "adapter_config.json").is_file() and not weights:
        raise ModelError(
            f"Only a LoRA adapter: {folder}. Merge it into its model with peft (merge_and_unload), save that with its "
            "tokenizer, and give the folder."
        )
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise ModelError(f"Not a complete Hugging Face checkpoint: {folder}. Add {', '.join(missing)}.")
    return folder
