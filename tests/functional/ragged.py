"""Random arrays under masks of every shape of padding, shared by the tests of this folder."""

import jax.numpy as jnp
import numpy as np

MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1],  # full
        [0, 0, 0, 1, 1, 1, 1, 1],  # padded on the left
        [0, 1, 1, 1, 0, 0, 0, 0],  # on both sides
        [0, 1, 0, 0, 1, 1, 0, 1],  # with holes
        [0, 0, 0, 0, 0, 0, 0, 0],  # empty
        [0, 0, 0, 0, 0, 0, 1, 0],  # one token
    ],
    dtype=bool,
)
B, T = MASK.shape


def normals(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def poisoned(x: np.ndarray, mask: np.ndarray = MASK) -> jnp.ndarray:
    """`x` with NaN and infinities wherever the mask is False."""
    poison = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), x.shape)
    return jnp.asarray(np.where(mask, x, poison))
