"""The requirements of a training, checked before it starts: faults that can be known beforehand are refused here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sqlbench.agent.prompts import RESAMPLE, prompts_for
from sqlbench.data.tasks import Task, headline_split, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import SqlbenchError, TrainingError
from sqlbench.interfaces import BUILT_IN, load_plugin
from sqlbench.profiles import Profile
from sqlbench_train.credit import CONTROLS, CREDITS
from sqlbench_train.estimate import GPU_BYTES, estimate, gpu_bytes

if TYPE_CHECKING:
    from omegaconf import DictConfig

AGENTS = ("write", "rewrite", "check")
SAMPLINGS = ("uniform", "dynamic", "success-rate")
"""Ways to choose the tasks of a step (`sqlbench_train.sampling`)."""
_MODE = "sqlbench has its own synchronous trainer", "Leave the key out."
_REWARD = "verl's own rewards are never used", "Give a reward of your own as sqlbench.reward=module:attribute."
FIXED = {
    "trainer.v1.trainer_mode": ("sqlbench", _MODE),
    "trainer.use_v1": (True, _MODE),
    "actor_rollout_ref.hybrid_engine": (True, _MODE),
    "custom_reward_function.path": (None, _REWARD),
    "reward.custom_reward_function.path": (None, _REWARD),
    "reward_model.enable": (False, _REWARD),
    "reward.reward_model.enable": (False, _REWARD),
    "actor_rollout_ref.model.lora_adapter_path": (
        None,
        ("a training starts from whole weights", "Merge the adapter into its model, and give that as --model."),
    ),
    "actor_rollout_ref.model.lora.rank": (0, ("only Megatron reads it", "Give actor_rollout_ref.model.lora_rank.")),
}
"""Keys of verl with only one value that works here, though verl would accept others; the reason and the remedy."""


def needs(profile: Profile, config: DictConfig) -> list[str]:
    """Describe in lines of text what this configuration needs, and whether it is available."""
    batch, model = config.data.train_batch_size, config.actor_rollout_ref.model.path
    lines, cluster = [], config.ray_kwargs.ray_init.get("address")
    if profile.device == "cuda":
        count = f"{config.trainer.nnodes * config.trainer.n_gpus_per_node} GPU(s) with CUDA"
        vllm = config.actor_rollout_ref.rollout.name == "vllm"
        if cluster == "local":
            lines.append(f"{count}: {'found' if gpu_bytes() else 'NOT found on this machine'}")
            if vllm:
                installed = importlib.util.find_spec("vllm")
                lines.append(f"vllm: {'installed' if installed else 'NOT installed (environment.yml)'}")
        else:
            count += " and vllm" if vllm else ""
            lines.append(f"{count} on the {config.trainer.nnodes} node(s) of the Ray cluster at {cluster}")
    lines.append(f"model {model}: {'a folder' if Path(model).is_dir() else 'downloaded from the Hugging Face hub'}")
    tasks, source = profile.published_tasks, "as published"
    try:
        tasks, source = len(load_tasks(config)[0]), "that can be scored"
        lines.append(f"data {config.sqlbench.data}: found")
    except SqlbenchError as error:
        lines.append(f"data: {error}")
    work = f"steps of {batch} tasks x {config.actor_rollout_ref.rollout.n} rollouts"
    if not tasks:
        return [*lines, f"unknown number of {work}"]
    epoch, steps = planned_steps(config, tasks)
    lines.append(f"{steps} {work}: {steps / max(epoch, 1):.4g} epochs of {epoch} steps ({tasks:,} tasks {source})")
    if profile.device == "cuda" and config.actor_rollout_ref.rollout.name == "vllm":
        plan = estimate(config, steps, gpu_bytes() or GPU_BYTES)
        lines += plan.lines() if plan else [f"memory and disk: unknown for {model} (give the folder of the model)"]
    return lines


def too_small(config: DictConfig) -> str | None:
    """Return a one-line warning if the card is too small for a large model's training; None if not, or unknown."""
    if config.trainer.device != "cuda" or config.actor_rollout_ref.rollout.name != "vllm":
        return None
    plan = estimate(config, 1, gpu_bytes() or GPU_BYTES)
    return plan.warning() if plan else None


def preflight(profile: Profile, config: DictConfig) -> tuple[list[Task], list[Task]]:
    """Check the configuration and return the tasks to train and to validate on.

    Raises:
        TrainingError: this configuration cannot work, here or at all.
        DataError: the data set is missing or unusable.
    """
    check(profile, config)
    _reach(str(config.ray_kwargs.ray_init.get("address")))
    if profile.device == "cuda":
        missing = [line for line in needs(profile, config) if "NOT" in line]
        if missing:
            raise TrainingError(
                f"This machine cannot run the profile {profile.name}: {'; '.join(missing)}. See --dry-run."
            )
    return load_tasks(config)


def check(profile: Profile, config: DictConfig) -> None:
    """Refuse a configuration that works on no machine, in a training and in a dry run.

    Raises:
        TrainingError: the configuration cannot work.
    """
    from omegaconf import OmegaConf

    from sqlbench.models.local import check_chat_template  # imports torch and transformers

    settings = config.sqlbench
    if Path(settings.model).is_dir():
        check_chat_template(settings.model)
    for key, (value, reason) in FIXED.items():
        if (setting := OmegaConf.select(config, key)) not in (value, None):
            raise TrainingError(f"Unsupported {key}: {setting} ({reason[0]}). {reason[1]}")
    prompts_for(settings.prompts or settings.family)
    try:
        matched = [a for a in AGENTS if re.search(str(settings.trained_agents), a)]
        for kind in ("agent", "reward", "trainer"):
            load_plugin(kind, settings[kind])
    except re.error as error:
        raise TrainingError(
            f"Not a regular expression: sqlbench.trained_agents={settings.trained_agents} ({error}). Correct it."
        ) from error
    asked = set(AGENTS)
    if settings.agent == "self-correcting":
        asked -= {"rewrite"} if settings.max_turns == 1 or settings.repair == RESAMPLE else set()
        asked -= {"check"} if settings.max_turns == 1 or not settings.check else set()
    if settings.agent in BUILT_IN["agent"] and not asked & set(matched):
        raise TrainingError(
            f"Nothing to train with {settings.max_turns} turn(s): sqlbench.trained_agents={settings.trained_agents}. "
            f"Choose among the sub-agents that are asked: {', '.join(a for a in AGENTS if a in asked)}."
        )
    if (nodes := config.trainer.nnodes) > 1 and config.ray_kwargs.ray_init.get("address") == "local":
        raise TrainingError(
            f"trainer.nnodes={nodes} needs a Ray cluster. Name one with ray_kwargs.ray_init.address=HOST:PORT."
        )
    if settings.sampling not in SAMPLINGS:
        raise TrainingError(f"Unknown sqlbench.sampling: {settings.sampling}. Choose one of: {', '.join(SAMPLINGS)}.")
    if settings.most_sampled < 1:
        raise TrainingError(f"sqlbench.most_sampled is less than one batch: {settings.most_sampled}. Give 1 or more.")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    row = config.data.max_prompt_length + config.data.max_response_length
    for name, dynamic, limit in (
        ("actor.ppo_max_token_len_per_gpu", actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu),
        (
            "rollout.log_prob_max_token_len_per_gpu",
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
        ),
    ):
        if dynamic and limit < row:
            raise TrainingError(
                f"actor_rollout_ref.{name} is less than one row of {row} tokens: {limit}. Raise it, or lower "
                "data.max_prompt_length or data.max_response_length."
            )
    if settings.agent == "resampling" and "write" not in matched:
        raise TrainingError(
            f"Nothing to train, since resampling only writes: sqlbench.trained_agents={settings.trained_agents}. "
            "Give write."
        )
    if settings.credit not in CREDITS:
        raise TrainingError(f"Unknown sqlbench.credit: {settings.credit}. Choose one of: {', '.join(CREDITS)}.")
    if settings.credit != "rollout" and settings.reward != "execution-match":
        raise TrainingError(
            f"sqlbench.credit={settings.credit} rewards each query for its execution match, not by {settings.reward}. "
            "Leave one of the two out."
        )
    if settings.control not in (None, *CONTROLS):
        raise TrainingError(f"Unknown sqlbench.control: {settings.control}. Choose {' or '.join(CONTROLS)}.")
    if settings.control == "permuted" and settings.credit != "rollout":
        raise TrainingError(
            "sqlbench.control=permuted exchanges the rewards of whole rollouts, which "
            f"sqlbench.credit={settings.credit} does not compare. Leave one of the two out."
        )
    saved = config.actor_rollout_ref.actor.checkpoint.save_contents
    if (config.trainer.save_freq or 0) < 1 or "hf_model" not in saved:
        raise TrainingError(
            f"No policy would be saved: trainer.save_freq={config.trainer.save_freq}, save_contents={saved}. "
            "Give trainer.save_freq=1 or more, and hf_model among actor_rollout_ref.actor.checkpoint.save_contents."
        )
    tasks = profile.published_tasks
    with contextlib.suppress(SqlbenchError):  # reported by `needs`, and by the training itself
        tasks = len(load_tasks(config)[0])
    if tasks is None:
        return
    epoch, steps = planned_steps(config, tasks)
    if not epoch:
        raise TrainingError(
            f"Too few training tasks for one batch of {config.data.train_batch_size}: {tasks} in {settings.data}, "
            f"data.train_max_samples={config.data.train_max_samples}. Lower data.train_batch_size."
        )
    if steps > epoch * config.trainer.total_epochs:  # verl would end early, after hours
        raise TrainingError(
            f"Too many steps for trainer.total_epochs={config.trainer.total_epochs} of {epoch} steps: {steps}. "
            f"Give trainer.total_epochs={-(-steps // epoch)}, or fewer steps."
        )


def load_tasks(config: DictConfig) -> tuple[list[Task], list[Task]]:
    """Load the tasks to train and to validate on.

    Raises:
        DataError: a split or a database is missing or unusable.
        DatabaseError: the server of a database cannot be reached.
    """
    from sqlbench_train.tasks import validation_tasks

    dataset = open_dataset(config.sqlbench.data)
    tasks = [t for t in dataset.load("train") if t.scorable]
    for task in {t.db_id: t for t in tasks}.values():
        database = dataset.database(task.db_id)
        if isinstance(database, str):  # an address; files are opened by the processes that read them
            cached_database(database).schema()
    return tasks, validation_tasks(dataset, headline_split(dataset), config.sqlbench.validation_tasks)


def ask_verl(config: DictConfig) -> None:
    """Let verl's own classes validate a configuration; takes seconds, because verl is imported.

    Raises:
        TrainingError: verl refuses the configuration.
    """
    if importlib.util.find_spec("vllm") is None:  # verl would import it to look at the rank of an adapter
        config = config.copy()
        config.actor_rollout_ref.model.lora.merge = True
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import omega_conf_to_dataclass, validate_config

        try:
            validate_config(config, need_reference_policy(config), need_critic(config))
            for section in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
                omega_conf_to_dataclass(section)
        except Exception as error:
            why = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
            raise TrainingError(f"Configuration refused by verl: {why}. Correct the overrides.") from error


def planned_steps(config: DictConfig, tasks: int) -> tuple[int, int]:
    """Count the steps of an epoch and of the whole run, as verl does."""
    limit = config.data.train_max_samples or 0
    epoch = (min(tasks, limit) if limit > 0 else tasks) // config.data.train_batch_size
    return epoch, config.trainer.total_training_steps or epoch * config.trainer.total_epochs


def _reach(address: str) -> None:
    """Refuse a Ray cluster that does not answer: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise TrainingError(
                f"Cannot reach Ray at {address}: {error.strerror or error}. Start a cluster with 'ray start --head'."
            ) from error
