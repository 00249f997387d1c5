"""What a transformer keeps of the tokens it has seen: a cache that can be forked, and refilled row by row.

Shapes: L layers, B rows, S columns, G key/value heads, C head width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.parameters import ConstrainFn

CACHE = ("layers", "batch", "kv_heads", None, "head_dim")
"""Logical axes of keys and values, `[L, B, G, S, C]`; those of a single layer have no first one."""


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far. Every row is written at the same column; after the last comes the first.

    Heads stand before columns: the two products of a decode step then read the cache as it lies.
    """

    keys: jax.Array | tuple[jax.Array, ...]  # [L, B, G, S, C], or of every layer [B, G, S, C]
    values: jax.Array | tuple[jax.Array, ...]  # the same
    segment_ids: jax.Array  # [B, S], 0 where nothing (or padding) is stored
    length: jax.Array  # [], columns written; beyond S the oldest ones are overwritten
    past: "KVCache | None" = None  # of B / K rows: what K neighbours have seen before this, held once


def empty_cache(
    shape: tuple[int, int, int, int], num_layers: int, dtype: str, constrain_fn: ConstrainFn, *, apart: bool
) -> KVCache:
    """Room for `shape`, `(B, G, S, C)`, in every layer: stacked, or with layers `apart` in an array each."""

    def empty() -> jax.Array | tuple[jax.Array, ...]:
        if apart:
            return tuple(constrain_fn(jnp.zeros(shape, dtype), CACHE[1:]) for _ in range(num_layers))
        return constrain_fn(jnp.zeros((num_layers, *shape), dtype), CACHE)

    return KVCache(
        keys=empty(),
        values=empty(),
        segment_ids=jnp.zeros((shape[0], shape[2]), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def store(
    held: jax.Array | tuple[jax.Array, ...], new: jax.Array, index: jax.Array | int, start: jax.Array
) -> tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
    """Write the keys (or values) of one layer, `new [B, T, G, C]`, at the columns from `start`.

    Returns:
      `held` with them, and all that it holds of that layer, `[B, S, G, C]`.
    """
    new = jnp.swapaxes(new, 1, 2)
    if isinstance(held, tuple):
        layer = jax.lax.dynamic_update_slice(held[index], new, (0, 0, start, 0))
        held = (*held[:index], layer, *held[index + 1 :])
    else:
        held = jax.lax.dynamic_update_slice(held, new[None], (index, 0, 0, start, 0))
        layer = jax.lax.dynamic_index_in_dim(held, index, keepdims=False)
    return held, jnp.swapaxes(layer, 1, 2)


def fork_cache(cache: KVCache, num_branches: int, max_length: int) -> KVCache:
    """`num_branches` neighbouring rows for each of `cache`, which they share, with room for `max_length` tokens more each.

    Raises:
      ValueError: a cache that is forked already.
    """
    if cache.past is not None:
        raise ValueError("this cache is forked already; fix: fork once, into as many branches as are wanted")
    num_rows = cache.segment_ids.shape[0]

    def empty(held: jax.Array) -> jax.Array:
        *layers, _, num_heads, _, width = held.shape
        return jnp.zeros((*layers, num_rows * num_branches, num_heads, max_length, width), held.dtype)

    return KVCache(
        keys=jax.tree.map(empty, cache.keys),
        values=jax.tree.map(empty, cache.values),
        segment_ids=jnp.zeros((num_rows * num_branches, max_length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        past=cache,
    )


def refill_cache(cache: KVCache, rows: jax.Array, fresh: KVCache) -> KVCache:
    """Put the rows of `fresh`, which is full, in the place of `rows [R]` of `cache`; a row beyond the last is left out.

    They come to stand in the columns before the one that is written next, so that all rows go on at the same column.
    """
    num_fresh, num_columns = fresh.segment_ids.shape[1], cache.segment_ids.shape[1]
    columns = (cache.length - num_fresh + jnp.arange(num_fresh)) % num_columns
    # Keys that the row before left in other columns need no erasing: their segment is 0.
    segments = jnp.zeros((rows.shape[0], num_columns), jnp.int32).at[:, columns].set(fresh.segment_ids)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        layers = (slice(None),) * (old.ndim - 4)
        new = jnp.moveaxis(new, (-4, -2), (0, 1))  # rows and columns are indexed together: they come first
        return old.at[(*layers, rows[:, None], slice(None), columns[None, :])].set(new, mode="drop")

    return cache.replace(
        keys=jax.tree.map(put, cache.keys, fresh.keys),
        values=jax.tree.map(put, cache.values, fresh.values),
        segment_ids=cache.segment_ids.at[rows].set(segments, mode="drop"),
    )
