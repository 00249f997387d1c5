"""One optimiser step, and several epochs of minibatches over one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.types import Metrics, Objective, Params, TrainState, WeightedMetrics


def init_train_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with fresh optimiser moments."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, num_micro_batches: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Build `train_step(state, batch) -> (state, metrics)`; pure, jit it where the shardings are known.

    Totals and weights are summed over the micro-batches and divided once, so their number changes nothing but memory.
    A non-finite gradient is not applied: the state comes back as it was, and `grad/finite` is 0 for the host to see
    (`runtime.metrics.check_finite` raises).

    Args:
      objective: `(params, batch) -> (total, weight, metrics)`.
      optimizer: any optax transformation.
      num_micro_batches: the leading dimension of every array in the batch is split into so many parts.
    """

    def gradients(params: Params, batch: Any) -> tuple[Params, jax.Array, WeightedMetrics]:
        def total_of(params: Params):
            total, weight, metrics = objective(params, batch)
            return total, (weight, {**metrics, "loss": (total, weight)})

        grads, (weight, metrics) = jax.grad(total_of, has_aux=True)(params)
        return grads, weight, metrics

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if num_micro_batches == 1:
            sums = gradients(state.params, batch)
        else:
            micro_batches = split_leading(batch, num_micro_batches)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(gradients, state.params, jax.tree.map(lambda x: x[0], micro_batches)),
            )

            def accumulate(sums, micro_batch):
                return jax.tree.map(jnp.add, sums, gradients(state.params, micro_batch)), None

            sums, _ = jax.lax.scan(accumulate, zeros, micro_batches)
        grads, weight, metrics = sums
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        proposed = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
        means = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in metrics.items()}
        return state, {**means, "grad/norm": grad_norm, "grad/finite": finite.astype(jnp.float32)}

    return train_step


def update_epochs(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    num_epochs: int,
    num_minibatches: int,
    kl_stop: float | None = None,
) -> tuple[TrainState, Metrics]:
    """Pass `num_epochs` times over `batch` in `num_minibatches` steps each, rows freshly permuted every epoch.

    With `kl_stop` the remaining steps are skipped, in the compiled program, once a step saw a `policy/approxkl_avg` above
    it. A skipped step leaves zeros in the metrics and 0 in `update/taken`, which is 1 for the others.

    Returns the state after `num_epochs * num_minibatches` steps and the metrics, one entry a step
    `[num_epochs * num_minibatches]`.
    """
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    if num_rows % num_minibatches:
        raise ValueError(f"batch of {num_rows} rows does not divide into {num_minibatches} minibatches")
    permutations = [jax.random.permutation(jax.random.fold_in(key, epoch), num_rows) for epoch in range(num_epochs)]
    rows = jnp.stack(permutations).reshape(num_epochs * num_minibatches, num_rows // num_minibatches)

    def step(state: TrainState, chosen: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(state, jax.tree.map(lambda x: x[chosen], batch))

    if kl_stop is None:
        return jax.lax.scan(step, state, rows)

    def take(state: TrainState, chosen: jax.Array) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, chosen)
        return state, {**metrics, "update/taken": jnp.ones(())}

    def skip(state: TrainState, chosen: jax.Array) -> tuple[TrainState, Metrics]:
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(take, state, chosen)[1])

    def step_or_skip(carry: tuple[TrainState, jax.Array], chosen: jax.Array):
        state, stopped = carry
        state, metrics = jax.lax.cond(stopped, skip, take, state, chosen)
        return (state, stopped | (metrics["policy/approxkl_avg"] > kl_stop)), metrics

    (state, _), history = jax.lax.scan(step_or_skip, (state, jnp.zeros((), bool)), rows)
    return state, history


def split_leading(batch: Any, num_parts: int) -> Any:
    """Reshape every `[B, ...]` of the batch to `[num_parts, B / num_parts, ...]`."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % num_parts:
            raise ValueError(f"leading dimension {x.shape[0]} does not divide into {num_parts} parts")
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(split, batch)
