"""Floor 1: the mathematics of RLHF as pure functions of arrays.

Every function states its formula, shapes, units, the paper of its defaults and the special cases it reduces
to. None knows of a model, a device or a config.
"""

from rlhf_jax.functional.advantages import gae, group_relative, leave_one_out
from rlhf_jax.functional.kl import adaptive_kl_coef, k1, k2, k3
from rlhf_jax.functional.logprobs import entropy, mean_logprobs, sequence_logprobs, token_logprobs
from rlhf_jax.functional.masking import (
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    positions_from_segments,
    shift_right,
)
from rlhf_jax.functional.policy_losses import cispo_loss, clipped_policy_loss, clipped_value_loss, gspo_loss
from rlhf_jax.functional.preference_losses import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_jax.functional.reward_losses import (
    best_of_k_loss,
    bradley_terry_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from rlhf_jax.functional.rewards import (
    normalize_scores,
    replace_missing_eos,
    shape_rewards,
    subtract_missing_eos,
)

__all__ = [
    "adaptive_kl_coef",
    "best_of_k_loss",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "dpo_loss",
    "entropy",
    "gae",
    "group_relative",
    "gspo_loss",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "kto_baseline",
    "kto_loss",
    "last_true_index",
    "leave_one_out",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mean_logprobs",
    "normalize_scores",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "positions_from_segments",
    "replace_missing_eos",
    "robust_dpo_loss",
    "sequence_logprobs",
    "shape_rewards",
    "shift_right",
    "simpo_loss",
    "subtract_missing_eos",
    "token_logprobs",
]
