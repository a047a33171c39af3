"""The configuration of a training: verl's defaults, profile, arguments, recipe, overrides, in that order.

A value that is still ``auto`` after that is decided here, so that the configuration on record is the one that ran.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sqlbench.config import RolloutConfig
from sqlbench.errors import TrainingError
from sqlbench.models.checkpoint import checkpoint_family
from sqlbench.profiles import Profile
from sqlbench.runs import flat
from sqlbench_train.estimate import GPU_BYTES, SAVINGS, estimate, gpu_bytes

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG = Path(__file__).with_name("config")
TRACKERS = ("wandb", "mlflow", "tensorboard")
"""Backends of verl that can be added to its console and file; each needs the package of its name."""
COUNTS = {
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.rollout.agent.num_workers",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.train_batch_size",
    "sqlbench.validation_tasks",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.total_epochs",
    "trainer.total_training_steps",
}
"""Keys whose values below 1 would break verl only after it has started."""
SWITCHES = {*SAVINGS, "algorithm.rollout_correction.bypass_mode"}
"""Keys that are true, false, or ``auto`` where a profile says so."""


def compose(
    profile: Profile,
    *,
    run: str,
    folder: Path,
    data: Path | str,
    model: str,
    overrides: list[str] | tuple[str, ...] = (),
    recipe: str | None = None,
    control: str | None = None,
) -> DictConfig:
    """Compose and resolve the configuration of a run: verl's defaults, profile, arguments, recipe, overrides.

    Raises:
        TrainingError: the recipe does not exist; an override is not ``key=value``, names an unknown key, or has an
            invalid value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if importlib.util.find_spec("verl") is None:
        raise TrainingError("Not installed: verl. Run pip install 'sqlbench[train]'.")
    arguments = {
        "trainer.experiment_name": run,
        "sqlbench.run_folder": str(folder),
        "sqlbench.data": str(data),
        "sqlbench.model": model,
        "sqlbench.family": checkpoint_family(model),
    }
    base = [f"{key}={quoted(value)}" for key, value in arguments.items()]
    base.append(f"sqlbench.control={quoted(control) if control else 'null'}")
    if recipe is not None:
        if recipe not in (names := recipes()):
            raise TrainingError(f"Unknown recipe: {recipe}. Give one of: {', '.join(names)}.")
        base.append(f"+recipe={recipe}")
    GlobalHydra.instance().clear()
    for text in overrides:
        try:
            OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise TrainingError(
                f"Cannot read the override: {text!r}. Give key=value, and brackets in quotes: key='[a]'."
            ) from error
    with initialize_config_dir(str(CONFIG), version_base=None):
        try:
            config = hydra_compose(profile.name, overrides=[*base, *overrides])
            _check_values(config, flat(changes(profile.name, recipe)))
            decide(config)
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            message = str(error).strip().splitlines()[0]
            if unknown := re.fullmatch(r"Could not override '([\w.]+)'\.", message):
                keys = flat(OmegaConf.to_container(hydra_compose(profile.name, overrides=base)))
                raise TrainingError(
                    f"Unknown key: {unknown[1]}. Did you mean {' or '.join(_nearest(unknown[1], keys))}?"
                ) from error
            raise TrainingError(
                f"Cannot compose the training configuration: {message.rstrip('.')}. Correct the override."
            ) from error
    return config


def recipes() -> list[str]:
    """Return the names of the recipes: named sets of settings between a profile and the overrides."""
    return sorted(file.stem for file in (CONFIG / "recipe").glob("*.yaml"))


def decide(config: DictConfig) -> None:
    """Replace every ``auto`` by what fits the batch, the model and the card.

    For a model of unknown shape, everything is offloaded and recomputed, which is slow but takes the least memory.
    """
    from omegaconf import OmegaConf

    def settle(key: str, value: object) -> None:
        if OmegaConf.select(config, key) == "auto":
            OmegaConf.update(config, key, value)

    data, actor = config.data, config.actor_rollout_ref.actor
    settle("actor_rollout_ref.rollout.max_model_len", data.max_prompt_length + data.max_response_length)
    settle("algorithm.rollout_correction.bypass_mode", data.train_batch_size < 2 * actor.ppo_mini_batch_size)
    undecided = [key for key in SAVINGS if OmegaConf.select(config, key) == "auto"]
    for key in undecided:
        settle(key, False)
    for key in undecided:  # each only if the training is still too large without it
        plan = estimate(config, 1, gpu_bytes() or GPU_BYTES)
        OmegaConf.update(config, key, plan is None or plan.needed(key))


def changes(profile: str, recipe: str | None = None) -> dict[str, Any]:
    """Read the changes of a profile and a recipe to verl's defaults, with interpolations unresolved."""
    from omegaconf import OmegaConf

    names = ["common", profile, *([f"recipe/{recipe}"] if recipe else [])]
    tree = OmegaConf.merge(*(OmegaConf.load(CONFIG / f"{name}.yaml") for name in names))
    settings = OmegaConf.to_container(tree)
    return {key: value for key, value in settings.items() if key not in ("defaults", "hydra")}


def _nearest(key: str, keys: Collection[str]) -> list[str]:
    """Return up to three similar keys: those with the same ending, then those with similar spelling."""
    same = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    matches = [*get_close_matches(key, same, 3, cutoff=0.0), *get_close_matches(key, keys, 3, cutoff=0.75)]
    return list(dict.fromkeys(matches))[:3] or get_close_matches(key, keys, 1, cutoff=0.0)


def _check_values(config: DictConfig, given: dict[str, Any]) -> None:
    """Refuse values of another type than the profile's, which verl would accept and then break on."""
    from omegaconf import OmegaConf

    for key in sorted(COUNTS | {key for key, value in given.items() if type(value) in (int, float)}):
        value = OmegaConf.select(config, key)
        if value is None and (key not in COUNTS or key == "trainer.total_training_steps"):  # verl's own default
            continue
        if key in COUNTS and (type(value) is not int or value < 1):
            raise TrainingError(f"Invalid {key}: {value}. Give a whole number of at least 1.")
        if type(value) not in (int, float):
            raise TrainingError(f"Invalid {key}: {value}. Give a number.")
    try:
        RolloutConfig.of(config.sqlbench)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"Invalid sqlbench.{first['loc'][0]}: {first['input']} ({first['msg']})"
        raise TrainingError(f"{why}. Correct the override.") from error
    if type(rank := config.actor_rollout_ref.model.lora_rank) is not int or rank < 0:
        raise TrainingError(f"Invalid actor_rollout_ref.model.lora_rank: {rank}. Give a whole number; 0 is no LoRA.")
    copies = config.sqlbench.stop_repetition
    if copies is not None and (type(copies) is not int or copies < 2):
        raise TrainingError(f"Invalid sqlbench.stop_repetition: {copies}. Give a whole number of at least 2, or null.")
    for key, default in given.items():
        value = OmegaConf.select(config, key)
        if value == default == "auto":
            continue
        if key.endswith("max_model_len") and not (value is None or (type(value) is int and value > 0)):
            raise TrainingError(f"Invalid {key}: {value}. Give a whole number of at least 1, auto or null.")
        if (isinstance(default, bool) or key in SWITCHES) and not isinstance(value, bool):
            raise TrainingError(f"Invalid {key}: {value}. Give true or false.")


def tracking(backend: str) -> list[str]:
    """Return the override that also sends metrics to one of `TRACKERS`.

    Raises:
        TrainingError: the backend is unknown, or its package is not installed.
    """
    if backend not in TRACKERS:
        raise TrainingError(f"Unknown tracker: {backend}. Choose one of: {', '.join(TRACKERS)}.")
    if importlib.util.find_spec(backend) is None:
        raise TrainingError(f"Tracker is not installed: {backend}. Run 'pip install {backend}'.")
    return [f"trainer.logger=[console,file,{backend}]"]


def quoted(text: str) -> str:
    """Quote a text for Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
