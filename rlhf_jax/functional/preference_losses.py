"""Direct methods: losses that learn a policy from comparisons without a reward model, one number per pair.

They take log-probabilities of whole completions, so what was frozen (the reference) is data. `sequence_logprobs`
gives sums, `mean_logprobs` means per token; each docstring says which its paper uses.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive


def dpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    ref_chosen_logprobs: Float[Array, "B"],
    ref_rejected_logprobs: Float[Array, "B"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.0,
) -> Float[Array, "B"]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7).

        h = (log π - log ref)(chosen) - (log π - log ref)(rejected)
        loss = -(1 - e) log σ(β h) - e log σ(-β h)

    The policy that minimises it over pairs from a Bradley-Terry annotator with reward r is ref exp(r/β) / Z, the optimum
    of reward minus β KL. At π = ref the loss is ln 2. With e > 0 it is conservative DPO (cDPO; Mitchell 2023): the best
    h is finite, `log((1 - e)/e) / β`.

    Args:
      chosen_logprobs: `[B]` sums over the completion, in nats, under the policy.
      rejected_logprobs: `[B]` likewise.
      ref_chosen_logprobs: `[B]` under the reference, data.
      ref_rejected_logprobs: `[B]` likewise.
      beta: > 0, strength of the leash, in reward units per nat; 0.1 in Rafailov et al. 2023.
      label_smoothing: e in [0, 0.5], the chance that a label is flipped; 0 is DPO.

    Returns:
      Nats, float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_positive(beta=beta)
    check_between(0.0, 0.5, label_smoothing=label_smoothing)
    h = beta * _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def robust_dpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    ref_chosen_logprobs: Float[Array, "B"],
    ref_rejected_logprobs: Float[Array, "B"],
    *,
    beta: ScalarLike = 0.1,
    flip_rate: ScalarLike = 0.1,
) -> Float[Array, "B"]:
    """DPO made unbiased for labels of which a known share is flipped (Chowdhury et al. 2024, eq. 12).

        loss = [-(1 - e) log σ(β h) + e log σ(-β h)] / (1 - 2 e)

    Its mean over flipped labels is the DPO loss of the true ones: (1 - e) loss(h) + e loss(-h) = -log σ(β h). Single
    losses may be negative.

    Args:
      chosen_logprobs: `[B]` sums over the completion, in nats, under the policy.
      rejected_logprobs: `[B]` likewise.
      ref_chosen_logprobs: `[B]` under the reference, data.
      ref_rejected_logprobs: `[B]` likewise.
      beta: > 0, as in `dpo_loss`.
      flip_rate: e in [0, 0.49]; 0.1 in Chowdhury et al. 2024.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_positive(beta=beta)
    check_between(0.0, 0.49, flip_rate=flip_rate)
    h = beta * _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    raw = -(1.0 - flip_rate) * jax.nn.log_sigmoid(h) + flip_rate * jax.nn.log_sigmoid(-h)
    return raw / (1.0 - 2.0 * flip_rate)


def ipo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    ref_chosen_logprobs: Float[Array, "B"],
    ref_rejected_logprobs: Float[Array, "B"],
    *,
    beta: ScalarLike = 0.1,
) -> Float[Array, "B"]:
    """Identity preference optimisation (Azar et al. 2023, eq. 17; β is their τ).

        loss = (h - 1 / (2 β))²

    with h as in `dpo_loss`. A square has no flat side, so deterministic preferences do not drive h to infinity.

    Two normalisations are in use. On sums it is the paper's. On means per token (`mean_logprobs`) it is what TRL
    computes, after the authors' word; the same β is then a far weaker leash, and the two are not comparable.

    Args:
      chosen_logprobs: `[B]` sums, or means per token, under the policy; in nats.
      rejected_logprobs: `[B]` likewise.
      ref_chosen_logprobs: `[B]` the same under the reference, data.
      ref_rejected_logprobs: `[B]` likewise.
      beta: > 0; 0.1 in Azar et al. 2023.

    Returns:
      Nats squared, float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_positive(beta=beta)
    h = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jnp.square(h - 1.0 / (2.0 * beta))


def kto_loss(
    logprobs: Float[Array, "B"],
    ref_logprobs: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    kl: Float[Array, ""] | ScalarLike,
    beta: ScalarLike = 0.1,
    desirable_weight: ScalarLike = 1.0,
    undesirable_weight: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """Kahneman-Tversky optimisation: completions that are good or bad, without pairs (Ethayarajh et al. 2024, eq. 8).

        desirable:    w_D (1 - σ(β (d - z)))        d = log π - log ref
        undesirable:  w_U (1 - σ(β (z - d)))        z = kto_baseline(...)

    Each loss lies in (0, w) and pulls only where the completion is not yet clearly better, or worse, than z.

    Args:
      logprobs: `[B]` sums over the completion, in nats, under the policy.
      ref_logprobs: `[B]` under the reference, data.
      desirable: `[B]`, True for what people want.
      kl: scalar z, from `kto_baseline`; no gradient flows into it.
      beta: > 0; 0.1 in Ethayarajh et al. 2024.
      desirable_weight: w_D >= 0. The paper keeps `w_D n_D / (w_U n_U)` between 1 and 4/3.
      undesirable_weight: w_U >= 0.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, desirable])
    check_positive(beta=beta)
    check_between(0.0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    gap = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32) - jax.lax.stop_gradient(kl)
    good = desirable_weight * jax.nn.sigmoid(-beta * gap)
    bad = undesirable_weight * jax.nn.sigmoid(beta * gap)
    return jnp.where(desirable, good, bad)


def kto_baseline(
    mismatched_logprobs: Float[Array, "B"], mismatched_ref_logprobs: Float[Array, "B"]
) -> Float[Array, ""]:
    """KTO's reference point, `z = max(0, mean(log π - log ref))` over prompts with another prompt's completion.

    A rough estimate of KL(π‖ref). It is a statistic of the whole batch: micro-batches of a batch must share one, and it
    is treated as data.

    Args:
      mismatched_logprobs: `[B]` sums over the completion, in nats, under the policy.
      mismatched_ref_logprobs: `[B]` under the reference.

    Returns:
      float32 scalar, at least 0, through which no gradient flows.
    """
    chex.assert_equal_shape([mismatched_logprobs, mismatched_ref_logprobs])
    gap = mismatched_logprobs.astype(jnp.float32) - mismatched_ref_logprobs.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.maximum(gap.mean(), 0.0))


def orpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    *,
    beta: ScalarLike = 0.1,
    nll_coef: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """Odds-ratio preference optimisation: imitation and preference in one, no reference (Hong et al. 2024, eq. 6-7).

        loss = -nll_coef log p_c - β log σ(log odds(p_c) - log odds(p_r)),    odds(p) = p / (1 - p)

    Args:
      chosen_logprobs: `[B]` log p_c, means per token (`mean_logprobs`), below 0; with sums p would vanish.
      rejected_logprobs: `[B]` log p_r, likewise.
      beta: >= 0, the paper's λ; 0.1 in Hong et al. 2024. 0 is imitation of the chosen.
      nll_coef: >= 0; 1 there. 0 leaves the term of the odds, for an imitation term of another definition: TRL's is the
        mean over all tokens of the chosen rows, the prompt's too.

    Returns:
      Nats per token, float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([chosen_logprobs, rejected_logprobs])
    check_between(0.0, math.inf, beta=beta, nll_coef=nll_coef)
    chosen, rejected = (x.astype(jnp.float32) for x in (chosen_logprobs, rejected_logprobs))
    return -nll_coef * chosen - beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    *,
    beta: ScalarLike = 2.0,
    margin: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """Simple preference optimisation: length-normalised, no reference (Meng et al. 2024, eq. 6; `margin` is their γ).

        loss = -log σ(β (log p_c - log p_r) - margin)

    Without a reference there is no leash: watch the KL all the same.

    Args:
      chosen_logprobs: `[B]` log p_c, means per token (`mean_logprobs`).
      rejected_logprobs: `[B]` log p_r, likewise.
      beta: > 0; 2 to 2.5 in Meng et al. 2024.
      margin: >= 0, in units of the scaled reward; half of β there.

    Returns:
      Nats, float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([chosen_logprobs, rejected_logprobs])
    check_positive(beta=beta)
    check_between(0.0, math.inf, margin=margin)
    chosen, rejected = (x.astype(jnp.float32) for x in (chosen_logprobs, rejected_logprobs))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - margin)


def cpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    chosen_nll: Float[Array, "B"],
    *,
    beta: ScalarLike = 0.1,
    nll_coef: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """Contrastive preference optimisation: DPO with a uniform reference, plus imitation (Xu et al. 2024, eq. 5).

        loss = -log σ(β (log p_c - log p_r)) + nll_coef · nll_c

    Args:
      chosen_logprobs: `[B]` log p_c, sums over the completion.
      rejected_logprobs: `[B]` log p_r, likewise.
      chosen_nll: `[B]` nll_c; the mean per token, so that long completions do not outweigh the comparison.
      beta: > 0; 0.1 in Xu et al. 2024.
      nll_coef: >= 0; 1 there.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([chosen_logprobs, rejected_logprobs, chosen_nll])
    check_positive(beta=beta)
    check_between(0.0, math.inf, nll_coef=nll_coef)
    chosen, rejected = (x.astype(jnp.float32) for x in (chosen_logprobs, rejected_logprobs))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)) + nll_coef * chosen_nll.astype(jnp.float32)


def _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs):
    """h, the difference of the two log-ratios."""
    chex.assert_equal_shape([chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs])
    chosen, rejected, ref_chosen, ref_rejected = (
        x.astype(jnp.float32) for x in (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    )
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _log_odds(logprobs):
    """`log p - log(1 - p)`, where `1 - p = -expm1(log p)`; p = 1 to rounding counts as the largest float below 1."""
    safe = jnp.minimum(logprobs, -jnp.finfo(jnp.float32).epsneg)
    return safe - jnp.log(-jnp.expm1(safe))
