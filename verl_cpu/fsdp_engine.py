"""verl's FSDP engine for a CPU, without the logits that nobody reads.

verl computes logits, log-probabilities and entropy of every token, and the loss takes those of the answers. With
prompts five times as long as answers and a vocabulary of a thousand, the others are a third of a small model's update.
Here they are taken out right before the output layer, and the loss gets zeros for them. The numbers of the
answers are verl's own, to the rounding of sums. Importing this module selects the engine where the platform is a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CpuEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine, with an output layer that computes only the answers."""

    _answers: torch.Tensor
    """Positions (row, column) that predict a token of an answer."""

    def initialize(self) -> None:  # noqa: D102
        super().initialize()
        self.keep_answers()

    def keep_answers(self) -> None:
        """Let the output layer see only the positions that predict a token of an answer."""
        self.module.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0][self._answers],))

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: D102
        inputs, extras = super().prepare_model_inputs(micro_batch)
        rows, columns = inputs["input_ids"].shape
        length = micro_batch["input_ids"].offsets().diff().unsqueeze(1)
        prompt = micro_batch["prompts"].offsets().diff().unsqueeze(1)
        column = torch.arange(columns).expand(rows, columns)
        self._answers = (column >= prompt - 1) & (column < length - 1)
        extras["next"] = inputs["input_ids"].roll(-1, 1)[self._answers]
        extras["real"] = column < length
        return inputs, extras

    def prepare_model_outputs(  # noqa: D102
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, *_: Any, **__: Any
    ) -> dict[str, torch.Tensor]:
        rows = self._answers.nonzero()[:, 0]
        logp = torch.log_softmax(output.logits.float() / output_args["temperature"][rows].unsqueeze(1), -1)
        outputs = {"log_probs": logp.gather(1, output_args["next"].unsqueeze(1)).squeeze(1)}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", False):
            outputs["entropy"] = -(logp.exp() * logp).sum(1)
        offsets, real = micro_batch["input_ids"].offsets(), output_args["real"]
        return {
            name: torch.nested.nested_tensor_from_jagged(
                torch.zeros(real.shape).index_put((self._answers,), values)[real], offsets
            )
            for name, values in outputs.items()
        }


if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
    os.environ["VERL_ENGINE_DEVICE"] = "cpu"
