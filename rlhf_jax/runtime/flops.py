"""How much a program multiplies, counted in what JAX traced. XLA's own count takes the body of a loop once."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def matmul_flops(fn: Callable, *args: Any, while_steps: int = 1) -> int:
    """Floating-point operations of all matrix products of `fn(*args)`, on all devices together, nothing run.

        2 · B · M · N · K of every product `[B, M, K] × [B, K, N]`

    Loops count as often as they run and recomputation (`jax.checkpoint`) as what it is; what nobody reads is left out.

    Args:
      fn: traceable; attention written as products, which Pallas kernels are not.
      args: arrays or `jax.ShapeDtypeStruct`s.
      while_steps: how often each `while_loop` runs, which shapes do not say: `max_new_tokens - 1` for `generate`.

    Raises:
      ValueError: a Pallas kernel, whose work its trace does not tell.
    """
    traced = jax.make_jaxpr(fn)(*args).jaxpr
    needed, _ = dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count(needed, while_steps)


def _count(jaxpr: Jaxpr, while_steps: int) -> int:
    return sum(_count_equation(equation, while_steps) for equation in jaxpr.eqns)


def _count_equation(equation: Any, while_steps: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * _sizes(equation.invars[0].aval, contracted)
    if name.startswith("ragged_dot"):
        return _ragged_product(equation)
    if name == "pallas_call":
        raise ValueError("a Pallas kernel cannot be counted; fix: count with attention_fn=xla_attention")
    inner = [_count(jaxpr, while_steps) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    times = {"scan": params.get("length"), "while": while_steps}.get(name, 1)
    return times * sum(inner) * (params["mesh"].size if name == "shard_map" else 1)


def _ragged_product(equation: Any) -> int:
    """Rows of different groups meet different matrices: each row is multiplied once."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    left, right = (x.aval for x in equation.invars[:2])
    used = {*contracted, *batched, *numbers.rhs_group_dimensions}
    return 2 * left.size * _sizes(right, [dim for dim in range(right.ndim) if dim not in used])


def _sizes(array: Any, dims: Any) -> int:
    return math.prod(array.shape[dim] for dim in dims)


def _jaxprs(value: Any) -> list[Jaxpr]:
    parts = value if isinstance(value, tuple | list) else (value,)
    return [
        part.jaxpr if isinstance(part, ClosedJaxpr) else part for part in parts if isinstance(part, ClosedJaxpr | Jaxpr)
    ]
