"""Norms, in float32 whatever they are given."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * scale` over the dimensions of `scale`, in float32, returned in x's dtype."""
    x32, axes = x.astype(jnp.float32), tuple(range(x.ndim - scale.ndim, x.ndim))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return (normed * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis, in float32, returned in x's dtype."""
    x32, leading = x.astype(jnp.float32), range(x.ndim - 1)
    normed = jax.nn.standardize(x32, axis=-1, epsilon=eps)
    return (normed * jnp.expand_dims(scale, leading) + jnp.expand_dims(bias, leading)).astype(x.dtype)
