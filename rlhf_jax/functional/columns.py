"""A function of whole rows, computed a few columns at a time: for results too large to stand in memory at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Bool, Float, Shaped

from rlhf_jax.functional.checks import check_positive

Leaves: TypeAlias = list[jax.Array]


def map_columns(
    *arrays: Shaped[Array, "B T ..."],
    fn: Callable[..., Float[Array, "B C ..."] | tuple[Float[Array, "B C ..."], ...]],
    num_columns: int,
    mask: Bool[Array, "B T"] | None = None,
) -> Any:
    """`fn(*arrays)` of a function that treats every entry alike, `num_columns` columns at a time.

        out[:, t] = fn(*arrays)[:, t]

    Of `fn`'s intermediate results only one chunk's exist at any time, in the backward pass too, which computes them again
    (Chen et al. 2016, arXiv:1604.06174) and sums the gradients of what `fn` closes over in float32. Columns are cut, not
    rows: rows that lie on several devices stay there, and all devices work on every chunk.

    Args:
      arrays: `[B, T, ...]`.
      fn: `(*[B, C, ...]) -> [B, C, ...]` or a tuple of such, floats; entry (b, t) of the result depends on entry (b, t) of
        the arrays alone. It may close over parameters, through which gradients flow.
      num_columns: most columns of a chunk. Chunks are of one size; the last column is repeated where T is not a multiple.
      mask: `[B, T]`, True where the result is needed; None = everywhere. A chunk without any is not computed, forward or
        backward, and its result is 0 (under `vmap` over masks it is computed and thrown away).

    Returns:
      What `fn` returns, `[B, T, ...]`.

    Raises:
      ValueError: `num_columns` is not positive.
    """
    chex.assert_equal_shape_prefix([*arrays, *([] if mask is None else [mask])], 2)
    check_positive(num_columns=num_columns)
    num_rows, length = arrays[0].shape[:2]
    num_chunks = -(-length // num_columns)
    width = -(-length // num_chunks)

    def cut(x: jax.Array) -> jax.Array:
        missing = [(0, 0), (0, num_chunks * width - length)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, missing, mode="edge")  # values that `fn` has seen: zeros may have no finite gradient
        return jnp.moveaxis(padded.reshape(num_rows, num_chunks, width, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        whole = jnp.moveaxis(x, 0, 1).reshape(num_rows, num_chunks * width, *x.shape[3:])
        return jax.lax.slice_in_dim(whole, 0, length, axis=1)

    # A rule for gradients sees only what it is given: what `fn` closes over becomes an argument.
    chunk = [jax.ShapeDtypeStruct((num_rows, width, *x.shape[2:]), x.dtype) for x in arrays]
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*chunk)

    def of_chunk(closed_over: Leaves, *chunk: jax.Array) -> Leaves:
        return jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed_over))(*chunk)

    needed = jnp.ones(num_chunks, bool) if mask is None else cut(mask).any(axis=(1, 2))
    found = _map_chunks(of_chunk, mask is None, traced.consts, needed, [cut(x) for x in arrays])
    return jax.tree.unflatten(jax.tree.structure(shapes), [join(x) for x in found])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map_chunks(fn: Callable, all_needed: bool, closed_over: Leaves, needed: jax.Array, chunks: Leaves) -> Leaves:
    """`fn(closed_over, *chunk)` of every chunk that is needed, zeros of the others."""

    def step(_: None, chunk: tuple[jax.Array, Leaves]) -> tuple[None, Leaves]:
        is_needed, arrays = chunk
        return None, _if(all_needed, is_needed, lambda: fn(closed_over, *arrays))

    return jax.lax.scan(step, None, (needed, chunks))[1]


def _if(always: bool, condition: jax.Array, compute: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `compute` returns where the condition holds, else `otherwise` (None = zeros)."""
    if always:
        return compute()
    if otherwise is None:
        otherwise = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(condition, compute, lambda: otherwise)


def _forward(fn: Callable, all_needed: bool, closed_over: list, needed: Any, chunks: list) -> tuple[Leaves, tuple]:
    """Nothing is kept but the inputs; of those, the ones that are learned apart."""
    (learned, fixed), (moving, still) = (_by_perturbation(x) for x in (closed_over, chunks))
    found = _map_chunks(fn, all_needed, _merge(learned, fixed), needed.value, _merge(moving, still))
    return found, (learned, fixed, needed.value, moving, still)


def _by_perturbation(inputs: list) -> tuple[list, list]:
    """Values through which a gradient is asked for, and the others; None in the places of each other."""
    chosen = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact) for x in inputs]
    ours = [x.value if yes else None for x, yes in zip(inputs, chosen, strict=True)]
    return ours, [None if yes else x.value for x, yes in zip(inputs, chosen, strict=True)]


def _merge(some: list, others: list) -> Leaves:
    return [other if one is None else one for one, other in zip(some, others, strict=True)]


def _backward(fn: Callable, all_needed: bool, residuals: tuple, cotangents: list) -> tuple[list, None, list]:
    """Chunk by chunk: compute again, pull back, add up what the parameters get."""
    learned, fixed, needed, moving, still = residuals
    used = [i for i, x in enumerate(cotangents) if not isinstance(x, jax.custom_derivatives.SymbolicZero)]

    def step(sums: list, chunk: tuple) -> tuple[list, list]:
        is_needed, moving, still, cotangents = chunk

        def of_used(learned: list, moving: list) -> Leaves:
            found = fn(_merge(learned, fixed), *_merge(moving, still))
            return [found[i] for i in used]

        def pull_back() -> tuple[list, list]:
            to_learned, to_moving = jax.vjp(of_used, learned, moving)[1](cotangents)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, to_learned), to_moving

        return _if(all_needed, is_needed, pull_back, (sums, jax.tree.map(jnp.zeros_like, moving)))

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), learned)
    sums, to_moving = jax.lax.scan(step, sums, (needed, moving, still, [cotangents[i] for i in used]))
    return jax.tree.map(lambda total, x: total.astype(x.dtype), sums, learned), None, to_moving


_map_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
