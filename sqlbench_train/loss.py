"""Policy losses for verl, by name: ``token_mean``, ``per_rollout_mean`` and ``positive_only``.

All are verl's clipped objective. ``token_mean`` weighs every trained token alike, so a rollout with five transitions
counts five times as much as one with one. ``per_rollout_mean`` weighs every rollout alike: the mean over rollouts of
the mean over a rollout's trained tokens, exact for one optimizer step per batch, with micro-batches of any size.
With credit by transition (`sqlbench_train.credit`) each transition weighs the same. ``positive_only`` has the weights
of ``per_rollout_mean`` and learns only from rewards above their group's mean: nothing is pushed down. This is close
to RAFT++ (Xiong et al., arXiv 2504.11343).
All are means over the whole batch: rows that the trainer leaves out, since their advantage is 0, count in the
denominator.
All report the largest difference between the probabilities of the sampled tokens in the rollout engine and in the
trainer, as a mean over micro-batches; with one optimizer step per batch, and no separate old-log-probability pass,
this is the agreement of the two.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss

PER_ROLLOUT = ("per_rollout_mean", "positive_only")
Row = tuple[str, int]
"""Rollout of a row, and the number of its trained tokens."""


def row_weights(loss_mode: str, kept: list[Row], batch: list[Row]) -> list[float]:
    """Weigh the tokens of kept rows so that verl's mean over them becomes the loss's mean over the whole batch.

    Without this a step in which one group divides would have as large a gradient as one in which all do.

    Args:
        loss_mode: one of `PER_ROLLOUT`, or the name of a loss that is a mean over tokens.
        kept: the rows that are trained on.
        batch: all rows, those without advantage included.
    """
    tokens = sum(count for _, count in kept)
    if loss_mode not in PER_ROLLOUT:
        return [tokens / sum(count for _, count in batch)] * len(kept)
    of_rollout: Counter[str] = Counter()
    for rollout, count in kept:
        of_rollout[rollout] += count
    rollouts = len({rollout for rollout, _ in batch})
    return [tokens / (rollouts * of_rollout[rollout]) for rollout, _ in kept]


def _clipped(old_log_prob: torch.Tensor, log_prob: torch.Tensor, response_mask: torch.Tensor, **rest: Any) -> Any:
    loss, metrics = compute_policy_loss_vanilla(
        old_log_prob=old_log_prob, log_prob=log_prob, response_mask=response_mask, **rest
    )
    gap = ((log_prob.detach().exp() - old_log_prob.exp()).abs() * response_mask).max().item()
    return loss, {**metrics, "actor/rollout_probs_gap": gap}


@register_policy_loss("token_mean")
def token_mean(rollout_is_weights: torch.Tensor | None = None, **rest: Any) -> Any:
    """Compute verl's clipped loss with equal token weights; `row_weights` make it a mean over the whole batch."""
    return _clipped(rollout_is_weights=rollout_is_weights, **rest)


@register_policy_loss("per_rollout_mean")
def per_rollout_mean(rollout_is_weights: torch.Tensor | None = None, **rest: Any) -> Any:
    """Compute verl's clipped loss with equal rollout weights, by the weights of `row_weights`."""
    if rollout_is_weights is None:
        raise ValueError(
            "No row weights for the loss: per_rollout_mean. Use the trainer mode 'sqlbench', which computes them."
        )
    return _clipped(rollout_is_weights=rollout_is_weights, **rest)


@register_policy_loss("positive_only")
def positive_only(advantages: torch.Tensor, **rest: Any) -> Any:
    """Compute `per_rollout_mean` with advantages below 0 left out."""
    return per_rollout_mean(advantages=advantages.clamp(min=0), **rest)
