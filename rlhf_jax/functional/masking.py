"""Masks, the one shift in time, and statistics that see only what a mask keeps.

Masks are bool, True = keep. They are applied by selection before any arithmetic, so a NaN or an infinity
outside the mask changes neither a value nor a gradient. Statistics are float32 whatever comes in.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def shift_right(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """Move every entry one position later along axis 1, with a zero entering at position 0.

        out[:, 0] = 0,  out[:, t] = x[:, t-1]

    A causal model's output at position t-1 speaks of token t; this function, and no other code, moves it
    there. What stood at the last position speaks of a token that is not in the row and is dropped.

    Args:
      x: `[B, T, ...]`, any dtype.

    Returns:
      Same shape and dtype.
    """
    no_padding, one_later = (0, 0, 0), (1, -1, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [no_padding, one_later] + [no_padding] * (x.ndim - 2))


def masked_sum(
    x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Sum of the kept entries, `Σ m x`, in float32.

    Args:
      x: any shape and real dtype (bools count 0 and 1).
      mask: same shape as `x`.
      axis: reduced dimensions; None reduces all.

    Returns:
      float32, `x`'s shape without `axis`; 0 where nothing is kept.
    """
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x.astype(jnp.float32), 0.0).sum(axis=axis)


def masked_mean(
    x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Mean of the kept entries, `Σ m x / max(Σ m, 1)`: where nothing is kept it is 0, not NaN.

    To stay exact over micro-batches and devices, losses carry `(masked_sum, count)` and divide once; this
    function is for statistics of data that is all here.

    Args:
      x: any shape and real dtype.
      mask: same shape as `x`.
      axis: reduced dimensions; None reduces all.

    Returns:
      float32, `x`'s shape without `axis`.
    """
    return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis=axis), 1).astype(jnp.float32)


def masked_var(x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"], *, unbiased: bool = False) -> Float[Array, ""]:
    """Variance of all kept entries, `Σ m (x - mean)² / max(Σ m, 1)`, the population's unless told otherwise.

    lm-human-preferences whitens by this variance (`core.py`); TRL by the unbiased one, n/(n-1) times as large.

    Args:
      x: any shape and real dtype.
      mask: same shape as `x`.
      unbiased: divide by n - 1 (Bessel's correction) in place of n.

    Returns:
      float32 scalar; 0 when nothing is kept, or, with `unbiased`, a single entry.
    """
    centred = jnp.where(mask, x.astype(jnp.float32), 0.0) - masked_mean(x, mask)
    if not unbiased:
        return masked_mean(jnp.square(centred), mask)
    return masked_sum(jnp.square(centred), mask) / jnp.maximum(mask.sum() - 1, 1).astype(jnp.float32)


def masked_whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True, unbiased: bool = False
) -> Float[Array, "*shape"]:
    """Rescale the kept entries to unit variance and, unless told otherwise, to mean 0.

        (x - mean) · rsqrt(var + 1e-8)  [+ mean]      inside the mask, 0 outside

    One mean and one variance over all kept entries (lm-human-preferences `core.py: whiten`).

    Args:
      x: any shape.
      mask: same shape as `x`.
      shift_mean: True for advantages; False, which adds the mean back, for rewards (Ziegler et al. 2019),
        whose sign carries meaning.
      unbiased: as in `masked_var`: False in lm-human-preferences, True in TRL.

    Returns:
      float32, same shape. Kept entries that are all equal become 0 (or the mean), to rounding.
    """
    kept = jnp.where(mask, x.astype(jnp.float32), 0.0)
    mean = masked_mean(x, mask)
    whitened = (kept - mean) * jax.lax.rsqrt(masked_var(x, mask, unbiased=unbiased) + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def last_true_index(mask: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Column of the last True of every row.

    Args:
      mask: `[B, T]`, True anywhere: holes and padding on either side are fine.

    Returns:
      int32 `[B]`. A row without any True gives 0, a legal index: where such rows can occur, pair the result
      with `mask.any(axis=1)`.
    """
    chex.assert_rank(mask, 2)
    columns = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    return jnp.where(mask, columns, 0).max(axis=1)


def positions_from_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every token inside its own segment, counting real tokens only, from 0.

        position[t] = #{real s <= t} - #{real s <= start of t's segment}

    so padding on the left, on the right or in the middle of a segment leaves the positions of the real
    tokens as in the unpadded row, and every sequence of a packed row starts again at 0. Cost: O(T), a sum
    and a maximum along the row.

    Args:
      segment_ids: `[B, T]`, 0 = padding; real tokens carry 1, 2, 3, ... non-decreasing along the row.

    Returns:
      int32 `[B, T]`. Padding gets the position of the last real token before it (0 when there is none): a
      legal index of a position table, and otherwise without meaning.
    """
    chex.assert_rank(segment_ids, 2)
    real = segment_ids > 0
    # Number, among the row's real tokens, of the latest one so far (-1 before the first).
    index = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    starts = real & (segment_ids > shift_right(jax.lax.cummax(segment_ids, axis=1)))
    start_index = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return jnp.maximum(index - start_index, 0)
