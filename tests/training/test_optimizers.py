"""The optimiser against a numpy loop of TensorFlow's formula, the schedule by its corners."""

import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.training.optimizers import linear_anneal, scale_by_adam_unscaled_eps, warmup_cosine


def test_adam_with_tensorflow_eps():
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * 1e-4
    transform = scale_by_adam_unscaled_eps()
    state = transform.init(jnp.zeros(3))
    m = v = np.zeros(3)
    for t, g in enumerate(gradients, start=1):
        update, state = transform.update(jnp.asarray(g), state)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-5)
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_first_step_is_smaller_than_optax():
    """At t = 1 eps weighs 1/sqrt(1 - b2) = 31.6 times more: m̂ / (sqrt(v̂) + 31.6 eps)."""
    gradient = jnp.asarray([1e-4])
    ours = scale_by_adam_unscaled_eps()
    theirs = optax.scale_by_adam(eps=1e-5)
    update, _ = ours.update(gradient, ours.init(gradient))
    other, _ = theirs.update(gradient, theirs.init(gradient))
    np.testing.assert_allclose(update, 1e-4 / (1e-4 + 1e-5 / np.sqrt(1e-3)), rtol=1e-5)
    np.testing.assert_allclose(other, 1e-4 / (1e-4 + 1e-5), rtol=1e-5)


def test_schedules():
    anneal = linear_anneal(0.1, num_iterations=4, steps_per_iteration=2)
    np.testing.assert_allclose(
        [anneal(t) for t in range(8)], [0.1, 0.1, 0.075, 0.075, 0.05, 0.05, 0.025, 0.025], rtol=1e-6
    )
    warm = linear_anneal(0.1, num_iterations=4, steps_per_iteration=2, num_warmup=1)
    np.testing.assert_allclose([warm(t) for t in range(6)], [0.05, 0.05, 0.075, 0.075, 0.05, 0.05], rtol=1e-6)
    cosine = warmup_cosine(1.0, num_steps=100)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(100)], [0.0, 1.0, 0.1], atol=1e-6)
