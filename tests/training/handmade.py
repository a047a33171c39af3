"""Rollouts made by hand, taken through the real way to an update: ``python handmade.py FOLDER`` in the laptop profile's
environment.

`prepare` hands them over as the agent loop does, lets the trainer choose, pad and weigh the rows in a real
TransferQueue, and writes down what the trainer would send to its workers. `update` is such a worker, alone or one of
two ranks: it trains on those rows, cut into micro-batches in several ways, and writes down gradients and metrics.
`update_as_on_a_gpu` is one with the settings of the GPU profile.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import os
import socket
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pocket import NANO_PATH
from sqlbench.agent.trajectory import Completion, Transition
from sqlbench.agent.trajectory import Trajectory as Record
from sqlbench.data.tasks import Task
from sqlbench.errors import TrainingError
from sqlbench.profiles import PROFILES

Agents = tuple[tuple[str, int], ...]
"""Sub-agent and number of sampled tokens of each transition."""


@dataclass(frozen=True)
class Made:
    """One rollout."""

    task: str
    sample: int
    reward: float | None = None
    """None: it failed."""
    calls: Agents = ()
    ratio: float = 1.0
    """By how much likelier its tokens are to the policy than they were when they were sampled."""


def _failed(task: str, *samples: int) -> list[Made]:
    return [Made(task, sample) for sample in samples]


STEP = 2
"""A step at which probabilities are not compared."""
ONE, TWO = (("write", 2),), (("write", 3), ("check", 1), ("rewrite", 2))
MIXED = [
    Made("a", 0, 1.0, TWO, 1.1),
    Made("a", 1, 0.0, (("write", 2), ("check", 1)), 0.9),
    Made("a", 2, 0.0, (("write", 4), ("check", 1)), 1.2),
    *_failed("a", 3),
    *(Made("b", sample, 1.0, ONE) for sample in range(4)),
    Made("c", 0, 1.0, ONE),
    *_failed("c", 1, 2, 3),
    Made("d", 0, 1.0, ONE, 1.05),
    Made("d", 1, 1.0, ONE),
    Made("d", 2, 0.0, (("write", 3), ("check", 1), ("rewrite", 3), ("check", 2), ("rewrite", 1)), 0.95),
    Made("d", 3, 0.0, (("write", 5),), 1.25),
]
"""Two groups that divide (a, with one failed rollout; d), one that does not (b), one with one rollout left."""
ALIKE = [Made(task, sample, 0.0, TWO) for task in "abcd" for sample in range(4)]
ALONE = [made for task in "abcd" for made in (Made(task, 0, 1.0, ONE), *_failed(task, 1, 2, 3))]

BATCHES: dict[str, tuple[list[Made], int, tuple[str, ...]]] = {
    "per_rollout_mean": (MIXED, 1, ()),
    "two_ranks": (MIXED, 2, ()),
    "token_mean": (MIXED, 1, ("actor_rollout_ref.actor.policy_loss.loss_mode=token_mean",)),
    "nothing dropped": (
        MIXED,
        1,
        ("actor_rollout_ref.actor.policy_loss.loss_mode=token_mean", "sqlbench.drop_useless_groups=false"),
    ),
    "corrected": (
        MIXED,
        1,
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=token_mean",
            "algorithm.rollout_correction.rollout_is=token",
            "algorithm.rollout_correction.rollout_is_threshold=0.5",
        ),
    ),
    "check": (MIXED, 1, ("sqlbench.trained_agents=write|check",)),
    "permuted": (MIXED, 1, ("sqlbench.control=permuted",)),
    "half": (MIXED, 1, ("actor_rollout_ref.actor.ppo_mini_batch_size=2",)),
    "alike": (ALIKE, 1, ()),
    "alone": (ALONE, 1, ("sqlbench.max_failed_share=1",)),
    "failed": ([*MIXED[:-1], *_failed("d", 3)], 1, ()),
    "missing": (MIXED[:-1], 1, ()),
}
"""Rollouts, data-parallel ranks and overrides, by name."""

UPDATES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "micro 1": ("per_rollout_mean", 1, {"micro_batch_size_per_gpu": 1}),
    "micro 4": ("per_rollout_mean", 1, {"micro_batch_size_per_gpu": 4}),
    "micro 12": ("per_rollout_mean", 1, {"micro_batch_size_per_gpu": 12}),
    "tokens": ("per_rollout_mean", 1, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 256}),
    "two ranks": ("two_ranks", 2, {"micro_batch_size_per_gpu": 4}),
    "two ranks, tokens": ("two_ranks", 2, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 256}),
    "token_mean": ("token_mean", 1, {"micro_batch_size_per_gpu": 4}),
    "nothing dropped": ("nothing dropped", 1, {"micro_batch_size_per_gpu": 4}),
    "half": ("half", 1, {"micro_batch_size_per_gpu": 4}),
    "alike": ("alike", 1, {"micro_batch_size_per_gpu": 4}),
    "micro 4, again": ("per_rollout_mean", 1, {"micro_batch_size_per_gpu": 4}),
    "alike, later": ("alike", 1, {"micro_batch_size_per_gpu": 4}),
}
"""Prepared batch, data-parallel ranks and how it is cut, by name. Each starts afresh, but for the last one."""

FP32 = "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
_CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
GPU: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "seed, fp32": ("seed", (FP32,)),
    "gpu, not fused": (None, (FP32, "actor_rollout_ref.model.use_fused_kernels=false")),
    "gpu, fp32": (None, (FP32,)),
    "gpu, tokens": (None, (FP32, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256")),
    "gpu, checkpointing": (
        None,
        (
            FP32,
            f"{_CHECKPOINTING}=true",
            "actor_rollout_ref.actor.fsdp_config.param_offload=true",
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true",
        ),
    ),
    "gpu, bf16": (None, ()),
}
"""Recipe and overrides of the GPU profile, by name. verl's fused kernels change the model's class: they come last."""
ON_CPU = (
    "trainer.device=cpu",
    "actor_rollout_ref.actor.strategy=fsdp2",  # torch's FSDP 1 refuses to spread parameters from a CPU
    "actor_rollout_ref.actor.use_torch_compile=False",  # a minute for each shape
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
)


def settings(folder: Path, *overrides: str, profile: str = "laptop", recipe: str | None = None) -> Any:
    """A profile for four tasks of four rollouts."""
    from sqlbench_train.compose import compose

    (folder / "run").mkdir(exist_ok=True)
    own = (
        "data.train_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.policy_loss.loss_mode=per_rollout_mean",
        "actor_rollout_ref.actor.optim.clip_grad=1e9",
        "sqlbench.max_failed_share=0.25",
        "trainer.test_freq=-1",
    )
    return compose(
        PROFILES[profile],
        run="run",
        folder=folder / "run",
        data=folder / "data",
        model=str(NANO_PATH),
        overrides=[*own, *overrides],
        recipe=recipe,
    )


def policy() -> Any:
    """The shipped policy, by transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(NANO_PATH, dtype=torch.float32, attn_implementation="sdpa").eval()


def log_probs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probability of each token of a response after its prompt."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


def record(model: Any, made: Made) -> Record:
    """A hand-made rollout as it would be on record, its tokens drawn from its name."""
    random, transitions = np.random.default_rng([ord(made.task), made.sample]), []
    for turn, (agent, count) in enumerate(made.calls, 1):
        prompt, response = (random.integers(3, 1000, size).tolist() for size in (int(random.integers(5, 60)), count))
        with torch.no_grad():
            sampled = log_probs(model, prompt, response) - math.log(made.ratio)
        call = Completion(text="", prompt_ids=prompt, response_ids=response, logprobs=sampled.tolist())
        transitions.append(Transition(agent=agent, turn=turn, messages=[], completion=call))
    return Record(
        task_key=made.task,
        task_id=made.task,
        db_id="d",
        question="q",
        gold="g",
        transitions=transitions,
        reward=made.reward,
        error=None if made.calls else "model: ModelError: gone",
        step=STEP,
        sample=made.sample,
    )


def prepare(folder: Path, base: Any) -> None:
    """The driver: from rollouts to what the trainer sends to its workers: one file for each of `BATCHES`."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf
    from verl.utils.transferqueue_utils import tqbridge

    from sqlbench_train.agent_loop import SqlAgentLoop, SqlAgentLoopWorker
    from sqlbench_train.trainer import SqlTrainer

    ray.init(**OmegaConf.to_container(base.ray_kwargs.ray_init))
    tq.init(base.transfer_queue)
    model, loop, worker = policy(), object.__new__(SqlAgentLoop), object.__new__(SqlAgentLoopWorker)

    async def hand_over(config: Any, records: list[Record]) -> None:
        worker.config, worker._groups = config, defaultdict(list)
        steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), 0)
        for one in records:
            rewards = [one.reward] * len(one.transitions)
            outputs = [] if one.failed else loop._outputs(one, rewards, steps, config.sqlbench.trained_agents)
            task = Task(task_id=one.task_id, db_id="d", question="q", gold="g", split="train")
            row = {"uid": f"{one.task_key}_x", "session_id": one.sample, "data_source": "", "reward_model": {}}
            row["extra_info"] = {"task": task.model_dump_json()}
            await worker._agent_loop_postprocess(outputs, False, global_steps=STEP, **row)

    class Workers:
        """In the place of verl's worker group: writes down what it is sent."""

        def __init__(self, ranks: int) -> None:
            self._dispatch_info = {"actor": list(range(ranks))}

        @tqbridge()
        def update_actor(self, data: Any) -> Any:
            self.data = data
            return {"metrics": {"mfu": 0.0}}

    for name, (rollouts, ranks, overrides) in BATCHES.items():
        config = settings(folder, *overrides)
        trainer = SqlTrainer(config)
        trainer.tokenizer, trainer.global_steps = SimpleNamespace(eos_token_id=2), STEP
        trainer.replay_buffer.tasks = [*"abcd"]
        trainer.actor_rollout_wg = workers = Workers(ranks)
        records = [record(model, made) for made in rollouts]
        with (folder / "run/trajectories.jsonl").open("a") as file:
            file.writelines(one.model_dump_json() + "\n" for one in records)
        asyncio.run(hand_over(config, records))
        stored = tq.kv_list("train")["train"]
        batch = tq.KVBatchMeta(partition_id="train", keys=list(stored), tags=list(stored.values()))
        batch.extra_info["temperature"] = 1.0
        metrics: dict[str, Any] = {"stored": len(batch.keys)}
        try:
            batch = trainer._balance_batch(batch, metrics)
        except TrainingError as error:
            result = {"error": str(error)}
        else:
            batch = trainer._compute_old_log_prob(batch, metrics)
            config.algorithm.rollout_correction.bypass_mode = name != "corrected"
            for part in (trainer._compute_advantage, trainer._update_actor):
                batch = part(batch, metrics)
            left = sorted(tq.kv_list("train")["train"])
            rows = {"keys": batch.keys, "padding": [bool(tag.get("is_padding")) for tag in batch.tags], "left": left}
            result = {"data": workers.data, "metrics": metrics, **rows}
        _save(result, folder / f"{name}.batch")
        tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    tq.close()
    ray.shutdown()


def start_worker(config: Any, rank: int = 0, ranks: int = 1, port: int = 0) -> Any:
    """One of verl's actor workers, with the model loaded."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from verl.workers.engine_workers import ActorRolloutRefWorker

    torch.set_num_threads(1)
    worker = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    return worker


def train(worker: Any, config: Any, batch: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Update a worker with a prepared batch; the metrics, the optimizer's moments and how many steps it made.

    The engine clears its gradients; after one step from nothing, AdamW's first moment is a tenth of the gradient.
    """
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    while not batch.is_file():
        time.sleep(0.1)
    data = torch.load(batch, weights_only=False)["data"]
    worker.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor)))
    output = worker.update_actor(tu.chunk_tensordict(data, ranks)[rank])
    engine = worker.actor.engine
    state = {name: engine.optimizer.state[p] for name, p in engine.module.named_parameters()}
    return {
        "metrics": tu.get(output, "metrics"),
        "moment": whole({name: of["exp_avg"] for name, of in state.items()}),
        "square": whole({name: of["exp_avg_sq"] for name, of in state.items()}),
        "optimizer_steps": {int(of["step"]) for of in state.values()},
    }


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of sharded tensors, put together."""
    return {name: t.full_tensor().clone() for name, t in tensors.items()}


def update(folder: Path, rank: int, ranks: int, port: int) -> None:
    """Train on prepared batches as one of verl's workers; rank 0 writes one file for each of `UPDATES`."""
    worker = start_worker(settings(folder), rank, ranks, port)
    engine = worker.actor.engine
    parameters = dict(engine.module.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for name, (batch, wanted, cut) in UPDATES.items():
        if wanted != ranks:
            continue
        if name != "alike, later":
            engine.optimizer.state.clear()
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(start[key])
        before = whole({key: p.detach() for key, p in parameters.items()})
        for option, value in {"use_dynamic_bsz": False, **cut}.items():
            setattr(worker.actor.engine_config, option, value)
        result = train(worker, settings(folder, *BATCHES[batch][2]), folder / f"{batch}.batch", rank, ranks)
        after = whole({key: p.detach() for key, p in parameters.items()})
        if rank == 0:
            _save(result | {"before": before, "after": after}, folder / f"{name}.update")


def update_as_on_a_gpu(folder: Path, port: int) -> None:
    """Train on a prepared batch with the GPU profile's actor, in verl's own engine; one file for each of `GPU`."""
    for name, (recipe, overrides) in GPU.items():
        loss = "actor_rollout_ref.actor.policy_loss.loss_mode=token_mean"
        config = settings(folder, *ON_CPU, loss, *overrides, profile="gpu", recipe=recipe)
        worker = start_worker(config, port=port)
        module = worker.actor.engine.module
        rows, layers = [], []
        module.register_forward_pre_hook(
            lambda _, __, given, rows=rows: rows.append(len(given["input_ids"])), with_kwargs=True
        )
        module.model.layers[0].mlp.register_forward_pre_hook(lambda *_, layers=layers: layers.append(1))
        result = train(worker, config, folder / "token_mean.batch")
        engine = worker.actor.engine
        facts = {
            "engine": type(engine).__name__,
            "attention": module.config._attn_implementation,
            "fused": config.actor_rollout_ref.model.use_fused_kernels,
            "offload": (engine.is_param_offload_enabled, engine.is_optimizer_offload_enabled),
            "rows": rows,
            "layer_calls": len(layers),
            "dtype": engine._autocast_dtype,
        }
        _save(result | facts, folder / f"{name}.update")


def _save(result: Any, path: Path) -> None:
    torch.save(result, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(folder: Path) -> None:
    """Everything, in forks of this process, which imports verl once; Ray's workers are such forks as in a training."""
    from omegaconf import OmegaConf

    from verl_cpu import forkserver

    modules = ["sqlbench_train.trainer"]
    os.environ.update(forkserver.BORN_AS, RAY_RAYLET_PID=str(os.getpid()))
    for name in (*forkserver.PRELOAD, *modules, "transformers.models.qwen3.modeling_qwen3"):
        importlib.import_module(name)
    jobs = [
        partial(update, folder, rank, ranks, port)
        for ranks, port in ((1, _port()), (2, _port()))
        for rank in range(ranks)
    ]
    updates = []
    for job in (*jobs, partial(update_as_on_a_gpu, folder, _port())):
        updates.append(forkserver._fork())
        if updates[-1] == 0:
            forkserver._leave(job)
    forkserver._drive = lambda config, _: prepare(folder, config)
    OmegaConf.save(settings(folder), folder / "config.yaml")
    try:
        forkserver.main(str(folder / "config.yaml"), os.getppid(), str(folder), modules)
    except SystemExit as end:
        if end.code:  # the updates wait for what will not come; they end with this process
            raise
    for process in updates:
        with contextlib.suppress(ChildProcessError):  # ended already
            os.waitpid(process, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
