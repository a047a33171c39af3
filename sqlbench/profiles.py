"""The two training profiles: model, data set, and the environment of the processes.

``laptop`` trains the built-in policy on a CPU; ``gpu`` is the seed experiment (Qwen2.5-Coder-3B-Instruct on Spider, one
GPU). Its changes of verl's configuration are in ``sqlbench_train/config/<name>.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlbench.errors import RunError, TrainingError


@dataclass(frozen=True)
class Profile:
    """One way to train."""

    name: str
    model: str
    """Default policy: ``nano``, a folder, or a name on the Hugging Face hub."""
    data: str
    """Default data set folder."""
    environment: dict[str, str]
    """Environment of the training processes; a variable that is set already wins."""
    device: str = "cpu"
    published_tasks: int | None = None
    """Training tasks of the default data set as published, for plans made without the data set."""

    def on(self, device: str) -> Profile:
        """Return this profile with another ``trainer.device``: a CPU profile also runs on a GPU.

        Raises:
            TrainingError: this profile does not run on the device.
        """
        if device == self.device:
            return self
        if device != "cuda":
            choices = " or ".join(dict.fromkeys((self.device, "cuda")))
            raise TrainingError(f"Unsupported trainer.device of profile {self.name}: {device}. Choose {choices}.")
        environment = {name: value for name, value in self.environment.items() if name != "VERL_PLATFORM"}
        return replace(self, device=device, environment=environment)


PROFILES = {
    "laptop": Profile(
        name="laptop",
        model="nano",
        data="data/pocket",
        environment={
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_cpu.platform",
            # More threads are slower: rollout, trainer and agents already share the cores.
            "OMP_NUM_THREADS": "1",
            "TQ_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_raylet_start_wait_time_s": "300",  # 60 is not enough on a busy laptop
            "RAY_worker_niceness": "0",  # by default 15: beside two other busy programs a training hardly moves
        },
    ),
    "gpu": Profile(
        name="gpu",
        model="Qwen/Qwen2.5-Coder-3B-Instruct",
        data="data/spider",
        environment={
            "RAY_prestart_worker_first_driver": "0",
            "RAY_raylet_start_wait_time_s": "300",
            "VLLM_LOGGING_LEVEL": "INFO",  # says how long loading, compiling and capturing take; verl sets WARN
            "VLLM_NO_USAGE_STATS": "1",
        },
        device="cuda",
        published_tasks=7000,  # train_spider.json of Spider 1.0 (Yu et al., EMNLP 2018)
    ),
}


def find_profile(name: str) -> Profile:
    """Return the profile of a name.

    Raises:
        RunError: the profile does not exist.
    """
    if name not in PROFILES:
        raise RunError(f"Unknown profile: {name}. Choose one of: {', '.join(PROFILES)}.")
    return PROFILES[name]
