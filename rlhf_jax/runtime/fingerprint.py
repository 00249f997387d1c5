"""Sixty-four bits that name an array by its bits, whatever mesh, layout or device it lies on.

    h_s = sum_i mix(bits_i ^ mix(i · 0x9e3779b1 + s)) mod 2³²,  s = one of two seeds

`i` is the flat (row-major) place of a 32-bit word in the whole array and `mix` murmur3's finaliser, a bijection: one
changed word always changes both sums, and a sum does not care in which order the devices add. Bits count, not values:
-0.0 is not 0.0, and NaNs with other payloads are other arrays. Not cryptographic: it finds accidents, not forgers.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = 0x9E3779B1
"""2³² over the golden ratio: spreads the places before they are mixed."""

SEEDS = (0x243F6A88, 0x85A308D3)
"""First bits of the fraction of π."""


def fingerprint(tree: Any) -> dict[str, str]:
    """Path → 16 hex digits of every array in `tree`, computed where the array lies. Shapes and dtypes are no part of it.

    Arrays are `jax.Array` or numpy, of any integer, float (float8 to float64), complex or bool dtype. An array of 2³² words
    or more has places that share an index.
    """
    return {name: f"{high:08x}{low:08x}" for name, (high, low, _) in measure(tree).items()}


def short(tree: Any) -> str:
    """Eight hex digits over names, dtypes, shapes and bits: what two people compare in their logs."""
    forms = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(tree)}
    text = "\n".join(f"{name} {forms[name]} {bits}" for name, bits in sorted(fingerprint(tree).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def measure(tree: Any) -> dict[str, tuple[int, int, bool]]:
    """Path → (two 32-bit sums, whether all elements are finite), in one pass over every array."""
    # One after the other: many programs across devices in flight at once can starve the threads of a CPU.
    measured = {name: jax.device_get(_measure_leaf(leaf)) for name, leaf in named_leaves(tree)}
    return {name: (int(high), int(low), not wrong) for name, (high, low, wrong) in measured.items()}


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, `params/layers/0`: dataclass fields, dict keys and tuple places are spelled alike.

    Raises:
      ValueError: two leaves have one spelling (keys "a/b" and "a" → "b").
    """
    named = [
        ("/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves are spelled alike: {', '.join(twice)}; fix: rename a key")
    return named


def _measure_leaf(leaf: jax.Array | np.ndarray) -> tuple[jax.Array, ...]:
    if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize >= 8:  # a device might narrow it
        words = np.ascontiguousarray(leaf).reshape(-1).view(np.uint32)
        return (*_reduce(words, np.zeros(words.shape, bool))[:2], np.sum(~np.isfinite(leaf)))
    return _measure_on_device(leaf)


@jax.jit
def _measure_on_device(x: jax.Array) -> tuple[jax.Array, ...]:
    words = _words(x)
    wrong = jnp.zeros(x.shape, bool)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        wrong = ~jnp.isfinite(x)
    return _reduce(words, jnp.broadcast_to(wrong.reshape(*wrong.shape, *[1] * (words.ndim - wrong.ndim)), words.shape))


@jax.jit
def _reduce(words: jax.Array, wrong: jax.Array) -> tuple[jax.Array, ...]:
    """Both sums of `words` and the number of `wrong`, in one reduction: a CPU takes 20 times longer for three."""
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    places = index * jnp.uint32(GOLDEN)
    parts = (*(_mix(words ^ _mix(places + jnp.uint32(seed))) for seed in SEEDS), wrong.astype(jnp.uint32))
    zeros = (jnp.uint32(0),) * len(parts)
    return jax.lax.reduce(parts, zeros, lambda a, b: tuple(map(jnp.add, a, b)), range(words.ndim))


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32; 64-bit elements become two, the lower first."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits >= 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
