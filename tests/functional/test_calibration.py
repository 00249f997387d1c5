"""Temperature against scipy's minimiser, calibration error against a loop, length against numpy's least squares."""

import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import normals
from scipy.optimize import minimize_scalar

from rlhf_jax.functional import expected_calibration_error, fit_log_length, fit_temperature, remove_length

N = 4000
GAPS = 2 * normals(0, N)


def outcomes(temperature, seed=1):
    chance = 1 / (1 + np.exp(-GAPS / temperature))
    return (np.random.default_rng(seed).random(N) < chance).astype(np.float32)


@pytest.mark.parametrize("true", [0.3, 1.0, 5.0])
def test_temperature_is_the_minimum_of_the_likelihood(true):
    labels = outcomes(true)
    labels[:200] = 0.5  # ties

    def loss(log_temperature):
        gaps = GAPS.astype(np.float64) / np.exp(log_temperature)
        return np.mean(labels * np.logaddexp(0, -gaps) + (1 - labels) * np.logaddexp(0, gaps))

    best = minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-8}).x
    found = fit_temperature(jnp.asarray(GAPS), jnp.asarray(labels))
    np.testing.assert_allclose(found, np.exp(best), rtol=1e-3)


def test_temperature_comes_back_from_its_own_samples():
    np.testing.assert_allclose(fit_temperature(jnp.asarray(GAPS), jnp.asarray(outcomes(2.5))), 2.5, rtol=0.1)


def test_temperature_turns_with_the_scores():
    """Scores three times as large need three times the temperature, and predict the same."""
    labels = jnp.asarray(outcomes(1.0))
    one, three = (fit_temperature(factor * jnp.asarray(GAPS), labels) for factor in (1, 3))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-3)


@pytest.mark.parametrize(("sign", "bound"), [(1, 0.01), (-1, 50.0)])
def test_temperature_of_separable_labels_is_a_bound(sign, bound):
    labels = jnp.asarray((sign * GAPS > 0).astype(np.float32))
    found = fit_temperature(jnp.asarray(GAPS), labels, low=0.01, high=50.0)
    np.testing.assert_allclose(found, bound, rtol=1e-3)


def naive_error(p, y, num_bins):
    total = 0.0
    for b in range(num_bins):
        low, high = 0.5 + b / num_bins / 2, 0.5 + (b + 1) / num_bins / 2
        confidence, hit = np.maximum(p, 1 - p), np.where(p > 0.5, y, 1 - y)
        inside = (confidence >= low) & ((confidence < high) | (b == num_bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return total


@pytest.mark.parametrize("num_bins", [1, 7, 10])
def test_calibration_error_is_a_loop_over_bins(num_bins):
    p = 1 / (1 + np.exp(-np.float64(GAPS)))
    y = outcomes(3.0)
    found = expected_calibration_error(jnp.asarray(p, jnp.float32), jnp.asarray(y), num_bins=num_bins)
    np.testing.assert_allclose(found, naive_error(p, y, num_bins), rtol=0.01)
    assert found > 0.1


def test_calibration_error_does_not_depend_on_who_is_called_first():
    p, y = 1 / (1 + np.exp(-GAPS)), outcomes(1.0)
    swap = np.random.default_rng(2).random(N) < 0.5
    found = expected_calibration_error(jnp.asarray(p), jnp.asarray(y))
    swapped = expected_calibration_error(jnp.asarray(np.where(swap, 1 - p, p)), jnp.asarray(np.where(swap, 1 - y, y)))
    np.testing.assert_allclose(found, swapped, atol=1e-4)
    all_chosen = expected_calibration_error(jnp.asarray(np.where(y > 0, p, 1 - p)), jnp.ones(N))
    np.testing.assert_allclose(found, all_chosen, atol=1e-4)


def test_a_fitted_temperature_calibrates():
    gaps, labels = jnp.asarray(GAPS), jnp.asarray(outcomes(3.0))
    temperature = fit_temperature(gaps, labels)
    before = expected_calibration_error(1 / (1 + jnp.exp(-gaps)), labels)
    after = expected_calibration_error(1 / (1 + jnp.exp(-gaps / temperature)), labels)
    assert after < 0.03 < 0.1 < before


def test_certainty_that_is_always_right_or_a_coin():
    sure = jnp.ones(4)
    np.testing.assert_allclose(expected_calibration_error(sure, jnp.ones(4)), 0)
    np.testing.assert_allclose(expected_calibration_error(sure, jnp.zeros(4)), 1)
    np.testing.assert_allclose(expected_calibration_error(sure / 2, jnp.asarray([0.0, 1, 1, 1])), 0)


LENGTHS = np.random.default_rng(3).integers(1, 200, N)


def test_length_is_least_squares():
    scores = 0.7 * np.log(LENGTHS) - 2 + normals(4, N)
    slope, intercept = fit_log_length(jnp.asarray(scores, jnp.float32), jnp.asarray(LENGTHS))
    expected = np.polyfit(np.log(LENGTHS), scores, 1)
    np.testing.assert_allclose([slope, intercept], expected, rtol=1e-3)


def test_what_is_left_knows_no_length_and_keeps_what_is_no_length():
    quality = normals(5, N)
    scores = jnp.asarray(1.5 * np.log(LENGTHS) + quality, jnp.float32)
    slope, intercept = fit_log_length(scores, jnp.asarray(LENGTHS))
    left = np.asarray(remove_length(scores, jnp.asarray(LENGTHS), slope=slope, intercept=intercept))
    assert abs(np.corrcoef(np.asarray(scores), np.log(LENGTHS))[0, 1]) > 0.7
    assert abs(np.corrcoef(left, np.log(LENGTHS))[0, 1]) < 1e-3
    assert abs(left.mean()) < 1e-4
    assert np.corrcoef(left, quality)[0, 1] > 0.999


def test_equal_lengths_have_no_slope():
    slope, intercept = fit_log_length(jnp.asarray([1.0, 2.0, 6.0]), jnp.asarray([12, 12, 12]))
    np.testing.assert_allclose([slope, intercept], [0.0, 3.0], rtol=1e-6)
