"""Laws of tokens computed in chunks, against the plain form: values, gradients and what is computed at all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals

from rlhf_jax.functional import chunked_token_laws, map_columns, token_laws

D, V = 4, 7
HIDDEN, MATRIX = jnp.asarray(normals(0, B, T, D)), jnp.asarray(normals(1, V, D))
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)))
SEEN = jnp.asarray(MASK & (np.arange(T) > 0))
WEIGHTS = [jnp.asarray(normals(seed, B, T)) for seed in (2, 3)]


def product(matrix, states):
    return jnp.einsum("...d,vd->...v", states, matrix, preferred_element_type=jnp.float32)


def capped(matrix, states):
    return 3 * jnp.tanh(product(matrix, states) / 3)


def normed(matrix, states):
    """Zeros have no gradient here."""
    return product(matrix, states / jnp.linalg.norm(states, axis=-1, keepdims=True))


def impossible(matrix, states):
    return product(matrix, states).at[..., 0].set(-jnp.inf)


def rounded(matrix, states):
    return product(matrix.astype(jnp.bfloat16), states.astype(jnp.bfloat16))


def total(laws, mask=SEEN):
    """Every entry of the two differentiable results with a weight of its own; all three results beside it."""
    kept = [jnp.where(mask, x, 0) for x in laws]
    return sum(jnp.vdot(w, x) for w, x in zip(WEIGHTS, kept, strict=False)), kept


def plain(unembed, matrix, hidden, temperature=1.0):
    return total(token_laws(unembed(matrix, hidden), TOKENS, temperature=temperature))


def chunked(unembed, matrix, hidden, temperature=1.0, *, chunk_size, mask=SEEN):
    options = {"unembed": partial(unembed, matrix), "chunk_size": chunk_size, "mask": mask}
    return total(chunked_token_laws(hidden, TOKENS, temperature=temperature, **options))


def with_gradients(form, *arguments):
    argnums = tuple(range(len(arguments)))
    return jax.jit(jax.value_and_grad(form, argnums=argnums, has_aux=True))(*arguments)


def assert_close(found, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize(
    ("unembed", "chunk_size", "mask"),  # one column at a time; chunks that do not divide
    [(product, 1, SEEN), (normed, 3 * B, None), (capped, 3 * B, SEEN), (rounded, 3 * B, SEEN)],
)
def test_values_and_gradients_are_those_of_the_plain_form(unembed, chunk_size, mask):
    """In the matrix, the states and the temperature."""
    arguments = (MATRIX, HIDDEN, jnp.float32(0.7))
    expected = with_gradients(partial(plain, unembed), *arguments)
    slack = {"rtol": 2e-2, "atol": 2e-2} if unembed is rounded else {}  # a chunk's gradient is rounded to bfloat16
    found = with_gradients(partial(chunked, unembed, chunk_size=chunk_size, mask=mask), *arguments)
    assert_close(found, expected, **slack)


def test_impossible_tokens_are_as_in_the_plain_form():
    expected = with_gradients(partial(plain, impossible), MATRIX, HIDDEN)
    found = with_gradients(partial(chunked, impossible, chunk_size=2 * B), MATRIX, HIDDEN)
    (_, values), gradients = found
    assert np.isneginf(values[0]).any()
    assert np.isfinite(values[1]).all()
    np.testing.assert_array_equal(values[0], expected[0][1][0])
    assert_close(gradients, expected[1])


def test_one_chunk_has_the_bits_of_the_plain_form():
    found = jax.jit(partial(chunked, product, chunk_size=B * T))(MATRIX, HIDDEN)[1]
    expected = jax.jit(partial(plain, product))(MATRIX, HIDDEN)[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_not_differentiated_is_not_pulled_back():
    """Log-probs alone: the backward pass has no entropy in it, and nothing is added up for a matrix that is frozen."""

    def loss(matrix, hidden):
        laws = chunked_token_laws(hidden, TOKENS, unembed=partial(product, matrix), chunk_size=B)
        return laws.logprobs.sum()

    of_states = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(MATRIX, HIDDEN))
    of_both = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(MATRIX, HIDDEN))
    assert of_states.count("dot_general") + 1 == of_both.count("dot_general")


@pytest.mark.parametrize("transform", ["jit of grad", "grad of jit", "checkpoint", "vmap"])
def test_under_every_transformation(transform):
    """`unembed` closes over traced floats and integers: a matrix of codes with a scale, and a table of outputs."""
    codes, table = jnp.round(20 * MATRIX).astype(jnp.int8), jnp.arange(V)[::-1]

    def loss(form, codes, table, scale, hidden):
        def unembed(scale, states):
            return product(codes.astype(jnp.float32) * scale, states)[..., table]

        return form(unembed, scale, hidden)[0]

    def gradient(form):
        function = partial(loss, form)
        if transform == "checkpoint":
            function = jax.checkpoint(function)
        if transform == "grad of jit":
            function = jax.jit(function)
        gradient = jax.grad(function, argnums=(2, 3))
        if transform == "vmap":
            gradient = jax.vmap(gradient, in_axes=(None, None, 0, 0))
            return jax.jit(gradient)(codes, table, jnp.asarray([0.05, 0.1]), jnp.stack([HIDDEN, 2 * HIDDEN]))
        gradient = gradient if transform == "grad of jit" else jax.jit(gradient)
        return gradient(codes, table, jnp.float32(0.05), HIDDEN)

    assert_close(gradient(partial(chunked, chunk_size=3 * B)), gradient(plain), rtol=1e-4, atol=1e-5)


def test_gradients_of_narrow_parameters_are_summed_in_float32():
    """256 chunks of one sign: two roundings of 2^-9 are allowed; a running sum in bfloat16 has one a chunk."""
    hidden, tokens = jnp.asarray(abs(normals(5, 1, 256, D))), jnp.zeros((1, 256), jnp.int32)
    matrix = MATRIX.astype(jnp.bfloat16)

    @jax.jit
    def gradient(matrix):
        def unembed(matrix, states):
            return product(matrix.astype(jnp.float32), states)

        def loss(matrix):
            laws = chunked_token_laws(hidden, tokens, unembed=partial(unembed, matrix), chunk_size=1)
            return laws.logprobs.sum()

        return jax.grad(loss)(matrix)

    exact, found = np.asarray(gradient(matrix.astype(jnp.float32))), gradient(matrix)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2.0**-8, atol=0)


def test_chunks_without_a_token_that_counts_are_not_computed():
    """Their states may be NaN: no result and no gradient sees them."""
    mask = jnp.asarray(np.arange(T)[None] >= np.array([[4], [5], [4], [6], [7], [4]]))
    states = HIDDEN.at[:, :3].set(jnp.nan)  # column t - 1 speaks of token t: chunks of two columns begin at 0, 2, 4
    options = {"chunk_size": 2 * B, "mask": mask}
    (_, values), gradients = with_gradients(partial(chunked, product, **options), MATRIX, states)
    (_, expected), slopes = with_gradients(partial(chunked, product, **options), MATRIX, HIDDEN)
    jax.tree.map(np.testing.assert_array_equal, values, expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, slopes)
    assert np.abs(slopes[0]).max() > 0.1


def test_any_function_of_entries():
    """Several arrays, results of any rank; the chunks are of three columns, of which the last is too long."""
    x, y = jnp.asarray(normals(7, B, T, 2)), jnp.asarray(normals(8, B, T))
    shift = jnp.float32(0.5)

    def fn(x, y):
        assert x.shape == (B, 3, 2)
        return jnp.sin(x) * y[..., None] + shift, jnp.cos(y)

    found = map_columns(x, y, fn=fn, num_columns=3)
    np.testing.assert_allclose(found[0], np.sin(x) * np.asarray(y)[..., None] + 0.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], np.cos(y), rtol=1e-6)
