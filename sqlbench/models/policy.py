"""The checkpoints that verl leaves in a run's folder, and the policy of the newest as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sqlbench.errors import TrainingError
from sqlbench.runs import RunFolder, write_whole
from verl_cpu.lora import merged


def export_policy(run: str | Path, start: str | Path | None = None) -> Path:
    """Copy the newest checkpoint of a run to ``<run>/policy`` as a complete Hugging Face folder, and return it.

    Tokenizer and family files come from the policy that training started from, byte by byte. LoRA adapters are merged.

    Args:
        run: run folder.
        start: the policy that training started from; by default the one that the run's configuration names.

    Raises:
        TrainingError: the run has no checkpoint yet, or the policy it started from is gone.
    """
    run = Path(run)
    saved = run / f"checkpoints/global_step_{checkpointed(run)}/actor/huggingface"
    if not saved.is_dir():
        raise TrainingError(f"No checkpoint in {run}. Train it to its first one (trainer.save_freq).")
    target, building = run / "policy", run / ".policy.new"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(saved, building)
    if (note := saved.with_name("lora_train_meta.json")).is_file():
        _merge_adapters(building, json.loads(note.read_text()))
    record = RunFolder(run).config()
    start = Path(start or record["config"]["sqlbench"]["model"])
    if record["model_files"] and not start.is_dir():
        raise TrainingError(f"Missing start policy of {run}: {start}. Run this in the project's folder.")
    if start.is_dir():
        copy_tokenizer(start, building)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    return target


def _merge_adapters(folder: Path, trained: dict[str, Any]) -> None:
    """Replace weights as verl saves them, with adapters beside and under peft's names, by those of a plain model."""
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    plain = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): t for n, t in saved.items()}
    weights = {name: tensor for name, tensor in plain.items() if ".lora_" not in name}
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    weights |= merged(saved, weights, trained["lora_alpha"] / trained["r"])
    for file in [*files, *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def copy_tokenizer(start: Path, policy: Path) -> None:
    """Copy the files of a checkpoint beside its weights: tokenizer, chat template and prompt family."""
    for file in start.iterdir():
        if file.is_file() and ("token" in file.name or file.name in ("sqlbench.json", "chat_template.jinja")):
            shutil.copy2(file, policy / file.name)


def checkpointed(run: str | Path) -> int:
    """Return the step of a run's newest whole checkpoint, 0 without one; repair verl's note of it after a kill.

    verl writes the note last and not in one piece: if it exists without a number, the newest checkpoint is whole.
    """
    folder = Path(run) / "checkpoints"
    note = folder / "latest_checkpointed_iteration.txt"
    if not note.is_file():
        return 0
    if not (text := note.read_text()).isdigit():
        text = str(max((_step_of(file.parent) for file in folder.glob("global_step_*/data.pt")), default=0))
        write_whole(note, [text])
    return int(text)


def latest_checkpoint(run: str | Path) -> Path:
    """Return the folder of a run's newest policy, ready for `sqlbench.models.local`."""
    policy = Path(run) / "policy"
    return policy if RunFolder(run).finished and policy.is_dir() else export_policy(run)


def drop_others(run: str | Path, done: int, keep: int | None) -> None:
    """Remove torn checkpoints after step `done`, and all but the newest `keep` whole ones.

    verl forgets the checkpoints of earlier attempts, and one that a kill cut short.
    """
    saved = sorted((Path(run) / "checkpoints").glob("global_step_*"), key=_step_of)
    complete = [folder for folder in saved if _step_of(folder) <= done]
    for folder in saved[len(complete) :] + (complete[:-keep] if keep else []):
        shutil.rmtree(folder)


def _step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"global_step_(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
