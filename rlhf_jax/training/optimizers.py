"""The optimiser of the original RLHF code, and its learning-rate anneal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamMoments(NamedTuple):
    """First and second moments of Adam and the number of updates they have seen."""

    count: jax.Array
    first: optax.Updates
    second: optax.Updates


def scale_by_adam_unscaled_eps(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-5
) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 computes it: `sqrt(1 - b2^t) / (1 - b1^t) · m / (sqrt(v) + eps)`.

    eps is added to the *uncorrected* second moment, so at t = 1 it weighs `1 / sqrt(1 - b2)` = 31.6 times more than in
    `optax.scale_by_adam` (Kingma & Ba 2015, end of §2). lm-human-preferences was tuned with this placement (eps 1e-5); the
    other one is more aggressive during the first updates.
    """

    def init(params: optax.Params) -> AdamMoments:
        first, second = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamMoments(jnp.zeros((), jnp.int32), first, second)

    def update(grads, moments: AdamMoments, params=None):
        del params
        count = moments.count + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments.first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), moments.second, grads)
        rate = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        scaled = jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), first, second)
        return scaled, AdamMoments(count, first, second)

    return optax.GradientTransformation(init, update)


def linear_anneal(
    learning_rate: float, *, num_iterations: int, steps_per_iteration: int = 1, num_warmup: int = 0
) -> optax.Schedule:
    """From `learning_rate` linearly to 0 over iterations, constant within one (lm-human-preferences `train_policy.py`).

    Iteration i of the first `num_warmup` is scaled by `(i + 1) / (num_warmup + 1)`: Adam's first step is `learning_rate`
    on every parameter, whatever the gradient's noise.
    """

    def schedule(count: jax.Array) -> jax.Array:
        iteration = count // steps_per_iteration
        warmup = jnp.minimum((iteration + 1) / (num_warmup + 1), 1.0)
        return learning_rate * warmup * (1.0 - iteration / num_iterations)

    return schedule


def ppo_optimizer(
    learning_rate: float | optax.Schedule, *, eps: float = 1e-5, max_grad_norm: float = 1.0
) -> optax.GradientTransformation:
    """Global-norm clipping, then Adam with TensorFlow's eps placement."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        scale_by_adam_unscaled_eps(eps=eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam_optimizer(
    learning_rate: float | optax.Schedule, *, max_grad_norm: float = 1.0
) -> optax.GradientTransformation:
    """Global-norm clipping, then Adam: for supervised fine-tuning and reward models."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate))


def warmup_cosine(learning_rate: float, *, num_steps: int, warmup_fraction: float = 0.05) -> optax.Schedule:
    """Linear warm-up over the first `warmup_fraction` of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, int(warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=warmup, decay_steps=max(num_steps, warmup + 1), end_value=0.1 * learning_rate
    )
