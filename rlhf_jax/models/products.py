"""Products of hidden states with weights, and how their gradients are taken: one function each, of the same numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

ProductFn: TypeAlias = Callable[..., jax.Array]
"""`product(equation, states, weight, preferred_element_type=None)`, as `jnp.einsum`."""


def small_turned(equation: str, states: jax.Array, weight: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum`, whose weight's gradient turns the smaller of states and gradient: for training on CPUs.

    `dW = states^T · gradient` contracts over tokens, for which XLA's CPU writes one of the two anew, tokens last. By
    autodiff that is always the gradient, `[tokens, F]` of a matrix `[D, F]`, and with it all that was fused into it; here
    it is whichever is smaller, and what is turned back is a matrix. Same products, sums in an order of their own.
    Reverse mode only.

    Args:
      equation: of two operands, each letter once in each, no ellipsis.
      states: `[..., D]`, one dimension or more of tokens.
      weight: of any two or more dimensions.
      preferred_element_type: of the result.
    """
    return _product(equation, preferred_element_type, states, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gradient_rounded(product: ProductFn, equation: str, states: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` to float32 of operands in 16 bits, whose gradient is rounded to 16 bits before it is multiplied.

    Autodiff would multiply the float32 gradient by operands made float32 again, on a GPU in TF32, at half the rate or less.
    For logits: their gradient, `p - 1[token]`, keeps the 8 bits of every other gradient in such a network.

    Args:
      product: as `jnp.einsum`.
      equation, states, weight: its operands; both of one dtype.
    """
    return product(equation, states, weight, preferred_element_type=jnp.float32)


def _rounded_forward(product: ProductFn, equation: str, states: jax.Array, weight: jax.Array):
    return gradient_rounded(product, equation, states, weight), (states, weight)


def _rounded_backward(product: ProductFn, equation: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    _, transposed = jax.vjp(partial(product, equation), *saved)
    return transposed(gradient.astype(saved[0].dtype))


gradient_rounded.defvjp(_rounded_forward, _rounded_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: Any, states: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(equation, states, weight, preferred_element_type=dtype)


def _forward(equation: str, dtype: Any, states: jax.Array, weight: jax.Array):
    return _product(equation, dtype, states, weight), (states, weight)


def _backward(equation: str, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    states, weight = saved
    operands, out = equation.split("->")
    of_states, of_weight = operands.split(",")
    to_states = jnp.einsum(f"{out},{of_weight}->{of_states}", gradient, weight)
    pair = [(of_states, states), (out, gradient)]
    (turned, small), (other, large) = pair if states.size <= gradient.size else pair[::-1]
    tokens = [letter for letter in turned if letter not in of_weight]
    contracted = tuple(tuple(map(letters.index, tokens)) for letters in (turned, other))
    found = [letter for letter in turned + other if letter not in tokens]
    dtype = jnp.result_type(small, large)
    to_weight = jax.lax.dot_general(small.astype(dtype), large.astype(dtype), (contracted, ((), ())))
    # Without the barrier XLA would take the turn of the matrix into the product, and turn the larger operand after all.
    to_weight = jax.lax.optimization_barrier(to_weight)
    turned_back = jnp.transpose(to_weight, [found.index(letter) for letter in of_weight])
    return to_states.astype(states.dtype), turned_back.astype(weight.dtype)


_product.defvjp(_forward, _backward)
