"""The two training profiles, as data: what they change in verl's own default configuration.

``laptop`` trains the embedded policy on a CPU; ``gpu`` is the seed experiment (Qwen2.5-Coder-3B-Instruct on Spider, one
GPU). A profile is a tree of verl's keys; the section ``sqlbench`` is ours and is read by the agent loop and the
trainer. Precedence: verl's defaults < profile < arguments < ``key=value`` overrides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlbench.errors import RunError, TrainingError


@dataclass(frozen=True)
class Profile:
    """One way to train."""

    name: str
    model: str
    """Default policy: ``nano``, a folder, or (GPU) a name on the Hugging Face hub."""
    data: str
    """Default data set folder."""
    config: dict[str, Any]
    """Changes to verl's defaults."""
    environment: dict[str, str]
    """Environment of the training processes; a variable that is set already wins."""
    device: str = "cpu"
    published_tasks: int | None = None
    """Training tasks of the default data set as it was published: for plans made where it is not at hand."""

    def on(self, device: str) -> Profile:
        """This profile with another ``trainer.device``: what was made for the CPU also runs on a GPU.

        Raises:
            TrainingError: there is no such device for this profile.
        """
        if device == self.device:
            return self
        if device != "cuda":
            known = " or ".join(dict.fromkeys((self.device, "cuda")))
            raise TrainingError(f"trainer.device={device} does not go with the profile '{self.name}'; choose {known}")
        environment = {name: value for name, value in self.environment.items() if name != "VERL_PLATFORM"}
        return replace(self, device=device, environment=environment)


SQLBENCH = {
    "trained_agents": "write",
    "max_turns": 3,
    "table_info_truncate": 2048,
    "execution_truncate": 2048,
    "query_timeout": 5.0,
    "seed": 1,
    "random_reward": False,
    "credit": "rollout",
    "max_failed_share": 0.2,
    "drop_useless_groups": True,
    "seed_sampling": True,
    "validation_tasks": 200,
    "agent": "self-correcting",
    "reward": "execution-match",
    "trainer": "verl",
}
"""Settings of ours that both profiles start from.

trained_agents: regular expression over sub-agent names; ``write`` finds ``rewrite`` too.
credit: what a transition is rewarded for: ``rollout``, the match of the rollout's last query, or ``transition``, what
it did itself (`sqlbench.training.credit`).
query_timeout: seconds that a query may take, the policy's and the gold one alike.
max_failed_share: of the rollouts of a step; the run stops above it.
drop_useless_groups: leave groups whose rewards are all equal out of the update (their advantage is 0).
seed_sampling: give every model call its own seed, so that a run repeats; vLLM is slower with it.
validation_tasks: number of tasks of the headline split that verl validates on.
agent, reward, trainer: built-in names, or ``module:attribute`` of your own (`sqlbench.interfaces`).
"""

_COMMON: dict[str, Any] = {
    "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
    "data": {
        "seed": "${sqlbench.seed}",
        "dataloader_num_workers": 0,
        "truncation": "error",
        "custom_cls": {"path": "pkg://sqlbench.training.tasks", "name": "TaskRows"},
    },
    "actor_rollout_ref": {
        "actor": {
            "use_kl_loss": False,
            "kl_loss_coef": 0.0,
            "entropy_coeff": 0,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.3,
            "policy_loss": {"loss_mode": "token_mean"},
            "checkpoint": {"save_contents": ["model", "optimizer", "extra", "hf_model"]},
        },
        "model": {"external_lib": "sqlbench.training.loss"},
        "rollout": {
            "tensor_model_parallel_size": 1,
            "calculate_log_probs": True,
            "multi_turn": {"format": "hermes"},
            "val_kwargs": {"temperature": 0, "do_sample": False},
            "agent": {
                "default_agent_loop": "sqlbench",
                "agent_loop_manager_class": "sqlbench.training.agent_loop.SqlAgentLoopManager",
            },
        },
    },
    "trainer": {
        "n_gpus_per_node": 1,
        "nnodes": 1,
        "critic_warmup": 0,
        "val_before_train": True,
        "resume_mode": "auto",
        "v1": {"trainer_mode": "sqlbench"},
    },
    "ray_kwargs": {"ray_init": {"address": "local", "include_dashboard": False}},
}

_LAPTOP: dict[str, Any] = {
    "algorithm": {"rollout_correction": {"bypass_mode": True}},
    "data": {"train_batch_size": 16, "max_prompt_length": 640, "max_response_length": 128},
    "actor_rollout_ref": {
        "actor": {
            "strategy": "fsdp2",
            "calculate_entropy": True,  # the pass over old log-probabilities, which has it too, is left out
            "ppo_mini_batch_size": 16,
            "ppo_micro_batch_size_per_gpu": 16,
            "use_torch_compile": False,
            "fsdp_config": {
                "use_torch_compile": False,
                "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            },
            "optim": {"lr": 2e-4},
        },
        "model": {
            "external_lib": ["sqlbench.training.loss", "verl_cpu.fsdp_engine"],
            "use_remove_padding": False,
            "enable_gradient_checkpointing": False,
            "override_config": {"attn_implementation": "sdpa"},
        },
        "rollout": {
            "name": "local",
            "n": 8,
            "temperature": 1.0,
            "dtype": "float32",
            "load_format": "auto",
            "free_cache_engine": False,
            "max_model_len": 768,
            "log_prob_micro_batch_size_per_gpu": 16,
            "agent": {"num_workers": 1},
            "engine_kwargs": {"local": {"threads": 1, "device": "${trainer.device}"}},
        },
    },
    "reward": {"num_workers": 0},
    "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
    "trainer": {
        "device": "cpu",
        "logger": ["console", "file"],
        "total_training_steps": 40,
        "total_epochs": 1000,
        "test_freq": 10,
        "save_freq": 20,
        "max_actor_ckpt_to_keep": 2,
    },
    # Logical resources: verl asks for 3 CPUs and 1 GPU a rank, whatever the machine has.
    "ray_kwargs": {"ray_init": {"num_cpus": 64, "num_gpus": "${trainer.n_gpus_per_node}"}},
}

_GPU: dict[str, Any] = {
    "data": {"train_batch_size": 32, "max_prompt_length": 4096, "max_response_length": 2048},
    "actor_rollout_ref": {
        "actor": {
            "ppo_mini_batch_size": 32,
            "ppo_micro_batch_size_per_gpu": 4,
            "fsdp_config": {"param_offload": True, "optimizer_offload": True},
            "optim": {"lr": 1e-6},
        },
        "model": {
            "use_remove_padding": True,
            "enable_gradient_checkpointing": True,
            # verl's own default is flash_attention_2: the package flash-attn, which `environment.yml` does not have.
            "override_config": {"attn_implementation": "sdpa"},
        },
        "rollout": {
            "name": "vllm",
            "n": 4,
            "gpu_memory_utilization": 0.8,
            "log_prob_micro_batch_size_per_gpu": 4,
        },
        "ref": {"log_prob_micro_batch_size_per_gpu": 8, "fsdp_config": {"param_offload": True}},
    },
    "trainer": {
        "device": "cuda",
        "logger": ["console", "file"],
        "save_freq": 256,
        "test_freq": 32,
        "total_epochs": 2,
    },
    "sqlbench": {"seed_sampling": False, "validation_tasks": 500},
}


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Trees laid over each other; later leaves win."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = result.get(key)
            result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


PROFILES = {
    "laptop": Profile(
        name="laptop",
        model="nano",
        data="data/pocket",
        config=merged(_COMMON, _LAPTOP, {"sqlbench": SQLBENCH}),
        environment={
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_cpu.platform",
            # More threads than that are slower: rollout, trainer and agents share the cores already.
            "OMP_NUM_THREADS": "1",
            "TQ_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_raylet_start_wait_time_s": "300",  # 60 is not enough on a busy laptop
        },
    ),
    "gpu": Profile(
        name="gpu",
        model="Qwen/Qwen2.5-Coder-3B-Instruct",
        data="data/spider",
        config=merged(_COMMON, {"sqlbench": SQLBENCH}, _GPU),
        environment={},
        device="cuda",
        published_tasks=7000,  # train_spider.json of Spider 1.0 (Yu et al., EMNLP 2018)
    ),
}


def find_profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        RunError: there is none.
    """
    if name not in PROFILES:
        raise RunError(f"no profile '{name}'; there are: {', '.join(PROFILES)}")
    return PROFILES[name]
