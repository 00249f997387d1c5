"""Machines that are not here: chips, slices of them, and what a program compiled for one of their devices needs."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

GIB = 2**30
HOST_MEMORIES = ("pinned_host", "unpinned_host")
"""What JAX calls the memory of a device's host."""


class Chip(NamedTuple):
    """One chip, as its compiler and its makers describe it."""

    memory: int
    """Bytes of HBM that the compiler gives to programs (libtpu 0.0.42; what is missing to the data sheet is its own)."""
    flops: float
    """Most bfloat16 operations a second."""
    slices: tuple[str, ...]
    """Topologies that can be had, small ones first."""
    joined: bool = False
    """It has two cores, which its compiler must be told to make one device of, as JAX does where the chip is."""


_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, _CUBE, joined=True),
    "v5e": Chip(int(15.75 * GIB), 197e12, _PLANE),
    "v5p": Chip(int(95.74 * GIB), 459e12, _CUBE),
    "v6e": Chip(int(31.25 * GIB), 918e12, _PLANE),
}
"""Speeds, and data sheet sizes of 32, 16, 95 and 32 GB: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e."""


_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU whose metadata could be asked for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the topology is said by name
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several may compile side by side
}
"""What libtpu reads; with these it is silent."""


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a topology, to compile for: `v5e:4x4` of a TPU that need not be here, `cpu:8` of this process.

    A program for a TPU is compiled by `jax.jit(f).lower(...).compile()` with arguments that are `jax.ShapeDtypeStruct`s on a
    mesh of these devices. Nothing can be run there.

    Raises:
      ValueError: no such topology, or more CPU devices than this process has.
      ModuleNotFoundError: the TPU's compiler, the package `libtpu`, is not installed.
    """
    family, _, size = name.partition(":")
    if family == "cpu" and size.isdigit() and int(size):
        devices = jax.devices("cpu")
        if len(devices) < int(size):
            raise ValueError(
                f"{name}: this process has {len(devices)} CPU devices. Fix: "
                f"jax.config.update('jax_num_cpu_devices', {size}) before anything else asks JAX for a device"
            )
        return devices[: int(size)]
    if family not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        raise ValueError(f"no topology {name!r}; {_known()}")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"{name}: the compiler for TPUs is not installed. Fix: pip install 'rlhf_jax[tpu-compiler]'; no TPU is needed"
        )
    for variable, value in _COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if CHIPS[family].joined else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"no topology {name!r} ({error}); {_known()}") from error


def _known() -> str:
    return "known: " + "; ".join(f"{name}:{', '.join(chip.slices)}" for name, chip in CHIPS.items()) + "; cpu:N"


def device_memory(name: str) -> int | None:
    """Bytes that a program may use on each device of a topology; None for CPUs, which share their host's."""
    family = name.partition(":")[0]
    return CHIPS[family].memory if family in CHIPS else None


def device_flops(name: str) -> float | None:
    """Most bfloat16 operations a second of each device of a topology; None for CPUs."""
    family = name.partition(":")[0]
    return CHIPS[family].flops if family in CHIPS else None


def abstract(shapes: Any, shardings: Any) -> Any:
    """Arrays that are not there: anything with `shape` and `dtype`, each with its sharding, to lower a program with."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def device_bytes(arrays: Any) -> int:
    """Bytes of `arrays` (abstract ones will do) on each device, by shapes and shardings; PRNG keys count as nothing."""
    return _bytes(arrays, on_host=False)


def host_bytes(arrays: Any) -> int:
    """Bytes of `arrays` that are in the host's memory instead, for each device."""
    return _bytes(arrays, on_host=True)


def _bytes(arrays: Any, *, on_host: bool) -> int:
    kept = [x for x in jax.tree.leaves(arrays) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    there = [x for x in kept if (x.sharding.memory_kind in HOST_MEMORIES) == on_host]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in there)


class Memory(NamedTuple):
    """Bytes on each device that a compiled program needs, by its compiler."""

    arguments: int
    outputs: int
    """Those that take the place of no donated argument."""
    temporaries: int
    """As allocated, gaps between them included."""
    code: int
    live: int
    """Most that is in use at one moment: what an allocator without gaps would need for all of it."""

    @property
    def total(self) -> int:
        """While it runs, as allocated."""
        return self.arguments + self.outputs + self.temporaries + self.code


def program_memory(compiled: jax.stages.Compiled) -> Memory:
    """What `jax.jit(f).lower(...).compile()` needs on each device."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        live=found.peak_memory_in_bytes,
    )


def wanted_memory(error: jax.errors.JaxRuntimeError) -> int | None:
    """Bytes on each device that a program wanted when its compiler gave up; None if the error says something else."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    sizes = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
    if sizes is None:
        return None
    number, unit = [x for x in sizes.groups() if x]
    return int(float(number) * 1024 ** (" KMGT".index(unit)))
