"""Hidden states at some columns only: which ones, and by the model's own way to compute no others where it has one."""

import jax
import jax.numpy as jnp

from rlhf_jax.types import Cache, CausalModel, Params, PickFn


def last_columns(number: int) -> PickFn:
    """The last `number` columns of every row."""
    return lambda x: x[:, -number:]


def column_of_row(columns: jax.Array) -> PickFn:
    """One column of each row, `columns [B]`."""

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, columns.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)

    return pick


def hidden_at(
    model: CausalModel,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    pick: PickFn,
    cache: Cache = None,
) -> tuple[jax.Array, Cache]:
    """`model.hidden` at the picked columns, `[B, R, D]`, and the cache with all T tokens appended; see `CausalModel`."""
    if model.hidden_at is not None:
        return model.hidden_at(params, tokens, positions, segment_ids, cache, pick)
    hidden, cache = model.hidden(params, tokens, positions, segment_ids, cache)
    return pick(hidden), cache
