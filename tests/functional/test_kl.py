"""KL estimators against the exact KL of an enumerable policy, in value and gradient, and the controller.

Expectations are sums over all 27 completions weighted with frozen probabilities, so "the gradient of the
sample mean" is known without sampling. The exact gradients come from differentiating the exact divergences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.tabular import all_completions, completion_logprobs, logprobs, num_prefixes

from rlhf_jax.functional import adaptive_kl_coef, exact_kl, k1, k2, k3, masked_sum, shape_rewards, shift_right
from rlhf_jax.functional.kl import k3_straight_through

VOCAB, LENGTH = 3, 3
ALL = all_completions(VOCAB, LENGTH)
POLICY_KEY, REF_KEY = jax.random.split(jax.random.key(0))
SHAPE = (num_prefixes(VOCAB, LENGTH), VOCAB)
POLICY, REF = jax.random.normal(POLICY_KEY, SHAPE), jax.random.normal(REF_KEY, SHAPE)
REF_TOKENS, REF_WHOLE = logprobs(REF, ALL), completion_logprobs(REF, ALL)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def expected(per_completion, policy=POLICY):
    """Mean over completions drawn from `policy`, whose probabilities are data (as those of samples are)."""
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(completion_logprobs(policy, ALL))) * per_completion)


def reverse_kl(policy):
    """KL(π‖ref), exact and differentiable."""
    whole = completion_logprobs(policy, ALL)
    return jnp.sum(jnp.exp(whole) * (whole - REF_WHOLE))


def forward_kl(policy):
    """KL(ref‖π), exact and differentiable."""
    return jnp.sum(jnp.exp(REF_WHOLE) * (REF_WHOLE - completion_logprobs(policy, ALL)))


def of_completions(estimator, policy):
    """The estimator of whole completions' log-ratios, `[27]`."""
    return estimator(completion_logprobs(policy, ALL), REF_WHOLE)


def summed_over_tokens(estimator, policy):
    """The estimator token by token, summed, `[27]`."""
    return masked_sum(estimator(logprobs(policy, ALL), REF_TOKENS), ALL.mask, axis=1)


def gradient_in_loss(values, estimator):
    return jax.grad(lambda policy: expected(values(estimator, policy), policy))(POLICY)


def gradient_in_reward(values, estimator):
    """∇ of the cost whose policy gradient treats the estimate as a (negative) reward: E[k ∇ log π]."""
    cost = jax.lax.stop_gradient(values(estimator, POLICY))
    return jax.grad(lambda policy: expected(cost * completion_logprobs(policy, ALL), policy))(POLICY)


REVERSE_GRADIENT, FORWARD_GRADIENT = jax.grad(reverse_kl)(POLICY), jax.grad(forward_kl)(POLICY)
both_levels = pytest.mark.parametrize("values", [of_completions, summed_over_tokens])


def test_the_example_is_not_degenerate():
    assert jnp.exp(completion_logprobs(POLICY, ALL)).sum() == pytest.approx(1, abs=1e-5)
    assert 0.2 < reverse_kl(POLICY) < 3
    assert np.linalg.norm(REVERSE_GRADIENT) > 0.1
    assert np.linalg.norm(REVERSE_GRADIENT - FORWARD_GRADIENT) > 0.1


def test_exact_kl_of_completions_and_of_tokens():
    """Token by token under the policy's own prefixes, it adds up to that of completions (the chain rule)."""
    whole = exact_kl(completion_logprobs(POLICY, ALL), REF_WHOLE)
    np.testing.assert_allclose(whole, reverse_kl(POLICY), rtol=1e-6)
    of_prefixes = exact_kl(jax.nn.log_softmax(POLICY), jax.nn.log_softmax(REF))
    per_token = jnp.where(ALL.mask, shift_right(of_prefixes[ALL.prefixes]), 0.0)
    np.testing.assert_allclose(expected(per_token.sum(axis=1)), whole, rtol=1e-5)
    noise = expected(jnp.square(per_token.sum(axis=1) - whole))
    assert noise < 0.5 * expected(jnp.square(of_completions(k1, POLICY) - whole))


def test_exact_kl_of_impossible_outcomes():
    sure, even = jnp.log(jnp.asarray([1.0, 0.0])), jnp.log(jnp.asarray([0.5, 0.5]))
    np.testing.assert_allclose(exact_kl(sure, even), np.log(2), rtol=1e-6)
    assert exact_kl(even, sure) == np.inf
    assert exact_kl(sure, sure) == 0


@both_levels
@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(values, estimator):
    np.testing.assert_allclose(expected(values(estimator, POLICY)), reverse_kl(POLICY), rtol=1e-5)


@both_levels
@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("distance", [0.01, 0.1, 0.5, 2.0])
def test_unbiased_at_every_distance(values, estimator, distance):
    policy = REF + distance * (POLICY - REF)
    found, exact = expected(values(estimator, policy), policy), reverse_kl(policy)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-7)


def test_k2_is_biased_and_only_by_a_higher_order():
    """E[k2] = ½ Σ π (log π/ref)²: another number than KL, whose relative error shrinks with the distance."""
    whole = np.float64(completion_logprobs(POLICY, ALL))
    second_moment = 0.5 * np.sum(np.exp(whole) * (whole - np.float64(REF_WHOLE)) ** 2)
    np.testing.assert_allclose(expected(of_completions(k2, POLICY)), second_moment, rtol=1e-5)
    near = REF + 0.02 * (POLICY - REF)
    errors = [float(expected(of_completions(k2, x), x) / reverse_kl(x) - 1) for x in (POLICY, near)]
    assert abs(errors[0]) > 0.1
    assert abs(errors[1]) < 0.05


def test_elementwise_formulas_and_signs():
    policy, ref = jnp.asarray([-1.0, -2.0, -3.0]), jnp.asarray([-2.0, -2.0, -1.0])
    np.testing.assert_allclose(k1(policy, ref), [1, 0, -2])
    np.testing.assert_allclose(k2(policy, ref), [0.5, 0, 2])
    np.testing.assert_allclose(k3(policy, ref), [np.exp(-1), 0, np.exp(2) - 3], rtol=1e-6)


def test_k3_keeps_its_digits_near_the_reference():
    tiny = jnp.asarray([1e-3, -1e-3, 1e-2])
    np.testing.assert_allclose(k3(tiny, jnp.zeros(3)), tiny**2 / 2 - tiny**3 / 6, rtol=1e-3)


@both_levels
def test_k1_in_the_loss_has_no_gradient(values):
    np.testing.assert_allclose(gradient_in_loss(values, k1), 0, atol=2e-7)


def test_k2_in_the_loss_is_the_gradient_of_reverse_kl():
    np.testing.assert_allclose(gradient_in_loss(of_completions, k2), REVERSE_GRADIENT, **TOLERANCE)


def test_k3_in_the_loss_is_the_gradient_of_forward_kl():
    np.testing.assert_allclose(gradient_in_loss(of_completions, k3), FORWARD_GRADIENT, **TOLERANCE)


def test_token_losses_miss_the_later_prefixes():
    """Summed token by token, k2 is right for the last token's logits and wrong for the earlier ones."""
    found = np.asarray(gradient_in_loss(summed_over_tokens, k2))
    last = num_prefixes(VOCAB, LENGTH - 1)
    np.testing.assert_allclose(found[last:], REVERSE_GRADIENT[last:], **TOLERANCE)
    assert np.abs(found[:last] - REVERSE_GRADIENT[:last]).max() > 0.03


@both_levels
def test_k1_in_the_reward_is_the_gradient_of_reverse_kl(values):
    np.testing.assert_allclose(gradient_in_reward(values, k1), REVERSE_GRADIENT, **TOLERANCE)


def test_shaped_rewards_carry_the_gradient_of_the_objective():
    """E[Σ_t r_t ∇ log π] = ∇(E[score] - kl_coef · KL), through `shape_rewards` itself."""
    scores = jax.random.normal(jax.random.key(2), (len(ALL.tokens),))
    rewards = shape_rewards(scores, logprobs(POLICY, ALL), REF_TOKENS, ALL.mask, kl_coef=0.3)
    total = rewards.sum(axis=1)
    found = jax.grad(lambda policy: expected(total * completion_logprobs(policy, ALL), policy))(POLICY)

    def objective(policy):
        return jnp.sum(jnp.exp(completion_logprobs(policy, ALL)) * scores) - 0.3 * reverse_kl(policy)

    np.testing.assert_allclose(found, jax.grad(objective)(POLICY), **TOLERANCE)


def test_k3_in_the_reward_is_a_difference_of_divergences():
    found = gradient_in_reward(of_completions, k3)
    np.testing.assert_allclose(found, REVERSE_GRADIENT - FORWARD_GRADIENT, **TOLERANCE)


@both_levels
@pytest.mark.parametrize("estimator", [k1, k3])
def test_reward_and_loss_parts_complete_each_other(values, estimator):
    """∇E_π[k] = E[k ∇ log π] + E[∇k], and E_π[k] = KL for an unbiased k."""
    found = gradient_in_reward(values, estimator) + gradient_in_loss(values, estimator)
    np.testing.assert_allclose(found, REVERSE_GRADIENT, **TOLERANCE)


def test_controller_moves_at_most_one_percent_with_the_papers_numbers():
    assert adaptive_kl_coef(0.15, 60.0, num_samples=512) == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    assert adaptive_kl_coef(0.15, 0.0, num_samples=512) == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000))
    assert adaptive_kl_coef(0.15, 60.0, num_samples=512) / 0.15 == pytest.approx(1.01, abs=5e-4)


def test_controller_is_proportional_inside_the_clip():
    found = adaptive_kl_coef(jnp.float32(0.2), jnp.float32(6.6), target=6.0, horizon=100.0, num_samples=50)
    assert found == pytest.approx(0.2 * 1.05, rel=1e-5)
    assert adaptive_kl_coef(0.2, 6.0, target=6.0, num_samples=512) == pytest.approx(0.2)
    assert adaptive_kl_coef(0.2, 5.4, target=6.0, horizon=100.0, num_samples=50) < 0.2


def test_controller_settles_on_its_target():
    """A plant whose KL falls with the coefficient and lags behind it."""

    def step(state, _):
        coef, kl = state
        coef = adaptive_kl_coef(coef, kl, target=6.0, horizon=2000.0, num_samples=512)
        kl = kl + 0.5 * (2.0 / coef - kl)
        return (coef, kl), kl

    for start in (0.15, 0.9):
        first = (jnp.float32(start), jnp.float32(2.0 / start))
        _, history = jax.lax.scan(step, first, None, length=50)
        assert abs(history[0] / 6.0 - 1) > 0.3
        np.testing.assert_allclose(history[-5:], 6.0, rtol=0.15)


def test_controller_refuses_what_its_clip_cannot_bound():
    with pytest.raises(ValueError, match="num_samples / horizon"):
        adaptive_kl_coef(0.15, 6.0, horizon=100.0, num_samples=512)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2():
    new, ref = (jnp.asarray(np.random.default_rng(seed).normal(size=50).astype(np.float32)) for seed in (0, 1))
    np.testing.assert_allclose(k3_straight_through(new, ref), k3(new, ref), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: k3_straight_through(x, ref).sum())(new)
    np.testing.assert_allclose(slope, new - ref, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(slope - jax.grad(lambda x: k3(x, ref).sum())(new)).max()) > 0.5
