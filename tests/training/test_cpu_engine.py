"""The CPU's engine gives the trainer verl's own numbers, and leaves out what it does not read."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from pocket import NANO_PATH
from verl_cpu.fsdp_engine import CpuEngine

pytestmark = pytest.mark.training


def ragged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(temperature: float) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    lengths = [(40, 5), (31, 1), (44, 12), (12, 30)]
    prompts, answers = zip(
        *[[torch.randint(3, 1000, (n,), generator=generator) for n in row] for row in lengths], strict=True
    )
    whole = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    rows = {
        "prompts": ragged(list(prompts)),
        "responses": ragged(list(answers)),
        "input_ids": ragged(whole),
        "position_ids": ragged([torch.arange(len(row)) for row in whole]),
    }
    batch = TensorDict(rows, batch_size=[len(lengths)])
    tu.assign_non_tensor(batch, use_remove_padding=False, calculate_entropy=True, temperature=temperature)
    return batch


def run(cls: type[FSDPEngineWithLMHead], batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Log-probabilities, entropies, gradient of a loss on both, and how many rows the output layer computed."""
    engine: Any = object.__new__(cls)  # verl's own needs a process group and a whole configuration
    engine.pad_to_length, engine.use_ulysses_sp = None, False
    engine.engine_config = types.SimpleNamespace(entropy_checkpointing=False)
    engine.module = AutoModelForCausalLM.from_pretrained(NANO_PATH, dtype=torch.float32, attn_implementation="sdpa")
    if cls is CpuEngine:
        engine.keep_answers()
    inputs, rest = engine.prepare_model_inputs(batch)
    output = engine.module(**inputs, use_cache=False)
    found = engine.prepare_model_outputs(output, rest, batch, None)
    logp, entropy = (no_padding_2_padding(found[name], batch) for name in ("log_probs", "entropy"))
    (logp * torch.arange(logp.numel()).view_as(logp) + entropy).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters()])
    return logp.detach(), entropy.detach(), gradient, output.logits.shape[:-1].numel()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_have_the_numbers_and_gradients_of_verls_engine(temperature: float) -> None:
    batch = micro_batch(temperature)
    *theirs, all_rows = run(FSDPEngineWithLMHead, batch)
    *ours, rows = run(CpuEngine, batch)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    assert rows == 5 + 1 + 12 + 30
    assert all_rows > 3 * rows
