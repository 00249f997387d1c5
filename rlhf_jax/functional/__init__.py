"""Floor 1: the mathematics of RLHF as pure functions of arrays.

Every function states its formula, shapes, units, the paper of its defaults and the special cases it reduces
to. None knows of a model, a device or a config.
"""

from rlhf_jax.functional.advantages import (
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    zero_spread,
)
from rlhf_jax.functional.aggregation import constant_length_mean, sequence_mean, token_mean
from rlhf_jax.functional.calibration import (
    expected_calibration_error,
    fit_log_length,
    fit_temperature,
    remove_length,
)
from rlhf_jax.functional.ensembles import ensemble_mean, normalize_members, uncertainty_weighted, worst_case
from rlhf_jax.functional.kl import adaptive_kl_coef, k1, k2, k3, k3_straight_through
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
from rlhf_jax.functional.policy_losses import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    gspo_loss,
    reinforce_loss,
)
from rlhf_jax.functional.preference_inputs import (
    against_reference,
    mean_against_reference,
    mean_per_token,
    sums_and_nll,
)
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
    first_choice_loss,
    ordered_pairs,
    pairwise_ranking_loss,
    plackett_luce_loss,
    regression_loss,
    signed_cost_loss,
    step_reward_loss,
)
from rlhf_jax.functional.rewards import (
    normalize_scores,
    replace_missing_eos,
    shape_rewards,
    subtract_missing_eos,
    subtract_overlong,
)

__all__ = [
    "adaptive_kl_coef",
    "against_reference",
    "best_of_k_loss",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "constant_length_mean",
    "cpo_loss",
    "dpo_loss",
    "ensemble_mean",
    "entropy",
    "expected_calibration_error",
    "first_choice_loss",
    "fit_log_length",
    "fit_temperature",
    "gae",
    "group_relative",
    "gspo_loss",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "k3_straight_through",
    "kto_baseline",
    "kto_loss",
    "last_true_index",
    "leave_one_out",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mean_against_reference",
    "mean_logprobs",
    "mean_per_token",
    "normalize_members",
    "normalize_scores",
    "ordered_pairs",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "positions_from_segments",
    "regression_loss",
    "reinforce_loss",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remove_length",
    "replace_missing_eos",
    "rewards_to_go",
    "robust_dpo_loss",
    "sequence_logprobs",
    "sequence_mean",
    "shape_rewards",
    "shift_right",
    "signed_cost_loss",
    "simpo_loss",
    "step_reward_loss",
    "subtract_missing_eos",
    "subtract_overlong",
    "sums_and_nll",
    "token_logprobs",
    "token_mean",
    "uncertainty_weighted",
    "worst_case",
    "zero_spread",
]
