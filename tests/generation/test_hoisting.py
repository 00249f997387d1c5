"""What is computed before a loop: all that does not depend on the carry and is no larger than what it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from rlhf_jax.generation.generate import generate
from rlhf_jax.generation.hoisting import hoist


def equations(fn, *args):
    """Primitives of the body of the only loop of `fn`, inner programs included."""
    (loop,) = [e for e in jax.make_jaxpr(fn)(*args).eqns if e.primitive.name == "while"]

    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in [x for x in equation.params.values() if hasattr(x, "jaxpr")]:
                yield from names(inner.jaxpr)

    return set(names(loop.params["body_jaxpr"].jaxpr))


def test_constants_leave_the_loop_and_the_numbers_stay():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)
    codes = jnp.asarray([[1, -2, 3, 4]], jnp.int8)

    def run(stack, codes, hoisted):
        def body(carry):
            step, x = carry["step"], carry["x"]
            x = jnp.tanh(x @ stack[1].astype(jnp.bfloat16).astype(jnp.float32) + codes.astype(jnp.float32))
            return {"step": step + 1, "x": x}

        carry = {"x": jnp.ones((2, 4)), "step": jnp.zeros((), jnp.int32)}
        return jax.lax.while_loop(lambda c: c["step"] < 3, hoist(body, carry) if hoisted else body, carry)["x"]

    x = np.ones((2, 4))
    for _ in range(3):
        x = np.tanh(x @ np.asarray(stack[1].astype(jnp.bfloat16), np.float64) + np.asarray(codes, np.float64))
    np.testing.assert_allclose(run(stack, codes, True), x, rtol=1e-5)
    plain, rest = (equations(lambda *x, hoisted=hoisted: run(*x, hoisted), stack, codes) for hoisted in (False, True))
    assert {"slice", "squeeze"} <= plain
    assert plain - rest == {"slice", "squeeze"}, "what grows (int8 and bfloat16 to float32) is made in the loop"


def test_effects_stay_in_the_loop_and_what_is_only_carried_passes():
    seen, fixed = [], jnp.zeros(3)

    def body(carry):
        step, other, _ = carry
        jax.debug.callback(lambda fixed: seen.append(fixed), fixed)
        return step + 1, other, True

    def run(other):
        carry = (jnp.zeros((), jnp.int32), other, False)
        return jax.lax.while_loop(lambda c: c[0] < 4, hoist(body, carry), carry)

    step, other, ran = jax.jit(run)(jnp.arange(3.0))
    jax.block_until_ready(step)
    jax.effects_barrier()
    assert (int(step), bool(ran), len(seen)) == (4, True, 4)
    np.testing.assert_array_equal(other, np.arange(3.0))


def test_a_decode_step_cuts_no_weights_out_of_their_stack():
    """In the loop over tokens no array of all layers is read, in float32 or rounded."""
    prompts, key = tiny.prompts(), jax.random.key(0)
    params = tiny.init_params()

    def run(params):
        options = {"max_new_tokens": 3, "eos_id": tiny.EOS, "pad_id": tiny.PAD}
        return generate(tiny.MODEL, params, prompts, key, **options)

    (loop,) = [e for e in jax.make_jaxpr(run)(params).eqns if e.primitive.name == "while"]
    stacked = {x.shape for x in jax.tree.leaves(params["layers"]) if x.ndim > 2}
    assert len(stacked) == 5
    assert not stacked & {x.aval.shape for x in loop.invars}
