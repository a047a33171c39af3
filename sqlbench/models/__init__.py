"""Models, by the name that commands and notebooks use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlbench.interfaces import Model


def open_model(
    spec: str,
    *,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    timeout: float | None = None,
    cache: Path | None = None,
) -> Model:
    """Open ``nano``, ``openai:NAME``, ``module:attribute``, a checkpoint or run folder, or a Hugging Face name.

    Args:
        spec: name of the model.
        temperature: 0 is greedy. A model of your own (``module:attribute``) keeps its own settings.
        max_tokens: most tokens of an answer; None is the model's own default.
        timeout: seconds one call to an endpoint may take.
        cache: folder that keeps an endpoint's answers.

    Raises:
        ModelError: the model does not exist or cannot be loaded.
    """
    from sqlbench.errors import ModelError

    limits: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    if spec.startswith("openai:"):
        from sqlbench.models.chat import EndpointChatModel

        if spec == "openai:":
            raise ModelError("No model named: openai:. Write openai:NAME, as the endpoint calls it.")
        deadline: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        how = limits | deadline
        return EndpointChatModel(spec.removeprefix("openai:"), temperature=temperature, cache=cache, **how)
    if cache is not None:
        raise ModelError(f"No cache for answers of {spec}: only those of an endpoint are kept. Leave out --cache.")
    from sqlbench.interfaces import is_plugin, load_plugin

    if is_plugin(spec):
        return load_plugin("model", spec)
    from sqlbench.models.checkpoint import checkpoint_family
    from sqlbench.models.local import LocalChatModel

    path = policy_folder(spec)
    if checkpoint_family(path) != "nano":  # long prompts, long answers, large weights
        limits = {"max_tokens": 512, "max_model_len": 8192, "max_batch": 32, "threads": 0} | limits
    return LocalChatModel(path, name=spec, temperature=temperature, **limits)


def trained_with(spec: str) -> dict[str, Any] | None:
    """Return the settings of the rollouts that trained a policy, from its run folder; None for other models."""
    from sqlbench.runs import CONFIG, RunFolder

    for folder in (Path(spec), Path(spec).parent):
        config = RunFolder(folder).config() if (folder / CONFIG).is_file() else {}
        if config.get("kind") == "training":
            return config["config"]["sqlbench"]
        if config.get("kind") == "sft":
            return config["rollout"]
    return None


def policy_folder(spec: str) -> Path:
    """Find the checkpoint folder of ``nano``, a path or a Hugging Face name; of a training run, its newest policy.

    Raises:
        TrainingError: the run has no checkpoint yet.
        ModelError: the model cannot be downloaded.
    """
    if spec == "nano":
        from pocket import NANO_PATH

        return NANO_PATH
    from sqlbench.models.hub import hub_checkpoint, is_hub_name

    if is_hub_name(spec):
        return hub_checkpoint(spec)
    path = Path(spec)
    if (path / "policy").is_dir() or (path / "checkpoints").is_dir():
        from sqlbench.models.policy import latest_checkpoint

        return latest_checkpoint(path)
    return path
