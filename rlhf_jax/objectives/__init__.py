"""Objectives: a model's forward bound to the losses of floor 1.

Every objective is `objective(params, batch) -> (total, weight, metrics)`: the loss is `total / weight`, divided once after
all micro-batches and devices have added theirs, so neither can change a gradient. Metrics travel in the same form.
"""

from rlhf_jax.objectives.forward import policy_hidden, policy_laws, sequence_token_logprobs, whole_rows
from rlhf_jax.objectives.gradient_first import gradient_first
from rlhf_jax.objectives.policy import (
    CriticFn,
    PolicyBatch,
    actor_critic,
    of_policy,
    policy_gradient,
    separate_critic,
    shared_critic,
)
from rlhf_jax.objectives.preferences import PairInputsFn, labelled_preference, pair_token_logprobs, preference
from rlhf_jax.objectives.rewards import (
    AttributeBatch,
    RankingLossFn,
    StepBatch,
    attribute_regression,
    process_reward,
    reward_model,
)
from rlhf_jax.objectives.shared_prompts import SharedPrompts, shared_scores, shared_sizes, shared_token_logprobs
from rlhf_jax.objectives.supervised import sft

__all__ = [
    "AttributeBatch",
    "CriticFn",
    "PairInputsFn",
    "PolicyBatch",
    "RankingLossFn",
    "SharedPrompts",
    "StepBatch",
    "actor_critic",
    "attribute_regression",
    "gradient_first",
    "labelled_preference",
    "of_policy",
    "pair_token_logprobs",
    "policy_gradient",
    "policy_hidden",
    "policy_laws",
    "preference",
    "process_reward",
    "reward_model",
    "separate_critic",
    "sequence_token_logprobs",
    "sft",
    "shared_critic",
    "shared_scores",
    "shared_sizes",
    "shared_token_logprobs",
    "whole_rows",
]
