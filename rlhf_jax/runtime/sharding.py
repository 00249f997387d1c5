"""Where arrays live: a mesh, one table from logical axis names to its axes, and the ways onto it: born there, put there,
moved. One device is a mesh of ones.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name to mesh axis, or to several of them together; None = not split."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

COLUMN_AXIS = "sequence"
"""Mesh axis over which its columns are split."""

DEFAULT_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "batch": BATCH_AXES,
    "lookup": "data",
    "length": COLUMN_AXIS,
}


class Declared(Protocol):
    """An array to come, as `models.parameters.ParamSpec` declares it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical name of every dimension; None is never split."""


def make_mesh(
    *, data: int = -1, fsdp: int = 1, expert: int = 1, sequence: int = 1, tensor: int = 1, devices: list | None = None
) -> Mesh:
    """A mesh with these five axes; one size may be -1: whatever is left of the devices.

    Neighbouring devices are those along the last axis, whose members talk most.

    Args:
      data: copies of the parameters, each with rows of its own.
      fsdp: parts of the parameters and of the optimiser's moments, each with rows of its own.
      expert: parts of the experts.
      sequence: parts of the columns of the batch.
      tensor: parts of heads, MLP width and vocabulary.
      devices: all of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, a process has none of them, or a TPU slice's sides do
        not give them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh axes must be at least 1, at most one of them -1, got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or not (free or known == len(devices)):
        needed = f"a multiple of {known}" if free else str(known)
        raise ValueError(
            f"a mesh of {sizes} needs {needed} devices, there are {len(devices)} in {jax.process_count()} processes. "
            "Fix: other sizes (data=-1 takes what is left), or start the missing processes"
        )
    idle = sorted(set(range(jax.process_count())) - {device.process_index for device in devices})
    if idle:
        raise ValueError(
            f"processes {idle} of {jax.process_count()} have none of the mesh's {len(devices)} devices and would wait for "
            "ever. Fix: a mesh over jax.devices(), or fewer processes"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=axis_types)
    except NotImplementedError as error:
        raise ValueError(
            f"a mesh of {sizes} would split a side of the slice between two axes ({error}). "
            "Fix: every size a product of whole sides of the slice"
        ) from error


def named_shardings(specs: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Tree of `NamedSharding` for a tree of declared arrays (`transformer.param_specs(config)`, `lora.lora_specs(...)`).

    Raises:
      ValueError: a name that the table does not know, a mesh axis that the mesh does not have, two dimensions of one array
        on the same mesh axis, or a dimension that its mesh axis does not divide; with the parameter's path and a fix.
    """

    def place(path: tuple, spec: Declared) -> NamedSharding:
        return NamedSharding(mesh, _partition(jax.tree_util.keystr(path), spec, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, specs, is_leaf=_is_declared)


def _is_declared(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "axes")


def _partition(where: str, spec: Declared, mesh: Mesh, rules: Rules) -> PartitionSpec:
    if not _is_declared(spec) or len(spec.axes) != len(spec.shape):
        raise ValueError(f"{where}: {spec} declares no array with a shape and a name for each of its dimensions")
    mapped = _look_up(where, spec.axes, rules)
    split = [_mesh_axes(axes) for axes in mapped]
    used = [axis for axes in split for axis in axes]
    if not set(used) <= set(mesh.shape):
        raise ValueError(f"{where}: axes {spec.axes} map to {mapped}; the mesh has {tuple(mesh.shape)}")
    if len(used) != len(set(used)):
        raise ValueError(f"{where}: axes {spec.axes} map to {mapped}, two dimensions on one mesh axis")
    for dim, (size, name, axes) in enumerate(zip(spec.shape, spec.axes, split, strict=True)):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{where}: dimension {dim} ({name}) has size {size}, which mesh axis {'+'.join(axes)} of {parts} does not "
                f"divide. Fix: an axis that divides it, or rules={{**DEFAULT_RULES, {name!r}: None}}, which leaves it whole"
            )
    return PartitionSpec(*mapped)


def state_shardings(state: Any, specs: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Tree of `NamedSharding` for a state around parameters: whatever follows a parameter goes where it goes.

    An array of the state follows the parameter whose path is the end of its own (`.opt_state[0].mu['layers']['up']`) and
    whose shape it has. Scalars, and what is kept of a parameter in another shape (factored moments), are whole everywhere.

    Args:
      state: arrays, or their shapes from `jax.eval_shape`.
      specs: the parameters' tree of declared arrays.
      mesh: from `make_mesh`.
      rules: logical axis name to mesh axis.

    Raises:
      ValueError: as `named_shardings`, or an array that is no scalar and no parameter's: it would be whole on every device.
    """
    shardings = named_shardings(specs, mesh, rules)
    declared = jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_declared)
    known = {
        jax.tree_util.keystr(path): (spec.shape, sharding)
        for (path, spec), sharding in zip(declared, jax.tree.leaves(shardings), strict=True)
    }

    def place(path: tuple, leaf: Any) -> NamedSharding:
        ends = (jax.tree_util.keystr(path[start:]) for start in range(len(path) + 1))
        found = next((known[end] for end in ends if end in known), None)
        if found is None and leaf.shape:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} {leaf.shape} belongs to no declared parameter, so that every device would "
                f"hold it whole. Fix: declare it in specs; they know {len(known)} arrays, such as {next(iter(known), None)}"
            )
        return found[1] if found and found[0] == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def init_sharded(init_fn: Callable[..., Any], *args: Any, specs: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """`init_fn(*args)` with every array born in its parts: none is ever whole on a device, unless `rules` say so.

    The numbers are those of `jax.jit(init_fn)(*args)`, on any mesh. Arguments and errors of `state_shardings`;

        init_sharded(lambda key: init_train_state(transformer.init(key, config), optimizer), key, specs=..., mesh=...)
    """
    shardings = state_shardings(jax.eval_shape(init_fn, *args), specs, mesh, rules)
    return jax.jit(init_fn, out_shardings=shardings)(*args)


def constrain_on(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """`constrain(x, axes) -> x` for a model's activations, `TransformerConfig.constrain_fn`: the table applied to them.

    A dimension that its mesh axes do not divide (one token a row, while decoding) is left whole. Equal arguments give the
    same object, so that configs with it are equal.
    """
    return _constrain_on(mesh, tuple(sorted(rules.items())))


@functools.cache
def _constrain_on(mesh: Mesh, rules: tuple) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    table = dict(rules)

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        mapped = _look_up(f"activation {x.shape}", axes, table)
        parts = [math.prod(mesh.shape[axis] for axis in _mesh_axes(mapped_to)) for mapped_to in mapped]
        kept = [to if not size % part else None for to, size, part in zip(mapped, x.shape, parts, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*kept)))

    return constrain


def _look_up(where: str, names: tuple[str | None, ...], rules: Rules) -> list[str | tuple[str, ...] | None]:
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"{where}: no rule for logical axes {unknown}; the table knows {sorted(rules)}")
    return [None if name is None else rules[name] for name in names]


def _mesh_axes(mapped: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (mapped,) if isinstance(mapped, str) else mapped or ()


def reshard(tree: Any, shardings: Any) -> Any:
    """The same arrays in another layout on the same devices, as for generation after training; a copy.

    One program moves them all, so that `count_collectives(jax.jit(lambda x: x, out_shardings=shardings).lower(tree)
    .compile())` tells the bytes.

    Args:
      tree: arrays on a mesh.
      shardings: one for all, or a tree of them, from `named_shardings` or `state_shardings`.
    """
    return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree: Any) -> Any:
    return tree


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put every array of a host batch, the same in every process, on the mesh: rows split, columns too if it says so.

    Columns are the last dimension of the arrays that have most of them (of `[B, T]` and `[B, K, T]` beside `[B]` and
    `[B, K]`). With a sequence axis each device keeps its columns through the network, and attention gathers the keys and
    values of all, unless it is one that sends them round (`models.ring_attention`). The axis is for long rows.

    Raises:
      ValueError: a number of rows that does not divide by the number of row shards, or of columns by the sequence axis.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    length = max((x.shape[-1] for x in jax.tree.leaves(batch) if x.ndim > 1), default=0)
    columns = mesh.shape[COLUMN_AXIS]

    def place_rows(path: tuple, x: Any) -> jax.Array:
        where = f"batch{jax.tree_util.keystr(path)}"
        _check_shared(where, x.shape[0], "rows", parts)
        if columns == 1 or x.ndim < 2 or x.shape[-1] != length:
            return place(x, batch_sharding(mesh))
        _check_shared(where, length, "columns", columns)
        between = (None,) * (x.ndim - 2)
        return place(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *between, COLUMN_AXIS)))

    return jax.tree_util.tree_map_with_path(place_rows, batch)


def _check_shared(where: str, size: int, what: str, parts: int) -> None:
    if size % parts:
        raise ValueError(
            f"{where} has {size} {what}, which {parts} devices cannot share evenly: "
            f"use {size // parts * parts or parts} or {(size // parts + 1) * parts}"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put every array, the same in every process, whole on every device of the mesh."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def place(x: jax.Array | np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put an array there, which may be the devices of several processes; each then hands over its own part only."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
