"""What a loop over tokens need not compute again for every token (loop-invariant code motion)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun


def hoist(body: Callable[[Any], Any], carry: Any) -> Callable[[Any], Any]:
    """`body` of a `while_loop` without what does not depend on the carry: that is computed here, before the loop.

    Weights are cut out of their stack and rounded to the compute dtype once, where XLA repeats it for every token. Only what
    is no larger than what it is made of is moved: whether weights in 8 bits are restored before the loop or in it is left to
    the compiler. The numbers are those of `body`.

    Args:
      body: `carry -> carry`, pure.
      carry: of the shapes that the loop's has; not read.
    """
    closed, shape = jax.make_jaxpr(body, return_shape=True)(carry)
    jaxpr, fixed, once, always = closed.jaxpr, set(closed.jaxpr.constvars), [], []
    for equation in jaxpr.eqns:
        if _worth(equation, fixed):
            fixed.update(equation.outvars)
            once.append(equation)
        else:
            always.append(equation)
    used = {x for inputs in (*(e.invars for e in always), jaxpr.outvars) for x in inputs if isinstance(x, Var)}
    kept = [x for x in dict.fromkeys([*jaxpr.constvars, *(x for e in once for x in e.outvars)]) if x in used]
    constants = _function(jaxpr, once, jaxpr.constvars, kept)(*closed.consts)
    rest = _function(jaxpr, always, [*kept, *jaxpr.invars], jaxpr.outvars)
    return lambda carry: jax.tree.unflatten(jax.tree.structure(shape), rest(*constants, *jax.tree.leaves(carry)))


def _worth(equation: Any, fixed: set) -> bool:
    inputs = [x for x in equation.invars if isinstance(x, Var)]
    if equation.effects or not inputs or not fixed.issuperset(inputs):
        return False
    return _num_bytes(equation.outvars) <= _num_bytes(set(inputs))


def _num_bytes(variables: Iterable[Any]) -> int:
    return sum(x.aval.size * x.aval.dtype.itemsize for x in variables)


def _function(jaxpr: Jaxpr, equations: list, inputs: list, outputs: list) -> Callable[..., list[jax.Array]]:
    """A part of `jaxpr`."""
    part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
    return jaxpr_as_fun(ClosedJaxpr(part, ()))
