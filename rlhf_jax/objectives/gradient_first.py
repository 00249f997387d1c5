"""Two losses one after the other, each with its gradient: what the first keeps for its backward pass is gone by then."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params


def gradient_first(
    fn: Callable[[Params, Any], tuple[jax.Array, Any]], params: Params, data: Any, then: Any
) -> tuple[jax.Array, Any, Any]:
    """`(*fn(params, data), then)`, of which `then` waits for the gradient of `fn`.

        total, aux, then = gradient_first(fn, params, data, then)
        loss = total + another(other_params, then)

    Differentiated as one sum, two networks' losses run forward, then backward, and the activations of both lie in memory
    together. Here the backward pass of `fn` is part of the forward pass, and all that is computed from `then` comes after
    it: the peak is that of one, and no number changes. XLA for CPUs goes along where layers are unrolled; for a loop over
    layers it sets up what the loop will keep from the start.

    Args:
      fn: `(params, data) -> (total, aux)`; total is a float scalar, aux a pytree of floats.
      params: pytree of floats; gradients flow to them, in reverse mode (forward mode raises a TypeError).
      data: pytree; no gradient flows to it.
      then: pytree of arrays without which the next loss cannot begin, its tokens for example. Gradients flow through it.

    Returns:
      `(total, aux, then)`; no gradient flows through aux.
    """
    total, aux, done = _with_gradient(fn, params, jax.lax.stop_gradient(data))
    done = jax.lax.stop_gradient(done)
    never = done > done + 1.0  # true of no number, which no compiler knows; that of CPUs orders nothing by a barrier
    then = jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), then)
    return total, jax.lax.stop_gradient(aux), then


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(fn: Callable, params: Params, data: Any) -> tuple[jax.Array, Any, jax.Array]:
    """`(*fn(params, data), done)`, where `done` is a number that is there last."""
    total, aux = fn(params, data)
    return total, aux, total


def _forward(fn: Callable, params: Params, data: Any) -> tuple[tuple[jax.Array, Any, jax.Array], Params]:
    (total, aux), gradient = jax.value_and_grad(fn, has_aux=True)(params, data)
    gradient = jax.lax.optimization_barrier(gradient)
    done = sum(x.ravel()[0].astype(total.dtype) for x in jax.tree.leaves(gradient))
    return (total, aux, done), gradient


def _backward(fn: Callable, gradient: Params, cotangents: tuple[jax.Array, Any, jax.Array]) -> tuple[Params, None]:
    return jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradient), None


_with_gradient.defvjp(_forward, _backward)
