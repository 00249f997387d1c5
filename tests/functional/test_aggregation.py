"""Three ways from losses per token to one number, against loops over ragged rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import constant_length_mean, sequence_mean, token_mean

LOSSES = normals(0, B, T)
ROWS = [row[keep].astype(np.float64) for row, keep in zip(LOSSES, MASK, strict=True)]
FULL = [row for row in ROWS if row.size]


def loss(aggregate, losses=None, mask=MASK, **options):
    total, weight = aggregate(poisoned(LOSSES) if losses is None else losses, jnp.asarray(mask), **options)
    return float(total / weight)


def test_token_mean_weighs_tokens():
    np.testing.assert_allclose(loss(token_mean), np.concatenate(ROWS).mean(), rtol=1e-5)


def test_sequence_mean_weighs_completions():
    np.testing.assert_allclose(loss(sequence_mean), np.mean([row.mean() for row in FULL]), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 7.5])
def test_constant_length_mean_divides_all_alike(length):
    expected = np.mean([row.sum() / length for row in FULL])
    np.testing.assert_allclose(loss(constant_length_mean, length=length), expected, rtol=1e-5)


def test_rows_of_equal_length_make_them_equal():
    everywhere, losses = np.ones((B, T), bool), jnp.asarray(LOSSES)
    expected = loss(token_mean, losses, everywhere)
    np.testing.assert_allclose(loss(sequence_mean, losses, everywhere), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(constant_length_mean, losses, everywhere, length=T), expected, rtol=1e-5)
