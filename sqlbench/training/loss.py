"""Two policy losses for verl, by name: ``token_mean`` and ``per_rollout_mean``.

Both are verl's clipped objective. ``token_mean`` weighs every trained token alike, so a rollout with five transitions
counts five times as much as one with one. ``per_rollout_mean`` weighs every rollout alike: the mean over rollouts of
the mean over a rollout's trained tokens, exact for one optimizer step a batch, however rows are cut into micro-batches.
With credit by transition (`sqlbench.training.credit`) each transition stands for itself and weighs the same.
Both report the largest difference between the probabilities of the sampled tokens in the rollout engine and in the
trainer, as a mean over micro-batches; with one optimizer step a batch, and no separate old-log-probability pass, that
is the agreement of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss


def rollout_weights(sessions: list[str], tokens: list[int]) -> list[float]:
    """Weight of every row's tokens that turns a token mean into a mean over rollouts.

    Args:
        sessions: the rollout that each row belongs to.
        tokens: trained tokens of each row.
    """
    total: dict[str, int] = {}
    for session, count in zip(sessions, tokens, strict=True):
        total[session] = total.get(session, 0) + count
    return [sum(tokens) / (len(total) * total[session]) for session in sessions]


def _clipped(old_log_prob: torch.Tensor, log_prob: torch.Tensor, response_mask: torch.Tensor, **rest: Any) -> Any:
    loss, metrics = compute_policy_loss_vanilla(
        old_log_prob=old_log_prob, log_prob=log_prob, response_mask=response_mask, **rest
    )
    gap = ((log_prob.detach().exp() - old_log_prob.exp()).abs() * response_mask).max().item()
    return loss, {**metrics, "actor/rollout_probs_gap": gap}


@register_policy_loss("token_mean")
def token_mean(rollout_is_weights: torch.Tensor | None = None, **rest: Any) -> Any:
    """verl's clipped loss with every token weighed alike."""
    return _clipped(rollout_is_weights=rollout_is_weights, **rest)


@register_policy_loss("per_rollout_mean")
def per_rollout_mean(rollout_is_weights: torch.Tensor | None = None, **rest: Any) -> Any:
    """verl's clipped loss with every rollout weighed alike, by the weights of `rollout_weights`."""
    if rollout_is_weights is None:
        raise ValueError("per_rollout_mean needs the trainer mode 'sqlbench', which computes the rollouts' weights")
    return _clipped(rollout_is_weights=rollout_is_weights, **rest)
