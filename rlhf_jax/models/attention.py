"""Attention: which keys a query sees, and the implementations of the product itself, one function each."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

AttentionFn: TypeAlias = Callable[..., jax.Array]
"""`attend(query [B, T, N, C], key [B, S, G, C], value [B, S, G, C], mask [B, 1, T, S], *, scale) -> [B, T, N, C]`;
N query heads share G key heads, N / G neighbours each."""


def causal_mask(query_segments: jax.Array, key_segments: jax.Array, start: jax.Array) -> jax.Array:
    """`[B, 1, T, S]`: the key is not after the query, of the same segment, and no padding.

    Args:
      query_segments: `[B, T]`, 0 = padding.
      key_segments: `[B, S]`.
      start: the column of the first query among the keys.
    """
    causal = distances(query_segments.shape[1], key_segments.shape[1], start) >= 0
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments[:, None, :] > 0) & causal[None])[:, None]


def distances(num_queries: int, num_keys: int, start: jax.Array) -> jax.Array:
    """`[T, S]`: how many columns the key lies before the query. A sliding window of w keeps those below w."""
    return start + jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :]


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """`softmax(scale * q·k) v` in float32, logits through `softcap * tanh(logits / softcap)` where one is given."""
    groups, heads = key.shape[2], query.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, query.shape[3])
    logits = scale * jnp.einsum("btgnc,bsgc->bgnts", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bgnts,bsgc->btgnc", weights, value)
    return attended.reshape(*attended.shape[:2], heads, attended.shape[4])


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
    """`jax.nn.dot_product_attention` as XLA compiles it: any device, any dtype."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="xla")


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
    """cuDNN's fused kernel: NVIDIA GPUs, bfloat16 or float16, head width a multiple of 8 up to 128."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="cudnn")


def best_for(device: jax.Device, *, dtype: str, head_dim: int) -> AttentionFn:
    """The fastest implementation that `device` has for this dtype and head width. Scripts ask; models do not."""
    half = jnp.dtype(dtype).itemsize == 2
    if (
        device.platform == "gpu"
        and "nvidia" in device.device_kind.lower()
        and half
        and not head_dim % 8
        and head_dim <= 128
    ):
        return cudnn_attention
    return xla_attention
