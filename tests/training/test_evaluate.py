"""Intervals against closed forms; sums over batches are divided once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.generation.generate import generate
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.training.evaluate import (
    evaluate,
    group_win_rate,
    matched_win_rate,
    mean_interval,
    proportion_interval,
    token_kl,
    win_rate,
)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(wins, n, low, high):
    interval = proportion_interval([1] * wins + [0] * (n - wins))
    np.testing.assert_allclose(interval, (wins / n, low, high, n), atol=5e-5)


def test_wilson_bounds_solve_its_equation():
    """|p - bound| = z sqrt(bound (1 - bound) / n), the definition of the score interval."""
    interval = proportion_interval([1] * 7 + [0] * 4)
    for bound in (interval.low, interval.high):
        np.testing.assert_allclose(abs(7 / 11 - bound), 1.959964 * math.sqrt(bound * (1 - bound) / 11), rtol=1e-9)


def test_student():
    """t(2) = 4.3027 and s = 1."""
    np.testing.assert_allclose(mean_interval([1.0, 2.0, 3.0]), (2.0, 2 - 2.48414, 2 + 2.48414, 3), atol=1e-5)
    many = np.random.default_rng(0).normal(size=100_000)
    np.testing.assert_allclose(mean_interval(many).high - many.mean(), 1.96 * many.std() / 100_000**0.5, rtol=1e-3)
    assert str(mean_interval([1.0, 2.0, 3.0])) == "2.000 [-0.484, 4.484]"


def test_a_tie_is_half_a_win():
    assert win_rate([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 2.0])[:2] == proportion_interval([1, 0.5, 0, 0.5])[:2]
    assert win_rate([1.0] * 4, [1.0] * 4).mean == 0.5
    flipped, forward = win_rate([0.0, 1, 3], [1.0, 1, 1]), win_rate([1.0, 1, 1], [0.0, 1, 3])
    np.testing.assert_allclose([1 - forward.mean, 1 - forward.high], [flipped.mean, flipped.low])


def test_only_equal_lengths_are_matched():
    ours, theirs = [1.0, 5.0, 0.0, 2.0], [0.0, 0.0, 1.0, 1.0]
    interval = matched_win_rate(ours, theirs, [3, 9, 4, 4], [3, 2, 4, 4])
    assert interval == proportion_interval([1, 0, 1])
    with pytest.raises(ValueError, match="none of the 2 comparisons has two completions of equal length"):
        matched_win_rate([1.0, 2.0], [0.0, 0.0], [1, 2], [2, 1])
    with pytest.raises(ValueError, match="must pair up"):
        matched_win_rate([1.0, 2.0], [0.0, 0.0], [1, 2], [2])


def test_win_rate_of_groups_is_that_of_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, (20, 3)), rng.integers(0, 4, (20, 2))
    our_sizes, their_sizes = rng.integers(3, 6, (20, 3)), rng.integers(3, 8, (20, 2))
    everything, equal = [], []
    for i in range(20):
        outcomes = [
            ((a > b) + 0.5 * (a == b), n == m)
            for a, n in zip(ours[i], our_sizes[i], strict=True)
            for b, m in zip(theirs[i], their_sizes[i], strict=True)
        ]
        everything.append(np.mean([win for win, _ in outcomes]))
        equal += [np.mean([win for win, same in outcomes if same])] if any(same for _, same in outcomes) else []
    assert 0 < len(equal) < 20
    np.testing.assert_allclose(group_win_rate(ours, theirs), proportion_interval(everything))
    found = group_win_rate(ours, theirs, our_sizes=our_sizes, their_sizes=their_sizes)
    np.testing.assert_allclose(found, proportion_interval(equal))
    one = group_win_rate(ours[:, :1], theirs[:, :1])
    np.testing.assert_allclose(one, win_rate(ours[:, 0], theirs[:, 0]))


def test_token_kl_is_that_of_the_next_tokens_law():
    """The policy against itself: 0. Against another: its mean over samples is k1's, with less noise."""
    policy, other = (tiny.MODEL, tiny.init_params()), (tiny.MODEL, tiny.init_params(5))
    prompts = jax.tree.map(lambda x: jnp.tile(x, (256, 1)), tiny.prompts())

    @jax.jit
    def measured(key):
        options = {"max_new_tokens": 4, "eos_id": tiny.EOS, "pad_id": tiny.PAD, "temperature": 0.7}
        out = generate(*policy, prompts, key, **options)
        exact, none = (
            token_kl(policy, reference, out.tokens, out.segment_ids, temperature=0.7) for reference in (other, policy)
        )
        ref = sequence_token_logprobs(*other, out.tokens, out.segment_ids, temperature=0.7)
        return [jnp.where(out.completion_mask, x, 0.0).sum(axis=1) for x in (exact, out.logprobs - ref, none)]

    exact, sampled, none = (np.float64(x) for x in measured(jax.random.key(0)))
    np.testing.assert_allclose(none, 0, atol=1e-5)
    error = (sampled - exact).std() / len(exact) ** 0.5
    assert abs(exact.mean() - sampled.mean()) < 3 * error < 0.1 * exact.mean()
    assert exact.std() < 0.7 * sampled.std()


def test_token_kl_stands_at_its_token():
    """Entry t is a sum over every token that could stand at t."""
    row, t = jnp.asarray([5, 7, 3, 9]), 2
    rows = jnp.tile(row, (tiny.VOCAB, 1)).at[:, t].set(jnp.arange(tiny.VOCAB))
    models = [(tiny.MODEL, tiny.init_params(seed)) for seed in (0, 5)]

    @jax.jit
    def measured(rows):
        ones = jnp.ones_like(rows)
        return [sequence_token_logprobs(*model, rows, ones)[:, t] for model in models], token_kl(*models, rows, ones)

    (ours, theirs), found = jax.tree.map(np.float64, measured(rows))
    np.testing.assert_allclose(found[0, t], np.sum(np.exp(ours) * (ours - theirs)), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion_interval([]), "one or more numbers"),
        (lambda: proportion_interval([0.5, 1.5]), r"in \[0, 1\]"),
        (lambda: proportion_interval([0.5, math.nan]), r"in \[0, 1\]"),
        (lambda: mean_interval([1.0]), "two or more finite values, got 1 of 1"),
        (lambda: mean_interval([1.0, math.nan, 2.0]), "got 2 of 3"),
        (lambda: win_rate([1.0, 2.0], [1.0]), "must pair up"),
        (lambda: group_win_rate([[1.0]], [[1.0], [2.0]]), r"of the same prompts, got \(1, 1\) and \(2, 1\)"),
        (lambda: group_win_rate([[math.nan]], [[1.0]]), "not finite"),
        (
            lambda: group_win_rate([[1.0]], [[1.0]], our_sizes=[[1]], their_sizes=[[2]]),
            "none of the 1 comparisons has two completions of equal length",
        ),
        (lambda: win_rate([1.0, math.nan], [1.0, 0.0]), "1 of 2 comparisons have a score that is not finite"),
    ],
)
def test_numbers_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluation_sums_and_divides_once():
    """Batches of 1 and 3 kept tokens: the mean is over 4 tokens, not over 2 batches."""

    def objective(params, batch):
        total, weight = (params * batch["x"] * batch["mask"]).sum(), batch["mask"].sum()
        return total, weight, {"nll": (total, weight), "none": (0.0 * total, 0.0 * weight)}

    batches = [
        {"x": jnp.asarray([4.0, 9.0, 9.0]), "mask": jnp.asarray([1.0, 0.0, 0.0])},
        {"x": jnp.asarray([1.0, 2.0, 3.0]), "mask": jnp.ones(3)},
    ]
    evaluation = evaluate(objective)
    assert evaluation(jnp.asarray(2.0), batches) == {"nll": 2.0 * 10.0 / 4.0, "none": 0.0}
    assert evaluation(jnp.asarray(2.0), iter(batches)) == evaluation(jnp.asarray(2.0), batches[::-1])
    with pytest.raises(ValueError, match="no batch was given"):
        evaluation(jnp.asarray(2.0), [])
