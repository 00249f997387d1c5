"""Where arrays live: a mesh, and one table from logical axis names to its axes. One device is a mesh of ones."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | None]
"""Logical axis name to mesh axis, None = replicated."""

DEFAULT_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": None,
}

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor; one size may be -1: whatever is left of the devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh axes must be at least 1, at most one of them -1, got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or not (free or known == len(devices)):
        needed = f"a multiple of {known}" if free else str(known)
        raise ValueError(f"a mesh of {sizes} needs {needed} devices, there are {len(devices)}")
    if free:
        sizes[free[0]] = len(devices) // known
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=axis_types)


def named_shardings(axes: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Tree of `NamedSharding` for a tree of logical axis names (tuples, as `models.parameters.logical_axes` gives).

    Raises:
      ValueError: a name that the table does not know, or two dimensions of one array on the same mesh axis.
    """

    def place(path: tuple, names: tuple[str | None, ...]) -> NamedSharding:
        where = jax.tree_util.keystr(path)
        unknown = [name for name in names if name is not None and name not in rules]
        if unknown:
            raise ValueError(f"{where}: no rule for logical axes {unknown}; the table knows {sorted(rules)}")
        mapped = [None if name is None else rules[name] for name in names]
        used = [axis for axis in mapped if axis is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"{where}: axes {names} map to {mapped}, two dimensions on one mesh axis")
        return NamedSharding(mesh, PartitionSpec(*mapped))

    return jax.tree_util.tree_map_with_path(place, axes, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put every array of a host batch, the same in every process, on the mesh, rows split.

    Raises:
      ValueError: a leading dimension that does not divide by the number of row shards.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def place_rows(path: tuple, x: Any) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {x.shape[0]} rows, which {parts} devices cannot share evenly: "
                f"use {x.shape[0] // parts * parts or parts} or {(x.shape[0] // parts + 1) * parts}"
            )
        return place(x, batch_sharding(mesh))

    return jax.tree_util.tree_map_with_path(place_rows, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put every array, the same in every process, whole on every device of the mesh."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def place(x: jax.Array | np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put an array there, which may be the devices of several processes; each then hands over its own part only."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
