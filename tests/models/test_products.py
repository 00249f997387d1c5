"""Products whose weight's gradient turns the smaller operand: the numbers of autodiff, and what is turned."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.models import transformer
from rlhf_jax.models.products import gradient_rounded, small_turned
from rlhf_jax.objectives import sft
from rlhf_jax.types import SequenceBatch

EQUATIONS = {
    "btd,df->btf": ((2, 3, 4), (4, 9)),
    "btf,fd->btd": ((2, 3, 9), (9, 4)),
    "btd,dnc->btnc": ((2, 3, 4), (4, 5, 2)),
    "btnc,ncd->btd": ((2, 3, 5, 2), (5, 2, 4)),
    "btd,vd->btv": ((2, 3, 4), (11, 4)),
    "bd,vd->bv": ((3, 4), (11, 4)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equals_autodiff(equation, dtype):
    """Value and gradients up to the order of their sums, in the operands' dtypes."""
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=shape), dtype) for shape in EQUATIONS[equation]]

    def both(product):
        def run(*operands):
            out = product(equation, *operands, preferred_element_type=jnp.float32)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*operands)

    ((_, mine), found), ((_, theirs), expected) = both(small_turned), both(jnp.einsum)
    np.testing.assert_allclose(mine, theirs, atol=1e-6 * np.abs(theirs).max())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=(1e-6 if dtype == "float32" else 2e-2) * np.abs(b).max())


@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_are_of_two_matrices(equation):
    """Forward and backward: nothing is left that a compiler may order anew."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in EQUATIONS[equation]]
    traced = jax.make_jaxpr(jax.grad(lambda *operands: jnp.sin(small_turned(equation, *operands)).sum(), (0, 1)))(
        *shapes
    )
    products = [e for e in _equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {x.aval.ndim for e in products for x in e.invars} == {2}


@pytest.mark.parametrize("equation", ["bd,bdf->bf", "btd,fdn->btfn", "dt,df->tf", "btd,df->bft"])
def test_another_equation_is_refused(equation):
    sizes = dict(zip("bdfnt", (2, 3, 4, 5, 6), strict=True))
    operands = [jnp.ones([sizes[letter] for letter in part]) for part in equation.split("->")[0].split(",")]
    with pytest.raises(ValueError, match="no product of states"):
        small_turned(equation, *operands)


@pytest.mark.parametrize("product", [jnp.einsum, small_turned], ids=["einsum", "small_turned"])
def test_a_rounded_gradient(product):
    """Of logits: the value to the bit; every product is of two bfloat16 operands; gradients near those in float32."""
    equation, shapes = "btd,vd->btv", EQUATIONS["btd,vd->btv"]
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def of(logits_of):
        return lambda *operands: jax.nn.logsumexp(logits_of(*operands), axis=-1).sum()

    def rounded(*operands):
        return gradient_rounded(product, equation, *operands)

    def plain(*operands):
        return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)

    np.testing.assert_array_equal(rounded(*operands), plain(*operands))
    found, exact = jax.grad(of(rounded), (0, 1))(*operands), jax.grad(of(plain), (0, 1))(*operands)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2**-7 * np.abs(b).max())

    def dtypes(logits_of):
        traced = jax.make_jaxpr(jax.grad(of(logits_of), (0, 1)))(*operands).jaxpr
        return {x.aval.dtype.name for e in _equations(traced) if e.primitive.name == "dot_general" for x in e.invars}

    assert dtypes(rounded) == {"bfloat16"}
    assert "float32" in dtypes(plain)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_smaller_operand_comes_first(equation):
    """The first operand of the weight's gradient is the one that XLA's CPU turns."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in EQUATIONS[equation]]
    gradient = jax.grad(lambda states, weight: jnp.sin(small_turned(equation, states, weight)).sum(), 1)
    traced = jax.make_jaxpr(gradient)(*shapes).jaxpr
    products = [e for e in _equations(traced) if e.primitive.name == "dot_general"]
    sizes = [[x.aval.size for x in e.invars] for e in products if shapes[1].size not in [x.aval.size for x in e.invars]]
    assert len(sizes) == 1
    assert sizes[0] == sorted(sizes[0])


def _equations(jaxpr):
    inner = (getattr(x, "jaxpr", None) for e in jaxpr.eqns for x in e.params.values())
    return list(itertools.chain(jaxpr.eqns, *(_equations(x) for x in inner if hasattr(x, "eqns"))))


def test_a_network_learns_the_same():
    """Loss and gradients of all parameters, tied embedding and grouped heads included."""
    rows = tiny.prompts((5, 8, 3), width=8)
    batch = SequenceBatch(rows.tokens, rows.mask.astype(jnp.int32), rows.mask)
    params = tiny.init_params()

    def gradient(config):
        objective = sft(transformer.causal_model(config))
        return jax.jit(jax.value_and_grad(lambda params: objective(params, batch)[0]))(params)

    expected = gradient(tiny.CONFIG)
    found = gradient(dataclasses.replace(tiny.CONFIG, product_fn=small_turned))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
