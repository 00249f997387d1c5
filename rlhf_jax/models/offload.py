"""Frozen layers that wait in the host's memory and come to the device one at a time.

    params = jax.device_put(params, on_host(named_shardings(specs, mesh)))             # once
    scores = jax.jit(lambda params, rows: sequence_scores(model, stream(params), *rows))

For what is only read, now and then: reference and reward models, the base of an adapter. A sampler, which reads all layers
for every token, is no such thing.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct

from rlhf_jax.models.lora import MATRICES
from rlhf_jax.types import Params

HOST = "pinned_host"
"""JAX's name of the memory from which a device can copy by itself."""


@struct.dataclass
class Waiting:
    """What stands in the place of a matrix in `params["layers"]`: it comes to the device where it is cast."""

    matrix: Any
    """An array, or `quantize.Quantized`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.matrix.shape

    @property
    def ndim(self) -> int:
        """Of the matrix."""
        return self.matrix.ndim

    def astype(self, dtype: Any) -> jax.Array:
        """The matrix, on the device."""
        return jax.device_put(self.matrix, jax.memory.Space.Device).astype(dtype)


def on_host(shardings: Any) -> Any:
    """The same shardings, with the layers' matrices in the memory of each device's host.

    Embeddings, norms, biases, routers and heads stay on the devices: they are small, or read by rows.

    Args:
      shardings: one for every array of a transformer's params, or of a reward model's, `{"trunk": ..., "head": ...}`.

    Raises:
      ValueError: a device without such a memory, or params without layers.
    """
    return _each_matrix(lambda of_matrix: jax.tree.map(_waiting_sharding, of_matrix), shardings)


def stream(params: Params) -> Params:
    """Inside `jit`: params whose layers come to the device as they run, and again where a backward pass recomputes them.

    The numbers are those of the same arrays on the device; where they are there already, nothing moves.

    Args:
      params: put where `on_host` says. Stacks of models (ensembles) may be under `vmap`.

    Raises:
      ValueError: params without layers.
    """
    return _each_matrix(Waiting, params)


def _waiting_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    device = min(sharding.addressable_devices or sharding.device_set, key=lambda device: device.id)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"{device} ({device.platform}) has memories {kinds}, no {HOST!r}; nothing was moved. Fix: leave the parameters "
            "on the devices, in 8 bits (models.quantize) or in more parts (fsdp) if they are too large"
        )
    return sharding.with_memory_kind(HOST)


def _each_matrix(change: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with every matrix of its layers changed."""
    found = []

    def visit(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        parts = {name: visit(part) for name, part in tree.items()}
        if "layers" in tree:
            found.append(tree)
            parts["layers"] = {name: change(x) if name in MATRICES else x for name, x in tree["layers"].items()}
        return parts

    changed = visit(tree)
    if not found:
        names = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"no params['layers'] in {names}: nothing can wait. Fix: the params of models.transformer")
    return changed
