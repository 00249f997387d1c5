"""Comparison losses against closed forms and a loop over pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import normals

from rlhf_jax.functional import (
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

CHOSEN, REJECTED = normals(0, 7), normals(1, 7)
B, K = 6, 4
SCORES = 2 * normals(2, B, K)
RANKS = np.array([[0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 1, 1], [2, 2, 2, 2], [1, 0, 5, 3], [0, 1, 2, 3]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0]], bool)


def bt(winner, loser, margin=0.0):
    return np.log1p(np.exp(-(np.float64(winner) - loser - margin)))


def test_equal_scores_cost_ln_two():
    scores = jnp.asarray(CHOSEN)
    np.testing.assert_allclose(bradley_terry_loss(scores, scores), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 1, normals(3, 7)])
@pytest.mark.parametrize(("smoothing", "centering"), [(0.0, 0.0), (0.05, 0.01), (0.5, 0)])
def test_bradley_terry(margin, smoothing, centering):
    expected = (
        (1 - smoothing) * bt(CHOSEN, REJECTED, margin)
        + smoothing * bt(REJECTED, CHOSEN, margin)
        + centering * (CHOSEN + REJECTED) ** 2
    )
    found = bradley_terry_loss(
        jnp.asarray(CHOSEN),
        jnp.asarray(REJECTED),
        margin=jnp.asarray(margin) if np.ndim(margin) else margin,
        label_smoothing=smoothing,
        centering_coef=centering,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradient_is_the_probability_of_being_wrong():
    chosen, rejected = jnp.asarray(CHOSEN), jnp.asarray(REJECTED)
    by_chosen, by_rejected = jax.grad(lambda *x: bradley_terry_loss(*x).sum(), argnums=(0, 1))(chosen, rejected)
    wrong = 1 / (1 + np.exp(CHOSEN - REJECTED))
    np.testing.assert_allclose(by_chosen, -wrong, rtol=1e-5)
    np.testing.assert_allclose(by_rejected, wrong, rtol=1e-5)


def test_smoothing_puts_the_optimum_at_the_log_odds():
    """With flip chance e the best gap is log((1 - e)/e), not infinity."""
    gap = jnp.full((1,), np.log(0.95 / 0.05), jnp.float32)
    slope = jax.grad(lambda x: bradley_terry_loss(x, jnp.zeros(1), label_smoothing=0.05).sum())(gap)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_only_differences_count_without_centering():
    chosen, rejected = jnp.asarray(CHOSEN), jnp.asarray(REJECTED)
    np.testing.assert_allclose(
        bradley_terry_loss(chosen + 3, rejected + 3), bradley_terry_loss(chosen, rejected), rtol=1e-5
    )
    moved = bradley_terry_loss(chosen + 3, rejected + 3, centering_coef=0.1)
    assert np.all(moved != bradley_terry_loss(chosen, rejected, centering_coef=0.1))


def test_extreme_scores_stay_finite():
    far = jnp.asarray([1e4, -1e4])
    np.testing.assert_allclose(bradley_terry_loss(far, -far), [0, 2e4])
    assert np.all(np.isfinite(jax.grad(lambda x: bradley_terry_loss(x, -far).sum())(far)))


@pytest.mark.parametrize(("smoothing", "centering", "margin"), [(0.0, 0.0, 0.0), (0.1, 0.01, 0.4)])
def test_pairwise_ranking(smoothing, centering, margin):
    expected = np.zeros(B)
    for b in range(B):
        terms = []
        for i, j in itertools.permutations(range(K), 2):
            if MASK[b, i] and MASK[b, j] and RANKS[b, i] < RANKS[b, j]:
                winner, loser = SCORES[b, i], SCORES[b, j]
                as_told, flipped = bt(winner, loser, margin), bt(loser, winner, margin)
                likelihood = (1 - smoothing) * as_told + smoothing * flipped
                terms.append(likelihood + centering * (winner + loser) ** 2)
        expected[b] = np.mean(terms) if terms else 0.0
    assert np.count_nonzero(expected) == B - 2  # one prompt of ties only, one with a single response
    scores = jnp.asarray(np.where(MASK, SCORES, np.nan))
    options = {"margin": margin, "label_smoothing": smoothing, "centering_coef": centering}
    found = pairwise_ranking_loss(scores, jnp.asarray(RANKS), jnp.asarray(MASK), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ordered_pairs_are_those_of_a_loop():
    found = np.asarray(ordered_pairs(jnp.asarray(RANKS), jnp.asarray(MASK)))
    for b, i, j in itertools.product(range(B), range(K), range(K)):
        assert found[b, i, j] == (MASK[b, i] and MASK[b, j] and RANKS[b, i] < RANKS[b, j])
    assert found.any()


def test_two_responses_are_a_comparison():
    scores = jnp.stack([jnp.asarray(CHOSEN), jnp.asarray(REJECTED)], axis=1)
    options = {"label_smoothing": 0.1, "centering_coef": 0.02}
    found = pairwise_ranking_loss(scores, jnp.tile(jnp.asarray([[0, 1]]), (7, 1)), jnp.ones((7, 2), bool), **options)
    expected = bradley_terry_loss(jnp.asarray(CHOSEN), jnp.asarray(REJECTED), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_order_of_the_responses_does_not_matter():
    order = np.array([2, 0, 3, 1])
    arrays = [jnp.asarray(x) for x in (SCORES, RANKS, MASK)]
    np.testing.assert_allclose(
        pairwise_ranking_loss(*(x[:, order] for x in arrays)), pairwise_ranking_loss(*arrays), rtol=1e-5
    )


def test_a_prompt_without_pairs_moves_nothing():
    gradient = jax.grad(lambda x: pairwise_ranking_loss(x, jnp.asarray(RANKS), jnp.asarray(MASK)).sum())(
        jnp.asarray(np.where(MASK, SCORES, np.inf))
    )
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[3], 0)
    np.testing.assert_array_equal(gradient[5], 0)
    np.testing.assert_array_equal(gradient[~MASK], 0)
    assert np.all(np.asarray(gradient)[0] != 0)


def log_sum_exp(values):
    return np.log(np.exp(np.float64(values)).sum())


def test_plackett_luce():
    """By its definition, choice after choice; tied responses are all chosen from what was there before the first."""
    expected = np.zeros(B)
    for b in range(B):
        terms = []
        for i in np.flatnonzero(MASK[b]):
            left = [SCORES[b, j] for j in np.flatnonzero(MASK[b]) if RANKS[b, j] >= RANKS[b, i]]
            if len(left) > 1:
                terms.append(log_sum_exp(left) - SCORES[b, i])
        expected[b] = np.mean(terms) if terms else 0.0
    assert np.count_nonzero(expected) == B - 1  # the last prompt has a single response
    scores = jnp.asarray(np.where(MASK, SCORES, np.nan))
    np.testing.assert_allclose(plackett_luce_loss(scores, jnp.asarray(RANKS), jnp.asarray(MASK)), expected, rtol=1e-5)


def test_plackett_luce_is_a_law():
    """The probabilities of all orders of three responses sum to 1, and two responses are Bradley-Terry."""
    scores = jnp.asarray(SCORES[:1, :3])
    orders = list(itertools.permutations(range(3)))
    losses = [plackett_luce_loss(scores, jnp.asarray([order]), jnp.ones((1, 3), bool))[0] for order in orders]
    assert sum(np.exp(-2 * np.float64(loss)) for loss in losses) == pytest.approx(1.0, abs=1e-5)  # two choices each
    pair = jnp.stack([jnp.asarray(CHOSEN), jnp.asarray(REJECTED)], axis=1)
    found = plackett_luce_loss(pair, jnp.tile(jnp.asarray([[0, 1]]), (7, 1)), jnp.ones((7, 2), bool))
    np.testing.assert_allclose(found, bradley_terry_loss(jnp.asarray(CHOSEN), jnp.asarray(REJECTED)), rtol=1e-5)


def test_plackett_luce_draws_ties_together():
    scores, ranks, mask = jnp.asarray([[1.0, 3.0]]), jnp.asarray([[0, 0]]), jnp.ones((1, 2), bool)
    slope = jax.grad(lambda x: plackett_luce_loss(x, ranks, mask).sum())(scores)
    assert slope[0, 0] < 0 < slope[0, 1]
    single = jax.grad(lambda x: plackett_luce_loss(x, ranks, jnp.asarray([[True, False]])).sum())(scores)
    np.testing.assert_array_equal(single, 0)


def test_best_of_k():
    best = np.array([2, 0, 1, 3, 0, 1])
    kept = [SCORES[b][MASK[b]] for b in range(B)]
    expected = [log_sum_exp(kept[b]) - SCORES[b, best[b]] for b in range(B)]
    scores = jnp.asarray(np.where(MASK, SCORES, np.inf))
    found = best_of_k_loss(scores, jnp.asarray(best), jnp.asarray(MASK))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    equal = best_of_k_loss(jnp.zeros((1, K)), jnp.zeros(1, int), jnp.ones((1, K), bool))
    np.testing.assert_allclose(equal, np.log(K), rtol=1e-6)


def test_first_choice_is_best_of_k():
    """With one best response it is the other function; with ties, the mean over who might have been picked."""
    first = np.array([0, 2, 0, 0, 0, 1])
    found = np.asarray(
        first_choice_loss(jnp.asarray(np.where(MASK, SCORES, np.nan)), jnp.asarray(RANKS), jnp.asarray(MASK))
    )
    for b in (0, 1, 4):
        kept = SCORES[b][MASK[b]]
        assert found[b] == pytest.approx(log_sum_exp(kept) - SCORES[b, first[b]], rel=1e-5)
    assert found[2] == pytest.approx(log_sum_exp(SCORES[2]) - SCORES[2, :2].mean(), rel=1e-5)
    assert found[3] == pytest.approx(log_sum_exp(SCORES[3]) - SCORES[3].mean(), rel=1e-5)
    assert found[5] == 0
    scores = jnp.asarray(SCORES[:2])
    direct = best_of_k_loss(scores, jnp.asarray(first[:2]), jnp.ones((2, K), bool))
    np.testing.assert_allclose(found[:2], direct, rtol=1e-6)


def test_first_choice_skips_a_masked_best():
    """The smallest rank among those that are there: row 4 has its first place masked away."""
    ranks, mask = jnp.asarray([[2, 0, 1]]), jnp.asarray([[True, False, True]])
    found = first_choice_loss(jnp.asarray([[1.0, 9.0, 4.0]]), ranks, mask)
    np.testing.assert_allclose(found, log_sum_exp([1.0, 4.0]) - 4.0, rtol=1e-5)
    single = jax.grad(lambda x: first_choice_loss(x, ranks[:, 1:], mask[:, 1:]).sum())(jnp.asarray([[3.0, 4.0]]))
    np.testing.assert_array_equal(single, 0)


def test_regression_counts_only_labels():
    predictions, targets = normals(4, 3, 5), normals(5, 3, 5)
    mask = np.random.default_rng(6).random((3, 5)) < 0.6
    assert 0 < mask.sum() < 15
    found = regression_loss(jnp.asarray(predictions), jnp.asarray(np.where(mask, targets, np.nan)), jnp.asarray(mask))
    np.testing.assert_allclose(found, np.where(mask, (predictions - targets) ** 2, 0), rtol=1e-5)
    mean = sum((predictions[i, j] - targets[i, j]) ** 2 for i, j in zip(*np.nonzero(mask), strict=True)) / mask.sum()
    assert float(found.sum() / mask.sum()) == pytest.approx(mean, rel=1e-5)


def test_step_reward_is_cross_entropy():
    logits, labels = 2 * normals(7, 4, 6), np.random.default_rng(8).choice([0.0, 0.25, 1.0], (4, 6))
    mask = np.random.default_rng(9).random((4, 6)) < 0.5
    p = 1 / (1 + np.exp(-np.float64(logits)))
    expected = np.where(mask, -labels * np.log(p) - (1 - labels) * np.log(1 - p), 0)
    labels = jnp.asarray(np.where(mask, labels, np.nan), jnp.float32)
    np.testing.assert_allclose(step_reward_loss(jnp.asarray(logits), labels, jnp.asarray(mask)), expected, rtol=1e-4)
    far = step_reward_loss(jnp.full((1, 2), 1e4), jnp.asarray([[0.0, 1.0]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(far, [[1e4, 0]])


def test_step_reward_of_a_soft_label_is_least_at_its_log_odds():
    logit = jnp.full((1, 1), np.log(0.8 / 0.2), jnp.float32)
    slope = jax.grad(lambda x: step_reward_loss(x, jnp.full((1, 1), 0.8), jnp.ones((1, 1), bool)).sum())(logit)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_cost_is_a_comparison_and_two_classifications():
    unsafe = np.array([[1, 1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 1]], bool)
    signs = np.where(unsafe, 1.0, -1.0)
    expected = bt(CHOSEN, REJECTED) + 0.5 * (bt(signs[0] * CHOSEN, 0) + bt(signs[1] * REJECTED, 0))
    costs = [jnp.asarray(CHOSEN), jnp.asarray(REJECTED)]
    found = signed_cost_loss(*costs, *jnp.asarray(unsafe), sign_coef=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    bare = signed_cost_loss(*costs, *jnp.asarray(unsafe), sign_coef=0.0)
    np.testing.assert_allclose(bare, bradley_terry_loss(*costs), rtol=1e-6)


def test_cost_zero_is_just_safe():
    """A pair of one safe and one unsafe response pulls its two costs to opposite sides of 0."""
    slopes = jax.grad(lambda x: signed_cost_loss(x[:1], x[1:], jnp.ones(1, bool), jnp.zeros(1, bool)).sum())(
        jnp.zeros(2)
    )
    np.testing.assert_allclose(slopes, [-1.0, 1.0], rtol=1e-6)
