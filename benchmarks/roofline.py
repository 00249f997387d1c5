"""How near a measured time is to this machine's limits: what the program multiplies and must move, at rates measured here.

Multiplications are those of the traced program's matrix products (`rl.matmul_flops`), needed or not; bytes are the arrays
that must be read and written at least once, counted from shapes: no activation, no gradient inside a layer. A phase takes
the longer of the two times, phases follow one another, and `fraction` is how much of the measured time that bound is.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Phase(NamedTuple):
    """A part of the work in which products and traffic overlap."""

    flops: float
    bytes: float


class Rates(NamedTuple):
    """What the machine does in a second."""

    flops: float
    bytes: float


def seconds(run: Callable[[], object]) -> float:
    """Wall time until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def machine(dtype: Any = jnp.float32, *, side: int = 2048, mebibytes: int = 256) -> Rates:
    """FLOP/s of products of random `[side, side]`, bytes/s read and written by passes in place: best of five calls."""
    matrix = (jax.random.normal(jax.random.key(0), (side, side)) * side**-0.5).astype(dtype)
    array = jnp.ones((mebibytes << 18,))
    # Several in one call: the passes in one buffer, for new pages would cost more than the pass.
    products = jax.jit(lambda x, y: jax.lax.fori_loop(0, 4, lambda i, x: x @ y, x))
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda i, x: x + 1.0, x))
    jax.block_until_ready((products(matrix, matrix), passes(array)))
    flops = 4 * 2 * side**3 / min(seconds(lambda: products(matrix, matrix)) for _ in range(5))
    return Rates(flops, 8 * 2 * array.nbytes / min(seconds(lambda: passes(array)) for _ in range(5)))


def num_bytes(arrays: Any) -> int:
    """Of all arrays; plain numbers are none."""
    return sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    )


def bound(phases: dict[str, Phase], rates: Rates) -> float:
    """Seconds that these products and bytes take at those rates."""
    return sum(max(phase.flops / rates.flops, phase.bytes / rates.bytes) for phase in phases.values())


def line(phases: dict[str, Phase], rates: Rates, step_seconds: float) -> dict[str, float]:
    """What a task reports of it."""
    return {
        "gflop": round(sum(phase.flops for phase in phases.values()) / 1e9, 2),
        "gbyte": round(sum(phase.bytes for phase in phases.values()) / 1e9, 3),
        "machine_gflops": round(rates.flops / 1e9, 1),
        "machine_gbytes": round(rates.bytes / 1e9, 1),
        "bound_s": round(bound(phases, rates), 4),
        "fraction": round(bound(phases, rates) / step_seconds, 3),
    }
