"""Direct methods against numpy in float64, their identities, and the optimum that their papers claim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functional.ragged import MASK, B, T, normals

from rlhf_jax.functional import (
    bradley_terry_loss,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    mean_logprobs,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)

N = 7
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (-5 + 2 * normals(seed, N) for seed in range(4))
PAIRS = [jnp.asarray(x) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
H = np.float64(CHOSEN) - REF_CHOSEN - (np.float64(REJECTED) - REF_REJECTED)


def nls(x):
    """-log σ(x)."""
    return np.log1p(np.exp(-np.float64(x)))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.1), (2.0, 0.5)])
def test_dpo(beta, smoothing):
    expected = (1 - smoothing) * nls(beta * H) + smoothing * nls(-beta * H)
    np.testing.assert_allclose(dpo_loss(*PAIRS, beta=beta, label_smoothing=smoothing), expected, rtol=1e-5)


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen, rejected, ref_chosen, ref_rejected = PAIRS
    implicit = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
    np.testing.assert_allclose(dpo_loss(*PAIRS, beta=0.3), bradley_terry_loss(*implicit), rtol=1e-5)


def test_dpo_starts_at_ln_two_whatever_the_reference():
    np.testing.assert_allclose(dpo_loss(PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1]), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.4])
def test_robust_dpo_is_unbiased_under_flips(flip_rate):
    """The mean over labels flipped at that rate is the loss of the true labels."""
    chosen, rejected, ref_chosen, ref_rejected = PAIRS
    options = {"beta": 0.5, "flip_rate": flip_rate}
    right = robust_dpo_loss(*PAIRS, **options)
    flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    expected = (-(1 - flip_rate) * -nls(0.5 * H) + flip_rate * -nls(-0.5 * H)) / (1 - 2 * flip_rate)
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((1 - flip_rate) * right + flip_rate * flipped, dpo_loss(*PAIRS, beta=0.5), rtol=1e-4)


def test_ipo():
    np.testing.assert_allclose(ipo_loss(*PAIRS, beta=0.2), (H - 2.5) ** 2, rtol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_kto(kl):
    desirable = np.arange(N) % 3 > 0
    gap = np.float64(CHOSEN) - REF_CHOSEN - kl
    expected = np.where(desirable, 1.2 * (1 - 1 / (1 + np.exp(-0.5 * gap))), 0.7 * (1 - 1 / (1 + np.exp(0.5 * gap))))
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    found = kto_loss(PAIRS[0], PAIRS[2], jnp.asarray(desirable), kl=kl, beta=0.5, **weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kto_baseline_is_a_mean_from_zero_on_and_data():
    found = kto_baseline(PAIRS[0], PAIRS[2])
    np.testing.assert_allclose(found, max(0.0, float(np.mean(CHOSEN - REF_CHOSEN))), rtol=1e-5)
    other = kto_baseline(PAIRS[2], PAIRS[0])
    np.testing.assert_allclose(other, max(0.0, float(np.mean(REF_CHOSEN - CHOSEN))), rtol=1e-5)
    assert {float(found) > 0, float(other) > 0} == {True, False}

    def loss(logprobs):
        kl = kto_baseline(logprobs, jnp.zeros(N))
        return kto_loss(logprobs, PAIRS[2], jnp.ones(N, bool), kl=kl).sum()

    held = jax.grad(lambda x: kto_loss(x, PAIRS[2], jnp.ones(N, bool), kl=kto_baseline(-PAIRS[0], jnp.zeros(N))).sum())
    np.testing.assert_allclose(jax.grad(loss)(-PAIRS[0]), held(-PAIRS[0]), rtol=1e-6)


def test_orpo():
    p_chosen, p_rejected = (np.exp(np.float64(x)) for x in (CHOSEN, REJECTED))
    odds_ratio = p_chosen / (1 - p_chosen) / (p_rejected / (1 - p_rejected))
    expected = -np.float64(CHOSEN) + 0.3 * nls(np.log(odds_ratio))
    np.testing.assert_allclose(orpo_loss(PAIRS[0], PAIRS[1], beta=0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(orpo_loss(PAIRS[0], PAIRS[1], beta=0.0), -CHOSEN, rtol=1e-6)
    of_the_odds = orpo_loss(PAIRS[0], PAIRS[1], beta=0.3, nll_coef=0.0)
    np.testing.assert_allclose(of_the_odds, 0.3 * nls(np.log(odds_ratio)), rtol=1e-5)


def test_orpo_survives_certainty():
    """A greedy-like completion has log p = 0 to rounding."""
    value, gradients = jax.value_and_grad(lambda *x: orpo_loss(*x).sum(), argnums=(0, 1))(jnp.zeros(1), -jnp.ones(1))
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_simpo():
    expected = nls(2.5 * (np.float64(CHOSEN) - REJECTED) - 0.7)
    np.testing.assert_allclose(simpo_loss(PAIRS[0], PAIRS[1], beta=2.5, margin=0.7), expected, rtol=1e-5)


def test_cpo():
    nll = -0.1 * CHOSEN
    expected = nls(0.2 * (np.float64(CHOSEN) - REJECTED)) + 0.5 * nll
    np.testing.assert_allclose(cpo_loss(PAIRS[0], PAIRS[1], jnp.asarray(nll), beta=0.2, nll_coef=0.5), expected, 1e-5)
    uniform = jnp.zeros(N)
    without = cpo_loss(PAIRS[0], PAIRS[1], uniform, beta=0.2)
    np.testing.assert_allclose(without, dpo_loss(PAIRS[0], PAIRS[1], uniform, uniform, beta=0.2), rtol=1e-6)


def test_mean_logprobs():
    x = normals(4, B, T)
    expected = [row[keep].mean() if keep.any() else 0.0 for row, keep in zip(x, MASK, strict=True)]
    np.testing.assert_allclose(mean_logprobs(jnp.asarray(x), jnp.asarray(MASK)), expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("loss_fn", [dpo_loss, ipo_loss], ids=lambda function: function.__name__)
def test_the_minimum_is_the_tilted_reference(loss_fn, beta):
    """Over ten outcomes and all pairs with their exact preferences the minimiser is known.

    DPO with Bradley-Terry labels: ref exp(r/β)/Z. IPO: the same with the mean preference against ref in place of r.
    """
    num = 10
    ref = jax.nn.log_softmax(jnp.asarray(normals(8, num)))
    reward = np.float64(normals(9, num))
    prefers = 1 / (1 + np.exp(-(reward[:, None] - reward[None, :])))
    first, second = (x.ravel() for x in np.meshgrid(np.arange(num), np.arange(num), indexing="ij"))
    p_ref = np.exp(np.float64(ref))
    weight = jnp.asarray((p_ref[first] * p_ref[second] * prefers[first, second]).astype(np.float32))

    def loss(table):
        logprobs = jax.nn.log_softmax(table)
        return jnp.vdot(weight, loss_fn(logprobs[first], logprobs[second], ref[first], ref[second], beta=beta))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 3000))

    def step(carry, _):
        table, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(table), moments)
        return (optax.apply_updates(table, updates), moments), None

    (table, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=3000))(ref)
    tilt = reward if loss_fn is dpo_loss else prefers @ p_ref
    best = p_ref * np.exp(tilt / beta)
    np.testing.assert_allclose(jax.nn.softmax(table), best / best.sum(), atol=2e-3)
