"""Products of hidden states with weights, and how their gradients are taken: one function each, of the same numbers."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

ProductFn: TypeAlias = Callable[..., jax.Array]
"""`product(equation, states, weight, preferred_element_type=None)`, as `jnp.einsum`."""


def small_turned(equation: str, states: jax.Array, weight: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum` as a product of two matrices, whose weight's gradient turns the smaller of states and gradient: for CPUs.

    `dW = states^T · gradient` contracts over tokens, for which XLA's CPU writes one of the two anew, tokens last. By
    autodiff that is always the gradient, `[tokens, F]` of a matrix `[D, F]`, and with it all that was fused into it; here
    it is whichever is smaller, and what is turned back is a matrix. Of more than two dimensions XLA sums in an order of its
    own, for which it may turn a weight in every call; matrices stay as they lie. Same products, sums in another order.
    Reverse mode only.

    Args:
      equation: of two operands, each letter once in each, no ellipsis: of the states tokens, then what is summed, which
        begins or ends the weight; of the result tokens, then the rest of the weight.
      states: `[..., D]`, one dimension or more of tokens.
      weight: of any two or more dimensions.
      preferred_element_type: of the result.

    Raises:
      ValueError: another equation.
    """
    operands, out = equation.split("->")
    of_states, of_weight = operands.split(",")
    tokens = of_states.rstrip(of_weight)
    summed = of_states[len(tokens) :]
    rest = of_weight.removeprefix(summed) if of_weight.startswith(summed) else of_weight.removesuffix(summed)
    if not summed or len(rest) + len(summed) != len(of_weight) or out != tokens + rest:
        raise ValueError(
            f"{equation!r} is no product of states, tokens first, with a weight that begins or ends with what is summed; "
            "fix: jnp.einsum"
        )
    axis = 0 if of_weight.startswith(summed) else 1
    rows = states.reshape(-1, math.prod(states.shape[len(tokens) :]))
    matrix = weight.reshape((rows.shape[1], -1) if axis == 0 else (-1, rows.shape[1]))
    product = _product(axis, preferred_element_type, rows, matrix)
    sizes = dict(zip(of_weight, weight.shape, strict=True))
    return product.reshape(*states.shape[: len(tokens)], *(sizes[letter] for letter in rest))


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
def _product(axis: int, dtype: Any, rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """`[N, D]` times `[D, F]` (axis 0) or `[F, D]` (axis 1): `[N, F]`."""
    return _contract(rows, matrix, 1, axis, dtype)


def _contract(left: jax.Array, right: jax.Array, of_left: int, of_right: int, dtype: Any = None) -> jax.Array:
    return jax.lax.dot_general(left, right, (((of_left,), (of_right,)), ((), ())), preferred_element_type=dtype)


def _forward(axis: int, dtype: Any, rows: jax.Array, matrix: jax.Array):
    return _product(axis, dtype, rows, matrix), (rows, matrix)


def _backward(axis: int, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    rows, matrix = saved
    wide = jnp.result_type(rows, gradient)
    to_rows = _contract(gradient, matrix.astype(wide), 1, 1 - axis)
    states_first = rows.size <= gradient.size
    turned, other = (rows, gradient) if states_first else (gradient, rows)
    to_matrix = _contract(turned.astype(wide), other.astype(wide), 0, 0)
    # Without the barrier XLA would take the turn of the matrix into the product, and turn the larger operand after all.
    to_matrix = jax.lax.optimization_barrier(to_matrix)
    to_matrix = to_matrix if states_first == (axis == 0) else to_matrix.T
    return to_rows.astype(rows.dtype), to_matrix.astype(matrix.dtype)


_product.defvjp(_forward, _backward)
