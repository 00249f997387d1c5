"""Floor 1: the mathematics of RLHF as pure functions of arrays.

Every function states its formula, shapes, units, the paper of its defaults and the special cases it reduces
to. None knows of a model, a device or a config.
"""

from rlhf_jax.functional.advantages import gae
from rlhf_jax.functional.kl import adaptive_kl_coef, k1, k2, k3
from rlhf_jax.functional.logprobs import entropy, sequence_logprobs, token_logprobs
from rlhf_jax.functional.masking import (
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    positions_from_segments,
    shift_right,
)
from rlhf_jax.functional.policy_losses import clipped_policy_loss, clipped_value_loss
from rlhf_jax.functional.reward_losses import bradley_terry_loss, pairwise_ranking_loss
from rlhf_jax.functional.rewards import (
    normalize_scores,
    replace_missing_eos,
    shape_rewards,
    subtract_missing_eos,
)

__all__ = [
    "adaptive_kl_coef",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "entropy",
    "gae",
    "k1",
    "k2",
    "k3",
    "last_true_index",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "normalize_scores",
    "pairwise_ranking_loss",
    "positions_from_segments",
    "replace_missing_eos",
    "sequence_logprobs",
    "shape_rewards",
    "shift_right",
    "subtract_missing_eos",
    "token_logprobs",
]
