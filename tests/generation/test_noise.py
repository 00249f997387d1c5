"""Noise against JAX's own generator and published answers of Threefry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation.noise import gumbel, threefry_2x32


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, counter, answer):
    """The known answers of Random123 for 20 rounds."""
    words = threefry_2x32(*(tuple(map(jnp.uint32, pair)) for pair in (key, counter)))
    assert tuple(map(int, words)) == answer


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 129)])
def test_noise_is_jaxs_bit_for_bit(shape):
    for key in (jax.random.key(11), jax.random.fold_in(jax.random.key(3), 7), jax.random.PRNGKey(5)):
        for draw in (gumbel, jax.jit(gumbel, static_argnums=1)):
            np.testing.assert_array_equal(draw(key, shape), jax.random.gumbel(key, shape))


def test_under_vmap_every_key_has_its_own():
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.vmap(lambda key: gumbel(key, (4, 6)))(keys)
    np.testing.assert_array_equal(drawn, [jax.random.gumbel(key, (4, 6)) for key in keys])


def test_keys_of_other_generators_are_left_to_jax():
    key = jax.random.key(1, impl="rbg")
    np.testing.assert_array_equal(gumbel(key, (5, 3)), jax.random.gumbel(key, (5, 3)))
