"""The flags of a mesh, and what follows from them: where a network's activations, a state and a checkpoint's arrays live.

    python experiments/ppo.py --run runs/mine --mesh.fsdp 4 --mesh.tensor 2

The numbers are those of any other mesh but for the order in which devices add. Without flags every device has its rows
and a copy of everything else.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.experts import experts_on
from rlhf_jax.runtime.sharding import (
    BATCH_AXES,
    COLUMN_AXIS,
    DEFAULT_RULES,
    Rules,
    constrain_on,
    init_sharded,
    make_mesh,
    named_shardings,
    place,
    replicate,
    state_shardings,
)
from rlhf_jax.runtime.topology import abstract


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes share the work; the product is their number, one size may be -1: what is left."""

    data: int = -1
    """Copies of the parameters, each with rows of its own."""
    fsdp: int = 1
    """Parts of the parameters and of the optimiser's moments, each with rows of its own."""
    expert: int = 1
    """Parts of the experts of a mixture."""
    sequence: int = 1
    """Parts of the columns of a batch."""
    tensor: int = 1
    """Parts of heads, MLP width and vocabulary."""
    whole: tuple[str, ...] = ()
    """Logical axes that are not split: `vocab` where the tensor axis does not divide it."""


COPIES = MeshConfig()
"""Every device has everything but the batch, of which it has its rows."""


def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh over the devices of all processes. Raises as `make_mesh`."""
    sizes = {name: size for name, size in vars(config).items() if name != "whole"}
    return make_mesh(**sizes)


def rules_of(config: MeshConfig) -> Rules:
    """The table from logical axes to the mesh's."""
    unknown = sorted(set(config.whole) - set(DEFAULT_RULES))
    if unknown:
        raise SystemExit(f"--mesh.whole {' '.join(unknown)}: nothing was started. Fix: of {', '.join(DEFAULT_RULES)}")
    return {**DEFAULT_RULES, **dict.fromkeys(config.whole)}


def is_split(config: MeshConfig) -> bool:
    """Whether there is more to place than rows: any axis but data has more than one part."""
    return any(size > 1 for name, size in mesh_of(config).shape.items() if name != "data")


def check(config: MeshConfig, *, rows: Mapping[str, int], columns: Mapping[str, int] | None = None) -> None:
    """Refuse in one line, before anything is read or compiled, what cannot be shared evenly.

    Args:
      config: the flags.
      rows: flag to the number of rows that the devices of the data and fsdp axes share.
      columns: flag to the number of columns that those of the sequence axis share.

    Raises:
      SystemExit: the sizes do not fit the number of devices, or do not divide these numbers.
    """
    rules_of(config)
    try:
        mesh = mesh_of(config)
    except ValueError as error:
        raise SystemExit(f"--mesh: {error}") from error
    for axes, sizes, what in ((BATCH_AXES, rows, "rows"), ((COLUMN_AXIS,), columns or {}, "columns")):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        for flag, size in sizes.items():
            if size < 1 or size % parts:
                near = f"{size // parts * parts or parts} or {(size // parts + 1) * parts}"
                raise SystemExit(
                    f"{flag} {size}: {' x '.join(axes)} = {parts} devices cannot share {size} {what} evenly; nothing was "
                    f"started. Fix: {near}, or another --mesh"
                )


def network_on(network: TransformerConfig, config: MeshConfig) -> TransformerConfig:
    """The network with its activations placed, and its experts.

    Raises:
      SystemExit: an axis of the mesh does not divide a dimension of a parameter.
    """
    if not is_split(config):
        return network
    _shardings(config, param_specs(network))
    mesh = mesh_of(config)
    return dataclasses.replace(network, constrain_fn=constrain_on(mesh, rules_of(config)), experts_fn=experts_on(mesh))


def shard_fn(config: MeshConfig) -> Callable[[Any], Any] | None:
    """From specs to shardings, for `huggingface.load`; None for copies, which are put on their devices with the state."""
    return partial(_shardings, config) if is_split(config) else None


def _shardings(config: MeshConfig, specs: Any) -> Any:
    try:
        return named_shardings(specs, mesh_of(config), rules_of(config))
    except ValueError as error:
        raise SystemExit(f"--mesh: {error}; as a flag: --mesh.whole and its name. Nothing was compiled") from error


def like(shapes: Any, specs: Any, config: MeshConfig) -> Any:
    """What `checkpoint.restore` is to make of arrays of these shapes: straight into their parts."""
    if not is_split(config):
        return shapes
    return abstract(shapes, state_shardings(shapes, specs, mesh_of(config), rules_of(config)))


def born(init_fn: Callable[..., Any], *args: Any, specs: Any, config: MeshConfig) -> Any:
    """`init_fn(*args)`, where the mesh splits anything with every array born in its parts."""
    if not is_split(config):
        return init_fn(*args)
    return init_sharded(init_fn, *args, specs=specs, mesh=mesh_of(config), rules=rules_of(config))


def put(state: Any, specs: Any, config: MeshConfig) -> Any:
    """The state on the mesh. What follows a parameter lies where it does, and what lies there already stays; scalars and
    all of a data axis' copies are whole.
    """
    mesh = mesh_of(config)
    if not is_split(config):
        return replicate(state, mesh)
    return jax.tree.map(place, state, state_shardings(state, specs, mesh, rules_of(config)))
