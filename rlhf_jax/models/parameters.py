"""Parameters declared once: shape, logical axes and initialiser. Init and sharding both derive from this."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params


class ParamSpec(NamedTuple):
    """One array of a model."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical name of every dimension; `runtime.sharding` maps the names to mesh axes."""
    stddev: float | None
    """Standard deviation of a normal initialiser centred on 0; None initialises to ones (norm scales)."""


Specs: TypeAlias = Any
"""A pytree of `ParamSpec`."""


ConstrainFn: TypeAlias = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
"""`constrain(x, axes) -> x`, placed: `runtime.sharding.constrain_on(mesh)`. The axes are logical names, one a dimension."""


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x` itself: the compiler decides where activations live."""
    del axes
    return x


def is_spec(leaf: Any) -> bool:
    """True for the leaves of a `Specs` tree."""
    return isinstance(leaf, ParamSpec)


def init_params(key: jax.Array, specs: Specs) -> Params:
    """Draw every array of `specs` in float32.

    Each array's key is `fold_in(key, hash of its path)`, so adding an array changes no other.
    """

    def draw(path: tuple, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.ones(spec.shape, jnp.float32)
        path_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return spec.stddev * jax.random.normal(path_key, spec.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)


def num_params(params: Params) -> int:
    """How many numbers `params` holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
