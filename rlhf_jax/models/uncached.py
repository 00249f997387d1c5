"""Any module as a causal model: decode by running the whole row again, for networks that offer no cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.types import CausalModel, Params


@struct.dataclass
class TokenCache:
    """The inputs seen so far, `[B, S]` each."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array  # [], columns written


def uncached_model(
    apply_fn: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array],
    unembed_fn: Callable[[Params, jax.Array], jax.Array],
) -> CausalModel:
    """Wrap `apply_fn(params, tokens, positions, segment_ids) -> hidden [B, T, D]`, for example a Flax module's.

    Works with every function of the library; each decoded token costs a forward over the whole row.
    """

    def init_cache(batch_size: int, max_length: int) -> TokenCache:
        empty = jnp.zeros((batch_size, max_length), jnp.int32)
        return TokenCache(empty, empty, empty, jnp.zeros((), jnp.int32))

    def hidden(params, tokens, positions, segment_ids, cache=None):
        if cache is None:
            return apply_fn(params, tokens, positions, segment_ids), None

        def append(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, cache.length))

        cache = TokenCache(
            tokens=append(cache.tokens, tokens),
            positions=append(cache.positions, positions),
            segment_ids=append(cache.segment_ids, segment_ids),
            length=cache.length + tokens.shape[1],
        )
        states = apply_fn(params, cache.tokens, cache.positions, cache.segment_ids)
        start = cache.length - tokens.shape[1]
        return jax.lax.dynamic_slice_in_dim(states, start, tokens.shape[1], axis=1), cache

    return CausalModel(hidden=hidden, unembed=unembed_fn, init_cache=init_cache)
