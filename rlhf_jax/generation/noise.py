"""Gumbel noise whose random bits are computed where they are used: the numbers of `jax.random.gumbel`, in one pass.

For CPUs JAX compiles its generator as a loop over arrays that a single core writes and reads five times; of a decode step
of a small network that is a tenth. Here it is plain arithmetic, which XLA fuses with the logarithms and spreads over cores.
"""

import math

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two random words of 32 bits for every counter: Threefry-2x32 of 20 rounds (Salmon et al. 2011).

    Args:
      key: two uint32, of any shape that broadcasts.
      counter: two uint32, the upper half of a number of 64 bits first.
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    first, second = counter[0] + words[0], counter[1] + words[1]
    for group in range(1, 6):
        for turn in _ROTATIONS[(group - 1) % 2]:
            first = first + second
            second = first ^ (second << turn | second >> 32 - turn)
        first = first + words[group % 3]
        second = second + words[(group + 1) % 3] + jnp.uint32(group)
    return first, second


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`-log(-log(u))` of uniform u, float32 of `shape`: bit for bit `jax.random.gumbel(key, shape)`.

    It is that function for keys of another generator than Threefry, and where the shape counts beyond 32 bits.

    Args:
      key: consumed.
      shape: of the result.
    """
    size = math.prod(shape)
    if str(jax.random.key_impl(key)) != "threefry2x32" or size >= 1 << 32 or not jax.config.jax_threefry_partitionable:
        return jax.random.gumbel(key, shape, jnp.float32)
    words = jax.random.key_data(key)
    count = jax.lax.iota(jnp.uint32, size).reshape(shape)
    first, second = threefry_2x32((words[0], words[1]), (jnp.zeros_like(count), count))
    # 23 bits are the mantissa of a number in [1, 2).
    fraction = jax.lax.bitcast_convert_type((first ^ second) >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    least = jnp.finfo(jnp.float32).tiny
    return -jnp.log(-jnp.log(jnp.maximum(fraction * (1.0 - least) + least, least)))
