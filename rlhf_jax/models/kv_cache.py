"""What a transformer keeps of the tokens it has seen: a cache that can be forked, and refilled row by row.

Shapes: L layers, B rows, S columns, G key/value heads, C head width.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far. Every row is written at the same column; after the last comes the first.

    Heads stand before columns: the two products of a decode step then read the cache as it lies.
    """

    keys: jax.Array  # [L, B, G, S, C]
    values: jax.Array  # [L, B, G, S, C]
    segment_ids: jax.Array  # [B, S], 0 where nothing (or padding) is stored
    length: jax.Array  # [], columns written; beyond S the oldest ones are overwritten
    past: "KVCache | None" = None  # of B / K rows: what K neighbours have seen before this, held once


def fork_cache(cache: KVCache, num_branches: int, max_length: int) -> KVCache:
    """`num_branches` neighbouring rows for each of `cache`, which they share, with room for `max_length` tokens more each.

    Raises:
      ValueError: a cache that is forked already.
    """
    if cache.past is not None:
        raise ValueError("this cache is forked already; fix: fork once, into as many branches as are wanted")
    num_layers, num_rows, num_heads, _, width = cache.keys.shape
    empty = jnp.zeros((num_layers, num_rows * num_branches, num_heads, max_length, width), cache.keys.dtype)
    return KVCache(
        keys=empty,
        values=empty,
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
    places = (slice(None), rows[:, None], slice(None), columns[None, :])

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[places].set(jnp.transpose(new, (1, 3, 0, 2, 4)), mode="drop")

    return cache.replace(
        keys=put(cache.keys, fresh.keys),
        values=put(cache.values, fresh.values),
        segment_ids=cache.segment_ids.at[rows].set(segments, mode="drop"),
    )
